"""LLaVA-1.5: one view of each image, 576 tokens, no newline, against transformers' own model.

Bounds are those of ``test_random_weights``; the largest gap measured was 6.1e-7 of the logit range.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_edge.convert.verification.reference.model import ReferenceModel
from llava_edge.profiles.errors import ImageError, RequestError
from llava_edge.runtime import LlavaEdge
from tests.parity.test_random_weights import FP16_LOGIT_BOUND, LOGIT_BOUND, assert_within

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("tiny", model_type="llava")


@pytest.fixture(scope="module")
def reference(folder: Path) -> ReferenceModel:
    return ReferenceModel(folder)


@pytest.fixture(scope="module")
def model(folder: Path, make_artifact: Callable[..., Path]) -> LlavaEdge:
    return LlavaEdge.load(make_artifact(folder), threads=1)


def images(picture: Image.Image, count: int) -> list[Image.Image]:
    """Of several shapes, so that the cut falls on either side."""
    return [picture, picture.rotate(90, expand=True).crop((0, 0, 310, 500))][:count]


@pytest.mark.parametrize("count", [1, 2])
def test_logits_and_answers_are_those_of_the_reference(
    model: LlavaEdge, reference: ReferenceModel, picture: Image.Image, count: int
) -> None:
    asked = images(picture, count)
    inputs = reference.prepare(reference.render(QUESTION, count), asked)
    forced = reference.greedy(inputs, 16)

    ours = model.teacher_forced_logits(QUESTION, asked, forced)
    answer = model.generate(QUESTION, asked, max_new_tokens=16)

    theirs = reference.logits(inputs, forced).numpy()[-len(ours) :]
    assert_within(LOGIT_BOUND, ours, theirs)
    assert list(answer.token_ids) == forced
    assert answer.image_tokens == 576 * count
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]


def test_the_cuda_target_agrees_within_fp16(
    folder: Path,
    reference: ReferenceModel,
    make_artifact: Callable[..., Path],
    picture: Image.Image,
) -> None:
    inputs = reference.prepare(reference.render(QUESTION, 1), [picture])
    forced = reference.greedy(inputs, 8)

    with LlavaEdge.load(make_artifact(folder, profile="a100"), threads=1, allow_slow=True) as half:
        ours = half.teacher_forced_logits(QUESTION, [picture], forced)

    theirs = reference.logits(inputs, forced).numpy()[-len(ours) :]
    assert_within(FP16_LOGIT_BOUND, ours, theirs)


def test_the_count_is_known_before_anything_runs(model: LlavaEdge, picture: Image.Image) -> None:
    without = model.count_tokens(QUESTION)

    counts = [model.count_tokens(QUESTION, images(picture, count)) for count in (1, 2)]

    assert np.diff([without, *counts]).min() >= 576


def test_tiles_and_slivers_are_refused(model: LlavaEdge, picture: Image.Image) -> None:
    with pytest.raises(RequestError, match="1x2"):
        model.count_tokens(QUESTION, [picture], grid="1x2")
    with pytest.raises(ImageError, match="only its middle would be seen"):
        model.generate(QUESTION, [picture.resize((505, 5))], max_new_tokens=1)
