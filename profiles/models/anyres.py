"""AnyRes: which tiles an image is cut into and which of their features stay, in integers alone.

No pixel and no feature is touched here. From an image's height and width come grid, resized size,
padding, kept rows and columns and the number of image tokens; tile size, patch size and candidates
are values, never constants. The plan, the image processor, the packing and the token counter all
read the same ``TileLayout``, so they cannot disagree.

Source of the rules: transformers 5.23.0, ``select_best_resolution``, ``get_patch_output_size``,
``LlavaNextImageProcessorPil._get_padding_size``, ``unpad_image`` and
``LlavaNextProcessor._get_number_of_features``. They compute with doubles. A double differs from the
exact quotient in one case only, where ``length · target / side`` is a whole number that the rounded
quotient misses by one unit in the last place: 600x400 at 672 gives 449 rows where 448 would do.
``_rounding_of_product`` decides that case from the bits a double keeps, so the answers are
the reference's on any machine and in any language.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from llava_edge.profiles.errors import ImageError, RequestError, shorten

Pinpoints = tuple[tuple[int, int], ...]

MAX_SIDE = 1_000_000
"""Longest image side, in pixels, for which the integers are proven equal to the doubles: the
reference rounds a kept length to seven decimals, which two lengths below 2e7 never share."""

MAX_TILES_PER_CANDIDATE = 144
"""A candidate of more tiles is refused: buffers are sized by it and the list may come from a file
that someone else wrote. Twelve by twelve is four times the largest grid known to be trained."""

_MANTISSA_BITS = 53

# Tiles (rows, columns) that each named grid adds to the ones before it. The first five keep the
# order of the released configs, because the earlier of two equally good candidates wins.
_ADDED: dict[str, tuple[tuple[int, int], ...]] = {
    "base": (),
    "1x2": ((1, 2), (2, 1)),
    "2x2": ((2, 2), (3, 1), (1, 3)),
    "2x3": ((2, 3), (3, 2)),
    "2x4": ((2, 4), (4, 2)),
    "3x3": ((3, 3),),
    "2x6": ((2, 6), (6, 2)),
}

GRID_NAMES = tuple(_ADDED)
"""Named grids from the smallest to the largest; each holds all candidates of those before it."""

STOCK_GRID = "2x2"
"""The candidates the released weights were trained with; larger grids go beyond them."""


@dataclass(frozen=True, slots=True)
class TileLayout:
    """Where the pixels and the features of one image go.

    Sizes named ``resized`` and ``pad`` are pixels on the canvas of ``rows`` x ``columns`` tiles;
    ``first`` and ``kept`` count patches on the map stitched from those tiles. The thumbnail is not
    part of the canvas; it is the first of ``num_tiles``. On the grid ``base`` there is no canvas:
    rows, columns and everything derived from them are 0.
    """

    image_height: int
    image_width: int
    rows: int
    columns: int
    resized_height: int
    resized_width: int
    pad_top: int
    pad_bottom: int
    pad_left: int
    pad_right: int
    first_row: int
    kept_rows: int
    first_column: int
    kept_columns: int
    num_tiles: int
    num_image_tokens: int


@dataclass(frozen=True, slots=True)
class AnyRes:
    """Tile and patch size in pixels and the candidate list, (height, width) in pixels.

    No candidates means grid ``base``: the thumbnail alone and one newline behind it, which
    ``has_newline`` false leaves out (LLaVA-1.5). ``reference`` is the order in which a list is
    read: ``hf`` as (height, width), ``original`` as (width, height). On a list that holds the turn
    of each candidate this changes ties alone.

    Raises:
        RequestError: sizes do not go together; every fault is listed.
    """

    tile_size: int
    patch_size: int
    pinpoints: Pinpoints
    reference: Literal["hf", "original"] = "hf"
    has_newline: bool = True

    def __post_init__(self) -> None:
        faults = _size_faults(self.tile_size, self.patch_size)
        if not faults:
            faults = _pinpoint_faults(self.pinpoints, self.tile_size)
        if self.reference not in ("hf", "original"):
            faults.append(f"reference is {self.reference!r}; allowed are 'hf' and 'original'")
        if self.pinpoints and not self.has_newline:
            faults.append("tiles need a newline behind each row of their features")
        if faults:
            raise RequestError("AnyRes values do not go together: " + "; ".join(faults))

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def candidates(self) -> Pinpoints:
        """Candidates as (height, width) in the order in which they are tried."""
        if self.reference == "original":
            return tuple((height, width) for width, height in self.pinpoints)
        return self.pinpoints

    @property
    def max_tiles(self) -> int:
        """Most tiles any image gets, thumbnail included.

        Exact: an image as large as a candidate fills it without waste, so each candidate is chosen
        for some image.
        """
        return 1 + max((h * w for h, w in self._grids()), default=0)

    @property
    def max_image_tokens(self) -> int:
        """Most image tokens any image gets; that same image keeps every row and column."""
        side = self.patches_per_side
        packed = (side * rows * (side * columns + 1) for rows, columns in self._grids())
        return side * side + max(packed, default=int(self.has_newline))

    def layout(self, height: int, width: int) -> TileLayout:
        """Tiles, padding, kept features and token count of an image of ``height`` x ``width``.

        Raises:
            ImageError: a side is outside 1 to ``MAX_SIDE`` pixels.
        """
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            raise ImageError(
                f"image is {height}x{width} (height x width) pixels; each side must be 1 to "
                f"{MAX_SIDE}. Give another image."
            )
        side = self.patches_per_side
        if not self.pinpoints:
            return TileLayout(
                image_height=height,
                image_width=width,
                rows=0,
                columns=0,
                resized_height=0,
                resized_width=0,
                pad_top=0,
                pad_bottom=0,
                pad_left=0,
                pad_right=0,
                first_row=0,
                kept_rows=0,
                first_column=0,
                kept_columns=0,
                num_tiles=1,
                num_image_tokens=side * side + self.has_newline,
            )
        canvas_height, canvas_width = self._choose(height, width)
        rows, columns = canvas_height // self.tile_size, canvas_width // self.tile_size

        if canvas_width * height < canvas_height * width:
            resized_width = canvas_width
            resized_height = min(_scaled_ceil(height, canvas_width, width), canvas_height)
        else:
            resized_height = canvas_height
            resized_width = min(_scaled_ceil(width, canvas_height, height), canvas_width)
        pad_top = (canvas_height - resized_height) // 2
        pad_left = (canvas_width - resized_width) // 2

        map_rows, map_columns = side * rows, side * columns
        first_row = first_column = 0
        if width * rows > height * columns:
            first_row = (map_rows - height * map_columns // width) // 2
        else:
            first_column = (map_columns - width * map_rows // height) // 2
        kept_rows = map_rows - 2 * first_row
        kept_columns = map_columns - 2 * first_column
        return TileLayout(
            image_height=height,
            image_width=width,
            rows=rows,
            columns=columns,
            resized_height=resized_height,
            resized_width=resized_width,
            pad_top=pad_top,
            pad_bottom=canvas_height - resized_height - pad_top,
            pad_left=pad_left,
            pad_right=canvas_width - resized_width - pad_left,
            first_row=first_row,
            kept_rows=kept_rows,
            first_column=first_column,
            kept_columns=kept_columns,
            num_tiles=rows * columns + 1,
            # One newline follows each kept row, the last included.
            num_image_tokens=side * side + kept_rows * (kept_columns + 1),
        )

    def _grids(self) -> Iterable[tuple[int, int]]:
        tile = self.tile_size
        return ((height // tile, width // tile) for height, width in self.candidates)

    def _choose(self, height: int, width: int) -> tuple[int, int]:
        """Candidate that shows most of the image's own pixels, then wastes least, then is first."""
        area = height * width
        best, best_effective, best_wasted = (0, 0), -1, 0
        for candidate in self.candidates:
            canvas_height, canvas_width = candidate
            if canvas_width * height <= canvas_height * width:
                target, side = canvas_width, width
            else:
                target, side = canvas_height, height
            shown_width, width_rest = divmod(width * target, side)
            shown_height, height_rest = divmod(height * target, side)
            effective = min(shown_width * shown_height, area)
            if effective < best_effective:
                # Rounding can only take pixels away, so what loses before it has lost.
                continue
            if (shown_width - 1) * (shown_height - 1) < area:
                if not width_rest:
                    shown_width -= _rounding_of_product(shown_width, width, target, side) < 0
                if not height_rest:
                    shown_height -= _rounding_of_product(shown_height, height, target, side) < 0
                effective = min(shown_width * shown_height, area)
            wasted = canvas_height * canvas_width - effective
            if effective > best_effective or (effective == best_effective and wasted < best_wasted):
                best, best_effective, best_wasted = candidate, effective, wasted
        return best


def grid_pinpoints(name: str, tile_size: int) -> Pinpoints:
    """Candidates of a named grid, (height, width) in pixels; none for ``base``.

    Raises:
        RequestError: the name is unknown.
    """
    return tuple((rows * tile_size, columns * tile_size) for rows, columns in _grid_tiles(name))


def grid_name(pinpoints: Pinpoints, tile_size: int) -> str | None:
    """Name of the grid that holds exactly these candidates, in whatever order; else None."""
    for name in GRID_NAMES:
        if set(grid_pinpoints(name, tile_size)) == set(pinpoints):
            return name
    return None


def lower_pinpoints(pinpoints: Pinpoints, name: str, tile_size: int) -> Pinpoints:
    """Those of ``pinpoints`` that the named grid holds too, in their own order.

    Args:
        pinpoints: candidates that buffers and graphs were made for.
        name: a named grid with no more tiles than the largest of ``pinpoints``.
        tile_size: side of a tile in pixels.

    Raises:
        RequestError: the name is unknown, asks for more tiles than there are, or shares no
            candidate with ``pinpoints``.
    """
    asked = grid_pinpoints(name, tile_size)
    present = max((h * w for h, w in pinpoints), default=0) // tile_size**2
    wanted = max((h * w for h, w in asked), default=0) // tile_size**2
    if wanted > present:
        raise RequestError(
            f"grid {name} needs {wanted} tiles beside the thumbnail; these candidates "
            f"({format_pinpoints(pinpoints) or 'thumbnail only'}) were made for at most {present}. "
            "A grid can only be lowered here; convert again with --grid for a larger one."
        )
    kept = tuple(point for point in pinpoints if point in set(asked))
    if asked and not kept:
        raise RequestError(
            f"grid {name} shares no candidate with {format_pinpoints(pinpoints)}. "
            "Ask for base, or convert again with --pinpoints."
        )
    return kept


def parse_pinpoints(text: str, tile_size: int) -> Pinpoints:
    """Candidates written as ``HxW,HxW,…`` in pixels, height before width.

    Raises:
        RequestError: an entry is no pair of positive multiples of the tile size, or comes twice;
            every such entry is named.
    """
    faults: list[str] = []
    points: list[tuple[int, int]] = []
    for entry in text.split(","):
        sides = entry.strip().lower().split("x")
        # str.isdigit alone also takes digits of other scripts and superscripts.
        if len(sides) != 2 or not all(s.isascii() and s.isdigit() and len(s) <= 9 for s in sides):
            faults.append(f"{entry.strip()!r:.40} is not of the form HxW")
            continue
        points.append((int(sides[0]), int(sides[1])))
    faults += [
        f"{height}x{width} comes {points.count((height, width))} times"
        for height, width in dict.fromkeys(points)
        if points.count((height, width)) > 1
    ]
    faults += _pinpoint_faults(tuple(dict.fromkeys(points)), tile_size)
    if faults:
        raise RequestError(
            f"pinpoints {text!r:.80}: {shorten(faults)}. Write them as "
            f"{tile_size}x{2 * tile_size},{2 * tile_size}x{tile_size} (height x width in pixels, "
            f"multiples of the tile side {tile_size})."
        )
    return tuple(points)


def format_pinpoints(pinpoints: Pinpoints) -> str:
    """The form that ``parse_pinpoints`` reads."""
    return ",".join(f"{height}x{width}" for height, width in pinpoints)


def _grid_tiles(name: str) -> tuple[tuple[int, int], ...]:
    if not isinstance(name, str) or name not in _ADDED:
        raise RequestError(
            f"grid {name!r:.40} is unknown; named grids are {', '.join(GRID_NAMES)}. "
            "Other candidates are given as --pinpoints HxW,…"
        )
    upto = GRID_NAMES.index(name) + 1
    return tuple(tiles for known in GRID_NAMES[:upto] for tiles in _ADDED[known])


def _size_faults(tile_size: int, patch_size: int) -> list[str]:
    if not 1 <= patch_size <= tile_size <= MAX_SIDE:
        return [f"patch side {patch_size} and tile side {tile_size} must be 1 to {MAX_SIDE} pixels"]
    if tile_size % patch_size:
        return [f"tile side {tile_size} is no multiple of the patch side {patch_size}"]
    return []


def _pinpoint_faults(pinpoints: Pinpoints, tile_size: int) -> list[str]:
    faults = []
    for height, width in pinpoints:
        if height < 1 or width < 1 or height % tile_size or width % tile_size:
            faults.append(
                f"candidate {height}x{width} is not made of whole tiles of {tile_size} pixels"
            )
        elif (tiles := height * width // tile_size**2) > MAX_TILES_PER_CANDIDATE:
            faults.append(
                f"candidate {height}x{width} has {tiles} tiles; at most "
                f"{MAX_TILES_PER_CANDIDATE} are taken"
            )
    return faults


def _scaled_ceil(length: int, target: int, side: int) -> int:
    """``math.ceil(length * (target / side))`` as doubles give it."""
    whole, rest = divmod(length * target, side)
    if rest:
        # At least 1/side away from a whole number, farther than two roundings reach.
        return whole + 1
    return whole + (_rounding_of_product(whole, length, target, side) > 0)


def _rounding_of_product(exact: int, length: int, target: int, side: int) -> int:
    """Sign of the error when doubles compute ``length * (target / side)``, exactly ``exact``.

    The quotient is rounded to 53 bits, half to even; the product of that and ``length`` is rounded
    once more and comes back to ``exact`` if it lies within half a unit in the last place of it.
    """
    shift = _MANTISSA_BITS - target.bit_length() + side.bit_length()
    if (target << shift) // side >> _MANTISSA_BITS:
        shift -= 1
    quotient, rest = divmod(target << shift, side)
    if not rest:
        return 0
    quotient += 2 * rest > side or (2 * rest == side and quotient & 1)
    scaled = exact << shift
    error = quotient * length - scaled
    # Doubles just below a power of two lie twice as close as those above it.
    bits = (scaled if error > 0 else scaled - 1).bit_length()
    if abs(error) << (_MANTISSA_BITS + 1) <= 1 << bits:
        return 0
    return 1 if error > 0 else -1
