"""Cases of the loop come back as they were written, and malformed ones are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.convert.verification.reference.sampling import choose_by_reference, draw_cases
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.verification.golden.loop import (
    DrawCase,
    GoldenLoop,
    TextCase,
    drawn_logits,
    parse_loop,
)
from llava_edge.runtime.verification.loop.check import check_loop
from llava_edge.runtime.verification.loop.choice import Rule, choice_margin, choose_plainly
from llava_edge.runtime.verification.loop.model import check_loop_on_model


@pytest.fixture(scope="module")
def model(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> Iterator[LlavaEdge]:
    artifact = make_artifact(make_checkpoint("odd", backbone="mistral"))
    with LlavaEdge.load(artifact, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def manifest(model: LlavaEdge) -> Manifest:
    return open_artifact(model.artifact.folder).manifest


@pytest.fixture
def loop() -> GoldenLoop:
    return GoldenLoop(
        draw_cases(), (TextCase("words", (70, 71, 72), 2, "length", 2, "ab", (1, 2)),)
    )


def test_cases_come_back_as_they_were(loop: GoldenLoop, manifest: Manifest) -> None:
    text = json.dumps(loop.to_json(), allow_nan=False)

    assert parse_loop(json.loads(text), manifest, "here") == loop
    assert len(text) < 48 << 10


def draw(**changes: Any) -> Callable[[GoldenLoop], GoldenLoop]:
    return lambda loop: dataclasses.replace(
        loop, draws=(dataclasses.replace(loop.draws[0], **changes),)
    )


def text(**changes: Any) -> Callable[[GoldenLoop], GoldenLoop]:
    return lambda loop: dataclasses.replace(
        loop, texts=(dataclasses.replace(loop.texts[0], **changes),)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (draw(temperature=-1.0), "temperature -1.0 must be 0"),
        (draw(top_p=0.0), "top_p 0.0 must lie"),
        (draw(vocab_size=4097), "vocab_size is 4097"),
        (draw(num_text_tokens=65), "num_text_tokens is 65"),
        (draw(ids=(64,)), "ids is 64"),
        (draw(prompt=(-1,)), "prompt is -1"),
        (draw(quantiles=(1.0,), quantile_ids=(0,)), r"outside \[0, 1\)"),
        (draw(quantiles=(0.5,), quantile_ids=()), "different lengths"),
        (draw(logits="wild"), "allowed are"),
        (draw(ids=(1,) * 300), "300 entries"),
        (draw(name="a\nb"), "a case has the name"),
        (text(ids=(1 << 40,), count=1, least=(0,)), "an id lies outside"),
        (text(count=4), "are no answer"),
        (text(least=(1,)), "are no answer"),
        (text(max_new_tokens=0), "max_new_tokens is 0"),
        (text(max_new_tokens=257), "max_new_tokens is 257, not 1 to 256"),
        (text(finish_reason="whim"), "allowed are"),
        (lambda loop: dataclasses.replace(loop, texts=()), "1 to 64 cases"),
        (lambda loop: dataclasses.replace(loop, draws=loop.draws * 9), "1 to 64 cases"),
    ],
)
def test_a_case_that_cannot_be_is_refused_with_its_reason(
    loop: GoldenLoop,
    manifest: Manifest,
    change: Callable[[GoldenLoop], GoldenLoop],
    message: str,
) -> None:
    value = json.loads(json.dumps(change(loop).to_json()))

    with pytest.raises(ArtifactError, match=f"here holds no golden loop cases.*{message}"):
        parse_loop(value, manifest, "here")


@pytest.mark.parametrize("value", [None, [], {"draws": []}, {"draws": [], "texts": [], "more": 1}])
def test_another_value_is_refused(value: Any, manifest: Manifest) -> None:
    with pytest.raises(ArtifactError, match="here holds no golden loop cases"):
        parse_loop(value, manifest, "here")


def test_drawn_logits_are_the_same_on_every_machine() -> None:
    assert drawn_logits("spread", 7, 5).tolist() == [
        6.925567626953125,
        -4.0930023193359375,
        4.878692626953125,
        2.258544921875,
        -5.2425994873046875,
    ]
    assert set(drawn_logits("tied", 7, 64).tolist()) == {-1.0, 0.0, 1.0, 2.0}
    assert np.isneginf(drawn_logits("holes", 7, 64)).any()
    assert np.ptp(drawn_logits("equal", 7, 64)) == 0


@pytest.mark.parametrize("case", draw_cases(), ids=lambda case: case.name)
def test_both_ways_to_choose_agree_with_what_travels(case: DrawCase) -> None:
    rule = Rule(case.options, case.num_text_tokens, case.places)
    for quantile, wanted in zip(case.quantiles, case.quantile_ids, strict=True):
        assert choose_plainly(case.row(0), rule, case.prompt, quantile) == wanted
        assert choose_by_reference(case.row(0), rule, case.prompt, quantile) == wanted
    assert len(case.ids) >= 8
    assert len(case.quantiles) >= (2 if case.temperature and case.top_k != 1 else 1)


def test_a_choice_beside_an_edge_is_not_sure() -> None:
    logits = np.array([2.0, 1.0, 0.0, -9.0], np.float32)
    first = float(np.exp(2.0) / np.exp(logits.astype(np.float64)).sum())
    rule = Rule(GenerationConfig(temperature=1.0), 4)

    assert choice_margin(logits, rule, (), first + 1e-7) < 1e-6
    assert choice_margin(logits, rule, (), first / 2) > 0.1
    close = np.array([2.0, 2.0 + 1e-6, 0.0], np.float32)
    assert choice_margin(close, Rule(GenerationConfig(), 3), (), 0.0) < 1e-6
    cut = Rule(GenerationConfig(temperature=1.0, top_p=first + 1e-7), 4)
    assert choice_margin(logits, cut, (), first / 2) < 1e-6


def test_a_wrong_case_fails_its_row_and_says_which(model: LlavaEdge, loop: GoldenLoop) -> None:
    first = loop.draws[0]
    wrong = dataclasses.replace(first, ids=(*first.ids[:3], first.ids[3] ^ 1))
    rows = {
        row.metric: row
        for row in check_loop(model, dataclasses.replace(loop, draws=(wrong, *loop.draws[1:])))
    }

    assert rows["differing_draws"].verdict == "fail"
    assert f"{first.name}: {first.ids[3]} for {first.ids[3] ^ 1}" in rows["differing_draws"].detail
    # The one text case of this file is made up.
    assert rows["differing_answers"].detail.startswith("words: text ")
    assert {rows[f"differing_{name}"].verdict for name in ("reuse", "drafts")} == {"pass"}


def test_a_small_context_is_enough_for_scripted_requests(
    model: LlavaEdge, loop: GoldenLoop
) -> None:
    with LlavaEdge.load(model.artifact.folder, threads=1, context_tokens=24) as small:
        rows = {row.metric: row for row in check_loop(small, loop)}

        assert small.context_tokens == 24
        assert {rows[f"differing_{name}"].verdict for name in ("reuse", "drafts")} == {"pass"}
        assert check_loop_on_model(small, choose_plainly).left_out.endswith("loaded are 24")


def test_a_model_is_as_before_after_the_check(model: LlavaEdge, loop: GoldenLoop) -> None:
    before = model.generate("Say it.", max_new_tokens=6)
    engine, decoder = model._engine, model._decoder

    check_loop(model, loop)

    assert (model._engine, model._decoder) == (engine, decoder)
    assert model.generate("Say it.", max_new_tokens=6).token_ids == before.token_ids
