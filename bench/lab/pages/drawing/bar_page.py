"""Pages with a bar chart: bars of different heights and colours, each above a letter."""

from __future__ import annotations

import numpy as np

from llava_edge.bench.lab.pages.drawing.page import BAR, COLOURS, LETTERS, Mark, Page, Question


def bar_page(generator: np.random.Generator, rows: int, columns: int) -> Page:
    """A chart of two to six bars; no two have the same height, colour or letter.

    A letter has the colour of its bar.

    Args:
        generator: all chance comes from it.
        rows: of cells, at least four; the last is for the letters.
        columns: of cells, at least six.
    """
    most = min(columns // 2, rows - 1, len(COLOURS))
    count = int(generator.integers(2, most + 1))
    # Every second column, so that bars do not touch.
    slots = sorted(generator.permutation(columns // 2)[:count].tolist())
    heights = (generator.permutation(rows - 1)[:count] + 1).tolist()
    letters = [LETTERS[i] for i in generator.permutation(len(LETTERS))[:count].tolist()]
    names = tuple(COLOURS)
    colours = [names[i] for i in generator.permutation(len(names))[:count].tolist()]
    marks: dict[tuple[int, int], Mark] = {}
    for number, (slot, height, letter, colour) in enumerate(
        zip(slots, heights, letters, colours, strict=True), start=1
    ):
        column = 2 * slot
        for step in range(height):
            marks[rows - 2 - step, column] = Mark(BAR, colour, (step + 1, slot + 1, 0))
        marks[rows - 1, column] = Mark(letter, colour, (height, slot + 1, number))
    tallest, shortest = heights.index(max(heights)), heights.index(min(heights))
    questions = [
        Question("count bars", "How many bars are there?", str(count)),
        Question("tallest bar", "Which bar is the tallest?", letters[tallest]),
        Question("tallest bar", "What colour is the tallest bar?", colours[tallest]),
        Question("tallest bar", "Which bar is the shortest?", letters[shortest]),
    ]
    for letter, colour in zip(letters, colours, strict=True):
        questions.append(Question("bar colour", f"What colour is bar {letter}?", colour))
        questions.append(Question("bar of a colour", f"Which bar is {colour}?", letter))
    return Page(rows, columns, marks, tuple(questions))
