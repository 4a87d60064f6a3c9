from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from llava_edge.profiles.errors import ImageError, OutOfMemoryError
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.runtime.processing.degradation import Degradation, Fallback
from llava_edge.runtime.processing.request import Medium, Request

GRID = AnyRes(28, 14, ((56, 56), (28, 56), (56, 28)))


def request(grid: AnyRes = GRID, size: int = 100, frames: int = 0) -> Request:
    layout = grid.layout(size, size)
    pixels = np.zeros((layout.num_tiles, 3, 28, 28), np.float32)
    media = [Medium(0, layout.num_image_tokens, layout, pixels=pixels)]
    if frames:
        shown = np.zeros((frames, 3, 28, 28), np.float32)
        media.append(Medium(layout.num_image_tokens, 4 * frames, pixels=shown))
    return Request(np.zeros(1, np.int64), tuple(media))


def out_of_memory() -> Request:
    raise OutOfMemoryError("none left")


def step(
    make: Callable[[], Request], tiles: int = 1, frames: int = 0, what: str = "less"
) -> Fallback:
    return Fallback(what, tiles, frames, make)


def test_a_request_that_fits_is_left_as_it_is() -> None:
    degradation = Degradation(request, lambda: [step(out_of_memory)])

    assert degradation.request.layouts[0].num_tiles == 5
    assert degradation.degraded == ()


def test_each_call_takes_the_next_step_and_says_why() -> None:
    steps = [
        step(lambda: request(AnyRes(28, 14, ((28, 56),))), 3, what="three tiles"),
        step(lambda: request(AnyRes(28, 14, ())), 1, what="one tile"),
    ]
    degradation = Degradation(request, lambda: steps)

    degradation.lower("too much")
    assert degradation.request.layouts[0].num_tiles == 3
    assert degradation.degraded == ("three tiles: too much",)

    degradation.lower("still too much")
    assert degradation.request.layouts[0].num_tiles == 1
    assert degradation.degraded == ("one tile: still too much",)
    assert not degradation.can_lower
    with pytest.raises(ValueError, match="no step is left"):
        degradation.lower("again")


def test_a_step_that_would_give_up_nothing_is_passed_over() -> None:
    # A single tile already: grids below change nothing for it.
    degradation = Degradation(lambda: request(AnyRes(28, 14, ())), lambda: [step(request, 3)])

    assert not degradation.can_lower


def test_fewer_frames_are_less_as_well() -> None:
    base = AnyRes(28, 14, ())
    steps = [step(lambda: request(base, frames=4), 1, 4)]
    degradation = Degradation(lambda: request(base, frames=8), lambda: steps)

    degradation.lower("too much")

    assert len(degradation.request.frame_pixels[0]) == 4


def test_pixels_without_room_take_the_first_step_that_has() -> None:
    base = AnyRes(28, 14, ())
    degradation = Degradation(
        out_of_memory, lambda: [step(out_of_memory, 3), step(lambda: request(base), 1)]
    )

    assert degradation.degraded == ("less: none left",)
    assert degradation.request.layouts[0].num_tiles == 1


def test_where_no_step_has_room_it_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemoryError, match="none left"):
        Degradation(out_of_memory, lambda: [step(out_of_memory, 3), step(out_of_memory, 1)])
    with pytest.raises(OutOfMemoryError, match="none left"):
        Degradation(out_of_memory)


def test_a_refused_image_is_refused_before_any_step_is_thought_of() -> None:
    def refuse() -> Request:
        raise ImageError("no image")

    def no_steps() -> list[Fallback]:
        raise AssertionError("asked too early")

    with pytest.raises(ImageError):
        Degradation(refuse, no_steps)


def test_what_was_given_up_before_is_still_told_when_more_is() -> None:
    degradation = Degradation(request, lambda: [step(lambda: request(AnyRes(28, 14, ())))], "a cap")
    assert degradation.degraded == ("a cap",)

    degradation.lower("too much")
    assert degradation.degraded == ("a cap", "less: too much")


def test_a_bare_memory_error_gives_way_too() -> None:
    def refused() -> Request:
        raise MemoryError

    degradation = Degradation(refused, lambda: [step(request)])
    assert degradation.degraded == ("less: memory ran out while the request was prepared",)
    with pytest.raises(OutOfMemoryError, match="while the request was prepared"):
        Degradation(refused)
