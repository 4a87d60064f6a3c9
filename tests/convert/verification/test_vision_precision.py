"""Verification of towers at 8 bits and of float16 towers with islands, sound and tampered with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.convert.quantization.vision.fp16_overflow import Float16Ranges
from llava_edge.convert.testing.random_outliers import plant_outliers
from llava_edge.convert.verification.structure.stage import structure_stage
from llava_edge.convert.verification.verifier import VerifyOptions, verify_artifact
from llava_edge.convert.verification.weights.stage import weights_stage
from llava_edge.profiles.boards.hardware import load_profile
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.artifact.certificate import StageResult
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.progress import no_progress
from tests.convert.quantization.vision.test_float16_guard import loud_mlp
from tests.faults.models.checkpoint_changes import rewrite
from tests.faults.models.tamper import Tampered

_BLOCK = "vision_tower.encoder.layers"
_FORMS: Mapping[str, tuple[str, str]] = {"loud": ("cpu-16gb", "int8"), "island": ("a100", "fp16")}


@pytest.fixture(scope="module")
def checkpoints(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """One with outlier channels, one that overflows float16 in layer 1."""
    place = tmp_path_factory.mktemp("vision")
    sizes = {"vision_hidden_size": 192, "vision_intermediate_size": 768}
    shutil.copytree(make_checkpoint("odd", **sizes), place / "loud")
    plant_outliers(place / "loud")
    shutil.copytree(make_checkpoint("odd"), place / "island")
    rewrite(place / "island", loud_mlp([1]))
    return {name: place / name for name in _FORMS}


@pytest.fixture(scope="module")
def artifacts(
    checkpoints: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    found = {}
    for name, (board, precision) in _FORMS.items():
        found[name] = tmp_path_factory.mktemp("artifact") / name
        request = ConvertRequest(
            checkpoint=str(checkpoints[name]),
            out=found[name],
            profile=load_profile(board),
            wishes=PlanRequest(precision=precision, context_tokens=1024),
            quantization=QuantizationRequest(quantizer="rtn"),
            verify="none",
        )
        convert_checkpoint(request, no_progress, lambda _: None)
    return found


@pytest.mark.parametrize("name", _FORMS)
def test_a_sound_tower_is_verified(
    name: str, artifacts: Mapping[str, Path], checkpoints: Mapping[str, Path]
) -> None:
    artifact = open_artifact(artifacts[name], verify_digests=False)
    checkpoint = open_checkpoint(checkpoints[name])
    certificate = verify_artifact(artifact, checkpoint, VerifyOptions(threads=1), no_progress)
    failed = [stage for stage in certificate.stages if stage.verdict == "fail"]
    assert failed == []
    facts = certificate.conversion["vision"]
    losses = {s.metric: s.value for s in certificate.stages if s.name == "quantization_loss"}
    if name == "island":
        assert list(facts["islands"]) == ["layers.1"]
        assert "tile_cosine_mean_loss" not in losses
        return
    assert facts["layers_in_float"] == {}
    assert facts["scaled_inputs"]
    assert 0 < losses["tile_cosine_mean_loss"] <= losses["tile_cosine_worst_loss"] < 1e-3
    # With the artifact's own weights, inputs scaled and rounded alike, what is left are some steps.
    gaps = [s.value for s in certificate.stages if s.name == "tile_features"]
    assert gaps[0] is not None
    assert gaps[0] < 0.02


def test_a_tower_that_overflows_without_islands_is_not_verified(
    checkpoints: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Float16Ranges, "wide", lambda *_: {})
    request = ConvertRequest(
        checkpoint=str(checkpoints["island"]),
        out=tmp_path / "bare",
        profile=load_profile("a100"),
        wishes=PlanRequest(precision="fp16", context_tokens=1024),
        verify="none",
    )
    convert_checkpoint(request, no_progress, lambda _: None)
    checkpoint = open_checkpoint(checkpoints["island"])
    options = VerifyOptions(threads=1)
    certificate = verify_artifact(
        open_artifact(tmp_path / "bare"), checkpoint, options, no_progress
    )
    failed = {stage.metric for stage in certificate.stages if stage.verdict == "fail"}
    # ONNX Runtime's CPU provider keeps float32 between nodes: only this stage sees it.
    assert failed == {"float16_cosine_loss"}


def _weights(folder: Path, checkpoint: Path) -> list[StageResult]:
    return weights_stage(open_artifact(folder, verify_digests=False), open_checkpoint(checkpoint))


def _first_scaled(copy: Tampered, end: str) -> tuple[str, int]:
    """A scaled layer by the end of its name, and its loudest channel."""
    scaled = copy.manifest["conversion"]["vision"]["scaled_inputs"]
    name = next(name for name in scaled if name.endswith(end))
    weights = np.abs(copy.tensor("vision", f"{name}.weight").astype(np.float32)).sum(1)
    return name, int(weights.argmax())


def _gain_by_two(copy: Tampered) -> None:
    name, channel = _first_scaled(copy, "fc1")
    norm = f"{name.removesuffix('.mlp.fc1')}.layer_norm2"

    def change(values: np.ndarray) -> np.ndarray:
        values[channel] *= 2
        return values

    for part in ("weight", "bias"):
        copy.change_tensor("vision", f"{norm}.{part}", change)


def _gain_by_a_little(copy: Tampered) -> None:
    name, channel = _first_scaled(copy, "fc1")

    def change(values: np.ndarray) -> np.ndarray:
        values[channel] *= np.float32(1.001)
        return values

    norm = f"{name.removesuffix('.mlp.fc1')}.layer_norm2"
    copy.change_tensor("vision", f"{norm}.weight", change)


def _other_factor(copy: Tampered) -> None:
    name, channel = _first_scaled(copy, "fc2")

    def change(values: np.ndarray) -> np.ndarray:
        values[channel] *= 2
        return values

    copy.change_tensor("vision", f"{name}.input_factor", change)


def _counts_forged(copy: Tampered) -> None:
    name, _ = _first_scaled(copy, "fc1")
    copy.manifest["conversion"]["vision"]["scaled_inputs"][name] += 1


def _one_code(copy: Tampered) -> None:
    name, channel = _first_scaled(copy, "fc1")

    def change(values: np.ndarray) -> np.ndarray:
        values[channel, 0] ^= 1
        return values

    copy.change_tensor("vision", f"{name}.weight", change)


def _scales_turned(copy: Tampered) -> None:
    copy.change_tensor("vision", f"{_BLOCK}.0.mlp.fc2.scales", lambda scales: scales[::-1])


@pytest.mark.parametrize(
    ("tamper", "metric", "says"),
    [
        (_gain_by_two, "differing_codes", "what its input is divided by is not what the manifest"),
        (_gain_by_a_little, "differing_tensors", "layer_norm2.weight: 1 of 192 values differ"),
        (_other_factor, "differing_codes", "what its input is divided by is not what the manifest"),
        (
            _counts_forged,
            "differing_codes",
            "channels of its input are divided; manifest.json says",
        ),
        (_one_code, "differing_codes", "codes or scales are not those that were written"),
        (_scales_turned, "differing_codes", "codes or scales are not those that were written"),
    ],
)
def test_weights_of_an_int8_tower_are_compared(
    tamper: Callable[[Tampered], None],
    metric: str,
    says: str,
    artifacts: Mapping[str, Path],
    checkpoints: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    sound = _weights(artifacts["loud"], checkpoints["loud"])
    assert all(stage.verdict == "pass" for stage in sound)
    copy = Tampered(artifacts["loud"], tmp_path / "copy")
    tamper(copy)
    rows = _weights(copy.seal(), checkpoints["loud"])
    failed = {stage.metric: stage for stage in rows if stage.verdict == "fail"}
    assert metric in failed
    assert says in failed[metric].detail


def _as_float(copy: Tampered) -> None:
    copy.manifest["precision"]["vision_tower"] = "fp16"


def _one_in_float(copy: Tampered) -> None:
    facts = copy.manifest["conversion"]["vision"]
    facts["layers_in_float"] = {f"{_BLOCK}.0.mlp.fc1": {}}


def _row_size_forgotten(copy: Tampered) -> None:
    name = f"{_BLOCK}.1.mlp.fc1"
    output = copy.node("vision", name).output[0]
    (scaled,) = (n for n in copy.nodes("vision", "Mul") if n.input[0] == output)
    copy.bypass("vision", scaled.name)


def _no_factor(copy: Tampered) -> None:
    name, _ = _first_scaled(copy, "fc2")
    factor = f"{name}.input_factor"
    (scaled,) = (n for n in copy.nodes("vision", "Mul") if factor in n.input)
    copy.bypass("vision", scaled.name)


def _island_rounds_in_between(copy: Tampered) -> None:
    graph = copy.model("vision").graph
    # Layer 1 is the island.
    inner = copy.nodes("vision", "Sigmoid")[1]
    casts = [
        helper.make_node("Cast", [inner.input[0]], ["half"], name="half", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["again"], name="again", to=TensorProto.FLOAT),
    ]
    inner.input[0] = "again"
    place = list(graph.node).index(inner)
    for cast in reversed(casts):
        graph.node.insert(place, cast)


def _wide_weights_denied(copy: Tampered) -> None:
    copy.manifest["conversion"]["vision"]["weights_in_float32"] -= 5


def _float_weights_invented(copy: Tampered) -> None:
    copy.manifest["conversion"]["vision"]["weights_in_float"] = 5


def _island_gone(copy: Tampered) -> None:
    copy.manifest["conversion"]["vision"]["float32_nodes"].pop()


def _island_of_one_more(copy: Tampered) -> None:
    copy.manifest["conversion"]["vision"]["float32_nodes"].append(f"{_BLOCK}.2.mlp.fc1")


@pytest.mark.parametrize(
    ("name", "tamper", "says"),
    [
        ("loud", _as_float, "operator is MatMulIntegerToFloat; manifest.json says MatMul"),
        ("loud", _one_in_float, "operator is MatMulIntegerToFloat; manifest.json says MatMul"),
        ("loud", _row_size_forgotten, "must be there"),
        ("loud", _no_factor, "factor in front of it is None; the file says"),
        ("island", _island_gone, "computes in float32; manifest.json says otherwise"),
        ("island", _island_of_one_more, "computes in float16; manifest.json says otherwise"),
        ("island", _island_rounds_in_between, "it widens what was rounded to float16 before"),
        ("island", _wide_weights_denied, "(weights_in_float32)"),
        ("loud", _float_weights_invented, "0 weights are wide; manifest.json says 5"),
    ],
)
def test_the_form_of_a_tower_is_what_the_manifest_says(
    name: str,
    tamper: Callable[[Tampered], None],
    says: str,
    artifacts: Mapping[str, Path],
    checkpoints: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    checkpoint = open_checkpoint(checkpoints[name])
    sound = structure_stage(open_artifact(artifacts[name], verify_digests=False), checkpoint)
    assert sound.verdict == "pass", sound.detail
    copy = Tampered(artifacts[name], tmp_path / "copy")
    tamper(copy)
    row = structure_stage(open_artifact(copy.seal(), verify_digests=False), checkpoint)
    assert row.verdict == "fail"
    assert says in row.detail


def test_a_tower_of_8_bits_asks_for_wide_sums_where_the_processor_needs_them(
    artifacts: Mapping[str, Path], tmp_path: Path
) -> None:
    from llava_edge.runtime.backends.cpu_isa import needs_wide_sums

    precision = open_artifact(artifacts["loud"], verify_digests=False).manifest.precision
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : avx2\n")
    nbits = replace(precision, int8_route="nbits")
    assert needs_wide_sums(nbits, cpuinfo, "x86_64")
    assert not needs_wide_sums(replace(nbits, vision_tower="fp16"), cpuinfo, "x86_64")
