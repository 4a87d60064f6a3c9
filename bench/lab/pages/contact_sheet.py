"""Contact sheet: pictures with question, truth and answers, as one picture to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 4
_PANEL_WIDTH, _PICTURE_HEIGHT, _LINE_HEIGHT, _MARGIN = 340, 230, 24, 16
_FONT_SIZE = 17
_WRAPPED_AT = 36
_PAPER, _INK, _RIGHT, _WRONG = (255, 255, 255), (30, 30, 30), (15, 115, 45), (190, 25, 30)


@dataclass(frozen=True)
class Panel:
    """One picture; ``answers`` are keyed by who gave them, such as ``int4``."""

    picture: Image.Image
    question: str
    truth: str
    answers: Mapping[str, str]


def contact_sheet(panels: Sequence[Panel]) -> Image.Image:
    """Draw panels in rows of four.

    Args:
        panels: at least one.

    Returns:
        RGB. Every panel is as high as the one with the most text needs.
    """
    texts = [_lines(panel) for panel in panels]
    text_height = _LINE_HEIGHT * max(map(len, texts))
    width, height = _PANEL_WIDTH + _MARGIN, _PICTURE_HEIGHT + text_height + 2 * _MARGIN
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for place, (panel, lines) in enumerate(zip(panels, texts, strict=True)):
        left = _MARGIN + place % columns * width
        top = _MARGIN + place // columns * height
        picture = _fitted(panel.picture)
        sheet.paste(picture, (left, top))
        pen.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=_INK)
        for number, (text, ink) in enumerate(lines):
            at = (left, top + _PICTURE_HEIGHT + 6 + number * _LINE_HEIGHT)
            pen.text(at, text, fill=ink, font=font)
    return sheet


def _fitted(picture: Image.Image) -> Image.Image:
    scale = min(_PANEL_WIDTH / picture.width, _PICTURE_HEIGHT / picture.height)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _lines(panel: Panel) -> list[tuple[str, tuple[int, int, int]]]:
    """Question and truth, then each different answer once, with all who gave it."""
    lines = [(line, _INK) for line in textwrap.wrap(panel.question, _WRAPPED_AT)]
    lines += [(line, _INK) for line in textwrap.wrap(f"truth: {panel.truth}", _WRAPPED_AT)]
    by_answer: dict[str, list[str]] = {}
    for name, answer in panel.answers.items():
        by_answer.setdefault(answer, []).append(name)
    for answer, names in by_answer.items():
        ink = _RIGHT if answer == panel.truth else _WRONG
        text = f"{', '.join(names)}: {answer or '(nothing)'}"
        lines += [(line, ink) for line in textwrap.wrap(text, _WRAPPED_AT)]
    return lines
