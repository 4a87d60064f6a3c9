from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llava_edge.profiles.boards.nvml import Gpu, GpuReport
from llava_edge.profiles.errors import EngineError, OutOfMemoryError, RequestError
from llava_edge.profiles.memory.buffers import MIN_TEXT_TOKENS, CacheType
from llava_edge.profiles.memory.estimate import Workload
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.memory_estimate import planned_memory
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.loading import memory_fit as load_fit
from llava_edge.runtime.loading import placement
from llava_edge.runtime.loading.memory_fit import LoadFit, fit_at_load, least_context


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Artifact:
    return open_artifact(make_artifact(make_checkpoint("odd"), context_tokens=2048))


def needed(artifact: Artifact, context: int) -> int:
    """Host bytes of the largest request, without this process."""
    work = Workload(context, tiles_per_image=5)
    peak = planned_memory(artifact.manifest, work).host_peak
    return replace(peak, process=0).total


@pytest.fixture(scope="module")
def with_int8(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Artifact:
    made = make_artifact(make_checkpoint("odd"), context_tokens=2048, cache="int8")
    return open_artifact(made)


def needed_with(artifact: Artifact, context: int, cache: CacheType) -> int:
    work = Workload(context, tiles_per_image=5, cache=cache)
    return replace(planned_memory(artifact.manifest, work).host_peak, process=0).total


def test_an_int8_cache_keeps_the_context_where_a_float_one_does_not_fit(
    with_int8: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    floats, int8 = (needed_with(with_int8, 2048, kind) for kind in ("float32", "int8"))
    assert int8 < floats

    free(monkeypatch, floats)
    assert fit_at_load(with_int8, "cpu") == LoadFit(2048, "float32")

    free(monkeypatch, floats - 1)
    fit = fit_at_load(with_int8, "cpu")
    assert (fit.context_tokens, fit.cache) == (2048, "int8")
    assert fit.degraded[0].startswith("cache lowered from float32 to int8: its largest request")
    # The same for a context that was named; a cache that was named stays, and the context gives.
    assert fit_at_load(with_int8, "cpu", 2047).cache == "float32"
    assert fit_at_load(with_int8, "cpu", 2048).cache == "int8"
    named = fit_at_load(with_int8, "cpu", cache="float32")
    assert (named.context_tokens, named.cache) == (2047, "float32")

    free(monkeypatch, needed_with(with_int8, 1500, "int8"))
    fit = fit_at_load(with_int8, "cpu")
    assert (fit.context_tokens, fit.cache, len(fit.degraded)) == (1500, "int8", 2)
    assert "context lowered from 2048 to 1500" in fit.degraded[1]


def test_a_model_that_took_an_int8_cache_by_itself_says_so(
    with_int8: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LlavaEdge.load(with_int8.folder, threads=1, cache="int8") as asked:
        expected = asked.generate("Hello there", max_new_tokens=4)
    assert (asked.cache, expected.degraded) == ("int8", ())
    free(monkeypatch, needed_with(with_int8, 2048, "float32") - 1)

    with LlavaEdge.load(with_int8.folder, threads=1) as model:
        answer = model.generate("Hello there", max_new_tokens=4)

    assert (model.cache, model.context_tokens) == ("int8", 2048)
    assert answer.token_ids == expected.token_ids
    assert "cache lowered from float32 to int8" in answer.degraded[0]


def free(patch: pytest.MonkeyPatch, nbytes: int | None) -> None:
    for module in (load_fit, placement):
        patch.setattr(module, "available_host_bytes", lambda: nbytes)


def test_the_plan_is_taken_where_it_fits(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, needed(artifact, 2048))
    fit = fit_at_load(artifact, "cpu", None)
    assert (fit.context_tokens, fit.degraded) == (2048, ())

    free(monkeypatch, None)
    assert fit_at_load(artifact, "cpu", None).context_tokens == 2048


def test_one_byte_less_and_the_longest_context_that_fits_is_taken(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, needed(artifact, 2048) - 1)
    assert fit_at_load(artifact, "cpu", None).context_tokens == 2047

    free(monkeypatch, needed(artifact, 1500))
    fit = fit_at_load(artifact, "cpu", None)
    assert fit.context_tokens == 1500
    assert len(fit.degraded) == 1
    assert fit.degraded[0].startswith("context lowered from 2048 to 1500 tokens: its largest")


def test_the_vision_cache_counts(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, needed(artifact, 1500) + (1 << 20))

    assert fit_at_load(artifact, "cpu", None, 1 << 20).context_tokens == 1500


def test_a_context_has_room_for_an_image_and_text(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = least_context(artifact.manifest)
    assert least == 135 + MIN_TEXT_TOKENS

    # Requests then still give way one by one, so loading goes on below what the plan wants.
    free(monkeypatch, needed(artifact, least) - (1 << 20))
    assert fit_at_load(artifact, "cpu", None).context_tokens == least


def test_a_context_that_was_asked_for_is_not_touched(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, needed(artifact, 1500))
    fit = fit_at_load(artifact, "cpu", 1900)
    assert (fit.context_tokens, fit.degraded) == (1900, ())

    free(monkeypatch, 1 << 16)
    with pytest.raises(OutOfMemoryError, match="context of 1900 tokens"):
        fit_at_load(artifact, "cpu", 1900)


@pytest.mark.parametrize("asked", [0, -1, 2049, "many"])
def test_an_impossible_context_is_refused(artifact: Artifact, asked: object) -> None:
    with pytest.raises(RequestError, match=r"context"):
        fit_at_load(artifact, "cpu", asked)  # type: ignore[arg-type]


def test_a_gpu_that_others_use_as_well(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_artifact(make_checkpoint("odd"), profile="a100", context_tokens=2048)
    opened = open_artifact(made)
    work = Workload(1000, tiles_per_image=5, chunk_tokens=opened.manifest.prefill_chunk)
    estimate = planned_memory(opened.manifest, work)

    def with_gpu(device_free: int | None, host_free: int) -> int:
        gpu = Gpu("a GPU", None, device_free, "8.0")
        monkeypatch.setattr(load_fit, "read_gpus", lambda: GpuReport((gpu,)))
        free(monkeypatch, host_free)
        return fit_at_load(opened, "cuda", None).context_tokens

    host = replace(estimate.host_peak, process=0).total
    assert with_gpu(1 << 40, 1 << 40) == 2048
    assert with_gpu(estimate.device_bytes, 1 << 40) == 1000
    # One memory for both, as on a Jetson.
    assert with_gpu(None, estimate.device_bytes + host) == 1000


def test_what_was_made_for_a_gpu_takes_its_memory_from_the_host_on_a_cpu(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_artifact(make_checkpoint("odd"), profile="a100", context_tokens=2048)
    opened = open_artifact(made)
    work = Workload(1000, tiles_per_image=5, chunk_tokens=opened.manifest.prefill_chunk)
    estimate = planned_memory(opened.manifest, work)
    both = max(
        estimate.host[phase].total
        - estimate.host[phase].process
        + terms.total
        - terms.driver_context
        for phase, terms in estimate.device.items()
    )

    free(monkeypatch, both)
    assert fit_at_load(opened, "cpu").context_tokens == 1000
    free(monkeypatch, both - 1)
    assert fit_at_load(opened, "cpu").context_tokens == 999


def test_a_gpu_takes_an_int8_cache_where_its_kernels_read_one(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Ten layers: of a few, dequantising one would take what the codes save.
    checkpoint = make_checkpoint("odd", layers=10)
    made = make_artifact(checkpoint, profile="a100", context_tokens=2048, cache="int8")
    opened = open_artifact(made)
    floats, codes = (
        planned_memory(
            opened.manifest,
            Workload(
                2048, tiles_per_image=5, cache=kind, chunk_tokens=opened.manifest.prefill_chunk
            ),
        ).device_bytes
        for kind in ("float16", "int8")
    )
    assert codes < floats
    free(monkeypatch, 1 << 40)

    def with_gpu(capability: str | None, **asked: object) -> LoadFit:
        gpu = Gpu("a GPU", None, floats - 1, capability)
        monkeypatch.setattr(load_fit, "read_gpus", lambda: GpuReport((gpu,)))
        return fit_at_load(opened, "cuda", **asked)  # type: ignore[arg-type]

    for capability in ("8.0", "12.0", None):
        fit = with_gpu(capability)
        assert (fit.context_tokens, fit.cache) == (2048, "int8")
        assert fit.degraded[0].startswith("cache lowered from float16 to int8")
        assert with_gpu(capability, cache="int8") == LoadFit(2048, "int8")
    old = with_gpu("7.5")
    assert (old.context_tokens < 2048, old.cache) == (True, "float16")
    with pytest.raises(EngineError, match=r"int8 cache was asked, but .* this one has 7\.5"):
        with_gpu("7.5", cache="int8")
    # No GPU's kernels run where a processor does the work.
    assert fit_at_load(opened, "cpu", cache="int8").cache == "int8"


def test_the_loaded_model_and_its_answers_say_so(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LlavaEdge.load(artifact.folder, threads=1) as whole:
        expected = whole.generate("Hello there", max_new_tokens=4)
    free(monkeypatch, needed(artifact, 1500))

    with LlavaEdge.load(artifact.folder, threads=1) as model:
        answer = model.generate("Hello there", max_new_tokens=4)
        assert model.context_tokens == 1500

    assert model.degraded == answer.degraded
    assert "lowered from 2048 to 1500" in model.degraded[0]
    assert answer.token_ids == expected.token_ids
