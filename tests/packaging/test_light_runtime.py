"""What a fresh interpreter loads when an artifact answers: the light half only."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "safetensors", "jinja2", "huggingface_hub")

PROGRAM = """
import json, sys
from llava_edge.runtime import LlavaEdge

model = LlavaEdge.load(sys.argv[1], threads=1)
answer = model.generate("What is this?", [sys.argv[2]], max_new_tokens=4)
print(json.dumps({"tokens": answer.token_ids, "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd"))


def test_answering_imports_no_heavy_package(
    artifact: Path, picture: Image.Image, tmp_path: Path
) -> None:
    picture.save(tmp_path / "picture.png")

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(artifact), str(tmp_path / "picture.png")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )

    result = json.loads(done.stdout)
    loaded = {name.split(".")[0] for name in result["modules"]}
    assert len(result["tokens"]) == 4
    assert loaded.isdisjoint(HEAVY)
    assert "llava_edge.convert" not in result["modules"]


def test_the_public_names_of_the_runtime_are_exactly_these() -> None:
    import llava_edge.runtime as runtime

    names = [name for name in runtime.__all__ if not name.endswith("Error")]
    assert names == [
        "Answer",
        "AnswerStream",
        "Artifact",
        "Chat",
        "ChatMessage",
        "CudaOptions",
        "GenerationConfig",
        "Limits",
        "LlavaEdge",
        "PeakMemory",
        "Timings",
        "VideoInput",
        "__version__",
        "configure_process",
        "draw_tiles",
        "open_artifact",
    ]
    for name in names:
        assert name == "__version__" or getattr(runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = runtime.Nothing


def test_building_an_engine_on_a_device_needs_no_heavy_package() -> None:
    program = "import sys, llava_edge.convert.cli.building; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert {name.split(".")[0] for name in done.stdout.split()}.isdisjoint(HEAVY)
