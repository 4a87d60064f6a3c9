"""Videos that the KV cache, the vision cache or a conversation holds already."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_edge.profiles.errors import PromptError, RequestError, VideoError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.cli import main as cli
from llava_edge.runtime.processing.request import PromptOptions, VideoInput
from llava_edge.runtime.processing.video.video_processor import VideoProcessor
from llava_edge.runtime.util.arrays import Array
from tests.support.videos import encoded, moving

SMALL = {"model_type": "llava_next_video", "backbone": "mistral", "image_size": 56}
PER_FRAME = 4
FRAMES = 4
RAW = PromptOptions(raw=True)
FIRST, SECOND = "one two <video> three", "one two <video> four five"


def clip(seed: int, count: int = FRAMES) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8)) for _ in range(count)]


def one_pixel_changed(frames: list[Image.Image]) -> list[Image.Image]:
    changed = frames[-1].copy()
    changed.paste((255, 0, 0), (38, 28, 42, 32))
    return [*frames[:-1], changed]


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", **SMALL), num_frames=8)


@pytest.fixture(scope="module")
def model(artifact: Path) -> Iterator[LlavaEdge]:
    with LlavaEdge.load(artifact, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def plain(artifact: Path) -> Iterator[LlavaEdge]:
    with LlavaEdge.load(artifact, threads=1, prefix_reuse=False) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def empty_cache(model: LlavaEdge) -> None:
    # Nothing of the test before may be found in the cache.
    model.teacher_forced_logits("x", raw=True)


def watch_tower(patch: pytest.MonkeyPatch, model: LlavaEdge) -> list[int]:
    """Tiles and frames of each call of the tower."""
    inner, given = model._tower.encoder, []
    real = inner.encode  # type: ignore[union-attr]

    def encode(pixel_values: Array, out: Array) -> None:
        given.append(len(pixel_values))
        real(pixel_values, out)

    patch.setattr(inner, "encode", encode)
    return given


def test_a_second_question_about_the_same_video_computes_only_what_is_new(
    model: LlavaEdge, plain: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = clip(1)
    given = watch_tower(monkeypatch, model)
    model.generate(FIRST, video=frames, raw=True, max_new_tokens=3)
    assert sum(given) == FRAMES
    given.clear()

    # Equal frames in other objects.
    second = model.generate(SECOND, video=clip(1), raw=True, max_new_tokens=6)

    assert given == []
    assert second.video_tokens == FRAMES * PER_FRAME < second.reused_tokens
    alone = plain.generate(SECOND, video=frames, raw=True, max_new_tokens=6)
    assert second.token_ids == alone.token_ids
    assert (alone.reused_tokens, alone.prompt_tokens) == (0, second.prompt_tokens)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(clip(2), id="another"),
        pytest.param(clip(1)[::-1], id="backwards"),
        pytest.param(one_pixel_changed(clip(1)), id="a spot of the last frame"),
    ],
)
def test_another_video_of_the_same_length_is_not_taken_for_the_first(
    model: LlavaEdge, plain: LlavaEdge, second: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model.generate(FIRST, video=clip(1), raw=True, max_new_tokens=3)
    given = watch_tower(monkeypatch, model)

    answer = model.generate(FIRST, video=second, raw=True, max_new_tokens=6)

    assert answer.prompt_tokens == first.prompt_tokens
    assert sum(given) == FRAMES
    assert 0 < answer.reused_tokens < answer.prompt_tokens - FRAMES * PER_FRAME
    alone = plain.generate(FIRST, video=second, raw=True, max_new_tokens=6)
    assert answer.token_ids == alone.token_ids


def test_other_frames_of_the_same_video_are_another_video(model: LlavaEdge) -> None:
    frames = clip(1, 8)
    options = {"video": frames, "num_frames": 4, "raw": True, "max_new_tokens": 2}
    model.generate(FIRST, **options)

    assert model.generate(FIRST, **options).reused_tokens > 4 * PER_FRAME
    other = model.generate(FIRST, frame_choice="original", **options)
    assert other.reused_tokens < 4 * PER_FRAME


def test_an_image_behind_a_video_is_encoded_alone(
    model: LlavaEdge, plain: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "<video> one <image> two"
    images = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]
    model.generate(prompt, images[:1], video=clip(1), raw=True, max_new_tokens=2)
    given = watch_tower(monkeypatch, model)

    answer = model.generate(prompt, images[1:], video=clip(1), raw=True, max_new_tokens=4)

    assert sum(given) < FRAMES
    alone = plain.generate(prompt, images[1:], video=clip(1), raw=True, max_new_tokens=4)
    assert answer.token_ids == alone.token_ids


def test_frames_of_the_vision_cache_are_not_encoded_again(
    artifact: Path, plain: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = clip(1)
    with LlavaEdge.load(artifact, threads=1, vision_cache_bytes=1 << 22) as cached:
        given = watch_tower(monkeypatch, cached)
        for video, encoded_now in [(frames, 4), (frames, 0), (one_pixel_changed(frames), 1)]:
            given.clear()
            ours = cached.replay(FIRST, (), (), lambda *_: None, RAW, video=VideoInput(video))
            assert sum(given) == encoded_now
            theirs = plain.replay(FIRST, (), (), lambda *_: None, RAW, video=VideoInput(video))
            np.testing.assert_array_equal(ours.features, theirs.features)


def test_a_conversation_shows_videos_and_computes_only_what_is_new(
    model: LlavaEdge, plain: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, other = model.chat(), plain.chat()
    image = Image.new("RGB", (56, 56), "red")
    turns = [
        ("What happens?", [], clip(1)),
        ("And then?", [image], None),
        ("And <video> there, beside <image>?", [image], clip(2, 2)),
        ("Where?", [], None),
    ]
    given = watch_tower(monkeypatch, model)
    cut: list[int] = []
    real = VideoProcessor.preprocess

    def preprocess(self: VideoProcessor, frames: object, count: int) -> Array:
        cut.append(count)
        return real(self, frames, count)  # type: ignore[arg-type]

    monkeypatch.setattr(VideoProcessor, "preprocess", preprocess)
    for number, (text, images, video) in enumerate(turns):
        count = chat.count_tokens(text, images, video)
        given.clear()
        cut.clear()

        answer = chat.send(text, images, video, max_new_tokens=4, prompt_lookup_num_tokens=4)

        # A picture gives tiles, of which the video before it is no part.
        new = 0 if video is None else len(video)
        assert cut == ([new] if new else [])
        if not images:
            assert sum(given) == new
        theirs = other.send(text, images, video, max_new_tokens=4)
        assert answer.token_ids == theirs.token_ids
        assert answer.prompt_tokens == theirs.prompt_tokens == count
        assert answer.video_tokens == theirs.video_tokens
        assert (answer.reused_tokens > FRAMES * PER_FRAME) is (number > 0)
    assert answer.video_tokens == (FRAMES + 2) * PER_FRAME
    assert [None if m.video is None else m.video.num_tokens for m in chat.messages[::2]] == [
        FRAMES * PER_FRAME,
        None,
        2 * PER_FRAME,
        None,
    ]


def test_a_conversation_names_what_it_does_not_take(
    model: LlavaEdge, make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    chat = model.chat()
    with pytest.raises(VideoError, match=r"9 frames.*planned for at most 8"):
        chat.send("What?", video=clip(1, 9), num_frames=9)
    with pytest.raises(RequestError, match="frame choice 'any' is unknown"):
        chat.send("What?", video=clip(1), frame_choice="any")
    with pytest.raises(PromptError, match=r"1 videos were given and the text has 2 <video> marks"):
        chat.send("<video> and <video>", video=clip(1))
    assert chat.messages == []
    with (
        LlavaEdge.load(make_artifact(make_checkpoint("odd", backbone="mistral"))) as images_only,
        pytest.raises(VideoError, match="is no video model"),
    ):
        images_only.chat().send("What?", video=clip(1))


def test_the_command_talks_about_videos_with_all_options_at_once(
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    video, image, drawn = tmp_path / "clip.mp4", tmp_path / "a.png", tmp_path / "tiles.png"
    video.write_bytes(encoded(moving(12)))
    Image.new("RGB", (80, 60), "red").save(image)
    lines = f"/video {video}\nAnd this?\n/video no/such.mp4\nWhere?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    command = ["run", str(artifact), "--chat", "--video", str(video), "--frames", "3"]
    command += ["--frame-choice", "original", "--image", str(image), "--show-tiles", str(drawn)]
    command += ["--prompt", "What happens?", "--prompt-lookup", "4", "--max-new-tokens", "3"]

    code = cli.main([*command, "--json", "--threads", "1"])

    output = capsys.readouterr()
    result = json.loads(output.out.splitlines()[-1])
    answers = [turn["answer"] for turn in result["turns"]]
    assert code == 2
    assert "no/such.mp4" in output.err
    assert f"3 frames, {3 * PER_FRAME} tokens, with the next message" in output.err
    assert [answer["video_tokens"] for answer in answers] == [
        3 * PER_FRAME,
        6 * PER_FRAME,
        6 * PER_FRAME,
    ]
    assert all(answer["reused_tokens"] > 3 * PER_FRAME for answer in answers[1:])
    assert [said["videos"] for said in result["messages"]] == [1, 0, 1, 0, 0, 0]
    assert drawn.exists()
