from dataclasses import replace

import pytest

from llava_edge.profiles.memory.device_arena import DeviceArena
from llava_edge.profiles.memory.device_pages import (
    PAGE,
    paged,
    unused_cache_bytes,
    unused_weight_bytes,
)
from llava_edge.profiles.memory.device_runs import DecoderRuns, cublas_bytes, run_once, tower_bytes
from llava_edge.profiles.memory.formats import VisionFormat, weight_bytes, weight_tensors
from llava_edge.profiles.models.variants import find_variant, load_variants

MIB = 1 << 20
DIMS = find_variant("llava-v1.6-mistral-7b").dims
RUNS = DecoderRuns(
    DIMS.text,
    2048,
    step_tokens=0,
    context_tokens=10_240,
    has_int8_cache=False,
    dequantises=False,
    most_dequantised=256 * MIB,
    compute_capability=(8, 0),
)
QUANTISED = replace(RUNS, dequantises=True)
CODES = replace(RUNS, has_int8_cache=True)
OLD = replace(RUNS, compute_capability=(7, 5))


@pytest.mark.parametrize(
    ("runs", "chunk", "regions"),
    [
        pytest.param(RUNS, 2048, "16 24 0.25 16 16 56 56 56 16 16", id="fp16"),
        pytest.param(QUANTISED, 256, "2 3 48 112", id="int4, 256"),
        pytest.param(QUANTISED, 512, "4 6 48 112 112", id="int4, 512"),
        pytest.param(QUANTISED, 1024, "8 12 48 112 112", id="int4, 1024"),
        pytest.param(QUANTISED, 2048, "16 24 48 56 112 112", id="int4, 2048"),
        pytest.param(CODES, 2048, "16 24 0.25 24 16 56 56 56 16 24", id="int8 cache"),
        pytest.param(OLD, 2048, "16 24 80 80 24 56 16 80 80 24", id="7.5"),
        pytest.param(
            replace(OLD, dequantises=True), 512, "4 6 48 80 80 112", id="int4 on 7.5, 512"
        ),
        pytest.param(
            replace(OLD, dequantises=True),
            4096,
            "32 48 48 80 80 48 112 112 112 112 48",
            id="int4 on 7.5, 4096",
        ),
    ],
)
def test_a_first_chunk_takes_the_regions_that_the_provider_took(
    runs: DecoderRuns, chunk: int, regions: str
) -> None:
    """MiB of each allocation of 0.25 MiB or more; onnxruntime-gpu 1.31.1, two layers of a 7B."""
    arena = DeviceArena()
    run_once(arena, runs, chunk, is_first=True)
    taken = [sum(piece.nbytes for piece in region) / MIB for region in arena.regions]
    assert [size for size in taken if size >= 0.25] == [float(size) for size in regions.split()]


def test_later_chunks_take_more_where_the_cache_holds_codes_alone() -> None:
    for runs, grown in ((RUNS, 0), (CODES, 56)):
        arena = DeviceArena()
        run_once(arena, runs, 2048, is_first=True)
        before = arena.nbytes
        run_once(arena, runs, 2048)
        assert arena.nbytes - before == grown * MIB


@pytest.mark.parametrize("name", [variant.name for variant in load_variants()])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("kind", ["float16", "codes", "7.5"])
@pytest.mark.parametrize("chunk", [512, 2048])
def test_behind_the_runs_at_loading_no_prompt_takes_more(
    name: str, quantised: bool, kind: str, chunk: int
) -> None:
    """Of whatever length, behind whatever was asked before."""
    runs = replace(
        {"float16": RUNS, "codes": CODES, "7.5": OLD}[kind],
        text=find_variant(name).dims.text,
        dequantises=quantised,
        chunk_tokens=chunk,
    )
    arena = DeviceArena()
    run_once(arena, runs, chunk, is_first=True)
    run_once(arena, runs, chunk)
    run_once(arena, runs, 33, kept=33)
    taken = arena.nbytes
    # What a run does follows from the regions, and those stay as they are.
    for tokens in (*range(1, chunk, 37), chunk):
        for is_first in (True, False):
            run_once(arena, runs, tokens, is_first=is_first)
    for tokens in range(1, 34):
        run_once(arena, runs, tokens, kept=tokens)
    assert arena.nbytes == taken


def test_small_prompts_first_leave_regions_that_large_ones_have_no_use_for() -> None:
    for runs in (RUNS, QUANTISED, CODES, OLD):
        planned = sum(runs.by_cause())
        arena = DeviceArena()
        for tokens in (60, 600, 1600, 2048):
            run_once(arena, runs, tokens, is_first=True)
        run_once(arena, runs, 2048)
        assert arena.nbytes > planned


def test_a_draft_brings_the_whole_head_into_float16() -> None:
    one, several = (sum(replace(QUANTISED, step_tokens=n).by_cause()) for n in (0, 33))
    head = 32_064 * 4096 * 2
    assert head < several - one < head + 2 * PAGE + 33 * 32_064 * 2
    # A head of more than twice 32,768 rows goes in parts of as many.
    wide = replace(DIMS.text, vocab_size=152_064)
    one, several = (sum(replace(QUANTISED, text=wide, step_tokens=n).by_cause()) for n in (0, 33))
    assert several - one == pytest.approx(32_768 * 4096 * 2, rel=0.06)
    # A large one of fewer rows does not.
    many = replace(DIMS.text, vocab_size=64_000)
    one, several = (sum(replace(QUANTISED, text=many, step_tokens=n).by_cause()) for n in (0, 33))
    assert several - one >= 64_000 * 4096 * 2


def test_a_context_matters_to_codes_and_old_cards_alone() -> None:
    for runs, matters in ((RUNS, False), (CODES, True), (OLD, True)):
        short, long = (sum(replace(runs, context_tokens=n).by_cause()) for n in (4096, 16_384))
        assert (long > short) is matters
        assert min(runs.by_cause()) >= 0


def test_an_arena_takes_the_smallest_piece_and_joins_what_is_free() -> None:
    arena = DeviceArena()
    large, small = arena.take(8 * MIB), arena.take(4 * MIB)
    arena.give(large)
    arena.give(small)
    assert arena.take(3 * MIB) is small
    assert small.nbytes == 4 * MIB
    parts = [arena.take(2 * MIB) for _ in range(4)]
    assert arena.nbytes == 12 * MIB
    assert arena.take(1).nbytes == 256
    for part in parts:
        arena.give(part)
    assert arena.take(8 * MIB).nbytes == 8 * MIB
    assert arena.nbytes == 12 * MIB + 256


def test_pages_of_what_is_large_are_whole() -> None:
    sizes = (1, PAGE // 2 - 1, PAGE // 2, PAGE, PAGE + 1)
    assert [paged(size) for size in sizes] == [1, PAGE // 2 - 1, PAGE, PAGE, 2 * PAGE]
    # 10 positions of 1,024 bytes each share pages; 1,100 leave most of a page.
    assert unused_cache_bytes(DIMS.text, 10, "float16") == 0
    assert unused_cache_bytes(DIMS.text, 1100, "float16") == 64 * (2 * PAGE - 1100 * 2048)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_tensors_of_weights_are_all_weights_but_vectors(precision: str) -> None:
    vision = VisionFormat("fp16")
    tensors = sum(nbytes * count for nbytes, count in weight_tensors(DIMS, precision, vision))
    whole = weight_bytes(DIMS, precision, "cuda", resident=True, vision=vision).total
    assert 0 < whole - tensors < 2 * MIB
    assert 0 < unused_weight_bytes(DIMS, precision, vision) < 2 * 600 * MIB


def test_the_tower_takes_what_the_provider_took_and_little_more() -> None:
    """162 MiB for five tiles of CLIP-L, and 106 for three beside its buffers."""
    assert 162 * MIB <= tower_bytes(DIMS, 5) <= 170 * MIB
    # Where the MLP is wider than all scores together, its tensors find no room among them.
    narrow = replace(DIMS.vision, image_size=70)
    scores, inner, hidden = (64 * 2 * 26 * size for size in (16 * 26, 4096, 1024))
    assert tower_bytes(replace(DIMS, vision=narrow), 64) >= 2 * scores + 2 * inner + 9 * hidden


def test_cublas_takes_what_its_documentation_says() -> None:
    found = [cublas_bytes(c) // MIB for c in ((7, 5), (8, 9), (9, 0), (10, 0), (12, 0))]
    assert found == [16, 16, 128, 128, 48]
