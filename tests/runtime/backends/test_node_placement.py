"""Where ONNX Runtime puts nodes, by a provider of this build that takes none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.onnx_proto import read_onnx_header
from llava_edge.runtime.backends import onnxruntime as session
from llava_edge.runtime.backends.cpu_fallback import size_nodes
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.util.opened_file import OpenedFile
from tests.support.fake_cudart import keep_on_host

TAKES_NOTHING = "AzureExecutionProvider"


@pytest.fixture
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd"), profile="a100", context_tokens=1024)


@pytest.fixture
def empty_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """``cuda`` is a provider that leaves every node to the CPU, as ONNX Runtime itself decides."""
    if TAKES_NOTHING not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {TAKES_NOTHING}")
    real = onnxruntime.InferenceSession

    def without_options(model: Any, settings: Any, providers: list[Any], **more: Any) -> Any:
        return real(model, settings, providers=[name for name, _ in providers], **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_options)
    names = {"cpu": "CPUExecutionProvider", "cuda": TAKES_NOTHING}
    monkeypatch.setattr(session, "_PROVIDERS", names)
    keep_on_host(monkeypatch)


def graph_of(artifact: Path, part: str) -> Path:
    return artifact / part / "model.onnx"


@pytest.mark.parametrize("part", ["decoder", "vision"])
def test_nodes_left_to_the_cpu_are_named(artifact: Path, part: str, empty_device: None) -> None:
    found = Session(graph_of(artifact, part), SessionOptions(device="cuda")).off_device

    kinds = {node.split(" ")[0] for node in found}
    assert "MatMul" in kinds
    assert kinds.isdisjoint({"Neg", "Unsqueeze", "Shape"})


def test_a_strict_session_refuses_them(artifact: Path, empty_device: None) -> None:
    options = SessionOptions(device="cuda", strict=True)

    with pytest.raises(EngineError, match=r"on cuda alone.*of its nodes on the CPU: .*strict"):
        Session(graph_of(artifact, "decoder"), options)


def test_nothing_is_off_where_the_cpu_was_asked(artifact: Path) -> None:
    options = SessionOptions(device="cpu", strict=True)

    assert Session(graph_of(artifact, "decoder"), options).off_device == ()


def test_every_answer_names_them(
    artifact: Path, picture: Image.Image, empty_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llava_edge.runtime.loading.placement.available_devices", lambda: ("cuda", "cpu")
    )
    with LlavaEdge.load(artifact, device="cuda", engine="ort") as model:
        answer = model.generate("What?", [picture], max_new_tokens=2)

    assert any(line.startswith("vision: MatMul") for line in answer.off_device)
    assert any(line.startswith("decoder: GroupQueryAttention") for line in answer.off_device)
    with pytest.raises(EngineError, match="on cuda alone"):
        LlavaEdge.load(artifact, device="cuda", engine="ort", strict_device=True)


def test_the_decoder_for_a_gpu_works_out_no_sizes(artifact: Path) -> None:
    """ONNX Runtime would do that on the GPU, with copies there and back, and record no graph."""
    assert size_nodes(read_onnx_header(OpenedFile(graph_of(artifact, "decoder")))) == frozenset()


@pytest.mark.parametrize(("profile", "part"), [("cpu-16gb", "decoder"), ("a100", "vision")])
def test_size_nodes_make_nothing_but_sizes(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    profile: str,
    part: str,
) -> None:
    made = make_artifact(make_checkpoint("odd"), profile=profile, context_tokens=1024)
    path = graph_of(made, part)
    model = onnx.load(path, load_external_data=False)
    makes = {node.output[0]: node.name for node in model.graph.node}
    wanted = size_nodes(read_onnx_header(OpenedFile(path)))
    assert wanted
    # ONNX Runtime computes them: integers of few elements come out.
    del model.graph.output[:]
    watched = [value for value, name in makes.items() if name in wanted]
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in watched
    )
    onnx.save(model, path.with_name("sizes.onnx"))
    try:
        ran = Session(path.with_name("sizes.onnx"), SessionOptions())
        given = {v.name: v for v in ran._session.get_inputs()}
        sizes = {"tokens": 1, "tiles": 1, "capacity": 8}
        kinds = {
            "tensor(int64)": np.int64,
            "tensor(int32)": np.int32,
            "tensor(float16)": np.float16,
            "tensor(float)": np.float32,
        }
        feeds = {
            name: np.ones(
                [s if isinstance(s, int) else sizes.get(s, 1) for s in v.shape], kinds[v.type]
            )
            for name, v in given.items()
        }
        for value in ran.run(feeds, watched):
            assert value.dtype == np.int64
            assert value.size <= 8
    finally:
        path.with_name("sizes.onnx").unlink()
