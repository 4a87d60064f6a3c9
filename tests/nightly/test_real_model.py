"""A trained language model through the whole main job: ``make test-nightly`` writes it first."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.quantization import QuantizationRequest
from llava_edge.convert.request import ConvertRequest
from llava_edge.profiles.planner import PlanRequest
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact import open_artifact
from llava_edge.runtime.cli import main
from llava_edge.runtime.progress import no_progress

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

_CHECKPOINT = Path(__file__).parents[2] / "build/real-model/checkpoint"
_PRECISIONS = ("fp16", "int8", "int4")
_CAPITAL = "What is the capital of France?"
_MOST_LOSS = {"fp16": 1e-6, "int8": 0.1, "int4": 0.6}
"""Nats a position against the checkpoint's own weights."""

ArtifactOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    assert _CHECKPOINT.is_dir(), "the real model is not there: run make real-model"
    return _CHECKPOINT


@pytest.fixture(scope="module")
def artifact_of(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ArtifactOf:
    """``artifact_of(precision)``: converted once and verified (quick)."""

    @cache
    def make(precision: str) -> Path:
        request = ConvertRequest(
            checkpoint=str(checkpoint),
            out=tmp_path_factory.mktemp("real") / precision,
            wishes=PlanRequest(precision=precision, context_tokens=2048),
            quantization=QuantizationRequest(num_samples=4),
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


_TOO_COARSE = pytest.mark.xfail(
    reason="int8 on a CPU has one scale a row of activations; outliers of a trained model exceed "
    "the bound of prefill_logits on one of the full probes (0.35 of 0.22)",
    strict=True,
)


@pytest.mark.parametrize(
    "precision", [pytest.param(p, marks=_TOO_COARSE if p == "int8" else ()) for p in _PRECISIONS]
)
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
