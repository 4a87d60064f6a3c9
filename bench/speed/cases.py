"""SpeedCase: what every artifact is asked while its time and memory are taken."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.memory.speed import QUESTION_TOKENS
from llava_edge.profiles.models.anyres import AnyRes, grid_name, lower_pinpoints
from llava_edge.runtime.artifact.manifest import Manifest

FULL = "1 image"
"""The case that the figures of a row speak of: one image that fills the artifact's own grid."""

TEXT = "text"

FEWER = ((TEXT, f"{FULL}, base", FULL), (TEXT, FULL))
"""What is asked of models that would take too long over everything."""

_SCALE = 2
"""Pixels of a picture along a side over those of its canvas: photographs are larger than both."""
_LOWER_GRIDS = ("base", "1x2")
_NUM_SEVERAL = 3
_SHARES = (0.25, 0.5, 0.9)
_NOISE_SIDE = 24


@dataclass(frozen=True)
class SpeedCase:
    """One prompt.

    Attributes:
        name: unique among the cases of an artifact.
        num_images: of ``height`` x ``width`` pixels each.
        grid: lowers the AnyRes grid; None for the artifact's own.
        text_tokens: the prompt's text is about so long, the template included.
        new_tokens: length of the answer, exactly.
        height: of each picture.
        width: of each picture.
        tiles_per_image: thumbnail included.
    """

    name: str
    num_images: int
    grid: str | None
    text_tokens: int
    new_tokens: int
    height: int = 0
    width: int = 0
    tiles_per_image: int = 0


def speed_cases(manifest: Manifest, *, thorough: bool = False) -> tuple[SpeedCase, ...]:
    """Text alone, one image on each grid, three images; in order of the room they need.

    Three images go on the largest grid on which the context holds them, and are left out where it
    holds them on none. ``thorough`` adds long prompts of text and longer answers.
    """
    grids = [None, *_lower_grids(manifest)]
    new_tokens = 128 if thorough else 32
    room = manifest.context_tokens - 2 * QUESTION_TOKENS
    new_tokens = max(2, min(new_tokens, room // 2))
    single = [_case(manifest, 1, grid, new_tokens) for grid in grids]
    several = [_case(manifest, _NUM_SEVERAL, grid, new_tokens) for grid in grids]
    cases = [SpeedCase(TEXT, 0, None, QUESTION_TOKENS, new_tokens)]
    fitting = [case for case in single if _tokens(manifest, case) + new_tokens <= room]
    cases += fitting
    cases += [case for case in several if _tokens(manifest, case) + new_tokens <= room][:1]
    if thorough:
        lengths = (int(manifest.context_tokens * share) - new_tokens for share in _SHARES)
        cases += [
            SpeedCase(f"text {length:,}", 0, None, length, new_tokens)
            for length in lengths
            if length > 2 * QUESTION_TOKENS
        ]
    return tuple(sorted(cases, key=lambda case: _tokens(manifest, case)))


def context_cases(manifest: Manifest, lengths: Sequence[int]) -> tuple[SpeedCase, ...]:
    """Prompts of text of these lengths, as far as the context holds them and an answer of 64."""
    new_tokens = 64
    return tuple(
        SpeedCase(f"{TEXT} {length:,}", 0, None, length, new_tokens)
        for length in lengths
        if length + new_tokens + QUESTION_TOKENS <= manifest.context_tokens
    )


def affordable_cases(seconds: Mapping[str, float], budget_seconds: float) -> tuple[str, ...]:
    """Names of as many cases as a budget pays, at least those that a row speaks of.

    Args:
        seconds: by name, what a case takes of all rounds and artifacts together.
        budget_seconds: for the sum.
    """
    choices = (tuple(seconds), *FEWER)
    for names in choices:
        if sum(seconds.get(name, 0.0) for name in names) <= budget_seconds:
            return names
    return choices[-1]


def draw_picture(seed: Sequence[int], height: int, width: int) -> bytes:
    """A JPEG of soft colours, another one for every seed, as large as a photograph compresses."""
    noise = np.random.default_rng(seed).integers(0, 256, (_NOISE_SIDE, _NOISE_SIDE, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _lower_grids(manifest: Manifest) -> list[str]:
    processing = manifest.image_processing
    own = grid_name(processing.image_grid_pinpoints, processing.tile_size)
    found = []
    for name in reversed(_LOWER_GRIDS):
        if name == own:
            continue
        try:
            lower_pinpoints(processing.image_grid_pinpoints, name, processing.tile_size)
        except RequestError:
            continue
        found.append(name)
    return found


def _case(manifest: Manifest, num_images: int, grid: str | None, new_tokens: int) -> SpeedCase:
    anyres = _anyres(manifest, grid)
    side = manifest.image_processing.tile_size
    canvas = max(anyres.candidates, key=lambda c: c[0] * c[1], default=(side, side))
    height, width = canvas[0] * _SCALE, canvas[1] * _SCALE
    name = FULL if num_images == 1 else f"{num_images} images"
    return SpeedCase(
        name if grid is None else f"{name}, {grid}",
        num_images,
        grid,
        QUESTION_TOKENS,
        new_tokens,
        height,
        width,
        anyres.layout(height, width).num_tiles,
    )


def image_tokens(manifest: Manifest, case: SpeedCase) -> int:
    """What the pictures of a case take of the prompt."""
    if not case.num_images:
        return 0
    layout = _anyres(manifest, case.grid).layout(case.height, case.width)
    return case.num_images * layout.num_image_tokens


def _tokens(manifest: Manifest, case: SpeedCase) -> int:
    """Of the prompt, about."""
    return case.text_tokens + image_tokens(manifest, case)


def _anyres(manifest: Manifest, grid: str | None) -> AnyRes:
    processing = manifest.image_processing
    pinpoints, side = processing.image_grid_pinpoints, processing.tile_size
    if grid is not None:
        pinpoints = lower_pinpoints(pinpoints, grid, side)
    return AnyRes(side, processing.patch_size, pinpoints)
