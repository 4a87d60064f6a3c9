"""The whole loop on the CUDA provider: requests, memory over many of them, memory that runs out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.cuda_options import CudaOptions
from tests.cuda_stand_in.record import StandIn
from tests.cuda_stand_in.test_provider import CONTEXT, SIZES

pytestmark = pytest.mark.stand_in

MIB = 1 << 20


@pytest.fixture(scope="session")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(
        make_checkpoint("tiny", **SIZES), profile="a100", precision="int4", context_tokens=CONTEXT
    )


def load(artifact: Path, **cuda: int) -> LlavaEdge:
    return LlavaEdge.load(
        artifact,
        device="cuda",
        engine="ort",
        strict_device=True,
        prefix_reuse=False,
        cuda=CudaOptions(**cuda),
    )


def picture(number: int, width: int = 112, height: int = 84) -> Image.Image:
    return Image.new("RGB", (width, height), (number * 37 % 256, number * 91 % 256, 80))


@pytest.mark.parametrize(
    "choice",
    [{}, {"graph": True}, {"best_on_device": False}, {"features_on_device": True}],
    ids=["as it is", "recorded", "all logits", "features on the device"],
)
def test_requests_of_all_kinds_are_answered(artifact: Path, choice: dict[str, int]) -> None:
    with load(artifact, **choice) as model:
        answers = [
            model.generate("What is it?", max_new_tokens=4),
            model.generate("What is it?", [picture(1)], max_new_tokens=4),
            model.generate("And these?", [picture(2), picture(3, 60, 200)], max_new_tokens=4),
            model.generate(
                "Again and again and again.", max_new_tokens=12, prompt_lookup_num_tokens=4
            ),
            model.generate("Warmer?", max_new_tokens=4, temperature=0.9, seed=3),
        ]

    for answer in answers:
        assert answer.off_device == ()
        assert answer.degraded == ()
        assert answer.token_ids
        assert answer.peak_memory.device_bytes


def test_features_stay_on_the_device(cuda: StandIn, artifact: Path) -> None:
    """Features of a tile are 576 rows of 512, a row of logits is smaller."""
    with load(artifact, features_on_device=True) as model:
        model.generate("What is it?", [picture(1)], max_new_tokens=2)
        with cuda.record() as record:
            model.generate("What is it?", [picture(2)], max_new_tokens=2)

    assert max(record.copies("device to host")) == 4 * SIZES["vocab_size"]
    assert max(record.copies("device to device")) >= 576 * 512 * 2


def test_memory_stays_where_it_is(cuda: StandIn, artifact: Path) -> None:
    with load(artifact) as model:
        for number in range(3):
            model.generate("What is it?", [picture(number)], max_new_tokens=4)
        settled = cuda.used
        for number in range(12):
            model.generate("What is it?", [picture(number)], max_new_tokens=4)
        assert cuda.used == settled


def test_a_closed_model_gives_its_memory_back(cuda: StandIn, artifact: Path) -> None:
    with load(artifact) as model:
        model.generate("What is it?", [picture(1)], max_new_tokens=4)
    left = cuda.used
    for _ in range(3):
        with load(artifact) as model:
            model.generate("What is it?", [picture(1)], max_new_tokens=4)
        assert cuda.used <= left


def test_a_request_gives_way_to_the_limit_of_the_provider(cuda: StandIn, artifact: Path) -> None:
    """Between what loading takes and what the largest request takes, smaller ones are answered."""
    question = "What is it? " * 40
    with load(artifact) as model:
        model.generate("What?", max_new_tokens=2)
        small = cuda.used
        whole = model.generate(question, [picture(1), picture(2)], max_new_tokens=2)
        large = cuda.used
    assert whole.degraded == ()
    assert large - small >= MIB

    said = []
    for eighths in range(1, 8):
        # Each session has an arena of its own; the decoder's holds weights and activations.
        limit = (large - small) * eighths // 8 + MIB
        try:
            with load(artifact, memory_limit_bytes=limit) as model:
                answer = model.generate(question, [picture(1), picture(2)], max_new_tokens=2)
                said.append(answer.degraded)
        except OutOfMemoryError:
            said.append(("refused",))

    # From refusals over lesser answers to whole ones, in that order.
    assert said[0] != ()
    assert said[-1] == ()
    assert said == sorted(said, key=lambda degraded: (degraded != ("refused",), degraded == ()))


@pytest.mark.parametrize("mebibytes", [2, 4, 16])
def test_a_device_that_is_too_small_is_said_in_words(artifact: Path, mebibytes: int) -> None:
    program = (
        "import sys; from llava_edge.runtime.cli import main;"
        "sys.exit(main(['run', sys.argv[1], '--device', 'cuda', '--prompt', 'What?', '--json']))"
    )
    small = {**os.environ, "STAND_IN_MEMORY": str(mebibytes * MIB)}

    done = subprocess.run(
        [sys.executable, "-c", program, str(artifact)], capture_output=True, text=True, env=small
    )

    assert done.returncode == OutOfMemoryError.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert "memory ran out while" in done.stderr
