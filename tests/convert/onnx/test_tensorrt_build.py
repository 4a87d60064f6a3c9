"""Engines are built for real, by TensorRT-RTX, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from onnx import TensorProto

from llava_edge.convert.onnx.tensorrt import build_vision_engine
from llava_edge.profiles.errors import EngineError, RequestError
from llava_edge.runtime.backends.tensorrt import TensorRTLibrary, open_library
from llava_edge.runtime.util.progress import no_progress
from tests.support.tower_graphs import write_quantized_graph, write_vision_graph

trt = pytest.importorskip("tensorrt_rtx")

TARGET_WORD = slice(32, 36)
"""Where TensorRT-RTX 1.7 keeps the targets of a plan, one bit each, in the order of its API."""


@pytest.fixture(scope="module")
def graph(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_graph(make_checkpoint("odd"), tmp_path_factory.mktemp("tower"))


@pytest.fixture
def library() -> TensorRTLibrary:
    return open_library("tensorrt-rtx")


def build(graph: Path, library: TensorRTLibrary, out: Path, target: str | None = "8.9") -> bytes:
    build_vision_engine(graph, library, 5, out, no_progress, compute_capability=target)
    return out.read_bytes()


@pytest.mark.parametrize(
    ("target", "bit"), [("7.5", 0), ("8.0", 1), ("8.6", 2), ("8.9", 3), ("12.0", 4)]
)
def test_an_engine_of_our_tower_is_compiled_for_its_target_without_a_gpu(
    graph: Path, library: TensorRTLibrary, tmp_path: Path, target: str, bit: int
) -> None:
    plan = build(graph, library, tmp_path / "tower.engine", target)

    assert len(plan) > sum(path.stat().st_size for path in graph.parent.iterdir())
    assert int.from_bytes(plan[TARGET_WORD], "little") == 1 << bit
    assert [path.name for path in tmp_path.iterdir()] == ["tower.engine"]


def test_the_profile_holds_one_tile_to_the_most_and_is_tuned_for_the_most(
    graph: Path, library: TensorRTLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = trt.Builder.create_optimization_profile

    def create(builder: Any) -> Any:
        made.append(real(builder))
        return made[-1]

    monkeypatch.setattr(trt.Builder, "create_optimization_profile", create)

    build(graph, library, tmp_path / "tower.engine")

    (profile,) = made
    assert [tuple(shape) for shape in profile.get_shape("pixel_values")] == [
        (1, 3, 70, 70),
        (5, 3, 70, 70),
        (5, 3, 70, 70),
    ]


@pytest.mark.parametrize(
    ("element_type", "name"), [(TensorProto.INT8, "INT8"), (TensorProto.FLOAT8E4M3FN, "FP8")]
)
def test_a_graph_with_qdq_nodes_becomes_an_engine_of_eight_bits(
    library: TensorRTLibrary,
    tmp_path: Path,
    element_type: int,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: set[str] = set()
    real = trt.Builder.build_serialized_network

    def remember(builder: Any, network: Any, config: Any) -> Any:
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            seen.update(layer.get_output(i).dtype.name for i in range(layer.num_outputs))
        return real(builder, network, config)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", remember)
    graph = write_quantized_graph(tmp_path / "quantised.onnx", element_type)

    assert build(graph, library, tmp_path / "tower.engine")
    assert name in seen


def test_progress_only_grows_and_ends_complete(
    graph: Path, library: TensorRTLibrary, tmp_path: Path
) -> None:
    said: list[tuple[str, int, int]] = []

    def report(stage: str, done: int, total: int) -> None:
        said.append((stage, done, total))

    out = tmp_path / "tower.engine"
    build_vision_engine(graph, library, 5, out, report, compute_capability="8.9")

    assert {stage for stage, _, _ in said} == {"engine"}
    done = [step for _, step, _ in said]
    assert done == sorted(done)
    assert len(done) > 20
    assert all(step <= total for _, step, total in said)
    assert said[-1][1] == said[-1][2]


def test_an_interruption_ends_the_build_and_leaves_nothing(
    graph: Path, library: TensorRTLibrary, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_vision_engine(graph, library, 5, tmp_path / "e", interrupt, compute_capability="8.9")

    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_built_is_refused_in_a_sentence(
    graph: Path, library: TensorRTLibrary, tmp_path: Path
) -> None:
    out = tmp_path / "tower.engine"
    with pytest.raises(RequestError, match=r"compute capability 9\.0 was asked.*12\.1\. Leave"):
        build(graph, library, out, "9.0")
    damaged = tmp_path / "model.onnx"
    damaged.write_bytes(b"no graph at all")
    with pytest.raises(EngineError, match=r"cannot read .*model\.onnx: [^\n]*parse[^\n]*[^.]\.$"):
        build(damaged, library, out)
    other = write_quantized_graph(tmp_path / "other.onnx", TensorProto.INT8)
    other.write_bytes(other.read_bytes().replace(b"pixel_values", b"pixel_volume"))
    with pytest.raises(EngineError, match="the graph takes pixel_volume; a tower takes pixel_val"):
        build(other, library, out)
    full = TensorRTLibrary("tensorrt", "11.4.0.106", trt)
    with pytest.raises(RequestError, match="builds for the GPU of the machine it runs on only"):
        build(graph, full, out, "8.9")
    assert not out.exists()


class RecordedConfig:
    """What is asked of a builder's configuration, written down; TensorRT's timing cache in it."""

    def __init__(self, calls: list[Any], stale: bool) -> None:
        self.calls, self.stale, self.cache = calls, stale, b""

    def add_optimization_profile(self, profile: Any) -> int:
        return 0

    def create_timing_cache(self, data: bytes) -> bytes:
        self.calls.append(("create", data))
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if cache and self.stale:
            return False
        self.cache = cache
        self.calls.append(("set", cache))
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.cache + b"+")


@pytest.mark.parametrize("stale", [False, True])
def test_tensorrt_keeps_measured_kernels_between_builds(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: bool
) -> None:
    """TensorRT 11 cannot be had here: its API is TensorRT-RTX's, its timing cache is recorded."""
    calls: list[Any] = []
    monkeypatch.setattr(
        trt.Builder, "create_builder_config", lambda _: RecordedConfig(calls, stale)
    )
    monkeypatch.setattr(trt.Builder, "build_serialized_network", lambda *_: b"plan")
    library = open_library("tensorrt-rtx")
    library.name = "tensorrt"
    cache, out = tmp_path / "cache" / "timing", tmp_path / "tower.engine"

    for _ in range(2):
        build_vision_engine(graph, library, 5, out, no_progress, timing_cache=cache)

    first = [("create", b""), ("set", b"")]
    again = [("create", b"+"), *(first if stale else [("set", b"+")])]
    assert calls == first + again
    assert cache.read_bytes() == (b"+" if stale else b"++")
    assert out.read_bytes() == b"plan"


@pytest.mark.nightly
def test_the_released_tower_becomes_an_engine(
    make_checkpoint: Callable[..., Path], library: TensorRTLibrary, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(
        "tiny",
        vision_hidden_size=1024,
        vision_intermediate_size=4096,
        vision_layers=24,
        vision_heads=16,
        hidden_size=4096,
        intermediate_size=64,
        layers=1,
        heads=32,
        kv_heads=8,
    )
    graph = write_vision_graph(checkpoint, tmp_path)

    plan = build(graph, library, tmp_path / "tower.engine", "8.9")

    assert 600e6 < len(plan) < 700e6
