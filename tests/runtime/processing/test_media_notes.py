"""Answers report what was done to images and videos before the model saw them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from llava_edge.profiles.errors import VideoError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.processing.request import VideoInput
from llava_edge.runtime.util.limits import Limits
from tests.support.videos import encoded, moving, remuxed

SMALL = {"model_type": "llava_next_video", "backbone": "mistral", "image_size": 56}
GROUPS = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=2:log-level=none"}
DEEP = np.tile(np.linspace(0, 65535, 90).astype(np.uint16), (70, 1))


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", **SMALL), num_frames=8)


@pytest.fixture(scope="module")
def model(artifact: Path) -> Iterator[LlavaEdge]:
    with LlavaEdge.load(artifact, threads=1) as loaded:
        yield loaded


def test_a_deep_picture_is_noted_in_every_way_of_asking(model: LlavaEdge) -> None:
    plain = model.generate("What?", [np.zeros((70, 90, 3), np.uint8)], max_new_tokens=1)
    asked = model.generate("What?", [DEEP], max_new_tokens=1)
    capped = model.generate("What?", [DEEP], max_new_tokens=1, max_image_tokens=10_000)
    chat = model.chat()
    first = chat.send("What?", [DEEP], max_new_tokens=1)
    second = chat.send("And?", max_new_tokens=1)

    assert plain.notes == ()
    (note,) = asked.notes
    assert "70x90" in note
    assert asked.notes == capped.notes == first.notes == second.notes


def test_a_model_loaded_to_clip_sees_what_the_reference_sees(
    artifact: Path, model: LlavaEdge
) -> None:
    white = np.minimum(DEEP, 255).astype(np.uint8)
    with LlavaEdge.load(artifact, threads=1, limits=Limits(high_bit_depth="clip")) as clipping:
        clipped = clipping.teacher_forced_logits("What?", [DEEP], raw=False)
        assert clipping.generate("What?", [DEEP], max_new_tokens=1).notes == ()
    assert np.array_equal(clipped, model.teacher_forced_logits("What?", [white], raw=False))


def decoded(data: bytes) -> list[Any]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_frames_of_a_late_start_are_chosen_from_those_that_decode(model: LlavaEdge) -> None:
    data = remuxed(encoded(moving(40), **GROUPS), "matroska", lambda number: number > 3)
    frames = decoded(data)
    assert len(frames) == 30

    of_file = model.teacher_forced_logits("What?", video=VideoInput(data))
    of_list = model.teacher_forced_logits("What?", video=VideoInput(frames))
    assert np.array_equal(of_file, of_list)


def test_tokens_are_counted_by_the_frames_that_decode(model: LlavaEdge) -> None:
    data = remuxed(encoded(moving(16), **GROUPS), "matroska", lambda number: number > 3)
    assert len(decoded(data)) == 6
    answer = model.generate("What?", video=data, max_new_tokens=1)

    assert answer.video_tokens == 6 * 4
    assert model.count_tokens("What?", video=data) == answer.prompt_tokens
    for ask in (model.count_tokens, model.generate):
        with pytest.raises(VideoError, match="7 frames were asked for; the video has 6"):
            ask("What?", video=data, num_frames=7)


def test_damaged_packets_are_noted(model: LlavaEdge) -> None:
    def zeroed(number: int, content: bytes) -> bytes:
        return bytes(len(content)) if number == 14 else content

    sound = encoded(moving(40), **GROUPS)
    damaged = remuxed(sound, "matroska", change=zeroed)

    assert model.generate("What?", video=sound, max_new_tokens=1).notes == ()
    (note,) = model.generate("What?", video=damaged, max_new_tokens=1).notes
    assert "from the 39 that decode" in note
