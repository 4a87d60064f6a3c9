"""LLaVA-NeXT-Video against ``LlavaNextVideoForConditionalGeneration``, frames alone and mixed.

Bounds are those of images (``test_random_weights``); the largest gap measured was 6.6e-7 of the
logit range in float32 and 4.1e-4 in float16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_edge.convert.verification.reference.model import ReferenceModel
from llava_edge.profiles.errors import BudgetError, PromptError, VideoError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.cli import main as cli
from llava_edge.runtime.processing.request import VideoInput
from llava_edge.runtime.processing.video.frame_sampling import choose_frames
from tests.parity.test_random_weights import FP16_LOGIT_BOUND, LOGIT_BOUND, assert_within
from tests.support.tiers import slow_but
from tests.support.videos import encoded, moving

QUESTION = "What happens?"
SCALED = {"backbone": "llama", "kv_heads": 4, "rope_factor": 2.5}
"""As the 7B: positions of a 4096 model divided by 2.5."""
YI = {"backbone": "llama", "kv_heads": 2, "rope_theta": 5e6}
"""As the 34B: no scaling, shared key heads."""
FRAMES = 32


def clip(count: int, height: int = 120, width: int = 200) -> list[Image.Image]:
    """Frames in which everything moves."""
    y, x = np.mgrid[0:height, 0:width]
    frames = []
    for number in range(count):
        wave = [127 + 120 * np.sin((x + 3 * number) / (7 + c) + y / (11 - c)) for c in range(3)]
        frames.append(Image.fromarray(np.stack(wave, -1).astype(np.uint8)))
    return frames


@pytest.fixture(scope="module")
def make_pair(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> Callable[..., tuple[ReferenceModel, LlavaEdge]]:
    made: dict[str, tuple[ReferenceModel, LlavaEdge]] = {}

    def make(
        changes: dict[str, object], profile: str = "cpu-16gb", **wishes: object
    ) -> tuple[ReferenceModel, LlavaEdge]:
        key = repr((sorted(changes.items()), profile, sorted(wishes.items())))
        if key not in made:
            folder = make_checkpoint("tiny", model_type="llava_next_video", **changes)
            artifact = make_artifact(folder, profile=profile, **wishes)
            model = LlavaEdge.load(artifact, threads=1, allow_slow=True)
            made[key] = ReferenceModel(folder), model
        return made[key]

    return make


@pytest.mark.parametrize("count", slow_but([8], [8, FRAMES]))
def test_logits_and_answers_are_those_of_the_reference(
    make_pair: Callable[..., tuple[ReferenceModel, LlavaEdge]], count: int
) -> None:
    reference, model = make_pair(SCALED, num_frames=FRAMES)
    frames = clip(count)
    inputs = reference.prepare(reference.render(QUESTION, 0, 1), [], frames)
    forced = reference.greedy(inputs, 8)

    ours = model.teacher_forced_logits(QUESTION, [], forced, video=VideoInput(frames, count))
    answer = model.generate(QUESTION, video=frames, num_frames=count, max_new_tokens=8)

    theirs = reference.logits(inputs, forced).numpy()[-len(ours) :]
    assert_within(LOGIT_BOUND, ours, theirs)
    assert list(answer.token_ids) == forced
    assert answer.video_tokens == 144 * count
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    counted = model.count_tokens(QUESTION, video=frames, num_frames=count)
    assert counted == answer.prompt_tokens


@pytest.mark.parametrize(
    "prompt",
    [
        "USER: <image>\n<video>\nWhat is in both? ASSISTANT:",
        "USER: First <video>, then <image>. What is in both? ASSISTANT:",
    ],
    ids=["image first", "video first"],
)
@pytest.mark.parametrize("changes", [SCALED, YI], ids=["scaled", "yi"])
def test_an_image_and_a_video_stand_where_they_were_put(
    make_pair: Callable[..., tuple[ReferenceModel, LlavaEdge]],
    picture: Image.Image,
    changes: dict[str, object],
    prompt: str,
) -> None:
    reference, model = make_pair(changes, num_frames=8)
    frames = clip(5)
    small = picture.resize((300, 200))
    inputs = reference.prepare(prompt, [small], frames)

    ours = model.teacher_forced_logits(prompt, [small], video=VideoInput(frames), raw=True)

    theirs = reference.logits(inputs).numpy()[-1:]
    assert_within(LOGIT_BOUND, ours, theirs)
    counted = model.count_tokens(prompt, [small], video=frames, raw=True)
    assert counted == inputs["input_ids"].shape[1]


def test_images_alone_take_the_path_of_images(
    make_pair: Callable[..., tuple[ReferenceModel, LlavaEdge]], picture: Image.Image
) -> None:
    reference, model = make_pair(SCALED, num_frames=FRAMES)
    inputs = reference.prepare(reference.render(QUESTION, 1), [picture])
    forced = reference.greedy(inputs, 8)

    ours = model.teacher_forced_logits(QUESTION, [picture], forced)

    assert_within(LOGIT_BOUND, ours, reference.logits(inputs, forced).numpy()[-len(ours) :])


def test_the_cuda_target_agrees_within_fp16(
    make_pair: Callable[..., tuple[ReferenceModel, LlavaEdge]], picture: Image.Image
) -> None:
    reference, model = make_pair(SCALED, "a100", num_frames=FRAMES)
    frames = clip(8)
    inputs = reference.prepare(reference.render(QUESTION, 1, 1), [picture], frames)
    forced = reference.greedy(inputs, 8)

    ours = model.teacher_forced_logits(QUESTION, [picture], forced, video=VideoInput(frames))

    assert_within(FP16_LOGIT_BOUND, ours, reference.logits(inputs, forced).numpy()[-len(ours) :])


def test_of_more_frames_those_of_the_reference_are_seen(
    make_pair: Callable[..., tuple[ReferenceModel, LlavaEdge]],
) -> None:
    reference, model = make_pair(SCALED, num_frames=FRAMES)
    frames = clip(21)
    for choice in ("reference", "original"):
        seen = [frames[number] for number in choose_frames(21, 5, choice)]
        inputs = reference.prepare(reference.render(QUESTION, 0, 1), [], seen)

        ours = model.teacher_forced_logits(QUESTION, video=VideoInput(frames, 5, choice))

        assert_within(LOGIT_BOUND, ours, reference.logits(inputs).numpy()[-1:])


def test_what_does_not_fit_is_refused_before_work(
    make_pair: Callable[..., tuple[ReferenceModel, LlavaEdge]],
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    picture: Image.Image,
) -> None:
    _, model = make_pair(SCALED, num_frames=FRAMES)
    _, narrow = make_pair(YI, num_frames=8, context_tokens=3600)

    with pytest.raises(VideoError, match=r"33 frames.*planned for at most 32.*--video 33"):
        model.generate(QUESTION, video=clip(40), num_frames=33)
    with pytest.raises(VideoError, match="9 frames were asked for; the video has 8"):
        model.generate(QUESTION, video=clip(8), num_frames=9)
    with pytest.raises(PromptError, match=r"2144 of them for 1 images, 1152 for a video"):
        narrow.generate("What " * 600, [picture], video=clip(8))
    with pytest.raises(PromptError, match="1 videos were given and the text has 2 <video> marks"):
        model.generate("<video> and <video>", video=clip(8))
    # 32 frames take 4,608 positions; the 34B has 4,096 and no scaling.
    yi = make_checkpoint("tiny", model_type="llava_next_video", **YI)
    with pytest.raises(BudgetError, match="the model has 4096"):
        make_artifact(yi, num_frames=FRAMES)


def test_a_model_of_images_takes_no_video(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    artifact = make_artifact(make_checkpoint("odd"))

    with (
        LlavaEdge.load(artifact, threads=1) as model,
        pytest.raises(VideoError, match="is no video model"),
    ):
        model.generate(QUESTION, video=clip(2))


def test_tower_and_projector_lie_once_in_the_artifact(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    sizes = [
        (make_artifact(make_checkpoint("tiny", model_type=kind, **SCALED)) / "vision/weights.bin")
        .stat()
        .st_size
        for kind in ("llava_next", "llava_next_video")
    ]

    assert sizes[0] == sizes[1]


def test_the_command_answers_about_a_file(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_checkpoint("tiny", model_type="llava_next_video", **SCALED)
    artifact = make_artifact(folder, profile="cpu-16gb", num_frames=FRAMES)
    path = tmp_path / "clip.mp4"
    path.write_bytes(encoded(moving(30)))
    command = ["run", str(artifact), "--video", str(path), "--frames", "4", "--threads", "1"]
    command += ["--prompt", QUESTION, "--max-new-tokens", "2", "--json"]

    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["video_tokens"] == 4 * 144
    assert found["image_tokens"] == 0

    assert cli.main([*command[:4], "--frames", "31", "--prompt", QUESTION]) == 2
    assert "31 frames were asked for; the video has 30" in capsys.readouterr().err
