"""AnyRes in integers against the library's own functions, and the numbers it promises."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from llava_edge.profiles.errors import ImageError, LlavaEdgeError, RequestError
from llava_edge.profiles.models import anyres
from llava_edge.profiles.models.anyres import (
    GRID_NAMES,
    STOCK_GRID,
    AnyRes,
    TileLayout,
    format_pinpoints,
    grid_name,
    grid_pinpoints,
    lower_pinpoints,
    parse_pinpoints,
)
from llava_edge.profiles.models.model_dims import STOCK_PINPOINTS
from tests.support.tiers import slow_but

STOCK = AnyRes(336, 14, STOCK_PINPOINTS)
# Five patches a side, a single-tile candidate, sets that are not symmetric, an entry given twice.
ODD = AnyRes(70, 14, ((210, 70), (70, 70), (140, 350), (70, 280), (210, 210), (70, 280)))
# Sixteen patches a side, large grids, the widest first.
WIDE = AnyRes(224, 14, ((448, 1344), (672, 672), (896, 448), (224, 448), (1120, 224), (448, 448)))

GEOMETRIES = {"stock": STOCK, "odd-patches-tile70": ODD, "wide-tile224": WIDE}


class Map:
    """Stands for a feature map: has its shape, and says which part of it is asked for."""

    def __init__(self, rows: int, columns: int) -> None:
        self.shape = (1, rows, columns)

    def __getitem__(self, key: tuple[slice, slice, slice]) -> tuple[int, int, int, int]:
        _, rows, columns = key
        top, bottom = rows.start or 0, self.shape[1] if rows.stop is None else rows.stop
        left, right = columns.start or 0, self.shape[2] if columns.stop is None else columns.stop
        return top, max(bottom - top, 0), left, max(right - left, 0)


class Library:
    """The reference's own functions for one geometry, brought to one tuple."""

    def __init__(self, geometry: AnyRes) -> None:
        self.pinpoints = [list(point) for point in geometry.candidates]
        self.tile = geometry.tile_size
        self.side = geometry.patches_per_side
        self.processor: Any = SimpleNamespace(
            image_processor=SimpleNamespace(image_grid_pinpoints=self.pinpoints),
            patch_size=geometry.patch_size,
            # One for the class token, which "default" takes away again: what the hub configs say.
            num_additional_image_tokens=1,
        )
        self.processor._get_unpadded_features = MethodType(
            LlavaNextProcessor._get_unpadded_features, self.processor
        )

    def answer(self, height: int, width: int) -> tuple[int, ...]:
        size = (height, width)
        rows, columns = get_anyres_image_grid_shape(size, self.pinpoints, self.tile)
        canvas = (rows * self.tile, columns * self.tile)
        image = SimpleNamespace(shape=(3, height, width))
        resized = get_patch_output_size(image, canvas, ChannelDimension.FIRST)
        (top, bottom), (left, right) = LlavaNextImageProcessorPil._get_padding_size(
            None, resized, canvas
        )
        kept = unpad_image(Map(self.side * rows, self.side * columns), size)
        tokens = LlavaNextProcessor._get_number_of_features(
            self.processor, height, width, self.tile, self.tile
        )
        return (rows, columns, *resized, top, bottom, left, right, *kept, tokens - 1)


our_answer: Callable[[TileLayout], tuple[int, ...]] = attrgetter(
    "rows",
    "columns",
    "resized_height",
    "resized_width",
    "pad_top",
    "pad_bottom",
    "pad_left",
    "pad_right",
    "first_row",
    "kept_rows",
    "first_column",
    "kept_columns",
    "num_image_tokens",
)


def assert_equal_to_library(geometry: AnyRes, sizes: Iterable[tuple[int, int]]) -> None:
    library = Library(geometry)
    for height, width in sizes:
        ours, theirs = our_answer(geometry.layout(height, width)), library.answer(height, width)
        # Millions of comparisons: a rewritten assert would cost more than the comparison.
        if ours != theirs:
            pytest.fail(f"{height}x{width}: {ours}, the library says {theirs}")


# Slices keep the work spread over parallel test workers.
SLICES = 25


@pytest.mark.parametrize("part", slow_but([0], range(SLICES)))
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_every_size_up_to_800_equals_the_library(geometry: AnyRes, part: int) -> None:
    heights = range(1 + part, 801, SLICES)
    assert_equal_to_library(geometry, ((h, w) for h in heights for w in range(1, 801)))


@pytest.mark.parametrize("count", slow_but([5_000], [5_000, 200_000]))
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_random_sizes_up_to_5000_equal_the_library(geometry: AnyRes, count: int) -> None:
    draw = random.Random(20240130)
    assert_equal_to_library(
        geometry, ((draw.randint(1, 5000), draw.randint(1, 5000)) for _ in range(count))
    )


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_extreme_sizes_equal_the_library(geometry: AnyRes) -> None:
    long_sides = (5001, 65535, 99_999, 999_999, 1_000_000)
    short_sides = (1, 2, 3, 335, 336, 337, 4096, *long_sides)
    sizes = [(a, b) for a in long_sides for b in short_sides]
    assert_equal_to_library(geometry, [*sizes, *((w, h) for h, w in sizes)])


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_tile_count_equals_the_library(geometry: AnyRes) -> None:
    pinpoints = [list(point) for point in geometry.candidates]
    for height in range(1, 1500, 83):
        for width in range(1, 1500, 71):
            expected = image_size_to_num_patches((height, width), pinpoints, geometry.tile_size)
            assert geometry.layout(height, width).num_tiles == expected


@given(
    tile=st.sampled_from([(336, 14), (70, 14), (84, 14), (224, 16), (30, 10), (21, 7), (1, 1)]),
    grids=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=9),
    height=st.integers(1, 6000),
    width=st.integers(1, 6000),
)
def test_any_candidate_list_equals_the_library(
    tile: tuple[int, int], grids: list[tuple[int, int]], height: int, width: int
) -> None:
    size, patch = tile
    geometry = AnyRes(size, patch, tuple((r * size, c * size) for r, c in grids))
    assert_equal_to_library(geometry, [(height, width)])


@given(
    length=st.integers(1, 1_000_000), target=st.integers(1, 10_000_000), side=st.integers(1, 10**6)
)
def test_scaling_rounds_as_doubles_do(length: int, target: int, side: int) -> None:
    assert anyres._scaled_ceil(length, target, side) == math.ceil(length * (target / side))


def whole_products() -> Iterator[tuple[int, int, int]]:
    """(length, target, side) whose exact product is whole, where a double may miss it."""
    for target in (70, 336, 512, 672, 1008, 1344, 4096):
        for side in range(1, 1500):
            step = side // math.gcd(target, side)
            yield from ((length, target, side) for length in (step, 3 * step, 7 * step))


def test_scaling_rounds_as_doubles_do_where_they_miss_a_whole_number() -> None:
    below = above = 0
    for length, target, side in whole_products():
        exact = length * target // side
        floor, ceil = int(length * (target / side)), math.ceil(length * (target / side))
        below, above = below + (floor < exact), above + (ceil > exact)
        sign = anyres._rounding_of_product(exact, length, target, side)
        assert exact - (sign < 0) == floor
        assert anyres._scaled_ceil(length, target, side) == ceil
    assert below > 500
    assert above > 500


@pytest.mark.parametrize(
    ("tile", "pinpoints", "height", "width", "chosen"),
    [
        (14, ((126, 126), (112, 126)), 2618, 2945, (8, 9)),
        (14, ((56, 168), (168, 28)), 1560, 781, (12, 2)),
        (84, ((924, 504), (588, 504)), 1041, 892, (7, 6)),
    ],
)
def test_rounding_of_doubles_can_decide_the_grid(
    tile: int, pinpoints: Any, height: int, width: int, chosen: tuple[int, int]
) -> None:
    # Exact fractions would show one more row or column on the other candidate and take that.
    geometry = AnyRes(tile, tile, pinpoints)
    layout = geometry.layout(height, width)
    assert (layout.rows, layout.columns) == chosen
    assert_equal_to_library(geometry, [(height, width)])


# (width, height), grid rows x columns, resized width x height, padding left, right / top, bottom,
# kept rows x columns, tokens.
WORKED = [
    ((336, 336), (1, 2), (336, 336), (168, 168, 0, 0), (24, 24), 1176),
    ((256, 256), (1, 2), (336, 336), (168, 168, 0, 0), (24, 24), 1176),
    ((300, 200), (1, 2), (504, 336), (84, 84, 0, 0), (24, 36), 1464),
    ((200, 300), (1, 2), (225, 336), (223, 224, 0, 0), (24, 16), 984),
    ((337, 337), (2, 2), (672, 672), (0, 0, 0, 0), (48, 48), 2928),
    ((448, 448), (2, 2), (672, 672), (0, 0, 0, 0), (48, 48), 2928),
    ((600, 400), (2, 2), (672, 449), (0, 0, 111, 112), (32, 48), 2144),
    ((400, 600), (2, 2), (449, 672), (111, 112, 0, 0), (48, 32), 2160),
    ((640, 480), (2, 2), (672, 504), (0, 0, 84, 84), (36, 48), 2340),
    ((480, 640), (2, 2), (504, 672), (84, 84, 0, 0), (48, 36), 2352),
    ((1024, 899), (2, 2), (672, 590), (0, 0, 41, 41), (42, 48), 2634),
    ((1920, 1080), (2, 2), (672, 378), (0, 0, 147, 147), (28, 48), 1948),
    ((3840, 2160), (2, 2), (672, 378), (0, 0, 147, 147), (28, 48), 1948),
    ((1344, 672), (1, 2), (672, 336), (0, 0, 0, 0), (24, 48), 1752),
    ((1500, 500), (1, 3), (1008, 336), (0, 0, 0, 0), (24, 72), 2328),
    ((500, 1500), (3, 1), (336, 1008), (0, 0, 0, 0), (72, 24), 2376),
    ((340, 1024), (3, 1), (335, 1008), (0, 1, 0, 0), (72, 24), 2376),
    ((2000, 100), (1, 3), (1008, 51), (0, 0, 142, 143), (4, 72), 868),
    ((1000, 10), (1, 3), (1008, 11), (0, 0, 162, 163), (0, 72), 576),
    ((10, 1000), (3, 1), (11, 1008), (162, 163, 0, 0), (72, 0), 648),
]


@pytest.mark.parametrize(
    ("size", "grid", "resized", "padding", "kept", "tokens"),
    WORKED,
    ids=[f"{width}x{height}" for (width, height), *_ in WORKED],
)
def test_worked_examples(
    size: tuple[int, int],
    grid: tuple[int, int],
    resized: tuple[int, int],
    padding: tuple[int, int, int, int],
    kept: tuple[int, int],
    tokens: int,
) -> None:
    width, height = size
    layout = STOCK.layout(height, width)
    assert (layout.image_width, layout.image_height) == size
    assert (layout.rows, layout.columns) == grid
    assert (layout.resized_width, layout.resized_height) == resized
    assert (layout.pad_left, layout.pad_right, layout.pad_top, layout.pad_bottom) == padding
    assert (layout.kept_rows, layout.kept_columns) == kept
    assert layout.num_image_tokens == tokens
    assert layout.num_tiles == grid[0] * grid[1] + 1


@pytest.mark.parametrize(
    ("width", "height", "tokens"), [(336, 336, 1176), (300, 200, 976), (200, 300, 1476)]
)
def test_original_order_takes_the_tall_grid_on_ties(width: int, height: int, tokens: int) -> None:
    layout = AnyRes(336, 14, STOCK_PINPOINTS, reference="original").layout(height, width)
    assert (layout.rows, layout.columns) == (2, 1)
    assert layout.num_image_tokens == tokens


def test_original_order_changes_nothing_above_one_tile() -> None:
    original = AnyRes(336, 14, STOCK_PINPOINTS, reference="original")
    for height in range(337, 1300, 37):
        for width in range(337, 1300, 29):
            assert original.layout(height, width) == STOCK.layout(height, width)


def test_original_order_reads_an_entry_as_width_then_height() -> None:
    geometry = AnyRes(70, 14, ((70, 210),), reference="original")
    assert (geometry.layout(100, 100).rows, geometry.layout(100, 100).columns) == (3, 1)


@pytest.mark.parametrize(
    ("tile", "patch", "tokens"), [(336, 14, 577), (70, 14, 26), (84, 14, 37), (224, 16, 197)]
)
def test_base_grid_is_the_thumbnail_and_one_newline(tile: int, patch: int, tokens: int) -> None:
    base = AnyRes(tile, patch, ())
    assert (base.max_tiles, base.max_image_tokens) == (1, tokens)
    for height, width in [(1, 1), (336, 336), (1, 5000), (4000, 3)]:
        layout = base.layout(height, width)
        assert (layout.num_tiles, layout.num_image_tokens) == (1, tokens)
        assert (layout.image_height, layout.image_width) == (height, width)
        assert our_answer(layout)[:-1] == (0,) * 12


@pytest.mark.parametrize(
    ("name", "tiles", "tokens"),
    [
        ("base", 1, 577),
        ("1x2", 3, 1776),
        ("2x2", 5, 2928),
        ("2x3", 7, 4104),
        ("2x4", 9, 5280),
        ("3x3", 10, 5832),
        ("2x6", 13, 7632),
    ],
)
def test_named_grids_have_the_published_maxima(name: str, tiles: int, tokens: int) -> None:
    geometry = AnyRes(336, 14, grid_pinpoints(name, 336))
    assert (geometry.max_tiles, geometry.max_image_tokens) == (tiles, tokens)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_maxima_are_reached_and_never_passed(geometry: AnyRes) -> None:
    steps = [*range(1, 1500, 13), *{side for point in geometry.candidates for side in point}]
    layouts = [geometry.layout(height, width) for height in steps for width in steps]
    assert max(layout.num_tiles for layout in layouts) == geometry.max_tiles
    assert max(layout.num_image_tokens for layout in layouts) == geometry.max_image_tokens


@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), name=st.sampled_from(GRID_NAMES[1:])
)
def test_resized_image_and_padding_fill_the_canvas(height: int, width: int, name: str) -> None:
    layout = AnyRes(84, 14, grid_pinpoints(name, 84)).layout(height, width)
    assert layout.pad_top + layout.resized_height + layout.pad_bottom == 84 * layout.rows
    assert layout.pad_left + layout.resized_width + layout.pad_right == 84 * layout.columns
    assert 0 <= layout.pad_bottom - layout.pad_top <= 1
    assert 0 <= layout.pad_right - layout.pad_left <= 1
    assert min(layout.resized_height, layout.resized_width) >= 1
    assert 2 * layout.first_row + layout.kept_rows == 6 * layout.rows
    assert 2 * layout.first_column + layout.kept_columns == 6 * layout.columns


def test_stock_grid_is_the_list_of_the_released_configs() -> None:
    assert grid_pinpoints(STOCK_GRID, 336) == STOCK_PINPOINTS
    assert grid_name(STOCK_PINPOINTS, 336) == STOCK_GRID


def test_each_named_grid_holds_the_ones_before_it() -> None:
    for smaller, larger in itertools.pairwise(GRID_NAMES):
        small, large = grid_pinpoints(smaller, 70), grid_pinpoints(larger, 70)
        assert large[: len(small)] == small
        assert len(large) > len(small)


@pytest.mark.parametrize("name", GRID_NAMES)
def test_a_grid_is_named_again_by_its_candidates_in_any_order(name: str) -> None:
    assert grid_name(tuple(reversed(grid_pinpoints(name, 84))), 84) == name


def test_other_candidates_have_no_grid_name() -> None:
    assert grid_name(((336, 1344), (1344, 336)), 336) is None
    assert grid_name(STOCK_PINPOINTS, 168) is None


@pytest.mark.parametrize("name", GRID_NAMES[: GRID_NAMES.index("3x3") + 1])
def test_lower_a_named_grid_gives_the_smaller_one(name: str) -> None:
    assert lower_pinpoints(grid_pinpoints("3x3", 336), name, 336) == grid_pinpoints(name, 336)


def test_lower_keeps_the_order_of_the_list() -> None:
    turned = ((1008, 1008), (672, 336), (336, 672), (672, 672))
    assert lower_pinpoints(turned, "2x2", 336) == ((672, 336), (336, 672), (672, 672))


def test_a_grid_cannot_be_raised() -> None:
    with pytest.raises(RequestError, match=r"2x3 needs 6 tiles beside the thumbnail.*at most 4"):
        lower_pinpoints(STOCK_PINPOINTS, "2x3", 336)
    with pytest.raises(RequestError, match="thumbnail only"):
        lower_pinpoints((), "1x2", 336)


def test_lower_to_a_grid_without_shared_candidates_is_refused() -> None:
    with pytest.raises(RequestError, match="shares no candidate with 672x672"):
        lower_pinpoints(((672, 672),), "1x2", 336)


def test_unknown_grid_names_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"'4x4' is unknown.*base, 1x2, 2x2, 2x3, 2x4, 3x3, 2x6"):
        grid_pinpoints("4x4", 336)


def test_pinpoints_are_read_height_first_and_written_the_same() -> None:
    text = "336x672,1344x336,672x672"
    points = parse_pinpoints(" 336x672, 1344X336 ,672x672", 336)
    assert points == ((336, 672), (1344, 336), (672, 672))
    assert format_pinpoints(points) == text


def test_bad_pinpoints_are_all_named_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        parse_pinpoints("336x672,100x672,x,672x0,336x672", 336)
    for part in ("100x672", "'x' is not", "672x0", "336x672 comes 2 times", "multiples"):
        assert part in str(caught.value)


@given(st.text(max_size=60) | st.from_regex(r"\A[0-9x, ²-]{0,30}\Z"))
def test_any_pinpoint_text_is_read_or_refused(text: str) -> None:
    try:
        points = parse_pinpoints(text, 14)
    except RequestError:
        return
    assert parse_pinpoints(format_pinpoints(points), 14) == points


@pytest.mark.parametrize(
    ("tile", "patch", "pinpoints", "reference", "fault"),
    [
        (0, 14, (), "hf", "must be 1 to"),
        (336, 0, (), "hf", "must be 1 to"),
        (336, 13, (), "hf", "no multiple of the patch side 13"),
        (336, 14, ((336, 500),), "hf", "336x500 is not made of whole tiles"),
        (336, 14, ((-336, 336),), "hf", "-336x336 is not made of whole tiles"),
        (336, 14, ((336 * 145, 336),), "hf", "has 145 tiles; at most 144"),
        (336, 14, (), "mine", "reference is 'mine'"),
    ],
    ids=["tile-0", "patch-0", "patch-13", "part-tile", "negative", "too-many-tiles", "reference"],
)
def test_sizes_that_do_not_go_together_are_refused(
    tile: int, patch: int, pinpoints: Any, reference: Any, fault: str
) -> None:
    with pytest.raises(RequestError, match=fault):
        AnyRes(tile, patch, pinpoints, reference)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-1, 5), (1_000_001, 5)])
def test_an_impossible_image_size_is_refused(height: int, width: int) -> None:
    for geometry in (STOCK, AnyRes(336, 14, ())):
        with pytest.raises(ImageError, match=f"image is {height}x{width}"):
            geometry.layout(height, width)


def test_the_reference_itself_is_pinned_by_a_known_choice() -> None:
    assert select_best_resolution((899, 1024), [list(p) for p in STOCK_PINPOINTS]) == (672, 672)
    assert issubclass(ImageError, LlavaEdgeError)
