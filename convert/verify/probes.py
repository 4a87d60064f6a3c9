"""Probes: the questions that an artifact is verified with.

Drawn by the project, with true answers, so that a loss on the answer's tokens can be measured; no
photographs. Images are small, since those of the golden tensors travel in the artifact; AnyRes
enlarges them all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from llava_edge.convert.conversations import Conversation
from llava_edge.convert.drawn_conversations import draw_conversations
from llava_edge.profiles.anyres import AnyRes
from llava_edge.runtime.certificate import Mode
from llava_edge.runtime.images import open_image
from llava_edge.runtime.prompt import MARKS

SEED = 2024
NUM_STEPS = 64
"""Answer tokens that are forced on both sides."""
_ROOM = 256
"""Tokens of question and answer beside the images, at least."""
_SIDE = 96
"""Longest side of a probe's image, where that keeps its grid."""


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        name: in the certificate.
        question: of the user; images come first.
        answer: what is true of the image.
        images: RGB.
    """

    name: str
    question: str
    answer: str
    images: tuple[Image.Image, ...] = ()

    def prompt(self, *, raw: bool) -> str:
        """What is handed to the runtime: the question, or a finished prompt with its marks."""
        return f"{MARKS['image'] * len(self.images)}\n{self.question}" if raw else self.question

    def arrays(self) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], ...]:
        """The images as uint8 (height, width, 3)."""
        return tuple(np.asarray(image.convert("RGB")) for image in self.images)


def draw_probes(anyres: AnyRes, mode: Mode, context_tokens: int) -> tuple[Probe, ...]:
    """What a mode asks: text alone and the cheapest grid; or every grid, and two images at once.

    Args:
        anyres: of the artifact.
        mode: ``quick`` or ``full``.
        context_tokens: two images are asked about only where they fit.
    """
    num_grids = max(1, len(anyres.candidates))
    # Of four conversations one is text alone; of fewer none.
    conversations, _ = draw_conversations(anyres, max(4, 2 * num_grids), SEED)
    pictured = [each for each in conversations if each.image is not None]
    text_only = next(each for each in conversations if each.image is None)
    by_grid: dict[str, tuple[int, Probe]] = {}
    for conversation in pictured:
        image = _small(anyres, conversation)
        layout = anyres.layout(image.height, image.width)
        grid = f"{layout.rows}x{layout.columns}" if layout.rows else "base"
        probe = Probe(f"grid {grid}", conversation.question, conversation.answer, (image,))
        by_grid.setdefault(grid, (layout.num_image_tokens, probe))
    cheapest = sorted(by_grid.values(), key=lambda found: found[0])
    text = Probe("text", text_only.question, text_only.answer)
    if mode == "quick":
        return (text, cheapest[0][1])
    probes = [probe for _, probe in cheapest]
    pair = _pair(probes)
    layouts = [anyres.layout(image.height, image.width) for image in pair.images]
    needed = sum(layout.num_image_tokens for layout in layouts) + _ROOM
    return (text, *probes, pair) if needed <= context_tokens else (text, *probes)


def _pair(probes: Sequence[Probe]) -> Probe:
    """Two images in one question, the cheaper ones."""
    first, second = probes[0], probes[min(1, len(probes) - 1)]
    images = (*first.images, *second.images)
    return Probe("two images", f"{first.question} {second.question}", first.answer, images)


def _small(anyres: AnyRes, conversation: Conversation) -> Image.Image:
    """The conversation's image, made smaller where AnyRes then still takes the same grid."""
    assert conversation.image is not None
    image = open_image(conversation.image()).convert("RGB")
    wanted = _grid(anyres, image)
    factor = _SIDE / max(image.size)
    if factor < 1:
        size = tuple(max(1, round(side * factor)) for side in image.size)
        smaller = image.resize((size[0], size[1]), Image.Resampling.BOX)
        if _grid(anyres, smaller) == wanted:
            return smaller
    return image


def _grid(anyres: AnyRes, image: Image.Image) -> tuple[int, int]:
    layout = anyres.layout(image.height, image.width)
    return layout.rows, layout.columns
