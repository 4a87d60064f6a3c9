from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_edge.profiles.memory.buffers import (
    MAX_DRAFT_TOKENS,
    kv_cache_bytes,
    logits_bytes,
    prefill_chunk_tokens,
    rope_table_bytes,
    tiles_per_batch,
    video_feature_bytes,
    video_tokens_per_frame,
)
from llava_edge.profiles.memory.constants import memory_constants, speed_constants
from llava_edge.profiles.memory.estimate import (
    PHASES,
    PLANNED_VIDEO_PIXELS,
    Machine,
    MemoryTerms,
    Workload,
    estimate_memory,
)
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.profiles.models.variants import find_variant
from llava_edge.runtime.util.limits import Limits

CPU = Machine("cpu")
CUDA = Machine("cuda", compute_capability="8.0")


@pytest.fixture(scope="module")
def dims() -> ModelDims:
    return find_variant("llava-v1.6-mistral-7b").dims


def test_terms_add_up_in_every_phase(dims: ModelDims) -> None:
    estimate = estimate_memory(dims, "int4", Workload(3440), CUDA)
    for terms in (*estimate.device.values(), *estimate.host.values()):
        assert terms.total == sum(terms.as_dict().values())
    assert set(estimate.device) == set(estimate.host) == set(PHASES)


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("llava-v1.6-mistral-7b", 131_072),
        ("llava-next-72b", 2_621_440),
        ("llava-next-110b", 327_680),
    ],
)
def test_the_cache_of_a_token_is_the_published_one(name: str, bytes_per_token: int) -> None:
    text = find_variant(name).dims.text
    assert kv_cache_bytes(text, 1, "float16") == bytes_per_token
    assert kv_cache_bytes(text, 7, "float32") == 14 * bytes_per_token
    # Codes, and a float32 scale a channel, however long the context.
    codes = kv_cache_bytes(text, 6, "int8") - kv_cache_bytes(text, 4, "int8")
    assert codes == bytes_per_token
    assert kv_cache_bytes(text, 2, "int8") - codes == 2 * bytes_per_token


def test_buffers_have_the_sizes_of_their_shapes(dims: ModelDims) -> None:
    assert rope_table_bytes(dims.text, 100, "cpu") == 2 * 100 * 64 * 4
    assert logits_bytes(dims.text) == 32064 * 4
    assert prefill_chunk_tokens(512, 100) == 100
    assert prefill_chunk_tokens(512, 4096) == 512
    assert tiles_per_batch("cpu", 5) == 1
    assert tiles_per_batch("cuda", 5) == 5
    assert video_tokens_per_frame(dims.vision) == 144
    assert video_feature_bytes(dims, 8, "cpu") == (8 * 144 + 1) * 4096 * 4


def test_the_need_is_the_largest_phase_and_not_the_sum(dims: ModelDims) -> None:
    estimate = estimate_memory(dims, "fp16", Workload(3440), CPU)
    totals = {name: terms.total for name, terms in estimate.host.items()}
    assert estimate.host_bytes == max(totals.values()) < sum(totals.values())
    assert estimate.device_bytes == 0
    assert estimate.host["load"].load_transient > 0
    assert estimate.host["decode"].load_transient == 0


def test_loading_holds_the_largest_matrix_twice(dims: ModelDims) -> None:
    load = estimate_memory(dims, "fp16", Workload(3440), CPU).host["load"]
    # The head: 32,064 x 4096, larger than 14,336 x 4096 and than queries, keys and values.
    assert load.load_transient == 4 * 32_064 * 4096
    tied = replace(dims, text=replace(dims.text, vocab_size=300))
    load = estimate_memory(tied, "fp16", Workload(3440), CPU).host["load"]
    assert load.load_transient == 4 * 14_336 * 4096


def test_a_tower_beside_a_small_decoder_is_the_worst_moment_of_loading(dims: ModelDims) -> None:
    text = replace(
        dims.text,
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
    )
    narrow = replace(dims, text=text)
    load = estimate_memory(narrow, "fp16", Workload(3440), CPU).host["load"]
    # 4096 x 1024 of the tower's MLP, less the decoder, which is not there yet.
    assert load.load_transient == 4 * 4096 * 1024 - load.decoder_weights - load.lm_head


def test_tiles_stay_until_the_answer_and_features_until_the_prompt_is_read(
    dims: ModelDims,
) -> None:
    host = estimate_memory(dims, "fp16", Workload(9000, num_images=3, image_pixels=1), CPU).host
    tiles = 15 * 3 * 336 * 336 * 4
    features = (15 * 576 + 1) * 4096 * 4
    assert [host[name].pixel_values for name in PHASES] == [0, tiles, tiles, tiles]
    assert [host[name].image_features for name in PHASES] == [0, features, features, 0]


def test_decoding_counts_the_logits_and_activations_of_the_longest_draft(dims: ModelDims) -> None:
    cpu = estimate_memory(dims, "int4", Workload(3440), CPU).host
    cuda = estimate_memory(dims, "fp16", Workload(3440), CUDA).device

    # One step's own buffer, and one for a token and its draft.
    rows = 1 + 1 + MAX_DRAFT_TOKENS
    assert cpu["decode"].logits == cuda["decode"].logits == rows * dims.text.vocab_size * 4
    chunk = cpu["prefill"].prefill_activations
    share = (1 + MAX_DRAFT_TOKENS) / 512
    assert cpu["decode"].prefill_activations == pytest.approx(chunk * share, abs=1)


def test_two_codes_an_activation_are_counted_in_layers_and_in_the_head(
    dims: ModelDims,
) -> None:
    two = estimate_memory(dims, "int8", Workload(3440), CPU).host
    one = estimate_memory(dims, "int8", Workload(3440), replace(CPU, int8_isa="none")).host
    factor = memory_constants()["cpu"]["prefill_factor"]
    text = dims.text

    assert two["prefill"].prefill_activations > one["prefill"].prefill_activations
    # Both products of up, both scaled, and up, beside the gate.
    assert two["prefill"].prefill_activations >= 512 * 4 * 6 * text.intermediate_size * factor
    rows = 1 + MAX_DRAFT_TOKENS
    head = int(rows * 2 * text.vocab_size * 4 * factor)
    assert head <= two["decode"].prefill_activations < 2 * head
    whole_rows = replace(dims, text=replace(text, hidden_size=text.hidden_size + 8))
    two = estimate_memory(whole_rows, "int8", Workload(3440), CPU).host
    assert two["decode"].prefill_activations >= 2 * head


def test_images_are_decoded_before_tiles_are_encoded(dims: ModelDims) -> None:
    photo = Workload(3440, image_pixels=24_000_000)
    thumbnail = Workload(3440, image_pixels=336 * 336)
    large, small = (
        estimate_memory(dims, "fp16", w, CPU).host["encode"] for w in (photo, thumbnail)
    )
    assert large.image_decoding == 18 * 24_000_000
    jpeg = Workload(3440, image_pixels=24_000_000, image_format="JPEG")
    named = estimate_memory(dims, "fp16", jpeg, CPU).host["encode"]
    assert 9 * 24_000_000 <= named.image_decoding < 10 * 24_000_000
    assert large.vision_activations == large.image_features == 0
    assert small.image_decoding == 0
    assert small.vision_activations > 60 << 20


def test_cutting_many_tiles_out_of_a_small_image_counts_the_tiles(dims: ModelDims) -> None:
    work = Workload(3440, tiles_per_image=5, image_pixels=100)
    host = estimate_memory(dims, "int4", work, CUDA).host["encode"]
    assert host.image_decoding == 13 * 672 * 672 + 4 * 100 + 4 * 6720


def test_a_video_brings_frames_features_and_a_decoder(dims: ModelDims) -> None:
    without, video = (
        estimate_memory(dims, "fp16", Workload(6000, num_frames=n, image_pixels=0), CPU).host
        for n in (0, 32)
    )
    hidden = dims.text.hidden_size
    assert video["encode"].pixel_values - without["encode"].pixel_values == 32 * 3 * 336**2 * 4
    features = video["prefill"].image_features - without["prefill"].image_features
    assert features == (32 * 144 + 1) * hidden * 4
    # What the runtime takes in at most is what is planned for.
    assert Limits().max_video_pixels == PLANNED_VIDEO_PIXELS
    assert video["encode"].image_decoding > 26 * PLANNED_VIDEO_PIXELS


def test_fp16_on_a_cpu_is_planned_at_four_bytes_a_weight(dims: ModelDims) -> None:
    cpu = estimate_memory(dims, "fp16", Workload(3440), CPU).host["decode"]
    cuda = estimate_memory(dims, "fp16", Workload(3440), CUDA).device["decode"]
    assert cpu.decoder_weights == 2 * cuda.decoder_weights
    assert cpu.vision_tower == 2 * cuda.vision_tower


def test_a_unified_board_adds_device_and_host(dims: ModelDims) -> None:
    apart = estimate_memory(dims, "int4", Workload(3440), CUDA)
    shared = estimate_memory(dims, "int4", Workload(3440), replace(CUDA, unified=True))
    sums = [apart.device[name].total + apart.host[name].total for name in PHASES]
    assert shared.peak.total == shared.device_bytes == max(sums)
    assert apart.peak.total == max(terms.total for terms in apart.device.values())


def test_cards_without_flash_attention_need_expanded_keys(dims: ModelDims) -> None:
    old = estimate_memory(dims, "fp16", Workload(3440), Machine("cuda", compute_capability="7.5"))
    new = estimate_memory(dims, "fp16", Workload(3440), CUDA)
    grown = old.device["prefill"].attention_workspace - new.device["prefill"].attention_workspace
    # Keys and values, and what buffers of activations leave of where they lay.
    assert 3 < grown / (3440 * 4096 * 2) < 4


def test_an_int8_cache_on_a_gpu_is_half_as_large_and_one_layer_is_dequantised(
    dims: ModelDims,
) -> None:
    text = dims.text
    floats, codes = (
        estimate_memory(dims, "fp16", Workload(3440, cache=kind), CUDA).device["prefill"].as_dict()
        for kind in ("float16", "int8")
    )
    scales = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    assert 2 * (codes["kv_cache"] - scales) == floats["kv_cache"]
    # Keys and values of one layer, all positions, float16: what the float cache takes of a layer;
    # with the queries they lie in a region of their own, beside that of the first chunk's.
    scratch = codes["attention_workspace"] - floats["attention_workspace"]
    layer = floats["kv_cache"] / text.num_hidden_layers
    chunk = 512 * (text.query_size + 4 * text.key_value_size) * 2
    assert layer < scratch < layer + 1.5 * chunk
    changed = {name for name in codes if codes[name] != floats[name]}
    assert changed == {"kv_cache", "attention_workspace", "allocator_slack"}
    # A processor reads codes as they are.
    cpu = (estimate_memory(dims, "int4", Workload(3440, cache=c), CPU) for c in (None, "int8"))
    assert len({each.host["prefill"].attention_workspace for each in cpu}) == 1


def test_terms_of_two_parts_add_term_by_term() -> None:
    both = MemoryTerms(kv_cache=2, logits=3) + MemoryTerms(kv_cache=5)
    assert (both.kv_cache, both.logits, both.total) == (7, 3, 10)
    assert both.with_slack(4, 0.5).allocator_slack == 9


def test_every_constant_names_where_it_comes_from() -> None:
    for group in (*memory_constants().values(), *speed_constants().values()):
        assert set(group.values) == set(group.sources)
        assert all(len(source) > 5 for source in group.sources.values())


def test_a_fit_may_replace_known_constants_only(dims: ModelDims) -> None:
    groups = memory_constants()
    changed = {**groups, "cpu": groups["cpu"].replace(process=0.0)}
    less = estimate_memory(dims, "fp16", Workload(3440), CPU, changed)
    assert less.host_bytes < estimate_memory(dims, "fp16", Workload(3440), CPU).host_bytes
    with pytest.raises(KeyError, match="guess"):
        groups["cpu"].replace(guess=1.0)


WORKLOADS = st.builds(
    Workload,
    context_tokens=st.integers(64, 40_000),
    num_images=st.integers(0, 5),
    tiles_per_image=st.integers(1, 13),
    num_frames=st.integers(0, 64),
    chunk_tokens=st.integers(1, 4096),
    batch_tiles=st.integers(1, 8),
    image_pixels=st.integers(1, 10**8),
)


PRECISIONS = st.sampled_from(["fp16", "int8", "int4"])
FIELDS = [
    "context_tokens",
    "num_images",
    "tiles_per_image",
    "num_frames",
    "batch_tiles",
    "image_pixels",
]
"""More of these is more work on every machine.

A longer chunk is so on a CPU alone: on a GPU the regions of an arena follow from the order of
tensors, and where one of them finds a free piece, two positions need a region less than one.
``test_device_runs`` holds what a GPU's plan needs: after the runs at loading no prompt needs more.
"""


def assert_needs_no_less(
    dims: ModelDims, precision: str, machine: Machine, work: Workload, more: Workload
) -> None:
    groups = memory_constants()
    before, after = (
        estimate_memory(dims, precision, each, machine, groups) for each in (work, more)
    )
    assert after.peak.total >= before.peak.total
    assert after.host_bytes >= before.host_bytes


@settings(max_examples=60, deadline=None)
@given(
    work=WORKLOADS,
    field=st.sampled_from(FIELDS),
    more=st.integers(1, 3000),
    precision=PRECISIONS,
    machine=st.sampled_from([CPU, CUDA, replace(CUDA, unified=True)]),
)
def test_more_work_never_needs_less_memory(
    dims: ModelDims, work: Workload, field: str, more: int, precision: str, machine: Machine
) -> None:
    larger = replace(work, **{field: getattr(work, field) + more})
    assert_needs_no_less(dims, precision, machine, work, larger)


@settings(max_examples=30, deadline=None)
@given(work=WORKLOADS, more=st.integers(1, 3000), precision=PRECISIONS)
def test_a_larger_chunk_never_needs_less_memory_on_a_cpu(
    dims: ModelDims, work: Workload, more: int, precision: str
) -> None:
    larger = replace(work, chunk_tokens=work.chunk_tokens + more)
    assert_needs_no_less(dims, precision, CPU, work, larger)
