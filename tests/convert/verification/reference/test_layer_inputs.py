"""What layers read is kept when the reference answers, and is not computed a second time."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.convert.verification.reference.probes import asked_again, probes_for
from llava_edge.convert.verification.reference.scratch_folder import ScratchFolder
from llava_edge.convert.verification.reference.streamed_model import StreamedModel
from llava_edge.convert.verification.verifier import VerifyOptions, open_reference, verify_artifact
from llava_edge.runtime.artifact.certificate import Certificate
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.progress import no_progress
from tests.faults.models.fault_models import FaultModels, Made


def verified(made: Made) -> Certificate:
    artifact = open_artifact(made.artifact, verify_digests=False)
    return verify_artifact(
        artifact, made.checkpoint, VerifyOptions("quick", None, threads=1), no_progress
    )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers of every run of the reference over whole prompts, by tokens."""
    found: list[int] = []
    real = StreamedModel.hidden

    def hidden(self: StreamedModel, rows: Any, layers: int | None = None) -> Any:
        found.append(len(rows))
        return real(self, rows, layers)

    monkeypatch.setattr(StreamedModel, "hidden", hidden)
    return found


def test_each_probe_is_read_once_by_each_reference_and_once_with_the_artifacts_answer(
    models: FaultModels, runs: list[int]
) -> None:
    made = models["int8"]
    made.artifact  # noqa: B018
    runs.clear()

    certificate = verified(made)

    assert certificate.verdict == "pass"
    assert "layers" in {stage.name for stage in certificate.stages}
    # With the artifact's weights, with the checkpoint's, and what the artifact answered.
    assert len(runs) == 3 * 2


def test_what_was_kept_is_what_a_run_of_its_own_gives(models: FaultModels) -> None:
    made = models["int8"]
    artifact = open_artifact(made.artifact, verify_digests=False)
    reference = open_reference(artifact, made.checkpoint)
    probe = asked_again(probes_for(artifact.manifest, "quick"))[1]
    answer = reference.answer(probe, remember=True)
    count = artifact.manifest.model.text.num_hidden_layers

    def layers() -> list[Any]:
        kept = reference.layer_inputs(answer)
        return [*(kept.load(layer) for layer in range(count + 1)), kept.normed]

    during = layers()
    reference.close()
    # Answers stay; what lay in files is computed anew.
    after = layers()
    reference.close()

    assert len(during) == count + 2
    np.testing.assert_array_equal(during[0], answer.embeddings)
    for ours, theirs in zip(during, after, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_forms_whose_layers_are_not_compared_keep_nothing(
    models: FaultModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nobody reads it")

    monkeypatch.setattr(np, "save", refuse)

    assert verified(models["qwen2"]).verdict == "pass"


def test_a_full_disk_fails_the_layers_alone_and_says_why(
    models: FaultModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = models["int8"]
    made.artifact  # noqa: B018

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    certificate = verified(made)

    failed = [stage for stage in certificate.stages if stage.verdict == "fail"]
    assert {stage.name for stage in failed} >= {"layers"}
    assert not {stage.name for stage in failed} & {"tile_features", "prefill_logits", "golden"}
    assert any("No space left" in (stage.detail or "") for stage in failed)


def test_a_scratch_folder_goes_when_it_is_closed_and_may_be_used_again(tmp_path: Path) -> None:
    folder = ScratchFolder("llava-edge-test-")
    first = folder.path
    (first / "file").write_bytes(b"1")
    folder.close()
    assert not first.exists()

    second = folder.path
    assert second.is_dir()
    del folder
    assert not second.exists()
