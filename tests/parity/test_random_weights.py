"""Random weights, torch against the runtime: the rung where arithmetic is proven.

Bounds: the largest logit difference is at most 1e-3 of the logit range, in float32 on both sides.
Gaps measured when this was written: at most 1.2e-6 of the range, and 6.4e-4 for float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_edge.convert.verification.reference.model import ReferenceModel
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.processing.request import PromptOptions
from tests.support.tiers import one_of_each

NUM_STEPS = 32
LOGIT_BOUND = 1e-3
FP16_LOGIT_BOUND = 3e-3

HEADS = {"tiny": 4, "odd": 6}
"""Query heads of the two presets, so that MHA can be asked for by number."""
GEOMETRIES = {"336-14": "tiny", "odd": "odd"}


def backbones(geometry: str) -> dict[str, dict[str, object]]:
    return {
        "llama-mha": {"backbone": "llama", "kv_heads": HEADS[geometry]},
        "mistral-gqa": {"backbone": "mistral", "kv_heads": 2},
        "qwen2-bias": {"backbone": "qwen2", "kv_heads": 2},
    }


CASES = [
    pytest.param(geometry, changes, id=f"{name}-{label}")
    for label, geometry in GEOMETRIES.items()
    for name, changes in backbones(geometry).items()
]


@dataclass(frozen=True)
class Pair:
    """The reference and the runtime on the same checkpoint."""

    reference: ReferenceModel
    runtime: LlavaEdge


@pytest.fixture(scope="module")
def make_pair(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> Callable[..., Pair]:
    made: dict[str, Pair] = {}

    def make(geometry: str, changes: dict[str, object], **request: object) -> Pair:
        key = repr((geometry, sorted(changes.items()), sorted(request.items())))
        if key not in made:
            folder = make_checkpoint(geometry, **changes)
            artifact = make_artifact(folder, **request)
            model = LlavaEdge.load(artifact, threads=1, allow_slow=True)
            made[key] = Pair(ReferenceModel(folder), model)
        return made[key]

    return make


def assert_within(bound: float, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Largest difference as a share of the reference's range, the worst over positions."""
    gap = float(np.max(np.abs(ours - theirs).max(-1) / np.ptp(theirs, axis=-1)))
    # Shown by pytest -rP: the figures of the README come from here.
    print(f"gap {gap:.1e} of the logit range, bound {bound:.0e}")
    assert gap <= bound


@pytest.mark.parametrize(("geometry", "changes"), CASES)
def test_prefill_and_teacher_forced_logits_stay_within_the_bound(
    make_pair: Callable[..., Pair], picture: Image.Image, geometry: str, changes: dict[str, object]
) -> None:
    pair = make_pair(geometry, changes)
    question = "What is in the picture?"
    inputs = pair.reference.prepare(pair.reference.render(question, 1), [picture])
    answer = pair.reference.greedy(inputs, NUM_STEPS)

    ours = pair.runtime.teacher_forced_logits(question, [picture], answer)

    theirs = pair.reference.logits(inputs, answer).numpy()[-len(ours) :]
    assert_within(LOGIT_BOUND, ours, theirs)


@pytest.mark.parametrize(("geometry", "changes"), CASES)
def test_greedy_tokens_equal_the_reference(
    make_pair: Callable[..., Pair], picture: Image.Image, geometry: str, changes: dict[str, object]
) -> None:
    pair = make_pair(geometry, changes)
    question = "What is in the picture?"
    inputs = pair.reference.prepare(pair.reference.render(question, 1), [picture])

    answer = pair.runtime.generate(question, [picture], max_new_tokens=NUM_STEPS)

    assert list(answer.token_ids) == pair.reference.greedy(inputs, NUM_STEPS)
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("prompt", "num_images"),
    [
        pytest.param("<image>\nWhat is this?", 1, id="image first"),
        pytest.param("What is this?\n<image>", 1, id="image last"),
        pytest.param("Look at <image> and say what it is.", 1, id="image in the middle"),
        pytest.param("<image> or <image>: which is darker?", 2, id="two images"),
        pytest.param("First <image>\nthen <image>", 2, id="two images, the second last"),
        pytest.param("No picture at all.", 0, id="text only"),
    ],
)
@pytest.mark.parametrize(("geometry", "changes"), CASES)
def test_images_anywhere_in_a_raw_prompt_give_the_reference_logits(
    make_pair: Callable[..., Pair],
    picture: Image.Image,
    geometry: str,
    changes: dict[str, object],
    prompt: str,
    num_images: int,
) -> None:
    pair = make_pair(geometry, changes)
    # Another shape for the second image: equal shapes would hide a swapped order of tiles.
    images = [picture, picture.rotate(90, expand=True).crop((0, 0, 310, 500))][:num_images]
    inputs = pair.reference.prepare(prompt, images)

    ours = pair.runtime.teacher_forced_logits(prompt, images, raw=True)

    theirs = pair.reference.logits(inputs).numpy()[-1:]
    assert_within(LOGIT_BOUND, ours, theirs)
    count = pair.runtime.count_tokens(prompt, images, raw=True)
    assert count == inputs["input_ids"].shape[1]


@pytest.mark.parametrize(("geometry", "changes"), one_of_each(lambda case: case[0], CASES))
def test_the_cuda_target_agrees_within_fp16_on_the_cpu_provider(
    make_pair: Callable[..., Pair], picture: Image.Image, geometry: str, changes: dict[str, object]
) -> None:
    pair = make_pair(geometry, changes, profile="a100")
    question = "What is in the picture?"
    inputs = pair.reference.prepare(pair.reference.render(question, 1), [picture])
    answer = pair.reference.greedy(inputs, 8)

    ours = pair.runtime.teacher_forced_logits(question, [picture], answer)

    theirs = pair.reference.logits(inputs, answer).numpy()[-len(ours) :]
    assert_within(FP16_LOGIT_BOUND, ours, theirs)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"backbone": "llama", "rope_factor": 2.5}, id="linear rope scaling"),
        pytest.param({"backbone": "mistral", "sliding_window": 96}, id="sliding window"),
        pytest.param({"backbone": "llama", "tie_word_embeddings": True}, id="tied head"),
        pytest.param({"vision_feature_layer": (-2, 1)}, id="two feature layers"),
        pytest.param({"backbone": "llama", "head_dim": 32}, id="head size of its own"),
    ],
)
def test_less_usual_models_give_the_reference_logits(
    make_pair: Callable[..., Pair], picture: Image.Image, changes: dict[str, object]
) -> None:
    pair = make_pair("odd", changes)
    inputs = pair.reference.prepare(pair.reference.render("What is this?", 1), [picture])
    answer = pair.reference.greedy(inputs, 8)

    ours = pair.runtime.teacher_forced_logits("What is this?", [picture], answer)

    theirs = pair.reference.logits(inputs, answer).numpy()[-len(ours) :]
    assert_within(LOGIT_BOUND, ours, theirs)


@pytest.mark.parametrize(
    "raw_prompt",
    [
        "[INST] <image>\nDescribe this image in detail. [/INST]",
        "[INST] <image>\nWhat is shown in this image? [/INST] A chart. </s> "
        "[INST] <image>\nWhat about this image? [/INST]",
    ],
    ids=["one image", "two images"],
)
def test_prompts_of_the_models_documentation_work_as_given(
    make_pair: Callable[..., Pair], picture: Image.Image, raw_prompt: str
) -> None:
    pair = make_pair("odd", backbones("odd")["mistral-gqa"])
    images = [picture, picture.rotate(90, expand=True)][: raw_prompt.count("<image>")]
    inputs = pair.reference.prepare(raw_prompt, images)
    request = pair.runtime._requests.build(raw_prompt, images, PromptOptions(raw=True))

    answer = pair.runtime.generate(raw_prompt, images, raw=True, max_new_tokens=8)

    assert request.ids.tolist() == inputs["input_ids"][0].tolist()
    assert list(answer.token_ids) == pair.reference.greedy(inputs, 8)


def test_a_sliding_window_holds_across_prefill_chunks(
    make_pair: Callable[..., Pair], picture: Image.Image
) -> None:
    # 2,144 image tokens take five chunks of 512; the window of 300 spans two of them.
    pair = make_pair("tiny", {"backbone": "mistral", "sliding_window": 300})
    inputs = pair.reference.prepare(pair.reference.render("What is this?", 1), [picture])
    answer = pair.reference.greedy(inputs, 8)

    ours = pair.runtime.teacher_forced_logits("What is this?", [picture], answer)

    theirs = pair.reference.logits(inputs, answer).numpy()[-len(ours) :]
    assert_within(LOGIT_BOUND, ours, theirs)
