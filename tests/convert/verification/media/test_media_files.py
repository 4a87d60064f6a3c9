"""Files that artifacts are verified with: what they are, and what the reference reads of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llava_edge.convert.verification.media import image_files as pictures
from llava_edge.convert.verification.media import video_files as clips
from llava_edge.convert.verification.media.image_files import picture_files
from llava_edge.convert.verification.media.video_files import clip_files
from llava_edge.convert.verification.reference.media import golden_clip, read_clip, read_picture
from llava_edge.runtime.util.image_formats import READABLE_FORMATS, recognise
from llava_edge.runtime.util.limits import VIDEO_FORMATS
from llava_edge.runtime.verification.golden.media import MEDIA_LIMITS

FRAMES = 8


def test_every_format_that_is_read_is_among_the_files() -> None:
    assert {file.format for file in picture_files()} == set(READABLE_FORMATS)
    assert {clip.format for clip in clip_files(FRAMES)} == set(VIDEO_FORMATS)
    for file in picture_files():
        kind = recognise(file.data)
        assert kind is not None
        assert kind.format == file.format


def test_names_differ_and_files_are_small() -> None:
    names = [file.name for file in (*picture_files(), *clip_files(FRAMES))]
    assert len(set(names)) == len(names)
    kept = [file.data for file in picture_files() if file.portable]
    kept += [clip.data for clip in clip_files(FRAMES) if clip.portable]
    assert max(map(len, kept)) < 8 << 10
    assert sum(map(len, kept)) < 80 << 10


def test_the_same_bytes_come_at_each_call() -> None:
    assert picture_files.__wrapped__() == picture_files()
    assert clip_files.__wrapped__(FRAMES) == clip_files(FRAMES)


def test_all_eight_orientations_give_pictures_that_differ_but_for_their_turning() -> None:
    stored = pictures.mosaic(large=True)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }
    by_name = {file.name: file for file in picture_files()}
    for number, expected in upright.items():
        found = read_picture(by_name[f"PNG, large, EXIF orientation {number}"].data)
        np.testing.assert_array_equal(found, expected)
    assert len({each.tobytes() for each in upright.values()}) == 8


def test_large_files_are_more_than_the_runtime_converts_at_once() -> None:
    from llava_edge.runtime.processing.images import loading as images

    assert pictures.mosaic(large=True)[..., 0].size > images._STRIP_PIXELS


def test_deep_files_hold_what_clipping_loses_and_what_rounding_decides() -> None:
    deep = [file for file in picture_files() if file.scaled is not None]
    assert len(deep) == 3
    for file in deep:
        assert file.scaled is not None
        scaled, clipped = read_picture(file.scaled), read_picture(file.data)
        assert abs(clipped.mean() - scaled.mean()) > 50
        assert len(np.unique(scaled)) > 15


@pytest.mark.parametrize("clip", clip_files(FRAMES), ids=lambda clip: clip.name)
def test_a_clip_shows_what_was_drawn(clip: Any) -> None:
    frames = np.stack([np.asarray(frame) for frame in read_clip(golden_clip(clip), clip)])
    drawn = clips._flat() if clip.portable else clips._textured()
    rule = (
        np.linspace(0, clip.total - 1, clip.num_frames, dtype=int)
        if clip.frame_choice == "original"
        else np.arange(clip.num_frames) * clip.total // clip.num_frames
    )
    luma = clip.upright(np.stack([drawn[i][0][..., None].repeat(3, -1) for i in rule]))
    grey = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)

    assert frames.shape[0] == clip.num_frames
    # Brighter where it was drawn brighter: frames are those that were chosen, and stand upright.
    for ours, theirs in zip(grey, luma[..., 0], strict=True):
        if np.ptp(theirs):
            assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.98
    if clip.portable:
        assert set(np.unique(frames)) == {0, 255}


def test_without_the_decoder_there_are_no_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "can_decode", lambda: False)

    assert clip_files.__wrapped__(FRAMES) == ()
    assert clip_files(0) == ()


def test_files_are_within_the_limits_that_they_are_opened_with() -> None:
    shape = pictures.mosaic(large=True).shape
    assert shape[0] * shape[1] < MEDIA_LIMITS.max_image_pixels
    assert all(clip.total < MEDIA_LIMITS.max_video_frames for clip in clip_files(FRAMES))
