"""A decoder too large to hold runs the whole loop on a cut of its first layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llava_edge.convert.verification import verifier
from llava_edge.convert.verification.reference.answer import Reference
from llava_edge.convert.verification.reference.probes import probes_for
from llava_edge.convert.verification.reference.streamed_model import StreamedModel
from llava_edge.convert.verification.runner import loop_cut as cutting
from llava_edge.convert.verification.runner.artifact_runner import ArtifactRunner
from llava_edge.convert.verification.runner.loop_cut import (
    LOOP_PRODUCTS,
    LoopCut,
    layer_weights,
    loop_cut,
    loop_layers,
)
from llava_edge.convert.verification.stages.greedy import greedy_tokens
from llava_edge.convert.verification.verifier import VerifyOptions, open_reference, verify_artifact
from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.profiles.models.variants import find_variant
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.certificate import Certificate, Mode, StageResult
from llava_edge.runtime.artifact.graph_signature import check_interfaces
from llava_edge.runtime.artifact.graph_validation import graph_faults
from llava_edge.runtime.artifact.onnx_proto import read_onnx_header
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import no_progress
from llava_edge.runtime.verification.tolerances import bounds_for
from llava_edge.runtime.vision.encoder import VisionEncoder
from tests.faults.models.fault_models import FaultModels, Made
from tests.faults.seeded.model.faults_runtime import FAULTS
from tests.support.tiers import one_of_each

MODELS = ("qwen2", "int8", "int8 cache cuda")
_BYTES = 1
"""Of memory: room for one layer at a time, which is the least that is taken."""


def verified(
    made: Made, artifact: Path, memory_bytes: int | None = _BYTES, mode: Mode = "quick"
) -> Certificate:
    opened = open_artifact(artifact, verify_digests=False)
    options = VerifyOptions(mode, memory_bytes, threads=1)
    return verify_artifact(opened, made.checkpoint, options, no_progress)


@pytest.fixture
def costly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that cost more than ``quick`` spends on the loop, two layers at least."""
    monkeypatch.setattr(verifier, "LOOP_PRODUCTS", 1.0)
    monkeypatch.setattr(cutting, "_LEAST_LAYERS", 2)


def loop_row(certificate: Certificate) -> StageResult:
    return [stage for stage in certificate.stages if stage.name == "greedy"][-1]


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_answers_as_the_reference_cut_at_the_same_layer(
    models: FaultModels, name: str
) -> None:
    made = models[name]
    artifact = open_artifact(made.artifact, verify_digests=False)
    reference = open_reference(artifact, made.checkpoint)
    probe = probes_for(artifact.manifest, "quick")[1]
    forced = np.arange(20, 36)
    with ArtifactRunner(artifact, _BYTES, threads=1) as subject, loop_cut(subject, 1) as cut:
        assert (cut.num_layers, cut.reference_layers) == (1, 1)
        check_interfaces(cut.artifact)
        for spec in cut.artifact.manifest.decoders.values():
            header = read_onnx_header(cut.artifact.files[spec.file])
            sizes = {"weights.bin": artifact.manifest.files["decoder/weights.bin"].bytes}
            assert graph_faults(header, sizes) == []
        with cut.load(threads=1, context_tokens=640, prefix_reuse=False) as model:
            ours = model.teacher_forced_logits(
                probe.prompt(raw=artifact.manifest.prompt is None), probe.arrays(), forced
            )
    inputs = reference.inputs(probe)
    theirs = reference.following(inputs, forced.tolist(), layers=1)
    whole = reference.following(inputs, forced.tolist())

    gap = {"qwen2": 1e-4, "int8": 0.05, "int8 cache cuda": 0.015}[name]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=gap * np.ptp(theirs))
    # With all layers it says something else: the cut is no accident.
    assert np.abs(theirs - whole).max() > 0.1 * np.ptp(whole)


def test_an_artifact_that_fits_runs_whole(models: FaultModels) -> None:
    artifact = open_artifact(models["qwen2"].artifact, verify_digests=False)

    with ArtifactRunner(artifact, None, threads=1) as subject, loop_cut(subject, 3) as cut:
        assert cut.artifact is artifact
        assert str(cut) == "the loop ran on all 3 layers"
        assert cut.reference_layers is None


def test_what_a_cut_opened_is_closed_and_the_artifact_stays_open(models: FaultModels) -> None:
    artifact = open_artifact(models["qwen2"].artifact, verify_digests=False)
    with ArtifactRunner(artifact, _BYTES, threads=1) as subject:
        with loop_cut(subject, 1) as cut:
            graph = cut.artifact.files[cut.artifact.manifest.decoder.file]
            assert graph.path.exists()
            cut.load(threads=1).close()

        assert not graph.path.exists()
        with pytest.raises(Exception, match="closed"):
            graph.descriptor  # noqa: B018
        whole = artifact.files[artifact.manifest.decoder.file]
        assert whole.descriptor >= 0
        assert whole.path == artifact.path(artifact.manifest.decoder.file)


def test_the_certificate_says_which_layers_the_loop_ran_on(models: FaultModels) -> None:
    made = models["int8"]

    certificate = verified(made, made.artifact)

    assert certificate.verdict == "pass"
    row = loop_row(certificate)
    assert row.metric == "differing_from_own_logits"
    assert row.detail.endswith(
        "the loop ran on a cut: the first 1 of 2 layers with the final norm and the head behind "
        "them"
    )


SMALL = TextDims(
    **{
        **vars(find_variant("llava-v1.6-mistral-7b").dims.text),
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    }
)
"""Of 135 million weights."""
MIDDLE = replace(
    find_variant("llava-v1.6-mistral-7b").dims.text,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
)


@pytest.mark.parametrize(
    ("text", "tokens", "is_whole", "beside_head", "layers"),
    [
        (SMALL, 600, True, 30, 30),
        (SMALL, 4000, True, 30, 28),
        (MIDDLE, 300, True, 16, 16),
        (MIDDLE, 1900, True, 16, 4),
        (MIDDLE, 1900, False, 15, 4),
        (find_variant("llava-v1.6-mistral-7b").dims.text, 1900, False, 3, 3),
    ],
)
def test_the_loop_runs_on_as_many_layers_as_memory_and_cost_allow(
    text: TextDims, tokens: int, is_whole: bool, beside_head: int, layers: int
) -> None:
    subject: Any = SimpleNamespace(
        dims=SimpleNamespace(text=text), is_whole=is_whole, layers_beside_head=beside_head
    )

    assert loop_layers(subject, tokens, LOOP_PRODUCTS) == layers
    assert loop_layers(subject, tokens, None) == beside_head
    if 4 < layers < text.num_hidden_layers:
        assert layers * layer_weights(text) * tokens <= LOOP_PRODUCTS


@pytest.mark.usefixtures("costly")
@pytest.mark.parametrize(("mode", "layers"), [("quick", 2), ("full", 3)])
def test_the_loop_of_a_costly_model_runs_on_a_cut_in_quick_alone(
    models: FaultModels, mode: Mode, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier, "memory_stage", lambda *_: None)
    made = models["qwen2"]

    certificate = verified(made, made.artifact, None, mode)

    assert certificate.verdict == "pass"
    told = f"first {layers} of 3 layers" if layers < 3 else "the loop ran on all 3 layers"
    assert told in (loop_row(certificate).detail or "")


LOOP_FAULTS = [each for each in FAULTS if each.id.startswith("token before")]


def fault_stages(made: Made, fault: Any, memory_bytes: int | None) -> set[str]:
    made.artifact  # noqa: B018
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        certificate = verified(made, made.artifact, memory_bytes)
    assert certificate.verdict == "fail"
    return {s.name for s in certificate.stages if s.verdict == "fail"}


@pytest.mark.parametrize("fault", one_of_each(lambda _: "", LOOP_FAULTS), ids=lambda f: f.id)
def test_a_fault_of_the_loop_is_found_on_a_cut(models: FaultModels, fault: Any) -> None:
    assert fault_stages(models[fault.model], fault, _BYTES) == {"greedy", "loop"}


@pytest.mark.usefixtures("costly")
@pytest.mark.parametrize("fault", one_of_each(lambda _: "", LOOP_FAULTS), ids=lambda f: f.id)
def test_a_fault_of_the_loop_is_found_on_a_cut_for_cost(models: FaultModels, fault: Any) -> None:
    assert fault_stages(models[fault.model], fault, None) == {"greedy", "loop"}


def test_a_cut_at_another_layer_than_the_references_is_found(
    models: FaultModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be seen if the cut were no exact one."""
    real = Reference.following
    monkeypatch.setattr(
        Reference, "following", lambda self, inputs, tokens, layers: real(self, inputs, tokens, 2)
    )
    made = models["qwen2"]

    assert [s.name for s in verified(made, made.artifact).stages if s.verdict == "fail"] == [
        "greedy"
    ]


def test_without_memory_for_a_cut_the_certificate_says_that_the_loop_was_not_run(
    models: FaultModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> LlavaEdge:
        raise OutOfMemoryError("3 GiB are free; 4 GiB are needed")

    monkeypatch.setattr(LoopCut, "load", refuse)
    made = models["qwen2"]

    small, whole = (verified(made, made.artifact, memory) for memory in (_BYTES, None))

    assert small.verdict == "pass"
    assert loop_row(small).metric == "loop_not_run"
    assert loop_row(small).detail == ("the loop was not run: 3 GiB are free; 4 GiB are needed")
    # Where the model fits, not to run it is a fault.
    assert whole.verdict == "fail"


def test_the_loop_runs_each_tower_once_a_picture(
    models: FaultModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model of the released size towers are half of the time."""
    artifact = open_artifact(models["qwen2"].artifact, verify_digests=False)
    reference = models["qwen2"].reference("quick")
    probes = probes_for(artifact.manifest, "quick")
    tiles: list[int] = []
    real = VisionEncoder.encode

    def encode(self: VisionEncoder, pixels: Array, *rest: Any) -> None:
        tiles.append(len(pixels))
        real(self, pixels, *rest)

    def embed(*_: object) -> None:
        raise AssertionError("the reference remembers these prompts")

    monkeypatch.setattr(VisionEncoder, "encode", encode)
    monkeypatch.setattr(StreamedModel, "embed", embed)
    bounds = bounds_for(artifact.manifest.target, artifact.manifest.precision)
    with ArtifactRunner(artifact, _BYTES, threads=1) as subject:
        _, row = greedy_tokens(subject, probes, reference, bounds, threads=1)

    assert row.verdict == "pass"
    assert sum(tiles) == sum(len(each) for p in probes for each in reference.inputs(p).pixel_values)
