"""Weights of a graph are placed elsewhere, wherever it names them, and nothing else moves."""

from __future__ import annotations

import re

import onnx
import pytest
from onnx import TensorProto, helper

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.onnx_proto import parse_onnx_header
from llava_edge.runtime.backends.external_data import relocate


def external(name: str, location: str, offset: int = 0) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    # The order of keys is free, and so is what else is said.
    for key, value in (("offset", str(offset)), ("location", location), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def rich_model() -> bytes:
    """Tensors at every place of a model that can hold one, and text that looks like a location."""
    sparse = onnx.SparseTensorProto(
        values=external("values", "w.bin"), indices=external("i", "w.bin")
    )
    inner = helper.make_graph([], "inner", [], [], [external("deep", "inner.bin")])
    node = helper.make_node("Custom", ["location"], ["w.bin"], name="location", body=inner)
    node.attribute.append(helper.make_attribute("t", external("t", "w.bin")))
    node.attribute.append(helper.make_attribute("list", [external("l", "b" * 300)]))
    node.attribute.append(helper.make_attribute("s", "location"))
    graph = helper.make_graph(
        [node], "g", [], [], [external("a", "w.bin", 64), helper.make_tensor("in", 1, [1], [2.0])]
    )
    graph.sparse_initializer.append(sparse)
    graph.metadata_props.add(key="location", value="w.bin")
    model = helper.make_model(graph, ir_version=10)
    model.functions.append(
        helper.make_function("d", "f", [], [], [node], [helper.make_opsetid("", 21)])
    )
    model.training_info.add().initialization.initializer.append(external("train", "w.bin"))
    model.metadata_props.add(key="location", value="w.bin")
    return bytes(model.SerializeToString())


def test_every_tensor_is_placed_anew_and_all_else_is_as_it_was() -> None:
    model = rich_model()
    asked: list[str] = []

    def place(location: str) -> str:
        asked.append(location)
        return f"proc/self/fd/{location}"

    placed = relocate(model, place)

    assert sorted(asked) == sorted(["w.bin"] * 6 + ["inner.bin"] * 2 + ["b" * 300] * 2)
    shown = re.sub(r"proc/self/fd/", "", str(onnx.ModelProto.FromString(placed)))
    # Keys are written in one order.
    assert sorted(shown.splitlines()) == sorted(str(onnx.ModelProto.FromString(model)).splitlines())
    before, after = (parse_onnx_header(data, "rich") for data in (model, placed))
    assert [dict(t.external).get("location") for t in after.tensors] == [
        (t.external and f"proc/self/fd/{dict(t.external)['location']}") or None
        for t in before.tensors
    ]


def test_a_model_placed_where_it_is_is_the_same_graph() -> None:
    model = rich_model()
    same = relocate(model, lambda location: location)
    assert onnx.ModelProto.FromString(same) == onnx.ModelProto.FromString(model)


def test_a_model_without_weights_elsewhere_stays_byte_for_byte() -> None:
    model = helper.make_model(
        helper.make_graph([], "g", [], [], [helper.make_tensor("in", 1, [1], [2.0])])
    ).SerializeToString()
    assert relocate(model, lambda _: pytest.fail("nothing to place")) == model


def test_what_is_cut_short_is_refused_at_every_place() -> None:
    model = rich_model()
    refused = 0
    for end in range(1, len(model)):
        try:
            relocate(model[:end], lambda location: location)
        except ArtifactError:
            refused += 1
    # Between two fields of the outermost message a cut is a model as well.
    assert refused > 0.9 * len(model)
