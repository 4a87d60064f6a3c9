"""Pages with shapes: squares, circles and triangles to be counted and named."""

from __future__ import annotations

from collections import Counter

import numpy as np

from llava_edge.bench.lab.pages.drawing.page import COLOURS, SHAPES, Mark, Page, Question

_MOST_ALIKE = 6
"""Most shapes of one form or of one colour, which is the highest count asked for."""


def shape_page(generator: np.random.Generator, rows: int, columns: int) -> Page:
    """A page with two to eight shapes in cells of their own.

    Args:
        generator: all chance comes from it.
        rows: of cells.
        columns: of cells; the page has at least sixteen.
    """
    count = int(generator.integers(2, 9))
    cells = sorted(generator.permutation(rows * columns)[:count].tolist())
    # Few colours on a page, or there would be little to count.
    names = tuple(COLOURS)
    palette = [names[i] for i in generator.permutation(len(names))[:3].tolist()]
    of_form: Counter[str] = Counter()
    of_colour: Counter[str] = Counter()
    marks: dict[tuple[int, int], Mark] = {}
    for cell in cells:
        form = SHAPES[int(generator.integers(len(SHAPES)))]
        colour = palette[int(generator.integers(len(palette)))]
        if of_form[form] == _MOST_ALIKE or of_colour[colour] == _MOST_ALIKE:
            continue
        of_form[form] += 1
        of_colour[colour] += 1
        place = (of_colour[colour], of_form[form], len(marks) + 1)
        marks[divmod(cell, columns)] = Mark(form, colour, place)
    drawn = list(marks.values())
    questions = [
        Question("count shapes", f"How many {form}s are there?", str(number))
        for form, number in sorted(of_form.items())
    ]
    for colour, number in sorted(of_colour.items()):
        questions.append(Question("count shapes", f"How many shapes are {colour}?", str(number)))
        if number == 1:
            form = next(mark.sign for mark in drawn if mark.colour == colour)
            questions.append(Question("name a shape", f"What shape is {colour}?", form))
    for form, number in sorted(of_form.items()):
        if number == 1:
            colour = next(mark.colour for mark in drawn if mark.sign == form)
            questions.append(Question("shape colour", f"What colour is the {form}?", colour))
    return Page(rows, columns, marks, tuple(questions))
