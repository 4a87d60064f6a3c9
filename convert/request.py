"""ConvertRequest: what was asked, and what it comes to for one checkpoint and one board."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_edge.profiles.anyres import (
    AnyRes,
    grid_name,
    grid_pinpoints,
    lower_pinpoints,
    parse_pinpoints,
)
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.model_dims import ModelDims
from llava_edge.runtime.manifest import Reference

Precision = Literal["fp16"]

DEFAULT_CONTEXT = 4096
TEXT_TOKENS = 512
"""Positions that must remain beside one full image (design of the plan)."""


@dataclass(frozen=True)
class ConvertRequest:
    """Options of one conversion, as given.

    ``checkpoint`` is a folder or a hub id; None fields take what the checkpoint and the profile
    say. ``grid`` and ``pinpoints`` exclude each other. Without ``use_template`` the artifact takes
    finished prompts only.
    """

    checkpoint: str
    out: Path | None = None
    profile: str = "cpu-16gb"
    precision: Precision = "fp16"
    grid: str | None = None
    pinpoints: str | None = None
    context: int | None = None
    reference: Reference | None = None
    revision: str | None = None
    use_template: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        if self.grid is not None and self.pinpoints is not None:
            raise RequestError(
                f"--grid {self.grid} and --pinpoints {self.pinpoints} were both given; they say "
                "the same thing in two ways. Give one of them."
            )


@dataclass(frozen=True)
class TileSettings:
    """AnyRes candidates and context of the artifact.

    ``grid`` is the name of the candidate set, or ``custom``; ``is_trained`` says whether every
    candidate is one the checkpoint's own configuration lists.
    """

    grid: str
    pinpoints: tuple[tuple[int, int], ...]
    reference: Reference
    max_tiles: int
    max_image_tokens: int
    context_tokens: int
    is_trained: bool


def choose_tiles(request: ConvertRequest, dims: ModelDims, layout: str) -> TileSettings:
    """Candidates and context for a request.

    Raises:
        RequestError: the grid is unknown or cannot be met, or the context cannot hold one full
            image and ``TEXT_TOKENS``, or exceeds the model's positions.
    """
    tile = dims.vision.image_size
    own = dims.image_grid_pinpoints
    if request.pinpoints is not None:
        pinpoints = parse_pinpoints(request.pinpoints, tile)
    elif request.grid is not None:
        pinpoints = _named(own, request.grid, tile)
    else:
        pinpoints = own
    reference = request.reference or ("original" if layout == "original" else "hf")
    anyres = AnyRes(tile, dims.vision.patch_size, pinpoints, reference)
    needed = anyres.max_image_tokens + TEXT_TOKENS
    limit = dims.text.max_positions
    context = request.context or min(limit, max(DEFAULT_CONTEXT, needed))
    if context > limit:
        raise RequestError(
            f"--context {context} was asked; the model has {limit} positions. Ask for at most that."
        )
    if context < needed:
        raise RequestError(
            f"a context of {context} tokens cannot hold one full image of the grid "
            f"({anyres.max_image_tokens} tokens) and {TEXT_TOKENS} of text; {needed} are needed"
            + (f", and the model has {limit} positions" if limit < needed else "")
            + ". Raise --context or lower --grid."
        )
    return TileSettings(
        grid=grid_name(pinpoints, tile) or "custom",
        pinpoints=pinpoints,
        reference=reference,
        max_tiles=anyres.max_tiles,
        max_image_tokens=anyres.max_image_tokens,
        context_tokens=context,
        is_trained=set(pinpoints) <= set(own),
    )


def _named(own: tuple[tuple[int, int], ...], name: str, tile: int) -> tuple[tuple[int, int], ...]:
    asked = grid_pinpoints(name, tile)
    if set(asked) <= set(own):
        # The checkpoint's own order decides ties, so a lower grid is a selection from it.
        return lower_pinpoints(own, name, tile)
    return asked
