"""Page: what is drawn where, cell by cell, and what may be asked about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "black": (25, 25, 25),
    "red": (205, 30, 35),
    "green": (20, 135, 50),
    "blue": (35, 65, 205),
    "orange": (235, 130, 15),
    "purple": (130, 40, 160),
}
"""Ink by name, (red, green, blue)."""

SHAPES = ("square", "circle", "triangle")
BAR = "bar"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
SIGNS: tuple[str, ...] = (*LETTERS, *DIGITS, *SHAPES, BAR)
"""All that can stand in a cell."""


@dataclass(frozen=True)
class Mark:
    """One sign in one cell.

    ``places`` are up to three small numbers that say what the sign is on its page (for text: line,
    item on the line, character of the item, from 1 on); training may ask for them, users do not.
    """

    sign: str
    colour: str
    places: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, and its kind, by which results are counted."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Page:
    """A page of ``rows`` x ``columns`` cells; a cell is one patch of a tile once AnyRes has cut.

    ``marks`` are keyed by (row, column), both from 0. ``questions`` are all that this page answers.
    """

    rows: int
    columns: int
    marks: Mapping[tuple[int, int], Mark]
    questions: tuple[Question, ...]
