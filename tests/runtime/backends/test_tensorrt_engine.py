"""Reaching the library, and what the real one says of engines on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava_edge.convert.onnx.tensorrt import build_vision_engine
from llava_edge.profiles.errors import DependencyError, EngineError
from llava_edge.runtime.backends.tensorrt import TensorRTEngine, open_library
from llava_edge.runtime.util.progress import no_progress
from tests.support.tower_graphs import write_vision_graph


def failing(error: Exception) -> Callable[[str], Any]:
    def load(_: str) -> Any:
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt"),
            DependencyError,
            r"^tensorrt is not installed\. Install TensorRT 11 from NVIDIA",
        ),
        (
            ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"),
            EngineError,
            r"is installed, but No module named 'tensorrt_libs'\. Install",
        ),
        (
            ImportError("libnvinfer.so.11: cannot open\nshared object file"),
            EngineError,
            r"cannot be loaded: libnvinfer\.so\.11: cannot open shared object file\. Install",
        ),
    ],
)
def test_a_missing_library_ends_in_one_line(
    error: Exception, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        open_library("tensorrt", failing(error))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["8.6.1", "unknown"])
def test_an_old_library_is_refused(version: str) -> None:
    with pytest.raises(EngineError, match=version):
        open_library("tensorrt", lambda _: SimpleNamespace(__version__=version))


def test_damage_is_told_from_a_missing_gpu_by_the_real_library(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    library = open_library("tensorrt-rtx")
    graph = write_vision_graph(make_checkpoint("odd"), tmp_path)
    path = tmp_path / "tower.engine"
    build_vision_engine(graph, library, 2, path, no_progress, compute_capability="8.9")
    plan = path.read_bytes()

    for damaged in (b"x" * 4096, plan[:40]):
        with pytest.raises(EngineError, match=r"cannot use the engine: it is damaged\.$"):
            TensorRTEngine(library, damaged, (3, 70, 70), (25, 64))
    # The whole plan comes further: to the GPU that is not there (or, where there is one, runs).
    if not Path("/dev/nvidiactl").exists():
        with pytest.raises(EngineError, match=r"cannot use the engine: [^\n]*driver[^\n]*\.$"):
            TensorRTEngine(library, plan, (3, 70, 70), (25, 64))
