"""Conversations that the project draws itself, for conversions without ``--calibration``.

Shapes, bar charts, words and pages of text, with questions and true answers about them, in sizes
that bring every grid of the artifact; and some conversations without an image. All of it follows
from the seed. It stands in for samples of the application: real ones are better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava_edge.convert.quantization.calibration.conversations import TEXT_SHARE, Conversation
from llava_edge.profiles.models.anyres import AnyRes

DEFAULT_SAMPLES = 32

_COLOURS = ("crimson", "royalblue", "seagreen", "orange", "purple", "teal", "black", "hotpink")
_SHAPES = ("circle", "square", "triangle")
_GOODS = ("apples", "books", "chairs", "doors", "engines", "forks", "gloves", "hats", "lamps")
_PROSE = (
    "the report shows that sales in the northern district grew by a tenth while costs fell "
    "slightly after new machines arrived in spring and staff learned to use them without delay "
    "customers asked for shorter waiting times larger rooms clear signs and a printed receipt "
    "every parcel must carry its number weight date and the name of the sender on the upper side"
)
_TEXTS = (
    (
        "Why is the sky blue?",
        "Air scatters short wavelengths of sunlight more strongly than long ones, so blue light "
        "reaches the eye from all directions.",
    ),
    (
        "Write a Python function that returns the larger of two numbers.",
        "def larger(a, b):\n    return a if a > b else b",
    ),
    (
        "List three things to check before a long drive.",
        "1. The pressure of the tyres.\n2. The level of oil and water.\n3. The lights.",
    ),
    (
        "Translate to German: The train leaves at eight o'clock.",
        "Der Zug fährt um acht Uhr ab.",
    ),
    (
        "What does a compiler do?",
        "It translates a program from the language it was written in to one that a machine runs, "
        "and reports what does not follow the language's rules.",
    ),
    (
        "Summarise in one sentence: The bridge was closed in May because rust had weakened two "
        "cables. Engineers replaced them, and it opened again in July.",
        "The bridge was closed from May to July so that two rusted cables could be replaced.",
    ),
    (
        "How many days have the months of a leap year together?",
        "366: February has 29 days in a leap year.",
    ),
    (
        "Erkläre kurz, was eine Batterie ist.",
        "Eine Batterie speichert chemische Energie und gibt sie als elektrischen Strom ab.",
    ),
)


@dataclass(frozen=True)
class _Drawing:
    """An image and what is true of it."""

    image: Image.Image
    question: str
    answer: str


_Draw = Callable[[np.random.Generator, int, int], _Drawing]


def draw_conversations(
    anyres: AnyRes, count: int = DEFAULT_SAMPLES, seed: int = 0
) -> tuple[tuple[Conversation, ...], dict[str, Any]]:
    """Draw a calibration set.

    Args:
        anyres: of the artifact; each of its candidates is the grid of some images.
        count: conversations, a quarter of them text only.
        seed: the same seed, candidates and version of Pillow give the same set.

    Returns:
        Conversations, and what is to be said of the source.
    """
    num_text = round(count * TEXT_SHARE)
    conversations = [_with_image(anyres, seed, index) for index in range(count - num_text)]
    conversations += [_text_only(seed, index) for index in range(num_text)]
    source = {
        "source": "drawn by this project: shapes, charts, words and pages; no photographs",
        "seed": seed,
    }
    return tuple(conversations), source


def _with_image(anyres: AnyRes, seed: int, index: int) -> Conversation:
    sizes = anyres.candidates or ((anyres.tile_size, anyres.tile_size),)
    generator = np.random.Generator(np.random.PCG64([seed, 0, index]))
    height, width = _size(anyres, sizes[index % len(sizes)], generator)
    draws = (_shapes, _chart, _page, _words)
    # Every kind of picture meets every grid in time: the two counts need not be coprime.
    draw = draws[(index + index // len(sizes)) % len(draws)]
    state = int(generator.integers(1 << 62))
    drawing = _drawn(draw, state, height, width)
    # Drawn anew at each call, so that no image stays in memory.
    image = partial(_image, draw, state, height, width)
    return Conversation(f"drawn-{index}", drawing.question, drawing.answer, image)


def _size(
    anyres: AnyRes, candidate: tuple[int, int], generator: np.random.Generator
) -> tuple[int, int]:
    """Height and width of an image whose grid is the candidate, somewhat off its proportions."""
    height, width = candidate
    wanted = (height // anyres.tile_size, width // anyres.tile_size)
    for _ in range(20):
        scale = generator.uniform(0.75, 1.3)
        stretch = generator.uniform(0.85, 1.18)
        size = (max(1, round(height * scale)), max(1, round(width * scale * stretch)))
        layout = anyres.layout(*size)
        if (layout.rows, layout.columns) == wanted:
            return size
    # An image of the candidate's own size loses nothing in it and fills it.
    return height, width


def _text_only(seed: int, index: int) -> Conversation:
    generator = np.random.Generator(np.random.PCG64([seed, 1, index]))
    question, answer = _TEXTS[(seed + index) % len(_TEXTS)]
    if index >= len(_TEXTS):
        first, second = generator.integers(11, 100, 2).tolist()
        question = f"What is {first} times {second}?"
        answer = f"{first} × {second} = {first * second}"
    return Conversation(f"drawn-text-{index}", question, answer)


def _image(draw: _Draw, state: int, height: int, width: int) -> Image.Image:
    return _drawn(draw, state, height, width).image


def _drawn(draw: _Draw, state: int, height: int, width: int) -> _Drawing:
    return draw(np.random.Generator(np.random.PCG64(state)), height, width)


def _canvas(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """Paper that is not quite even, as a camera sees it."""
    low, high = sorted(generator.integers(215, 256, 2).tolist())
    ramp = np.linspace(low, high, width)[None, :, None] + generator.normal(0, 2, (height, width, 1))
    tint = np.array([1.0, generator.uniform(0.96, 1.0), generator.uniform(0.92, 1.0)])
    return Image.fromarray((ramp * tint).clip(0, 255).astype(np.uint8))


def _shapes(generator: np.random.Generator, height: int, width: int) -> _Drawing:
    image = _canvas(generator, height, width)
    pen = ImageDraw.Draw(image)
    side = max(4, min(height, width) // 5)
    count = int(generator.integers(2, 8))
    names: list[str] = []
    for _ in range(count):
        colour = _COLOURS[int(generator.integers(len(_COLOURS)))]
        shape = _SHAPES[int(generator.integers(len(_SHAPES)))]
        size = int(generator.integers(side // 2, side + 1))
        x = int(generator.integers(max(1, width - size)))
        y = int(generator.integers(max(1, height - size)))
        if shape == "circle":
            pen.ellipse((x, y, x + size, y + size), fill=colour)
        elif shape == "square":
            pen.rectangle((x, y, x + size, y + size), fill=colour)
        else:
            pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=colour)
        names.append(f"a {colour} {shape}")
    return _Drawing(
        image,
        "Which shapes were drawn, from the one at the back to the one at the front?",
        f"There are {count} shapes: {', '.join(names)}.",
    )


def _chart(generator: np.random.Generator, height: int, width: int) -> _Drawing:
    image = _canvas(generator, height, width)
    pen = ImageDraw.Draw(image)
    count = int(generator.integers(3, 7))
    goods = [_GOODS[i] for i in generator.permutation(len(_GOODS))[:count].tolist()]
    values = (generator.permutation(90)[:count] + 10).tolist()
    step = width / count
    font = _font(step / 6)
    base = height * 0.85
    for place, (good, value) in enumerate(zip(goods, values, strict=True)):
        left, right = place * step + step * 0.15, (place + 1) * step - step * 0.15
        top = base - base * 0.85 * value / 100
        pen.rectangle((left, top, right, base), fill=_COLOURS[place])
        pen.text((left, base + 2), good, fill="black", font=font)
        pen.text((left, top - step / 6 - 4), str(value), fill="black", font=font)
    pen.line((0, base, width, base), fill="black", width=2)
    most = goods[values.index(max(values))]
    listed = ", ".join(f"{good} {value}" for good, value in zip(goods, values, strict=True))
    return _Drawing(
        image,
        "What does the chart say, and what is there most of?",
        f"{listed}. Most are {most}: {max(values)} of {sum(values)} in all.",
    )


def _page(generator: np.random.Generator, height: int, width: int) -> _Drawing:
    image = _canvas(generator, height, width)
    pen = ImageDraw.Draw(image)
    size = max(10, min(height, width) / 24)
    font, heading = _font(size), _font(size * 1.6)
    number = int(generator.integers(1000, 10000))
    pen.text((size, size), f"Report {number}", fill="black", font=heading)
    vocabulary = _PROSE.split()
    lines: list[str] = []
    y, per_line = size * 4, max(2, int(width / size / 3.2))
    while y < height - size * 2:
        chosen = generator.integers(len(vocabulary), size=per_line).tolist()
        words = [vocabulary[i] for i in chosen]
        pen.text((size, y), " ".join(words), fill=(30, 30, 40), font=font)
        lines.append(" ".join(words))
        y += size * 1.5
    # The whole page: answers are most of the text that the set has.
    return _Drawing(image, "Read this page aloud.", "\n".join([f"Report {number}", *lines]))


def _words(generator: np.random.Generator, height: int, width: int) -> _Drawing:
    image = _canvas(generator, height, width)
    pen = ImageDraw.Draw(image)
    chosen = [_GOODS[i] for i in generator.permutation(len(_GOODS))[:4].tolist()]
    step = height / len(chosen)
    for place, word in enumerate(chosen):
        font = _font(min(step * 0.6, width / 8))
        x = int(generator.integers(max(1, width // 3)))
        colour = _COLOURS[int(generator.integers(len(_COLOURS)))]
        pen.text((x, place * step + step * 0.15), word, fill=colour, font=font)
    return _Drawing(
        image,
        "Which words stand here, from top to bottom?",
        f"From top to bottom: {', '.join(chosen)}.",
    )


def _font(size: float) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, which needs no file; without FreeType it has one size."""
    return ImageFont.load_default(max(8.0, size))
