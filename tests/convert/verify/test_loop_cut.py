"""A decoder too large to hold runs the whole loop on a cut of its first layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.convert.verify.reference.answer import Reference
from llava_edge.convert.verify.reference.probes import probes_for
from llava_edge.convert.verify.reference.streamed_model import StreamedModel
from llava_edge.convert.verify.runner.artifact_runner import ArtifactRunner
from llava_edge.convert.verify.runner.loop_cut import LoopCut, loop_cut
from llava_edge.convert.verify.stages.greedy import greedy_tokens
from llava_edge.convert.verify.verifier import VerifyOptions, open_reference, verify_artifact
from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.certificate import Certificate, StageResult
from llava_edge.runtime.artifact.graph_signature import check_interfaces
from llava_edge.runtime.artifact.graph_validation import graph_faults
from llava_edge.runtime.artifact.onnx_proto import read_onnx_header
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import no_progress
from llava_edge.runtime.verification.tolerances import bounds_for
from llava_edge.runtime.vision.encoder import VisionEncoder
from tests.convert.verify.fault_models import FaultModels, Made
from tests.convert.verify.faults_runtime import FAULTS
from tests.support.tiers import one_of_each

MODELS = ("qwen2", "int8", "int8 cache cuda")
_BYTES = 1
"""Of memory: room for one layer at a time, which is the least that is taken."""


def verified(made: Made, artifact: Path, memory_bytes: int | None = _BYTES) -> Certificate:
    opened = open_artifact(artifact, verify_digests=False)
    options = VerifyOptions("quick", memory_bytes, threads=1)
    return verify_artifact(opened, made.checkpoint, options, no_progress)


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
    with ArtifactRunner(artifact, _BYTES, threads=1) as subject, loop_cut(subject) as cut:
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

    with ArtifactRunner(artifact, None, threads=1) as subject, loop_cut(subject) as cut:
        assert cut.artifact is artifact
        assert str(cut) == "the loop ran on all 3 layers"
        assert cut.reference_layers is None


def test_what_a_cut_opened_is_closed_and_the_artifact_stays_open(models: FaultModels) -> None:
    artifact = open_artifact(models["qwen2"].artifact, verify_digests=False)
    with ArtifactRunner(artifact, _BYTES, threads=1) as subject:
        with loop_cut(subject) as cut:
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


@pytest.mark.parametrize(
    "fault",
    one_of_each(lambda _: "", (each for each in FAULTS if each.id.startswith("token before"))),
    ids=lambda f: f.id,
)
def test_a_fault_of_the_loop_is_found_on_a_cut(models: FaultModels, fault: object) -> None:
    made = models[fault.model]  # type: ignore[attr-defined]
    made.artifact  # noqa: B018
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)  # type: ignore[attr-defined]

        certificate = verified(made, made.artifact)

    assert certificate.verdict == "fail"
    assert {s.name for s in certificate.stages if s.verdict == "fail"} == {"greedy", "loop"}


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
    bounds = bounds_for(artifact.manifest.flavour, artifact.manifest.precision)
    with ArtifactRunner(artifact, _BYTES, threads=1) as subject:
        _, row = greedy_tokens(subject, probes, reference, bounds, threads=1)

    assert row.verdict == "pass"
    assert sum(tiles) == sum(len(each) for p in probes for each in reference.inputs(p).pixel_values)
