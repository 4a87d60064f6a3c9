"""``make gpu-check`` from end to end on the CUDA provider, all but what needs torch on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_edge.bench.lab.gpu.models import GPU_MODELS
from llava_edge.bench.lab.gpu.steps import CARD, REFERENCE, gpu_steps
from tests.fake_cuda.record import FakeCuda

pytestmark = pytest.mark.fake_cuda

PRECISIONS = ("fp16", "int4")


def asked(*words: str) -> list[str]:
    steps = gpu_steps([GPU_MODELS["tiny"]], PRECISIONS)
    return [step.name for step in steps if all(word in step.name for word in words)]


@pytest.mark.parametrize(
    "words",
    [("fp16 round 0",), ("int4",), ("fp16 graph",), ("fp16 limit",), ("fp16 cache",), ("kernels",)],
    ids=" ".join,
)
def test_steps_of_the_check_run(cuda: FakeCuda, work: Path, words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "llava_edge.bench.lab.gpu.check", "--models", "tiny", "--keep"]
    command += ["--precisions", *PRECISIONS, "--work", str(work), "--only", *words]
    command += ["--results", str(work / "gpu.json")]

    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode in (0, 1), done.stderr
    assert asked(*words)
    entries: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["entries"]
    assert "Fake" in entries[CARD]["gpus"][0]["name"]
    for name in asked(*words):
        if "parity" in name or REFERENCE in name:
            assert "gpu.reference" in entries[name]["error"], "torch has no CUDA here"
            continue
        assert "error" not in entries[name], entries[name]
        assert entries[name].get("off_device", []) == []
        for case in entries[name].get("cases", []):
            assert case["degraded"] == []


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and results, kept from one part to the next."""
    return tmp_path_factory.mktemp("check")
