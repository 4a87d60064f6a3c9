"""The guard of the float16 tower: what overflows is named and kept in float32, nothing else is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, shape_inference

from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.onnx.builder import GraphBuilder
from llava_edge.convert.onnx.float16_emulation import emulate_float16
from llava_edge.convert.onnx.vision import build_vision_graph
from llava_edge.convert.quantization.vision import fp16_overflow
from llava_edge.convert.quantization.vision.activations import VisionTrace
from llava_edge.convert.quantization.vision.fp16_overflow import write_guarded_vision
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.artifact.graph_inputs import POOLING
from llava_edge.runtime.artifact.manifest import GraphSpec
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.vision.pooling import pooling_index
from tests.convert.quantization.vision.test_vision_int8 import tiles_of
from tests.faults.models.checkpoint_changes import Tensors, rewrite

_BLOCK = "vision_tower.encoder.layers"
_SIZES = {"vision_layers": 24, "vision_hidden_size": 48, "vision_heads": 3}
Change = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Guarded:
    """A tower looked at, and its float16 graph with and without islands."""

    dims: ModelDims
    facts: dict[str, Any]
    exact: np.ndarray[Any, Any]
    pixels: np.ndarray[Any, Any]
    guarded: Path
    bare: Path

    def cosine(self, model: Path) -> float:
        """Smallest cosine between rows of a graph's features, every value rounded to float16."""
        found = emulate_float16(model, self.dims, self.pixels)
        a, b = found.astype(np.float64), self.exact.astype(np.float64)
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return float(((a * b).sum(-1) / norms).min())


@pytest.fixture
def guard(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Guarded]:
    def make(change: Change | None = None, **sizes: object) -> Guarded:
        folder = tmp_path / "checkpoint"
        shutil.copytree(make_checkpoint("odd", **{**_SIZES, **sizes}), folder)
        if change is not None:
            rewrite(folder, change)
        checkpoint = open_checkpoint(folder)
        tiles = tiles_of(checkpoint)
        paths = {name: tmp_path / name for name in ("exact", "bare")}
        for path in paths.values():
            path.mkdir()
        build_vision_graph(checkpoint.dims, checkpoint, np.float32).save(paths["exact"])
        vision = checkpoint.dims.vision
        given = {POOLING: pooling_index(vision, vision.num_patches)}
        trace = VisionTrace(
            paths["exact"] / "model.onnx",
            tiles.pixel_values,
            given=given if checkpoint.dims.takes_video else None,
        )

        def save(graph: GraphBuilder) -> GraphSpec:
            (tmp_path / "vision").mkdir()
            graph.save(tmp_path / "vision")
            return graph.spec("vision/model.onnx")

        facts = write_guarded_vision(checkpoint, trace, tiles.pixel_values, tmp_path, save).facts
        build_vision_graph(checkpoint.dims, checkpoint, np.float16).save(paths["bare"])
        guarded, bare = (tmp_path / n / "model.onnx" for n in ("vision", "bare"))
        return Guarded(checkpoint.dims, facts, trace.features, tiles.pixel_values, guarded, bare)

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


def offset_scores(layers: Sequence[int]) -> Change:
    """A key bias adds the same large number to all scores of a row; the softmax takes it out."""

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            for layer in layers:
                if f"vision_model.encoder.layers.{layer}.self_attn.k_proj.bias" in name:
                    tensor += 400.0
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
    assert found.facts["islands"] == {}
    assert found.facts["float32_nodes"] == []
    assert found.guarded.read_bytes() == found.bare.read_bytes()
    assert found.cosine(found.bare) > 0.9999
    pieces = ["embeddings", *(f"layers.{i}" for i in range(23)), "projector"]
    assert list(found.facts["largest_by_layer"]) == pieces
    assert list(found.facts["tile_cosine_loss"]) == ["0.02"]


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


@pytest.mark.slow
def test_scores_that_a_softmax_needs_exactly_stay_in_float32(
    guard: Callable[..., Guarded],
) -> None:
    found = guard(offset_scores([5]))
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


@pytest.mark.slow
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
            if "mlp.fc2.bias" in name and ("layers.20." in name or "layers.21." in name):
                tensor[3] = 40000.0
        return tensors

    found = guard(change)
    layers = ["layers.20", "layers.21", "layers.22", "projector"]
    assert list(found.facts["islands"]) == layers
    assert not found.cosine(found.bare) > 0.9999
    assert found.cosine(found.guarded) >= 0.9999


def loud_features(tensors: Tensors, factor: float = 1.0) -> Tensors:
    """One feature is beyond what may be used of float16; times 2 it reaches beyond float16."""
    for name, tensor in tensors.items():
        if name.endswith("multi_modal_projector.linear_2.bias"):
            tensor[3] = 30000.0 * factor
        if factor > 1 and name.endswith("multi_modal_projector.linear_2.weight"):
            tensor[3] *= 5000.0
    return tensors


@pytest.mark.slow
def test_features_that_need_float32_are_handed_out_in_float16(
    guard: Callable[..., Guarded],
) -> None:
    found = guard(loud_features)
    assert list(found.facts["islands"]) == ["projector"]
    model = onnx.load(str(found.guarded), load_external_data=False)
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    onnx.checker.check_model(str(found.guarded), full_check=True)
    assert found.cosine(found.guarded) >= 0.9999


def test_features_beyond_float16_are_refused(guard: Callable[..., Guarded]) -> None:
    with pytest.raises(RequestError, match="in which the cuda target hands them"):
        guard(lambda tensors: loud_features(tensors, 2.0))


def offset_patches(tensors: Tensors) -> Tensors:
    """Every channel of a patch has the same part, which the first layer norm removes."""
    for name, tensor in tensors.items():
        if name.endswith("patch_embedding.weight"):
            tensor += 3.0
    return tensors


@pytest.mark.slow
def test_what_a_sum_has_of_its_summands_is_kept_from_there_on(
    guard: Callable[..., Guarded],
) -> None:
    found = guard(offset_patches)
    assert list(found.facts["islands"]) == ["embeddings"]
    # The product that makes the offset, three nodes before the norm that takes it out.
    assert found.facts["float32_nodes"][0].startswith("MatMul")
    assert found.facts["float32_share"] <= 0.05
    assert found.cosine(found.bare) < 0.9999
    assert found.cosine(found.guarded) >= 0.9999


@pytest.mark.parametrize("layers", [[-2, -5], [-5, -2]])
def test_all_parts_of_what_was_put_together_are_kept(
    guard: Callable[..., Guarded], layers: list[int]
) -> None:
    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if "encoder.layers.6.mlp.fc2.bias" in name:
                tensor += 3000.0
            if name.endswith("multi_modal_projector.linear_1.weight"):
                halves = tensor.reshape(len(tensor), 2, -1)
                halves -= halves.mean(-1, keepdims=True)
        return tensors

    found = guard(change, vision_layers=8, vision_feature_layer=layers)
    assert found.cosine(found.bare) < 0.9999
    assert found.cosine(found.guarded) >= 0.9999


@pytest.mark.parametrize("model_type", ["llava_next", "llava_next_video"])
def test_where_islands_do_not_do_the_whole_tower_is_kept(
    guard: Callable[..., Guarded], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    monkeypatch.setattr(fp16_overflow, "COSINE_LOSS", 1e-9)
    found = guard(vision_layers=4, model_type=model_type, image_size=56)
    assert list(found.facts["tile_cosine_loss"])[-1] == "whole"
    # All but nodes that read shapes.
    assert 0.95 < found.facts["float32_share"] < 1.0
    names = [entry["value"] for each in found.facts["islands"].values() for entry in each]
    assert names == ["all"] * len(found.facts["largest_by_layer"])
    weights = found.facts["weights_in_float32"]
    stored = onnx.load(str(found.guarded), load_external_data=False).graph.initializer
    halves = [tensor for tensor in stored if tensor.data_type == TensorProto.FLOAT16]
    assert weights == sum(int(np.prod(tensor.dims)) for tensor in halves)
    onnx.checker.check_model(str(found.guarded), full_check=True)
    Session(found.guarded, SessionOptions())


def test_what_is_not_a_number_stays_the_largest() -> None:
    nan = float("nan")
    for order in ([nan, 1.0, 2.0], [1.0, nan, 2.0], [1.0, 2.0, nan]):
        largest = 0.0
        for value in order:
            largest = fp16_overflow._larger(largest, value)
        assert np.isnan(largest)
    assert fp16_overflow._larger(1.0, 2.0) == fp16_overflow._larger(2.0, 1.0) == 2.0


def test_graphs_with_islands_pass_the_checker_and_need_no_further_library(
    guard: Callable[..., Guarded],
) -> None:
    found = guard(loud_mlp([0, 22]))
    onnx.checker.check_model(str(found.guarded), full_check=True)
    ops = {
        node.op_type for node in onnx.load(str(found.guarded), load_external_data=False).graph.node
    }
    assert not [op for op in ops if op.startswith(("Conv", "Reduce", "Arg", "Pool"))]


def test_the_emulation_overflows_where_float16_does(guard: Callable[..., Guarded]) -> None:
    found = guard(loud_mlp([1]), vision_layers=4)
    assert not np.isfinite(emulate_float16(found.bare, found.dims, found.pixels)).all()
    # ONNX Runtime itself does not show it on a CPU, which is why there is an emulation.
    session = Session(found.bare, SessionOptions())
    pixels = found.pixels.astype(np.float16)
    assert np.isfinite(session.run({"pixel_values": pixels}, ["image_features"])[0]).all()
    both = [emulate_float16(path, found.dims, found.pixels) for path in (found.guarded,) * 2]
    assert np.array_equal(*both)
    assert np.array_equal(both[0].astype(np.float16).astype(np.float32), both[0])
