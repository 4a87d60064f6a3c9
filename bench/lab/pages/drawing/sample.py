"""Samples: pages with their pictures, numbered without end, for training and held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from llava_edge.bench.lab.pages.drawing.bar_page import bar_page
from llava_edge.bench.lab.pages.drawing.copy_line import copy_line
from llava_edge.bench.lab.pages.drawing.geometry import PAGE_SIZES, cell_sizes
from llava_edge.bench.lab.pages.drawing.page import Page, Question
from llava_edge.bench.lab.pages.drawing.render import render
from llava_edge.bench.lab.pages.drawing.shape_page import shape_page
from llava_edge.bench.lab.pages.drawing.text_page import text_page

_GRID_SHARES = (0.4, 0.15, 0.15, 0.15, 0.15)
_PAGES: tuple[tuple[float, Callable[[np.random.Generator, int, int], Page]], ...] = (
    (0.48, text_page),
    (0.33, bar_page),
    (0.19, shape_page),
)
_COPY_SHARE = 0.1
_TRAINING, _HELD_OUT = 0, 1


@dataclass(frozen=True)
class Sample:
    """A page and its picture, and questions chosen from those it answers, or lines to copy."""

    page: Page
    image: Image.Image
    questions: tuple[Question, ...]


def training_sample(index: int, most_questions: int) -> Sample:
    """The page of this number in training, with up to ``most_questions`` questions at once."""
    return _sample(np.random.Generator(np.random.PCG64([_TRAINING, index])), most_questions)


def held_out_sample(seed: int, index: int) -> Sample:
    """A page that training never sees, whatever seed and index are; one question.

    The generators of both streams are seeded with different first words, so no seed of one is a
    seed of the other.
    """
    return _sample(np.random.Generator(np.random.PCG64([_HELD_OUT, seed, index])), 1)


def _sample(generator: np.random.Generator, most_questions: int) -> Sample:
    sizes = PAGE_SIZES[_choose(generator, _GRID_SHARES)]
    rows, columns = sizes[int(generator.integers(len(sizes)))]
    draw = _PAGES[_choose(generator, tuple(share for share, _ in _PAGES))][1]
    page = draw(generator, rows, columns)
    chosen = _questions(generator, page, most_questions)
    pixels = cell_sizes(rows, columns)
    image = render(page, pixels[int(generator.integers(len(pixels)))], generator)
    return Sample(page, image, chosen)


def _questions(
    generator: np.random.Generator, page: Page, most_questions: int
) -> tuple[Question, ...]:
    """Kinds in turn, so that those with many questions do not drown the others."""
    by_kind: dict[str, list[Question]] = {}
    for place in generator.permutation(len(page.questions)).tolist():
        question = page.questions[place]
        by_kind.setdefault(question.kind, []).append(question)
    # Copying asks nothing of the page, so any page will do.
    copies = generator.random() < _COPY_SHARE * min(most_questions, 3)
    chosen = [copy_line(generator)] if copies else []
    kinds = [list(by_kind)[i] for i in generator.permutation(len(by_kind)).tolist()]
    while len(chosen) < most_questions and any(by_kind.values()):
        for kind in kinds:
            if by_kind[kind] and len(chosen) < most_questions:
                chosen.append(by_kind[kind].pop())
    return tuple(chosen)


def _choose(generator: np.random.Generator, shares: tuple[float, ...]) -> int:
    return int(np.searchsorted(np.cumsum(shares), generator.random() * sum(shares), side="right"))
