"""The whole loop on the CUDA provider: requests, memory over many of them, memory that runs out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_edge.profiles.errors import EngineError, OutOfMemoryError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.generation.output import Answer
from tests.fake_cuda.record import FakeCuda
from tests.fake_cuda.test_provider import CONTEXT, SIZES
from tests.runtime.artifact.test_artifact import edit_manifest, relist
from tests.runtime.backends.test_logits_to_keep import name_the_number, number_instead_of_start

pytestmark = pytest.mark.fake_cuda

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


def test_a_video_is_answered_without_cudnn(
    cuda: FakeCuda, make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    """Its frames are pooled; ONNX Runtime has kernels for a mean that need a library more."""
    checkpoint = make_checkpoint("odd", model_type="llava_next_video", image_size=56)
    artifact = make_artifact(checkpoint, profile="a100", context_tokens=1024)
    frames = np.zeros((8, 60, 80, 3), np.uint8)
    with load(artifact) as model:
        loaded = cuda.used
        for count in (1, 3, 8):
            answer = model.generate("What?", video=frames, num_frames=count, max_new_tokens=3)
            assert answer.video_tokens == 4 * count
            assert answer.off_device == ()
        assert model.generate("And this?", [picture(1)], max_new_tokens=3).image_tokens
        assert cuda.used == loaded


def test_features_stay_on_the_device(cuda: FakeCuda, artifact: Path) -> None:
    """Features of a tile are 576 rows of 512, a row of logits is smaller."""
    with load(artifact, features_on_device=True) as model:
        model.generate("What is it?", [picture(1)], max_new_tokens=2)
        with cuda.record() as record:
            model.generate("What is it?", [picture(2)], max_new_tokens=2)

    assert max(record.copies("device to host")) == 4 * SIZES["vocab_size"]
    assert max(record.copies("device to device")) >= 576 * 512 * 2


def mixed(model: LlavaEdge) -> None:
    """Requests of rising and of falling length, with and without pictures and drafts."""
    for words in (1, 9, 40, 90, 150, 60, 3):
        model.generate("word " * words, max_new_tokens=3)
        model.generate("word " * words, max_new_tokens=9, prompt_lookup_num_tokens=8)
    for number, (width, height) in enumerate(((20, 20), (60, 200), (112, 84), (30, 40))):
        model.generate("It?", [picture(number, width, height)], max_new_tokens=3)
    model.generate("And?", [picture(5), picture(6, 60, 200)], max_new_tokens=3)


@pytest.fixture(scope="session")
def of_many_heads(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    """As many as a 7B has: attention of few heads is split among a GPU's processors.

    That takes memory which short prompts need and longer ones do not.
    """
    sizes = {**SIZES, "hidden_size": 2048, "heads": 32, "kv_heads": 8, "layers": 2}
    return make_artifact(
        make_checkpoint("tiny", **sizes), profile="a100", precision="fp16", context_tokens=CONTEXT
    )


@pytest.mark.parametrize("choice", [{}, {"graph": True}, {"features_on_device": True}])
def test_all_memory_is_taken_when_the_artifact_is_loaded(
    cuda: FakeCuda, of_many_heads: Path, choice: dict[str, int]
) -> None:
    with load(of_many_heads, **choice) as model:
        loaded = cuda.used
        mixed(model)
        assert cuda.used == loaded
        cuda.forget_peak()
        answer = model.generate("It?", [picture(1)], max_new_tokens=3)
        # But for the features of a request, where they stay on the device.
        assert (cuda.peak > loaded) == ("features_on_device" in choice)
        assert answer.peak_memory.device_bytes == cuda.peak
    empty = cuda.used

    with load(of_many_heads, warm_up=False, **choice) as model:
        before = cuda.used
        mixed(model)
        # What was there already is not the same each time.
        assert cuda.used - before > (loaded - empty) / 4


def test_what_a_failed_run_took_is_given_back(cuda: FakeCuda, artifact: Path) -> None:
    def prefill(model: LlavaEdge, tokens: int) -> int:
        """Bytes in use behind it."""
        model._decoder.rewind(0)
        model._decoder.prefill(tokens, lambda start, stop, out: out.fill(0))
        return cuda.used

    with load(artifact, warm_up=False) as model:
        small, large = (prefill(model, tokens) for tokens in (8, 1500))
    left = []
    # Weights count as well under a limit: below some it does not even load.
    for eighths in range(1, 17):
        limit = (large - small) * eighths // 8 + MIB
        with (
            suppress(OutOfMemoryError),
            load(artifact, warm_up=False, memory_limit_bytes=limit) as model,
        ):
            loaded = cuda.used
            try:
                prefill(model, 1500)
            except OutOfMemoryError:
                left.append(cuda.used - loaded)
    assert len(left) >= 3
    # Some stays: a page that weights share, buffers for steps.
    assert max(left) <= 4 * MIB


def test_a_closed_model_gives_its_memory_back(cuda: FakeCuda, artifact: Path) -> None:
    with load(artifact) as model:
        model.generate("What is it?", [picture(1)], max_new_tokens=4)
    left = cuda.used
    for _ in range(3):
        with load(artifact) as model:
            model.generate("What is it?", [picture(1)], max_new_tokens=4)
        assert cuda.used <= left


@pytest.mark.parametrize("warm_up", [True, False])
def test_what_does_not_fit_gives_way_to_the_limit_of_the_provider(
    cuda: FakeCuda, artifact: Path, warm_up: bool
) -> None:
    """Between what loading takes and what the largest request takes, smaller ones are answered."""
    question = "What is it? " * 40

    def ask(model: LlavaEdge) -> Answer:
        return model.generate(question, [picture(1), picture(2)], max_new_tokens=2)

    with load(artifact, warm_up=False) as model:
        model.generate("What?", max_new_tokens=2)
        small = cuda.used
    with load(artifact, warm_up=warm_up) as model:
        whole = ask(model)
        large = cuda.used
    assert whole.degraded == ()
    assert large - small >= MIB

    said: list[str] = []
    for eighths in (*range(1, 9), 12, 16):
        # Each session has an arena of its own; the decoder's holds weights and activations.
        limit = (large - small) * eighths // 8 + MIB
        try:
            with load(artifact, memory_limit_bytes=limit, warm_up=warm_up) as model:
                answer = ask(model)
        except OutOfMemoryError:
            said.append("refused")
            continue
        said.append(" ".join(answer.degraded))
        if answer.degraded == model.degraded:
            # Only the work was cut into smaller parts.
            assert answer.prompt_tokens == whole.prompt_tokens

    # From refusals over lesser answers to whole ones, in that order.
    assert said[0]
    assert not said[-1]
    assert said == sorted(said, key=lambda why: (why != "refused", not why))
    assert any("prompts computed by" in why for why in said) == warm_up


def test_an_artifact_of_before_is_not_recorded_and_told_so(artifact: Path, tmp_path: Path) -> None:
    old = number_instead_of_start(artifact, tmp_path / "old")
    relist(old, "decoder/model.onnx")
    edit_manifest(old, name_the_number)

    with pytest.raises(EngineError, match="Convert the checkpoint again, or load without graph"):
        load(old, graph=True)


def run(artifact: Path, **device: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, on a device of these variables."""
    program = (
        "import sys; from llava_edge.runtime.cli.main import main;"
        "sys.exit(main(['run', sys.argv[1], '--device', 'cuda', '--prompt', 'What?', '--json']))"
    )
    command = [sys.executable, "-c", program, str(artifact)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **device})


@pytest.mark.parametrize("capability", ["7.5", "8.6", "8.9", "9.0", "12.0"])
def test_every_generation_has_its_kernels(artifact: Path, capability: str) -> None:
    done = run(artifact, FAKE_CUDA_CAPABILITY=capability)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["off_device"] == []


@pytest.mark.parametrize("mebibytes", [2, 4, 16])
def test_a_device_that_is_too_small_is_said_in_words(artifact: Path, mebibytes: int) -> None:
    done = run(artifact, FAKE_CUDA_MEMORY=str(mebibytes * MIB))

    assert done.returncode == OutOfMemoryError.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert "memory ran out while" in done.stderr
