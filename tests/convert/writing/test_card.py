"""The card says in words what an artifact is and what was proven of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_edge.convert.writing.card import write_card
from llava_edge.profiles.memory.formats import Int8Route
from llava_edge.runtime.artifact.certificate import Certificate, Deviation, StageResult
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.open import open_artifact

GAP = StageResult("prefill_logits", "max_gap_of_range", 2.34567e-6, 1e-4, "pass")
LOSS = (
    StageResult("quantization_loss", "kl_divergence", 0.0123, 0.5, "pass", "loss"),
    StageResult("quantization_loss", "top1_disagreement", 0.03, None, "pass", "loss"),
    StageResult("quantization_loss", "answer_loss_rise", 0.004, 0.1, "pass", "loss"),
)


@pytest.fixture(scope="module")
def manifest(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Manifest:
    artifact = make_artifact(make_checkpoint("odd", backbone="mistral"))
    assert "verification was left out" in (artifact / "README.md").read_text()
    return open_artifact(artifact).manifest


def int4(manifest: Manifest) -> Manifest:
    precision = dataclasses.replace(manifest.precision, language_model="int4", lm_head="int8")
    return dataclasses.replace(manifest, precision=precision)


def test_it_says_source_precision_board_grid_and_how_to_load(manifest: Manifest) -> None:
    card = write_card(manifest, 3 << 20)

    assert f"`{manifest.source.id}`" in card
    assert "| board | cpu-16gb |" in card
    assert "| language model | fp16, head fp16 |" in card
    assert "70x140" in card
    assert "3.0 MiB" in card
    assert "LlavaEdge.load(" in card


def test_without_a_certificate_it_says_that_nothing_was_compared(
    manifest: Manifest, make_certificate: Callable[..., Certificate]
) -> None:
    left_out = make_certificate(mode="none", passed=False, verdict="inconclusive", stages=())
    for certificate in (None, left_out):
        card = write_card(manifest, 1, certificate)
        assert "Nothing here has been compared with the original weights" in card
        assert "--against CHECKPOINT" in card
        assert "passed" not in card


def test_it_says_what_was_verified_when_where_and_what_is_lost(
    manifest: Manifest, make_certificate: Callable[..., Certificate]
) -> None:
    host = {"machine": "x86_64", "cpu": "Some CPU", "int8_isa": "vnni"}
    certificate = make_certificate(host=host, mode="full", stages=(GAP, *LOSS))

    card = write_card(int4(manifest), 1, certificate)

    assert "Verified in full (the whole decoder, every grid) against transformers 5.23.0" in card
    assert "on 2026-11-24, on x86_64 (Some CPU; CPUExecutionProvider" in card
    assert "int8 instructions: vnni). It passed." in card
    assert "| prefill_logits | max gap of range | 2.35e-06 | 0.0001 | pass |" in card
    assert "What int4 costs" in card
    assert "KL divergence of the next token's distribution (nats) | 0.0123 | 0.5 |" in card
    assert "another best token | 0.03 | – | pass |" in card
    assert "answers (nats) | 0.004 |" in card
    same, original = card.split("What int4 costs")
    assert "KL divergence" not in same
    assert "prefill_logits" not in original


def test_a_failure_is_not_hidden(
    manifest: Manifest, make_certificate: Callable[..., Certificate]
) -> None:
    failed = dataclasses.replace(GAP, value=0.3, verdict="fail")
    where = Deviation("layers.3.mlp.down_proj", 0.3, 1e-4, {}, {})
    certificate = make_certificate(
        passed=False, verdict="fail", stages=(failed,), first_deviation=where
    )

    card = write_card(manifest, 1, certificate)

    assert "It **failed** at prefill_logits" in card
    assert "`layers.3.mlp.down_proj`" in card
    assert "passed" not in card


@pytest.mark.parametrize(
    ("quantised", "words"),
    [(False, "quantisation loses nothing"), (True, "int4 costs .* was not measured")],
)
def test_a_loss_that_was_not_measured_is_not_claimed(
    manifest: Manifest,
    make_certificate: Callable[..., Certificate],
    quantised: bool,
    words: str,
) -> None:
    chosen = int4(manifest) if quantised else manifest
    card = write_card(chosen, 1, make_certificate(stages=(GAP,)))
    assert re.search(words, card)


@pytest.mark.parametrize(
    ("precision", "route", "told"),
    [
        ("int8", "two-term", "activations of the layers in two 8-bit codes each, one scale a row"),
        ("int8", "integer", "coarse where a row has outliers"),
        ("int8", "nbits", "one scale a block of columns"),
        ("int4", "nbits", "one scale a block of columns"),
    ],
)
def test_it_says_how_activations_are_rounded(
    manifest: Manifest, precision: str, route: Int8Route, told: str
) -> None:
    stored = dataclasses.replace(manifest.precision, language_model=precision, int8_route=route)

    assert told in write_card(dataclasses.replace(manifest, precision=stored), 1 << 20)


def test_floats_are_not_said_to_be_rounded(manifest: Manifest) -> None:
    assert "activations" not in write_card(manifest, 1 << 20)
