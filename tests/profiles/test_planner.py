import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_edge.profiles.boards.hardware import (
    HardwareProfile,
    Int8Isa,
    load_profile,
    parse_profile,
    profile_names,
)
from llava_edge.profiles.errors import BudgetError, RequestError
from llava_edge.profiles.memory.distributed import Parallelism, parallelisms
from llava_edge.profiles.models.variants import find_variant, load_variants
from llava_edge.profiles.plan import DeploymentPlan
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.profiles.planner import CONTEXT_STEP, nearest_fit, plan_deployment

KEYS = [
    *("profile", "variant", "precision", "vision_precision", "grid", "max_tiles"),
    "max_image_tokens",
    *("context_tokens", "engine", "memory", "predicted", "fits", "rejected"),
]
SIZE = {v.name: v.parameters for v in load_variants()}


@cache
def shipped(name: str) -> DeploymentPlan:
    """Plans of shipped boards are asked for by several tests."""
    return plan_deployment(load_profile(name)).plan


def gpu(memory: int) -> HardwareProfile:
    return parse_profile(f'kind = "cuda"\nmemory = {memory}', "gpu")


def ask(variant: str, **wishes: object) -> PlanRequest:
    return PlanRequest(variants=(find_variant(variant),), **wishes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", profile_names())
def test_every_board_gets_a_plan_whose_terms_add_up(name: str) -> None:
    plan = shipped(name)
    document = plan.to_json()
    memory = document["memory"]
    terms = [
        count
        for key, count in memory.items()
        if key.endswith("_bytes") and key not in ("total_bytes", "budget_bytes")
    ]
    assert plan.fits
    assert sum(terms) == memory["total_bytes"] <= memory["budget_bytes"]
    assert memory["budget_bytes"] == load_profile(name).budget_bytes
    assert list(document) == KEYS
    assert set(document["predicted"]) == {"decode_tokens_per_second", "ttft_seconds"}
    for rejected in document["rejected"]:
        assert set(rejected) == {"variant", "precision", "grid", "total_bytes", "reason"}
        assert rejected["reason"]


@pytest.mark.parametrize("name", profile_names())
def test_a_plan_survives_json(name: str) -> None:
    plan = shipped(name)
    assert DeploymentPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("name", profile_names())
def test_a_plan_holds_one_full_image_and_512_tokens_of_text(name: str) -> None:
    plan = shipped(name)
    assert plan.context_tokens >= plan.max_image_tokens + 512
    assert plan.context_tokens <= find_variant(plan.variant).dims.text.max_positions


@pytest.mark.parametrize(
    ("grid", "tiles", "tokens"),
    [
        ("base", 1, 577),
        ("1x2", 3, 1776),
        ("2x2", 5, 2928),
        ("2x3", 7, 4104),
        ("2x4", 9, 5280),
        ("3x3", 10, 5832),
        ("2x6", 13, 7632),
    ],
)
def test_grids_have_their_real_tiles_and_tokens(grid: str, tiles: int, tokens: int) -> None:
    result = plan_deployment(load_profile("a100"), ask("llava-v1.6-mistral-7b", grid=grid))
    assert result.plan.fits
    assert (result.plan.grid, result.plan.max_tiles) == (grid, tiles)
    assert result.plan.max_image_tokens == tokens
    beyond = any("was not trained on" in note for note in result.notes)
    assert beyond == (tokens > 2928)


def test_grids_beyond_the_positions_are_refused() -> None:
    plan = plan_deployment(load_profile("a100"), ask("llava-v1.6-vicuna-7b", grid="3x3")).plan
    assert not plan.fits
    assert {r.reason for r in plan.rejected} == {
        "5832 media tokens and 512 of text need 6344 positions; the model has 4096"
    }


def test_pinpoints_of_ones_own_are_planned_and_named() -> None:
    request = ask("llava-v1.6-mistral-7b", pinpoints="336x336")
    plan = plan_deployment(load_profile("a100"), request).plan
    assert (plan.grid, plan.max_tiles, plan.max_image_tokens) == ("336x336", 2, 1176)


def test_larger_grids_are_never_chosen_unasked() -> None:
    plan = plan_deployment(load_profile("h200"), ask("llava-v1.6-mistral-7b")).plan
    assert plan.grid == "2x2"


def test_the_forerunner_takes_one_tile_without_a_newline() -> None:
    plan = plan_deployment(load_profile("rtx-4090"), ask("llava-1.5-7b")).plan
    assert (plan.grid, plan.max_tiles, plan.max_image_tokens) == ("base", 1, 576)
    with pytest.raises(RequestError, match="one tile"):
        plan_deployment(load_profile("rtx-4090"), ask("llava-1.5-7b", grid="2x2"))


def test_two_images_need_twice_the_tokens() -> None:
    plan = plan_deployment(load_profile("a100"), ask("llava-v1.6-vicuna-7b", num_images=2)).plan
    # Two full images of 2928 tokens exceed 4096 positions; two of 1776 do not.
    assert (plan.grid, plan.context_tokens) == ("1x2", 4096)


def test_a_video_counts_its_pooled_frames() -> None:
    plan = plan_deployment(load_profile("l40s"), PlanRequest(num_frames=32)).plan
    assert plan.variant == "LLaVA-NeXT-Video-7B"
    assert plan.rejected[0].reason == (
        "4608 media tokens and 512 of text need 5120 positions; the model has 4096"
    )
    few = plan_deployment(load_profile("l40s"), PlanRequest(num_frames=8)).plan
    assert few.variant == "LLaVA-NeXT-Video-34B"


BOUNDARIES = ("rtx-4060-8gb", "a10", "a100-40gb", "jetson-orin-nx-16gb", "cpu-16gb", "l40s")


@pytest.mark.parametrize("name", BOUNDARIES)
def test_every_larger_candidate_fits_at_its_own_size_and_not_one_byte_below(name: str) -> None:
    board = load_profile(name)
    plan = shipped(name)

    def chosen(budget: int) -> tuple[str, str, str]:
        resized = replace(board, memory_bytes=budget, system_reserve_bytes=0)
        found = plan_deployment(resized).plan
        return found.variant, found.precision, found.grid

    *larger, context = plan.rejected
    assert all(r.total_bytes > board.budget_bytes for r in plan.rejected)
    nearest = min(larger, key=lambda r: r.total_bytes)
    wanted = (nearest.variant, nearest.precision, nearest.grid)
    assert chosen(nearest.total_bytes) == wanted
    assert chosen(nearest.total_bytes - 1) != wanted
    # The last entry is the same candidate with the next larger context.
    if (context.variant, context.precision, context.grid) == (
        plan.variant,
        plan.precision,
        plan.grid,
    ):
        resized = replace(board, memory_bytes=context.total_bytes, system_reserve_bytes=0)
        below = replace(resized, memory_bytes=context.total_bytes - 1)
        pinned = ask(plan.variant, precision=plan.precision, grid=plan.grid)
        assert plan_deployment(resized, pinned).plan.context_tokens > plan.context_tokens
        assert plan_deployment(below, pinned).plan.context_tokens == plan.context_tokens


def test_a_plan_fits_its_own_total_exactly_and_not_a_byte_less() -> None:
    plan = plan_deployment(gpu(24 << 30), ask("llava-v1.6-mistral-7b", precision="int4")).plan
    pinned = ask("llava-v1.6-mistral-7b", precision="int4", context_tokens=plan.context_tokens)
    total = plan.memory.total_bytes
    assert plan_deployment(gpu(total), pinned).plan.fits
    short = plan_deployment(gpu(total - 1), replace(pinned, grid="2x2")).plan
    assert not short.fits
    assert short.memory.shortfall_bytes == 1
    with pytest.raises(BudgetError, match=r"short of 1 B\."):
        short.require_fit()


@settings(max_examples=25, deadline=None)
@given(
    memory=st.integers(1 << 30, 260 << 30),
    more=st.integers(0, 40 << 30),
    kind=st.sampled_from(["cuda", "cpu", "unified"]),
)
def test_more_memory_never_gives_a_smaller_model_or_grid(memory: int, more: int, kind: str) -> None:
    def plan(size: int) -> DeploymentPlan:
        return plan_deployment(parse_profile(f'kind = "{kind}"\nmemory = {size}', "x")).plan

    less, larger = plan(memory), plan(memory + more)
    if not less.fits:
        return
    assert larger.fits
    assert SIZE[larger.variant] >= SIZE[less.variant]
    if larger.variant == less.variant:
        assert larger.max_image_tokens >= less.max_image_tokens
        if larger.grid == less.grid and larger.precision == less.precision:
            assert larger.context_tokens >= less.context_tokens


def test_nothing_fits_a_gigabyte_and_the_plan_says_so() -> None:
    plan = plan_deployment(gpu(1 << 30)).plan
    assert not plan.fits
    assert len(plan.rejected) == 7 * 3 * 3
    assert nearest_fit(gpu(1 << 30), PlanRequest()) is None


def test_the_nearest_that_fits_gives_way_in_precision_before_the_variant() -> None:
    request = ask("llava-v1.6-34b", precision="fp16", grid="2x2")
    nearest = nearest_fit(load_profile("a10"), request)
    assert nearest is not None
    assert (nearest.variant, nearest.precision) == ("llava-v1.6-34b", "int4")
    smaller = nearest_fit(load_profile("rtx-4060-8gb"), request)
    assert smaller is not None
    assert smaller.variant == "llama3-llava-next-8b"


def test_one_gpu_that_cannot_hold_the_model_leads_to_the_distributed_engine() -> None:
    result = plan_deployment(load_profile("4xa100"), ask("llava-next-72b", precision="fp16"))
    plan = result.plan
    assert plan.fits
    assert plan.distributed
    parallel = Parallelism.parse(plan.engine)
    assert parallel == Parallelism(tensor=2, pipeline=1) or parallel == Parallelism(tensor=4)
    assert any("one device cannot hold it" in note for note in result.notes)
    small = plan_deployment(load_profile("4xa100"), ask("llava-v1.6-mistral-7b")).plan
    assert small.engine == "ort"
    assert Parallelism.parse("ort") is None


def test_tensor_parallelism_divides_heads_and_the_mlp() -> None:
    text = find_variant("llava-v1.6-34b").dims.text
    assert [(p.tensor, p.pipeline) for p in parallelisms(text, "fp16", 8)] == [
        *((2, 1), (1, 2), (4, 1), (2, 2), (1, 4)),
        *((8, 1), (4, 2), (2, 4), (1, 8)),
    ]
    odd = replace(text, num_attention_heads=6, num_key_value_heads=3)
    assert [p.tensor for p in parallelisms(odd, "fp16", 4)] == [1, 1]
    six = replace(text, num_attention_heads=6, num_key_value_heads=1)
    assert [p.tensor for p in parallelisms(six, "fp16", 4)] == [2, 1, 2, 1]


def test_the_host_can_be_what_does_not_fit() -> None:
    board = parse_profile('kind = "cuda"\nmemory = "80 GiB"\nhost_memory = "256 MiB"', "x")
    plan = plan_deployment(board, ask("llava-v1.6-mistral-7b", grid="base")).plan
    assert not plan.fits
    assert "the host needs" in plan.rejected[0].reason
    assert plan.memory.shortfall_bytes == plan.memory.host_total_bytes - (256 << 20)


def test_the_full_grid_comes_before_the_higher_precision() -> None:
    request = ask("llava-v1.6-mistral-7b", precision="int8", grid="base")
    memory = plan_deployment(gpu(80 << 30), replace(request, context_tokens=1089)).plan.memory
    tight = gpu(memory.total_bytes)
    assert plan_deployment(tight, request).plan.fits
    plan = plan_deployment(tight, replace(request, precision=None, grid=None)).plan
    assert (plan.precision, plan.grid) == ("int4", "2x2")


def test_preferences_differ_where_they_should() -> None:
    board = load_profile("l40s")
    plans = {
        prefer: plan_deployment(board, PlanRequest(prefer=prefer)).plan  # type: ignore[arg-type]
        for prefer in ("largest", "quality", "speed")
    }
    # 72B fits with a smaller grid only; quality keeps the full grid, speed the quickest answer.
    assert (plans["largest"].variant, plans["largest"].grid) == ("llava-next-72b", "1x2")
    assert (plans["quality"].variant, plans["quality"].grid) == ("llava-v1.6-34b", "2x2")
    assert plans["speed"].grid == "2x2"
    assert SIZE[plans["speed"].variant] < 9e9
    assert plans["speed"].precision == "int4"


def test_without_rates_the_fastest_is_the_one_that_streams_least() -> None:
    plan = plan_deployment(gpu(48 << 30), PlanRequest(prefer="speed")).plan
    assert plan.predicted.decode_tokens_per_second is None
    assert (plan.variant, plan.precision, plan.grid) == ("llava-v1.6-vicuna-7b", "int4", "2x2")


def test_no_plan_of_the_pareto_set_beats_another() -> None:
    front = plan_deployment(load_profile("rtx-4090"), pareto=True).pareto
    assert len(front) > 3
    assert all(plan.fits for plan in front)
    scores = [
        (
            SIZE[p.variant],
            p.max_image_tokens,
            -["fp16", "int8", "int4"].index(p.precision),
            p.predicted.decode_tokens_per_second or 0.0,
        )
        for p in front
    ]
    for mine in scores:
        assert not any(
            o != mine and all(x >= y for x, y in zip(o, mine, strict=True)) for o in scores
        )


def test_contexts_are_the_smallest_multiples_of_the_step_or_all_positions() -> None:
    plan = plan_deployment(gpu(17 << 30), ask("llava-v1.6-mistral-7b", precision="fp16")).plan
    assert plan.fits
    assert plan.context_tokens % CONTEXT_STEP == 0
    assert 3440 < plan.context_tokens < 32768


@pytest.mark.parametrize(
    ("wishes", "named"),
    [
        ({"precision": "int3"}, "int3"),
        ({"grid": "5x5"}, "5x5"),
        ({"pinpoints": "300x300"}, "300x300"),
        ({"grid": "2x2", "pinpoints": "336x336"}, "both given"),
        ({"context_tokens": 0}, "context is 0"),
        ({"num_images": 0}, "images is 0"),
        ({"num_frames": -1}, "frames is -1"),
        ({"num_frames": 8}, "takes images only"),
        ({"cache": "float32"}, "float32"),
        ({"prefer": "cheapest"}, "cheapest"),
    ],
)
def test_malformed_requests_are_named(wishes: dict[str, object], named: str) -> None:
    with pytest.raises(RequestError) as caught:
        plan_deployment(load_profile("a100"), ask("llava-v1.6-mistral-7b", **wishes))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("board", "asked", "engine", "marked"),
    [
        ("rtx-4090", "auto", "tensorrt-rtx", False),
        ("rtx-4090", "ort", "ort", False),
        ("a100", "auto", "ort", False),
        ("a100", "tensorrt-rtx", "tensorrt-rtx", True),
        ("jetson-orin-nano-8gb", "auto", "ort", False),
        ("cpu-16gb", "auto", "ort", False),
    ],
)
def test_the_board_decides_the_engine_unless_one_is_asked(
    board: str, asked: str, engine: str, marked: bool
) -> None:
    request = ask("llava-v1.6-mistral-7b", engine=asked)
    result = plan_deployment(load_profile(board), request)
    assert result.plan.engine == engine
    assert any("outside NVIDIA's support matrix" in note for note in result.notes) == marked


@pytest.mark.parametrize(
    ("board", "named"), [("h100", "h100 has 9.0"), ("cpu-16gb", "cpu-16gb has no GPU")]
)
def test_an_engine_that_cannot_be_compiled_for_the_board_is_refused(board: str, named: str) -> None:
    request = ask("llava-v1.6-mistral-7b", engine="tensorrt-rtx")
    with pytest.raises(RequestError, match=f"compiles for .*8.0; {named}"):
        plan_deployment(load_profile(board), request)


def test_a_smaller_cache_type_fits_more_context() -> None:
    board = load_profile("cpu-16gb")
    # An int8 tower alone makes room for all positions.
    request = ask("llava-v1.6-vicuna-13b", precision="int4", vision_precision="fp16")
    wide = plan_deployment(board, request).plan
    narrow = plan_deployment(board, replace(request, cache="int8")).plan
    assert narrow.context_tokens > wide.context_tokens


def test_an_int8_cache_makes_room_on_a_gpu_and_is_slower_without_a_kernel_for_it() -> None:
    board = load_profile("rtx-4070-12gb")
    request = ask("llava-v1.6-vicuna-13b", precision="int4")
    wide = plan_deployment(board, request)
    narrow = plan_deployment(board, replace(request, cache="int8"))
    assert narrow.plan.context_tokens > wide.plan.context_tokens

    same = replace(request, cache="int8", context_tokens=wide.plan.context_tokens)
    coded = plan_deployment(board, same)
    floats, codes = (each.plan.memory.terms for each in (wide, coded))
    assert 0.5 < codes["kv_cache"] / floats["kv_cache"] < 0.51
    # What dequantised weights take serves one layer's dequantised cache as well.
    assert codes["attention_workspace"] == floats["attention_workspace"] == 0
    rates = [each.plan.predicted.decode_tokens_per_second or 0.0 for each in (wide, coded)]
    assert 0 < rates[1] < rates[0]
    assert any("so do steps, as this model's heads do not suit" in note for note in coded.notes)
    assert not any("int8 cache" in note for note in wide.notes)


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("llava-v1.6-mistral-7b", True),
        ("llama3-llava-next-8b", True),
        ("llava-v1.6-vicuna-7b", False),
        ("llava-v1.6-34b", False),
        ("llava-next-72b", False),
        ("llava-next-110b", True),
    ],
)
def test_steps_that_read_codes_are_predicted_faster(name: str, reads: bool) -> None:
    board = load_profile("h200")
    rates, notes = [], ()
    for kind in (None, "int8"):
        request = ask(name, precision="int4", cache=kind, context_tokens=8192)
        result = plan_deployment(board, request)
        rates.append(result.plan.predicted.decode_tokens_per_second or 0.0)
        notes = result.notes
    assert (rates[1] > rates[0]) is reads
    assert any("steps read the codes" in note for note in notes) is reads


def test_an_int8_cache_is_refused_where_no_kernel_reads_it() -> None:
    request = ask("llava-v1.6-mistral-7b", precision="int4", cache="int8")
    with pytest.raises(RequestError, match=r"int8 was asked, but .* 8\.0 or high.* has 7\.5; use"):
        plan_deployment(load_profile("t4"), request)
    assert plan_deployment(gpu(24 << 30), request).plan.fits
    floats = ask("llava-v1.6-mistral-7b", cache="float32")
    with pytest.raises(RequestError, match=r"float32 does not go .*; use float16 or int8"):
        plan_deployment(load_profile("a100"), floats)


def test_an_int8_cache_is_never_spread_over_devices() -> None:
    board = load_profile("4xa100")
    request = ask("llava-next-110b", precision="fp16")
    assert plan_deployment(board, request).plan.fits

    plan = plan_deployment(board, replace(request, cache="int8")).plan

    assert not plan.fits
    assert "on the one device that an int8 cache is for" in plan.rejected[0].reason


def test_a_folder_plans_like_a_published_variant(tmp_path: Path) -> None:
    config = {
        "model_type": "llava_next",
        "image_token_index": 32000,
        "text_config": {
            "model_type": "mistral",
            "vocab_size": 32064,
            "max_position_embeddings": 32768,
            "sliding_window": None,
            "rope_theta": 1e6,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "image_size": 336,
            "patch_size": 14,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    mine = plan_deployment(load_profile("a10"), ask(str(tmp_path))).plan
    known = plan_deployment(load_profile("a10"), ask("llava-v1.6-mistral-7b")).plan
    assert replace(mine, variant=known.variant, rejected=()) == replace(known, rejected=())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"variant": 5}, "variant must be text"),
        ({"max_tiles": True}, "max_tiles must be a whole number"),
        ({"fits": "yes"}, "fits"),
        ({"rejected": [{}]}, "variant must be text"),
        ({"predicted": {"ttft_seconds": "soon"}}, "ttft_seconds"),
        ({"memory": {"kv_cache_bytes": 1, "total_bytes": 2, "budget_bytes": 3}}, "add up to 1"),
        ({"memory": {"magic_bytes": 1}}, "magic_bytes"),
        ({"memory": []}, "memory must be an object"),
    ],
)
def test_what_is_no_plan_is_refused_by_name(change: dict[str, object], named: str) -> None:
    document = {**shipped("a10").to_json(), **change}
    with pytest.raises(RequestError) as caught:
        DeploymentPlan.from_json(document)
    assert named in str(caught.value)


def test_a_plan_lacking_a_key_is_refused() -> None:
    document = shipped("a10").to_json()
    del document["grid"]
    with pytest.raises(RequestError, match="missing key 'grid'"):
        DeploymentPlan.from_json(document)


@pytest.mark.parametrize("board", ["4xa100", "8xh100"])
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_on_several_devices_too_the_boundary_is_exact(board: str, precision: str) -> None:
    wishes = PlanRequest(
        variants=(find_variant("llava-next-72b"),),
        precision=precision,
        grid="2x2",
        context_tokens=3440,
    )
    small = replace(load_profile(board), memory_bytes=1 << 30, system_reserve_bytes=0)
    needed = plan_deployment(small, wishes).plan.memory.total_bytes

    exact = replace(small, memory_bytes=needed)
    below = replace(small, memory_bytes=needed - 1)
    assert plan_deployment(exact, wishes).plan.fits
    assert not plan_deployment(below, wishes).plan.fits


def test_the_nearest_fit_gives_up_no_more_than_it_must() -> None:
    wishes = PlanRequest(
        variants=(find_variant("llava-v1.6-vicuna-7b"),), precision="int4", grid="3x3"
    )

    nearest = nearest_fit(load_profile("a100"), wishes)

    assert nearest is not None
    assert (nearest.precision, nearest.grid) == ("int4", "2x2")


@pytest.mark.parametrize(("frames", "longest"), [(8, "image"), (28, "video")])
def test_a_video_plan_predicts_one_prompt_and_not_a_mixture(frames: int, longest: str) -> None:
    # 8 frames are 1,152 tokens, fewer than one image of 2,928; 28 frames are 4,032.
    variant = find_variant("LLaVA-NeXT-Video-7B")
    board = load_profile("a100")
    video = PlanRequest(
        variants=(variant,), precision="fp16", num_frames=frames, context_tokens=8192
    )
    alone = replace(video, num_frames=0)

    with_video = plan_deployment(board, video).plan.predicted.ttft_seconds
    with_image = plan_deployment(board, alone).plan.predicted.ttft_seconds

    assert with_video is not None
    assert with_image is not None
    assert (with_video == with_image) == (longest == "image")


def test_the_tower_takes_8_bits_beside_a_quantised_language_model_on_a_cpu() -> None:
    board = load_profile("cpu-16gb")
    for precision, tower in (("fp16", "fp16"), ("int8", "int8"), ("int4", "int8")):
        plan = plan_deployment(board, ask("llava-v1.6-mistral-7b", precision=precision)).plan
        assert plan.vision_precision == tower
    for profile in (load_profile("a100"), replace(board, int8_isa="none")):
        plan = plan_deployment(profile, ask("llava-v1.6-mistral-7b", precision="int4")).plan
        assert plan.vision_precision == "fp16"


def test_an_int8_tower_is_smaller_and_faster_and_can_be_turned_off() -> None:
    request = ask("llava-v1.6-mistral-7b", precision="int4", context_tokens=4096)
    board = load_profile("cpu-16gb")
    chosen = plan_deployment(board, request).plan
    kept = plan_deployment(board, replace(request, vision_precision="fp16")).plan
    assert chosen.memory.terms["vision_tower"] < 0.3 * kept.memory.terms["vision_tower"]
    assert chosen.memory.terms["projector"] < 0.3 * kept.memory.terms["projector"]
    assert chosen.memory.total_bytes < kept.memory.total_bytes
    fast, slow = chosen.predicted.ttft_seconds, kept.predicted.ttft_seconds
    assert fast is not None
    assert slow is not None
    assert fast < slow
    assert any("--vision-precision fp16" in n for n in plan_deployment(board, request).notes)


def test_weights_that_calibration_left_in_float_are_planned_for() -> None:
    request = ask("llava-v1.6-mistral-7b", precision="int4", context_tokens=4096)
    board = load_profile("cpu-16gb")
    plans = [
        plan_deployment(board, replace(request, vision_wide_weights=count)).plan.memory
        for count in (0, 1 << 20)
    ]
    towers = [memory.terms["vision_tower"] for memory in plans]
    assert towers[1] - towers[0] == 3 << 20
    assert plans[1].total_bytes > plans[0].total_bytes


@pytest.mark.parametrize(
    ("board", "precision", "reason"),
    [
        ("a100", "int8", "the cuda target computes the tower in fp16"),
        ("cpu-32gb", "fp16", "an int8 tower goes with int8 or int4"),
    ],
)
def test_an_int8_tower_that_cannot_be_is_refused(board: str, precision: str, reason: str) -> None:
    request = ask("llava-v1.6-mistral-7b", precision=precision, vision_precision="int8")
    plan = plan_deployment(load_profile(board), request).plan
    assert not plan.fits
    assert reason in plan.rejected[-1].reason
    nearest = nearest_fit(load_profile(board), request)
    assert nearest is not None
    assert nearest.fits


def test_a_vision_precision_that_does_not_exist_is_refused() -> None:
    request = ask("llava-v1.6-mistral-7b", vision_precision="int4")
    with pytest.raises(RequestError, match="vision precision 'int4' is not one of fp16, int8"):
        plan_deployment(load_profile("cpu-16gb"), request)


def test_plans_of_before_there_was_a_choice_have_a_tower_in_float() -> None:
    document = shipped("cpu-16gb").to_json()
    del document["vision_precision"]
    assert DeploymentPlan.from_json(document).vision_precision == "fp16"


@pytest.mark.parametrize(
    ("isa", "precision", "told"),
    [
        ("vnni", "int8", "two 8-bit codes each"),
        ("none", "int8", "one scale a block of columns"),
        ("vnni", "int4", "one scale a block of columns"),
        ("vnni", "fp16", None),
    ],
)
def test_the_plan_tells_how_activations_are_rounded(
    isa: Int8Isa, precision: str, told: str | None
) -> None:
    board = replace(load_profile("cpu-32gb"), int8_isa=isa)

    notes = plan_deployment(board, PlanRequest(precision=precision)).notes

    found = [note for note in notes if "activations" in note]
    assert len(found) == (told is not None)
    assert told is None or told in found[0]
