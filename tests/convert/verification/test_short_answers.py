"""Models that stop at once or after a word: verified with evidence, and usable in every way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.verification.reference.probes import Probe, probes_for
from llava_edge.convert.verification.runner.losses import Losses
from llava_edge.convert.verification.stages import greedy as greedy_stage
from llava_edge.convert.verification.verifier import open_reference
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.cli.main import main
from llava_edge.runtime.util.progress import no_progress
from tests.faults.models.fault_models import FaultModels, Made, Model
from tests.support.conversion_cache import ConversionCache
from tests.support.tiers import slow_but

_FORMS = {
    "fp16": ("cpu-16gb", "fp16"),
    "int8": ("cpu-16gb", "int8"),
    "int4": ("cpu-16gb", "int4"),
    "cuda": ("a100", "fp16"),
}
_LENGTHS = {"no word": 1, "one word": 2}
"""Tokens of every answer, the stop token included."""


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, conversion_cache: ConversionCache
) -> FaultModels:
    made = {
        f"{words} {form}": Model(
            "mistral", precision=precision, board=board, alters=words, changes={"layers": 2}
        )
        for words in _LENGTHS
        for form, (board, precision) in _FORMS.items()
    }
    cache = Model("mistral", cache="int8", alters="no word", changes={"layers": 2})
    return FaultModels(
        tmp_path_factory.mktemp("short"), {**made, "int8 cache": cache}, conversion_cache
    )


@pytest.fixture
def silent(models: FaultModels) -> Made:
    return models["no word fp16"]


@pytest.mark.parametrize(
    ("words", "form"),
    slow_but(
        [("no word", "int8"), ("one word", "fp16")],
        [*(("no word", form) for form in _FORMS), ("one word", "fp16")],
    ),
)
def test_a_model_that_stops_early_passes_with_whole_answers_as_evidence(
    models: FaultModels, words: str, form: str
) -> None:
    made = models[f"{words} {form}"]

    certificate = made.verify(made.artifact)

    assert certificate.verdict == "pass", certificate.stages
    (loop,) = (s for s in certificate.stages if s.metric == "differing_from_own_logits")
    assert loop.detail.startswith("128 tokens of answers")


def test_a_silent_model_with_an_int8_cache_passes(models: FaultModels) -> None:
    made = models["int8 cache"]

    assert made.verify(made.artifact, "full").verdict == "pass"


def test_too_few_tokens_are_no_evidence_about_the_loop(
    silent: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy_stage, "NUM_STEPS", 1)

    certificate = silent.verify(silent.artifact)

    (loop,) = (s for s in certificate.stages if s.metric == "differing_from_own_logits")
    assert loop.verdict == certificate.verdict == "inconclusive"
    assert loop.detail.startswith("2 tokens of answers")
    assert "needed are 64" in loop.detail


@pytest.mark.parametrize("words", _LENGTHS)
def test_an_answer_ends_with_its_first_stop_token(models: FaultModels, words: str) -> None:
    artifact = open_artifact(models[f"{words} fp16"].artifact, verify_digests=False)
    (stop,) = artifact.manifest.tokens.stop
    for lookup in (0, 8):
        with LlavaEdge.over(artifact, "cpu") as model:
            answer = model.generate(
                "Say it again, again, again.", max_new_tokens=9, prompt_lookup_num_tokens=lookup
            )
            shortest = model.generate("Hello", max_new_tokens=1)
        assert len(answer.token_ids) == _LENGTHS[words]
        assert answer.token_ids[-1] == stop
        assert answer.finish_reason == "stop"
        assert bool(answer.text) == (words == "one word")
        assert shortest.token_ids == answer.token_ids[:1]
        assert shortest.finish_reason == ("stop" if words == "no word" else "length")


def test_a_conversation_goes_on_after_empty_answers(silent: Made) -> None:
    with LlavaEdge.over(open_artifact(silent.artifact, verify_digests=False), "cpu") as model:
        chat = model.chat()
        said = [chat.send(text).text for text in ("Hello?", "Is anybody there?", "Well?")]
        pieces = list(model.stream("Hello?"))

    assert said == ["", "", ""]
    assert [message.text for message in chat.messages[1::2]] == said
    assert pieces == []


def test_the_command_prints_an_empty_answer(
    silent: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(silent.artifact), "--prompt", "Hello?", "--json"]) == 0

    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["text"] == ""
    assert len(document["token_ids"]) == 1
    assert document["finish_reason"] == "stop"
    assert document["timings"]["decode_tokens_per_second"] is None


def test_a_silent_model_is_converted_verified_and_checked_on_the_device(
    silent: Made, tmp_path: Path
) -> None:
    request = ConvertRequest(
        checkpoint=str(silent.checkpoint.folder),
        out=tmp_path / "artifact",
        wishes=PlanRequest(precision="fp16", context_tokens=1024),
    )

    conversion = convert_checkpoint(request, no_progress, lambda _: None)

    assert conversion.certificate.passed
    assert main(["verify", str(conversion.folder), "--on-device"]) == 0


def test_the_reference_reads_no_tokens_of_an_answer_as_no_rows(silent: Made) -> None:
    reference = open_reference(
        open_artifact(silent.artifact, verify_digests=False), silent.checkpoint
    )
    inputs = reference.inputs(_probes(silent)[0])
    hidden = silent.checkpoint.dims.text.hidden_size

    assert reference.model.token_rows(torch.empty(0, dtype=torch.int64)).shape == (0, hidden)
    behind = reference.following(inputs, ())
    assert behind.shape == (1, silent.checkpoint.dims.text.vocab_size)
    np.testing.assert_allclose(behind[0], reference.following(inputs, (5,))[0], rtol=0, atol=1e-5)


def test_a_loss_is_measured_on_answers_of_any_length(silent: Made) -> None:
    reference = open_reference(
        open_artifact(silent.artifact, verify_digests=False), silent.checkpoint
    )
    for text in ("1", "A whole sentence of an answer, with several words in it."):
        probe = replace(_probes(silent)[0], name=text, answer=text)
        answer = reference.answer(probe)
        same = Losses.of(answer.export, answer.export, answer)
        assert answer.num_answer == len(reference.answer_ids(text))
        assert same == Losses(0.0, 0.0, 0.0)


def _probes(made: Made) -> tuple[Probe, ...]:
    return probes_for(open_artifact(made.artifact, verify_digests=False).manifest, "quick")
