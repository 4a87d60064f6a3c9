"""A trained language model through the whole main job: ``make test-nightly`` writes it first."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import QuantizationRequest, Quantizer
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.cli.main import main
from llava_edge.runtime.util.progress import no_progress
from tests.nightly.rounding_loss import TEXTS, Loss, Reference

pytestmark = pytest.mark.nightly

_CHECKPOINT = Path(__file__).parents[2] / "build/real-model/checkpoint"
_PRECISIONS = ("fp16", "int8", "int4")
_CAPITAL = "What is the capital of France?"
_MOST_LOSS = {"fp16": 1e-6, "int8": 0.02, "int4": 0.6}
"""Nats a position against the checkpoint's own weights."""
_MOST_NATS = 0.006
_MOST_OTHER_CHOICES = 0.03
"""At int8, of 833 positions of English in two texts. Of one text 3 % are 12 positions, and chance
moves that number by three."""

ArtifactOf = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    assert _CHECKPOINT.is_dir(), "the real model is not there: run make real-model"
    return _CHECKPOINT


@pytest.fixture(scope="module")
def artifact_of(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ArtifactOf:
    """``artifact_of(precision, quantizer)``: converted once and verified (quick)."""

    @cache
    def make(precision: str, quantizer: Quantizer = "gptq") -> Path:
        request = ConvertRequest(
            checkpoint=str(checkpoint),
            out=tmp_path_factory.mktemp("real") / f"{precision}-{quantizer}",
            wishes=PlanRequest(precision=precision, context_tokens=2048),
            quantization=QuantizationRequest(quantizer, num_samples=4),
        )
        return convert_checkpoint(request, no_progress, print).folder

    return make


@pytest.mark.parametrize("precision", _PRECISIONS)
def test_it_is_converted_verified_and_answers(artifact_of: ArtifactOf, precision: str) -> None:
    artifact = open_artifact(artifact_of(precision), require_verified=True)

    assert artifact.certificate is not None
    losses = {s.metric: s.value for s in artifact.certificate.stages if s.question == "loss"}
    assert losses["kl_divergence"] is not None
    assert losses["kl_divergence"] <= _MOST_LOSS[precision], losses
    with LlavaEdge.over(artifact, "cpu") as model:
        answer = model.generate(_CAPITAL, max_new_tokens=32)
        chat = model.chat()
        chat.send("What is the capital of Spain?", max_new_tokens=32)
        second = chat.send("And of France?", max_new_tokens=32)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop"
    assert second.reused_tokens > 0
    # At 4 bits a model of 135 million weights no longer knows it in a second turn.
    assert "Paris" in second.text or precision == "int4"


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_int8_loses_little_and_changes_few_choices_on_english(
    artifact_of: ArtifactOf, checkpoint: Path, quantizer: Quantizer
) -> None:
    losses = [
        Reference(checkpoint, text.read_text(encoding="utf-8")).artifact(
            artifact_of("int8", quantizer)
        )
        for text in TEXTS
    ]

    assert max(loss.nats for loss in losses) <= _MOST_NATS, losses
    others = sum(loss.other_choices for loss in losses) / len(losses)
    assert others <= _MOST_OTHER_CHOICES, losses


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_int4_loses_what_rounding_its_weights_costs(
    artifact_of: ArtifactOf, checkpoint: Path, text: Path
) -> None:
    reference = Reference(checkpoint, text.read_text(encoding="utf-8"))

    loss = reference.artifact(artifact_of("int4"))

    with reference.with_weights_of(artifact_of("int4")):
        alone = Loss.of(reference.run(), reference.logits)
    assert loss.nats <= 1.15 * alone.nats, (loss, alone)


@pytest.mark.parametrize("precision", _PRECISIONS)
def test_the_full_verification_passes(
    artifact_of: ArtifactOf,
    checkpoint: Path,
    precision: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(artifact_of(precision))

    code = main(["verify", folder, "--against", str(checkpoint), "--verify", "full", "--json"])

    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["verdict"] == "pass", document
    assert code == 0
    assert main(["verify", folder, "--on-device"]) == 0


def test_behind_a_finished_answer_it_stops_at_once(artifact_of: ArtifactOf) -> None:
    prompt = f"<|im_start|>user\n{_CAPITAL}<|im_end|>\n<|im_start|>assistant\n"

    with LlavaEdge.load(artifact_of("fp16"), require_verified=True) as model:
        answer = model.generate(f"{prompt}The capital of France is Paris.", raw=True)

    assert answer.text == ""
    assert answer.token_ids == model.artifact.manifest.tokens.stop
    assert answer.finish_reason == "stop"
