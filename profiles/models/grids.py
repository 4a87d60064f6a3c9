"""GridChoice: a candidate set as a plan sees it, from a checkpoint's own list downwards."""

from __future__ import annotations

from dataclasses import dataclass

from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.models.anyres import (
    GRID_NAMES,
    STOCK_GRID,
    AnyRes,
    Pinpoints,
    format_pinpoints,
    grid_name,
    grid_pinpoints,
    lower_pinpoints,
    parse_pinpoints,
)
from llava_edge.profiles.models.model_dims import ModelDims


@dataclass(frozen=True)
class GridChoice:
    """One candidate set.

    ``beyond_stock`` says that it holds candidates which the checkpoint's own list lacks: the
    weights were not trained on them.
    """

    name: str
    pinpoints: Pinpoints
    max_tiles: int
    max_image_tokens: int
    beyond_stock: bool = False


def stock_grids(dims: ModelDims) -> tuple[GridChoice, ...]:
    """The checkpoint's own candidates and every named grid below them, largest first."""
    tile = dims.vision.image_size
    own = dims.image_grid_pinpoints
    choices = [_choice(dims, own)]
    if own:
        for name in reversed(GRID_NAMES[: GRID_NAMES.index(STOCK_GRID) + 1]):
            try:
                lower = lower_pinpoints(own, name, tile)
            except RequestError:
                # A checkpoint with a list of its own need not hold every named grid.
                continue
            if lower not in (choice.pinpoints for choice in choices):
                choices.append(_choice(dims, lower))
    return tuple(sorted(choices, key=lambda c: -c.max_image_tokens))


def asked_grid(dims: ModelDims, name: str) -> GridChoice:
    """The grid that ``--grid`` names.

    A grid no larger than the checkpoint's own is the part of its list that the grid holds.

    Raises:
        RequestError: the name is unknown, or the model takes no tiles.
    """
    tile = dims.vision.image_size
    named = grid_pinpoints(name, tile)
    if named and not dims.takes_tiles:
        raise RequestError(
            f"grid {name} was asked, but {dims.model_type} models take one tile. Use --grid base."
        )
    own = dims.image_grid_pinpoints
    if set(named) <= set(own):
        return _choice(dims, lower_pinpoints(own, name, tile))
    return _choice(dims, named)


def asked_pinpoints(dims: ModelDims, text: str) -> GridChoice:
    """The candidates that ``--pinpoints`` lists.

    Raises:
        RequestError: the list is malformed, or the model takes no tiles.
    """
    if not dims.takes_tiles:
        raise RequestError(f"--pinpoints was given, but {dims.model_type} models take one tile.")
    return _choice(dims, parse_pinpoints(text, dims.vision.image_size))


def _choice(dims: ModelDims, pinpoints: Pinpoints) -> GridChoice:
    vision = dims.vision
    rules = AnyRes(vision.image_size, vision.patch_size, pinpoints, has_newline=dims.takes_tiles)
    return GridChoice(
        name=grid_name(pinpoints, vision.image_size) or format_pinpoints(pinpoints),
        pinpoints=pinpoints,
        max_tiles=rules.max_tiles,
        max_image_tokens=rules.max_image_tokens,
        beyond_stock=not set(pinpoints) <= set(dims.image_grid_pinpoints),
    )
