"""Pages of text: lines of words and numbers, each in its colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_edge.bench.lab.pages.drawing.page import COLOURS, Mark, Page, Question
from llava_edge.bench.lab.pages.drawing.words import WORDS3, WORDS4

READING_KINDS = ("number on a line", "first word", "last word", "beside", "below", "corner")
"""Kinds whose answer must be read from the page letter by letter."""


@dataclass(frozen=True)
class _Item:
    text: str
    colour: str

    @property
    def is_word(self) -> bool:
        return self.text.isalpha()


_Line = tuple[_Item, ...]


def text_page(generator: np.random.Generator, rows: int, columns: int) -> Page:
    """A page with a line of text on every second row, the last few perhaps empty.

    A line is a word and a number, and from ten columns on mostly a second word. No two items of a
    page begin with the same sign, so a small model can look one up by it.

    Args:
        generator: all chance comes from it.
        rows: of cells, even, at least four.
        columns: of cells, at least six.
    """
    most = rows // 2
    num_lines = most if generator.random() < 0.5 else int(generator.integers(2, most + 1))
    first_row = int(generator.integers(2))
    taken: set[str] = set()
    lines: list[_Line] = []
    marks: dict[tuple[int, int], Mark] = {}
    for number in range(1, num_lines + 1):
        line = _line(generator, columns, taken)
        lines.append(line)
        row = first_row + 2 * (number - 1)
        for index, (item, start) in enumerate(
            zip(line, _starts(generator, line, columns), strict=True), start=1
        ):
            for place, sign in enumerate(item.text):
                marks[row, start + place] = Mark(sign, item.colour, (number, index, place + 1))
    return Page(rows, columns, marks, tuple(_questions(lines)))


def _line(generator: np.random.Generator, columns: int, taken: set[str]) -> _Line:
    two_words = columns >= 10 and generator.random() < 0.8
    # What still has to fit behind the item, gaps included, is kept free.
    parts = ((_word, 6), (_number, 4), (_word, 0)) if two_words else ((_word, 2), (_number, 0))
    left = columns
    texts: list[str] = []
    for draw, behind in parts:
        text = draw(generator, left - behind)
        while text[0] in taken:
            text = draw(generator, left - behind)
        taken.add(text[0])
        texts.append(text)
        left -= len(text) + 1
    names = tuple(COLOURS)
    return tuple(_Item(text, names[int(generator.integers(len(names)))]) for text in texts)


def _word(generator: np.random.Generator, room: int) -> str:
    words = WORDS4 if room >= 4 and generator.random() < 0.5 else WORDS3
    return words[int(generator.integers(len(words)))]


def _number(generator: np.random.Generator, room: int) -> str:
    digits = int(generator.integers(1, min(3, room) + 1))
    return str(int(generator.integers(10 ** (digits - 1), 10**digits)))


def _starts(generator: np.random.Generator, line: _Line, columns: int) -> list[int]:
    """First column of each item: one gap between items at least, the rest drawn."""
    spare = columns - sum(len(item.text) for item in line) - (len(line) - 1)
    # Cuts in order give non-decreasing extra distances, so items keep their order.
    extra = sorted(generator.integers(0, spare + 1, len(line)).tolist())
    starts, column = [], 0
    for item, more in zip(line, extra, strict=True):
        starts.append(column + more)
        column += len(item.text) + 1
    return starts


def _questions(lines: Sequence[_Line]) -> list[Question]:
    questions = [Question("count lines", "How many lines are there?", str(len(lines)))]
    for number, line in enumerate(lines, start=1):
        words = [item.text for item in line if item.is_word]
        numeral = next(item.text for item in line if not item.is_word)
        on = f"on line {number}?"
        questions += [
            Question("number on a line", f"What is the number {on}", numeral),
            Question("first word", f"What is the first word {on}", words[0]),
            Question("beside", f"What number is next to {words[0]}?", numeral),
        ]
        if len(words) == 2:
            questions.append(Question("last word", f"What is the last word {on}", words[1]))
        if number < len(lines):
            below = lines[number][0].text
            questions.append(Question("below", f"What word is below {words[0]}?", below))
        for item in line:
            questions.append(Question("colour", f"What colour is {item.text}?", item.colour))
        for word in words:
            questions.append(Question("line of a word", f"Which line is {word} on?", str(number)))
    corners = {
        "top left": lines[0][0],
        "top right": lines[0][-1],
        "bottom left": lines[-1][0],
        "bottom right": lines[-1][-1],
    }
    for corner, item in corners.items():
        questions.append(Question("corner", f"What is at the {corner}?", item.text))
    return questions
