"""The checkpoint that ships, on a few held-out questions; the figures are in DECISIONS.md."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import llava_edge.bench.pages
from llava_edge.bench.pages.evaluate import Evaluator, held_out
from llava_edge.bench.pages.sample import Sample
from llava_edge.bench.pages.spoil import FAULTS, Fault
from llava_edge.bench.pages.text_page import READING_KINDS

CHECKPOINT = Path(llava_edge.bench.pages.__file__).parent / "checkpoint"


@pytest.fixture(scope="module")
def evaluator() -> Iterator[Evaluator]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Evaluator(CHECKPOINT)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    # Copying takes most of the time and none of the image.
    return [sample for sample in held_out(120, seed=1) if sample.questions[0].kind != "copy"]


@pytest.fixture(scope="module")
def whole(evaluator: Evaluator, samples: list[Sample]) -> float:
    return evaluator.evaluate(samples).share()


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 8_000_000


def test_it_answers_held_out_questions(whole: float) -> None:
    assert whole >= 0.9


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_anyres_step_shows_as_wrong_answers(
    evaluator: Evaluator, samples: list[Sample], whole: float, fault: Fault
) -> None:
    assert evaluator.evaluate(samples, fault).share() <= whole - 0.1


def test_the_thumbnail_alone_cannot_be_read(evaluator: Evaluator, samples: list[Sample]) -> None:
    assert evaluator.evaluate(samples, base=True).share(READING_KINDS) <= 0.6
