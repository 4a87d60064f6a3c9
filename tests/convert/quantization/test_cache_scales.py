"""Scales of an int8 KV cache: taken from the float cache on samples, and kept with the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_edge.convert.onnx.graph_file import GraphFile
from llava_edge.convert.onnx.int8_kv_cache import scales_digest
from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization import kv_cache_scales as cache_scales
from llava_edge.convert.quantization.calibration.calibration_set import (
    CalibrationSample,
    CalibrationSet,
)
from llava_edge.convert.quantization.kv_cache_scales import (
    HEADROOM,
    NUM_SAMPLES,
    QUIET,
    calibrate_cache,
)
from llava_edge.convert.verification.structure.int8_cache import read_scales
from llava_edge.convert.writing.artifact_builder import PartBuilders
from llava_edge.profiles.boards.hardware import load_profile
from llava_edge.profiles.errors import CheckpointError, RequestError
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.util.progress import no_progress

LENGTHS = (40, 7)


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Artifact:
    return open_artifact(make_artifact(make_checkpoint("odd", backbone="mistral"), cache="int8"))


def rows_of(artifact: Artifact) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    hidden = artifact.manifest.model.text.hidden_size
    return [random.normal(0, 0.5, (count, hidden)).astype(np.float32) for count in LENGTHS]


def samples_of(rows: list[np.ndarray]) -> CalibrationSet:
    return CalibrationSet(
        tuple(
            CalibrationSample(str(place), np.zeros(len(each), np.uint8), lambda each=each: each)
            for place, each in enumerate(rows)
        ),
        "digest",
        {"source": "drawn here"},
    )


def test_a_scale_is_the_largest_value_that_the_float_cache_held(
    artifact: Artifact, tmp_path: Path
) -> None:
    manifest, rows = artifact.manifest, rows_of(artifact)
    text = manifest.model.text
    graph = artifact.path(manifest.decoder.file)

    scales, facts = calibrate_cache(
        graph, manifest.model, manifest.precision, samples_of(rows), tmp_path, no_progress
    )

    # The whole decoder at once, which has layers, chunks and cache of its own.
    largest = np.zeros((2, text.num_hidden_layers, text.num_key_value_heads, text.head_dim))
    for each in rows:
        decoder = Decoder(Session(graph, SessionOptions(threads=1)), text, 64, 64, np.float32)
        decoder.prefill(len(each), lambda start, stop, out, each=each: out.__setitem__(..., each))
        for part, name in enumerate(("key", "value")):
            for layer in range(text.num_hidden_layers):
                seen = np.abs(decoder.cache.part(layer, name)).max(1)
                largest[part, layer] = np.maximum(largest[part, layer], seen)
    reach = HEADROOM * np.maximum(largest, QUIET * np.median(largest, -1, keepdims=True))
    np.testing.assert_allclose(scales.key * 127, reach[0], rtol=1e-3)
    np.testing.assert_allclose(scales.value * 127, reach[1], rtol=1e-3)
    assert facts["scales_sha256"] == scales_digest(scales.key, scales.value)
    assert facts["calibration"] == {"source": "drawn here"}
    assert not list(tmp_path.iterdir())


def test_what_was_calibrated_stands_in_the_graph_and_in_the_manifest(artifact: Artifact) -> None:
    manifest = artifact.manifest
    facts = manifest.conversion["int8_cache"]
    graph = GraphFile(artifact.path(manifest.decoders["int8"].file), "decoder")

    scales = read_scales(graph, manifest.model.text.num_hidden_layers)

    assert scales_digest(*scales) == facts["scales_sha256"]
    assert facts["calibration"]["num_samples"] == NUM_SAMPLES
    assert facts["headroom"] == HEADROOM


def test_a_channel_that_nothing_moves_has_a_scale_all_the_same(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cache_scales._largest

    def largest(*given: object) -> np.ndarray:
        found = real(*given)  # type: ignore[arg-type]
        found[1, 0, 0, 3] = 0
        return found

    monkeypatch.setattr(cache_scales, "_largest", largest)
    manifest = artifact.manifest
    graph = artifact.path(manifest.decoder.file)
    given = samples_of(rows_of(artifact))
    scales, facts = calibrate_cache(
        graph, manifest.model, manifest.precision, given, tmp_path, no_progress
    )

    assert facts["idle_channels"] == 1
    assert scales.value[0, 0, 3] > 0


def test_a_quiet_channel_gets_room_by_the_median_of_its_head_and_not_by_the_loudest() -> None:
    head = np.array([1, 1, 0, 0.5, 60], np.float32)
    silent = np.zeros(5, np.float32)

    steps = cache_scales._steps(np.stack([head, silent])) * 127 / HEADROOM

    np.testing.assert_allclose(steps[0], [2, 2, 2, 2, 60], rtol=1e-6)
    assert (steps[1] > 0).all()


def test_keys_that_are_not_finite_stop_the_conversion(artifact: Artifact, tmp_path: Path) -> None:
    rows = rows_of(artifact)
    rows[0][3] = np.inf
    manifest = artifact.manifest

    with pytest.raises(CheckpointError, match=r"layer 0 are not finite.*without --cache int8"):
        calibrate_cache(
            artifact.path(manifest.decoder.file),
            manifest.model,
            manifest.precision,
            samples_of(rows),
            tmp_path,
            no_progress,
        )
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_was_stopped_goes_on_and_calibrates_once_more(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ConvertRequest(
        checkpoint=str(make_checkpoint("odd", backbone="mistral")),
        out=tmp_path / "artifact",
        wishes=PlanRequest(precision="fp16", cache="int8"),
        verify="none",
    )
    real = PartBuilders.int8_cache
    built: list[str] = []
    real_decoder = PartBuilders.decoder

    def decoder(*given: object) -> object:
        built.append("decoder")
        return real_decoder(*given)  # type: ignore[arg-type]

    def stopped(*given: object) -> object:
        real(*given)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(PartBuilders, "decoder", decoder)
    with monkeypatch.context() as patch:
        patch.setattr(PartBuilders, "int8_cache", stopped)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(request, no_progress, print)
    parts = json.loads((tmp_path / "artifact.partial" / "journal.json").read_text())["parts"]
    assert "decoder" in parts
    assert "int8_cache" not in parts
    assert not list((tmp_path / "artifact.partial").rglob("int8_cache.onnx"))

    conversion = convert_checkpoint(request, no_progress, print)

    assert built == ["decoder"]
    assert set(open_artifact(conversion.folder).manifest.decoders) == {"float32", "int8"}


def test_a_gpu_without_a_kernel_for_it_gets_none(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    request = ConvertRequest(
        checkpoint=str(make_checkpoint("odd", backbone="mistral")),
        out=tmp_path / "artifact",
        profile=load_profile("t4"),
        wishes=PlanRequest(precision="fp16", cache="int8"),
        verify="none",
    )
    with pytest.raises(RequestError, match=r"cache int8 was asked, but .* this one has 7\.5"):
        convert_checkpoint(request, no_progress, print)
    assert not list(tmp_path.iterdir())


def test_the_cuda_target_has_scales_of_its_own_float16_cache(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path], artifact: Artifact
) -> None:
    checkpoint = make_checkpoint("odd", backbone="mistral")
    made = open_artifact(make_artifact(checkpoint, cache="int8", profile="a100"))
    manifest = made.manifest

    assert set(manifest.decoders) == {"float16", "int8"}
    inputs = {tensor.name: tensor.dtype for tensor in manifest.decoders["int8"].inputs}
    assert inputs["past_key_values.0.key"] == "int8"
    assert inputs["inputs_embeds"] == "float16"
    found, same = (
        read_scales(GraphFile(each.path(each.manifest.decoders["int8"].file), "decoder"), 2)
        for each in (made, artifact)
    )
    for ours, theirs in zip(found, same, strict=True):
        # The same samples and weights: another rounding of what was seen, and no more.
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0.02)
