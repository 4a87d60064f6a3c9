"""The guard of the float16 tower: what overflows is named and kept in float32, nothing else is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, shape_inference

from llava_edge.convert.checkpoint import open_checkpoint
from llava_edge.convert.float16_guard import Float16Ranges, island_report
from llava_edge.convert.float16_islands import add_islands
from llava_edge.convert.vision_graph import build_vision_graph
from llava_edge.convert.vision_trace import VisionTrace
from tests.convert.test_vision_int8 import tiles_of
from tests.convert.verify.checkpoint_changes import Tensors, rewrite

_BLOCK = "vision_tower.encoder.layers"
_SIZES = {"vision_layers": 24, "vision_hidden_size": 48, "vision_heads": 3}
Change = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Guarded:
    """A tower looked at, and its float16 graph with and without islands."""

    ranges: Float16Ranges
    facts: dict[str, Any]
    exact: np.ndarray[Any, Any]
    pixels: np.ndarray[Any, Any]
    guarded: Path
    bare: Path

    def cosine(self, model: Path) -> float:
        """Smallest cosine between rows of a graph's features, every value rounded to float16."""
        session = strict(model)
        (found,) = session.run(["image_features"], {"pixel_values": self.pixels})
        a, b = found.astype(np.float64), self.exact.astype(np.float64)
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return float(((a * b).sum(-1) / norms).min())


def strict(path: Path) -> ort.InferenceSession:
    """The graph in float32 with every float16 value rounded to float16 where it arises.

    ONNX Runtime's CPU provider computes float16 graphs in float32 and may leave roundings out.
    """
    model = shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True)
    graph = model.graph
    half = {
        value.name
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16
    }
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    nodes = []
    for node in graph.node:
        rounded = [name for name in node.output if name in half]
        for name in rounded:
            node.output[list(node.output).index(name)] = f"{name}.raw"
        if node.op_type == "Cast":
            node.attribute[0].i = TensorProto.FLOAT
        nodes.append(node)
        for name in rounded:
            nodes.append(helper.make_node("Cast", [f"{name}.raw"], [f"{name}.half"], to=10))
            nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], to=1))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options)


@pytest.fixture
def guard(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Guarded]:
    def make(change: Change | None = None, **sizes: object) -> Guarded:
        folder = tmp_path / "checkpoint"
        shutil.copytree(make_checkpoint("odd", **{**_SIZES, **sizes}), folder)
        if change is not None:
            rewrite(folder, change)
        checkpoint = open_checkpoint(folder)
        tiles = tiles_of(checkpoint)
        paths = {name: tmp_path / name for name in ("exact", "bare", "guarded")}
        for path in paths.values():
            path.mkdir()
        build_vision_graph(checkpoint.dims, checkpoint, np.float32).save(paths["exact"])
        trace = VisionTrace(paths["exact"] / "model.onnx", tiles.pixel_values)
        ranges = Float16Ranges.of(trace)
        build_vision_graph(checkpoint.dims, checkpoint, np.float16).save(paths["bare"])
        graph = build_vision_graph(checkpoint.dims, checkpoint, np.float16)
        total = len(graph.nodes)
        nodes = add_islands(graph, ranges.wide, ranges.floats)
        graph.save(paths["guarded"])
        facts = island_report(ranges, nodes, total)
        models = {name: path / "model.onnx" for name, path in paths.items()}
        return Guarded(
            ranges,
            facts,
            trace.features,
            tiles.pixel_values,
            models["guarded"],
            models["bare"],
        )

    return make


def loud_mlp(layers: Sequence[int], factor: float = 2.0**15) -> Change:
    """fc1 makes values beyond float16, fc2 brings them back."""

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            for layer in layers:
                block = f"vision_model.encoder.layers.{layer}.mlp"
                if f"{block}.fc1." in name:
                    tensor *= factor
                if f"{block}.fc2.weight" in name:
                    tensor /= factor
        return tensors

    return change


def loud_scores(layers: Sequence[int]) -> Change:
    """Queries and keys so large that scores reach beyond float16, or lose their small digits."""

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            for layer in layers:
                block = f"vision_model.encoder.layers.{layer}.self_attn"
                if f"{block}.q_proj" in name or f"{block}.k_proj" in name:
                    tensor *= 30.0
        return tensors

    return change


def loud_offset(tensors: Tensors) -> Tensors:
    """Channels in front of the first layer norm share a large offset, which the norm removes."""
    for name, tensor in tensors.items():
        if name.endswith("position_embedding.weight"):
            tensor += 2000.0
    return tensors


def test_an_ordinary_tower_gets_no_island(guard: Callable[..., Guarded]) -> None:
    found = guard()
    assert found.ranges.wide == {}
    assert found.facts["islands"] == {}
    assert found.facts["float32_nodes"] == []
    assert found.guarded.read_bytes() == found.bare.read_bytes()
    assert found.cosine(found.bare) > 0.9999
    pieces = ["embeddings", *(f"layers.{i}" for i in range(23)), "projector"]
    assert list(found.facts["largest_by_layer"]) == pieces
    assert max(found.ranges.loss.values()) < 0.01


def test_exactly_the_layers_that_overflow_are_named(guard: Callable[..., Guarded]) -> None:
    planted = [2, 7, 19]
    found = guard(loud_mlp(planted))
    assert list(found.facts["islands"]) == [f"layers.{layer}" for layer in planted]
    behind = {entry["behind"] for each in found.facts["islands"].values() for entry in each}
    assert behind == {f"{_BLOCK}.{layer}.mlp.fc1" for layer in planted}
    assert all(
        "float16 holds 65504" in entry["why"] for entry in found.facts["islands"]["layers.2"]
    )
    assert found.facts["float32_share"] <= 0.05
    assert not found.cosine(found.bare) > 0.9999
    assert found.cosine(found.guarded) >= 0.9999


def test_an_island_reaches_from_the_product_that_overflows_to_the_one_that_ends_it(
    guard: Callable[..., Guarded],
) -> None:
    found = guard(loud_mlp([7]))
    nodes = found.facts["float32_nodes"]
    assert nodes[0] == f"{_BLOCK}.7.mlp.fc1"
    assert nodes[-1] == f"{_BLOCK}.7.mlp.fc2"
    # Product, bias, and the three nodes of the activation, and the second product.
    assert len(nodes) == 6
    model = shape_inference.infer_shapes(
        onnx.load(str(found.guarded)), check_type=True, strict_mode=True
    )
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    makers = {node.name: node for node in model.graph.node}
    for name in nodes[:-1]:
        assert kinds[makers[name].output[0]] == TensorProto.FLOAT
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    # In: activations, two weights, bias, the activation's factor. Out: once.
    assert len(casts) == 6


def test_scores_that_a_softmax_needs_exactly_stay_in_float32(
    guard: Callable[..., Guarded],
) -> None:
    found = guard(loud_scores([5]))
    assert list(found.facts["islands"]) == ["layers.5"]
    reasons = [entry["why"] for entry in found.facts["islands"]["layers.5"]]
    assert any(reason.startswith("rounding it changes what follows by") for reason in reasons)
    ops = {
        node.name: node.op_type
        for node in onnx.load(str(found.guarded), load_external_data=False).graph.node
    }
    assert "Softmax" in {ops[name] for name in found.facts["float32_nodes"]}
    assert found.facts["float32_share"] <= 0.05
    assert found.cosine(found.guarded) > found.cosine(found.bare)


def test_an_offset_that_a_norm_removes_is_seen(guard: Callable[..., Guarded]) -> None:
    found = guard(loud_offset)
    assert list(found.facts["islands"]) == ["embeddings"]
    assert "vision_tower.pre_layrnorm" in found.facts["float32_nodes"]
    # The table itself is stored in float16: what it lost there is lost on both sides.
    assert not found.cosine(found.bare) > 0.9999
    assert found.cosine(found.guarded) >= 0.9999


def test_a_stream_that_overflows_is_kept_to_its_end(guard: Callable[..., Guarded]) -> None:
    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if "vision_model.encoder.layers.20.mlp.fc2.weight" in name:
                tensor[3] *= 400000.0
        return tensors

    found = guard(change)
    layers = ["layers.20", "layers.21", "layers.22", "projector"]
    assert list(found.facts["islands"]) == layers
    assert not found.cosine(found.bare) > 0.9999
    assert found.cosine(found.guarded) >= 0.9999


def test_graphs_with_islands_pass_the_checker_and_need_no_further_library(
    guard: Callable[..., Guarded],
) -> None:
    found = guard(loud_mlp([0, 22]))
    onnx.checker.check_model(str(found.guarded), full_check=True)
    ops = {
        node.op_type for node in onnx.load(str(found.guarded), load_external_data=False).graph.node
    }
    assert not [op for op in ops if op.startswith(("Conv", "Reduce", "Arg", "Pool"))]


def test_the_strict_graph_overflows_where_float16_does(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT16, [2])
    y = helper.make_tensor_value_info("image_features", TensorProto.FLOAT16, [2])
    factor = numpy_helper.from_array(np.array(1000, np.float16), "factor")
    inverse = numpy_helper.from_array(np.array(0.001, np.float16), "inverse")
    nodes = [
        helper.make_node("Mul", ["pixel_values", "factor"], ["large"]),
        helper.make_node("Mul", ["large", "inverse"], ["image_features"]),
    ]
    graph = helper.make_graph(nodes, "overflow", [x], [y], [factor, inverse])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    (found,) = strict(tmp_path / "model.onnx").run(
        None, {"pixel_values": np.array([1, 100], np.float32)}
    )
    assert found[0] == pytest.approx(1, rel=1e-3)
    assert np.isinf(found[1])
    assert torch.isinf(torch.tensor(1e5).half())
