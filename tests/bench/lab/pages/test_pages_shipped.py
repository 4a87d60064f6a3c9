"""The checkpoint that ships, on a few held-out questions; the figures are in docs/decisions."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_edge.bench.lab.pages.ablation import FAULTS, Fault
from llava_edge.bench.lab.pages.commands import ask, convert
from llava_edge.bench.lab.pages.contact_sheet import Panel, contact_sheet
from llava_edge.bench.lab.pages.drawing.draw import FILE, write_questions
from llava_edge.bench.lab.pages.drawing.sample import Sample
from llava_edge.bench.lab.pages.drawing.text_page import READING_KINDS
from llava_edge.bench.lab.pages.evaluate import Evaluator, held_out
from llava_edge.bench.lab.pages.training.checkpoint import SHIPPED
from tests.support.tiers import slow_but


@pytest.fixture(scope="module")
def evaluator() -> Iterator[Evaluator]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Evaluator(SHIPPED)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    # Copying takes most of the time and none of the image.
    return [sample for sample in held_out(90, seed=1) if sample.questions[0].kind != "copy"]


@pytest.fixture(scope="module")
def whole(evaluator: Evaluator, samples: list[Sample]) -> float:
    return evaluator.evaluate(samples).share()


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 8_000_000


def test_it_answers_held_out_questions(whole: float) -> None:
    assert whole >= 0.9


@pytest.mark.parametrize("fault", slow_but(["swapped tiles"], FAULTS))
def test_a_wrong_anyres_step_shows_as_wrong_answers(
    evaluator: Evaluator, samples: list[Sample], whole: float, fault: Fault
) -> None:
    assert evaluator.evaluate(samples, fault).share() <= whole - 0.1


def test_the_thumbnail_alone_cannot_be_read(evaluator: Evaluator, samples: list[Sample]) -> None:
    result = evaluator.evaluate(samples, base=True)
    assert sum(result.asked[kind] for kind in READING_KINDS) > 20
    assert result.share(READING_KINDS) <= 0.6


@pytest.mark.slow
def test_the_runtime_answers_as_transformers_does_and_less_with_the_thumbnail_alone(
    evaluator: Evaluator, tmp_path: Path
) -> None:
    count, seed = 40, 4
    write_questions(tmp_path / "questions", count, seed)
    artifact = {"fp16": tmp_path / "artifact"}
    convert(SHIPPED, artifact["fp16"], "fp16", ["--verify", "none"])
    file = tmp_path / "questions" / FILE
    rows, answers = ask(artifact, file, tmp_path / "answers.jsonl")
    assert answers["fp16"] == evaluator.answers(held_out(count, seed))
    assert rows["fp16"]["quality"]["exact_match"] >= 85
    lower, _ = ask(artifact, file, tmp_path / "base.jsonl", ("--grid", "base"))
    assert lower["fp16"]["quality"]["exact_match"] <= 60


def test_a_contact_sheet_shows_right_and_wrong_in_their_colours() -> None:
    picture = Image.new("RGB", (90, 30), "blue")
    panels = [
        Panel(picture, "What colour?", "blue", {"fp16": "blue", "int4": "blue"}),
        Panel(picture, "What is at the top left, and in how many words?", "A", {"int4": ""}),
    ]
    right, both = contact_sheet(panels[:1]), contact_sheet(panels)
    assert both.width > right.width
    assert both.height > right.height
    colours = [{colour for _, colour in sheet.getcolors(2**24)} for sheet in (right, both)]
    assert all((0, 0, 255) in found for found in colours)
    assert [(190, 25, 30) in found for found in colours] == [False, True]
    assert [(15, 115, 45) in found for found in colours] == [True, True]
    assert contact_sheet(panels * 3).height > both.height
