"""What may be reused, by ids and digests alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llava_edge.profiles.models.anyres import AnyRes, TileLayout
from llava_edge.runtime.generation.decoder.prefix_cache import PrefixCache
from llava_edge.runtime.processing.request import Medium, Request

IMAGE, VIDEO = 90, 91
SMALL = AnyRes(28, 14, ((28, 28),)).layout(28, 28)
COST = SMALL.num_image_tokens
VIDEO_COST = 6


def request(*parts: int | str, layout: TileLayout = SMALL) -> Request:
    """Ids as they are; a small letter is an image of that content, a large one a video."""
    ids: list[int] = []
    media = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        start = len(ids)
        if part.isupper():
            ids += [VIDEO] * VIDEO_COST
            frames = tuple(f"{part}{i}".encode() for i in range(2))
            media.append(Medium(start, VIDEO_COST, None, frames))
        else:
            ids += [IMAGE] * layout.num_image_tokens
            tiles = tuple(f"{part}{i}".encode() for i in range(layout.num_tiles))
            media.append(Medium(start, layout.num_image_tokens, layout, tiles))
    return Request(np.array(ids), tuple(media))


def shared(first: Request, second: Request, valid: int | None = None) -> int:
    contents = PrefixCache((IMAGE, VIDEO))
    contents.commit(first)
    return contents.match(second, first.num_tokens if valid is None else valid)


@pytest.mark.parametrize(
    ("first", "second", "reused"),
    [
        pytest.param((1, 2, 3), (1, 2, 4, 5), 2, id="text that parts"),
        pytest.param((1, 2, 3), (1, 2, 3, 4, 5), 3, id="text that goes on"),
        pytest.param((1, 2, 3), (1, 2, 3), 1, id="the same: two positions are computed"),
        pytest.param((1, 2, 3), (1,), 0, id="one token"),
        pytest.param((1, 2, 3), (9, 2, 3, 4), 0, id="nothing"),
        pytest.param((1, "a", 2), (1, "a", 3, 4), 1 + COST, id="the same picture"),
        pytest.param((1, "a", 2), (1, "b", 2, 3), 1, id="another picture"),
        pytest.param((1, "a", "b", 2), (1, "a", "c", 2), 1 + COST, id="another second picture"),
        pytest.param((1, "a", "b", 2), (1, "b", "a", 2), 1, id="exchanged pictures"),
        pytest.param((1, "a"), (1, "a"), 1, id="a picture at the end is not cut"),
        pytest.param((1, "a"), (1, "a", "b", 2), 1 + COST, id="one picture more"),
        pytest.param((1, "a", "b", 2), (1, "a", 2, 3), 1 + COST, id="one picture less"),
        pytest.param(
            (1, VIDEO, VIDEO, 2), (1, VIDEO, VIDEO, 2, 3), 1, id="places of nothing known"
        ),
        pytest.param((1, "V", 2), (1, "V", 3, 4), 1 + VIDEO_COST, id="the same video"),
        pytest.param((1, "V", 2), (1, "W", 2, 3), 1, id="another video of the same length"),
        pytest.param((1, "V", 2), (1, 1, "V", 2, 3), 1, id="the same video elsewhere"),
        pytest.param((1, "V"), (1, "V"), 1, id="a video at the end is not cut"),
        pytest.param(
            ("a", "V", "b", 2), ("a", "V", "c", 2), COST + VIDEO_COST, id="an image behind a video"
        ),
        pytest.param(("a", "V", 2), ("b", "V", 2), 0, id="another image before the same video"),
    ],
)
def test_the_common_beginning(
    first: tuple[int | str, ...], second: tuple[int | str, ...], reused: int
) -> None:
    assert shared(request(*first), request(*second)) == reused


@pytest.mark.parametrize(
    ("valid", "reused"), [(0, 0), (1, 1), (COST // 2, 1), (COST, 1), (COST + 1, COST + 1)]
)
def test_no_more_than_the_cache_holds_and_whole_pictures(valid: int, reused: int) -> None:
    assert shared(request(1, "a", 2, 3), request(1, "a", 2, 4, 5), valid) == reused


def test_pictures_of_another_geometry_differ_even_where_their_tiles_are_equal() -> None:
    other = replace(SMALL, first_row=SMALL.first_row + 1)

    assert shared(request(1, "a", 2), request(1, "a", 2, 3, layout=other)) == 1


def test_images_of_other_counts_that_fill_the_same_places_differ() -> None:
    long = AnyRes(28, 14, ((28, 56),)).layout(28, 56)
    assert long.num_image_tokens != COST
    one, two = request(1, "a", "b", 2), request(1, "a", 2, layout=long)
    count = min(one.num_tokens, two.num_tokens)
    assert (one.ids[: count - 1] == two.ids[: count - 1]).all()

    assert shared(one, two) == 1


def test_tokens_of_the_answer_count_as_far_as_they_are_in_the_cache() -> None:
    contents = PrefixCache((IMAGE,))
    contents.commit(request(1, 2))
    for token in (7, 8, 9):
        contents.append(token)
    again = request(1, 2, 7, 8, 9, 3, 4)

    # The last token of an answer is chosen but never run.
    assert contents.match(again, 4) == 4
    assert contents.match(request(1, 2, 7, 5, 9, 3), 4) == 3
    contents.commit(request(1, 2))
    assert contents.match(again, 4) == 2
    contents.clear()
    assert contents.match(again, 4) == 0


def test_a_request_without_digests_is_never_known() -> None:
    known = request(1, "a", 2, 3, 4)
    plain = replace(known, media=(replace(known.media[0], digests=()),))

    assert shared(plain, plain) == 1


def test_the_rest_of_a_request_keeps_the_media_behind() -> None:
    named = request(1, "a", "V", 2, "W", "b", 3)
    shown = (np.zeros(1), np.full(1, 2), np.full(1, 3), np.ones(1))
    media = zip(named.media, shown, strict=True)
    whole = replace(named, media=tuple(replace(medium, pixels=each) for medium, each in media))

    rest = whole.without_prefix(1 + COST + VIDEO_COST)

    assert rest.ids.tolist() == [2, *[VIDEO] * VIDEO_COST, *[IMAGE] * COST, 3]
    assert [(p.start, p.stop) for p in rest.media] == [
        (1, 1 + VIDEO_COST),
        (1 + VIDEO_COST, 1 + VIDEO_COST + COST),
    ]
    assert [p.digests for p in rest.media] == [p.digests for p in whole.media[2:]]
    assert (rest.image_tokens, rest.video_tokens) == (COST, VIDEO_COST)
    assert [float(pixels[0]) for pixels in (*rest.pixel_values, *rest.frame_pixels)] == [1, 3]
    assert whole.without_prefix(0) is whole
