"""The header reader sees what the onnx package sees, and survives whatever else it is given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.onnx_proto import (
    HeaderLimits,
    OnnxHeader,
    parse_onnx_header,
    read_onnx_header,
)
from llava_edge.runtime.artifact.onnx_schema import ELEMENT_TYPES
from llava_edge.runtime.util.opened_file import OpenedFile


def external(name: str, location: str = "weights.bin", offset: int = 0) -> TensorProto:
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT16, dims=[3, 2], data_location="EXTERNAL"
    )
    for key, value in (("location", location), ("offset", str(offset)), ("length", "12")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def rich_model() -> ModelProto:
    """Subgraphs two deep, a local function, tensors in every place that can hold one."""
    value = helper.make_tensor_value_info
    boolean = TensorProto.BOOL
    inner = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["z"], name="innermost")],
        "inner",
        [],
        [value("z", TensorProto.FLOAT, [2])],
        [external("inner.w", offset=4096)],
    )
    branch = helper.make_graph(
        [
            helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner),
            helper.make_node("Constant", [], ["k"], value=external("attribute.w")),
        ],
        "branch",
        [],
        [value("z", TensorProto.FLOAT, [2])],
    )
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("sparse.values", TensorProto.FLOAT, [1], [1.0]),
        helper.make_tensor("sparse.indices", TensorProto.INT64, [1], [2]),
        [5],
    )
    scan = helper.make_node("Custom", ["x"], ["y2"], domain="my.domain")
    scan.attribute.append(helper.make_attribute("bodies", [inner, branch]))
    scan.attribute.append(
        helper.make_attribute("tables", [helper.make_tensor("t", TensorProto.INT8, [2], [1, 2])])
    )
    scan.attribute.append(helper.make_attribute("numbers", [1, -1, 1 << 62]))
    scan.attribute.append(helper.make_attribute("reals", [0.5, 2.0]))
    scan.attribute.append(helper.make_attribute("words", ["a", "b"]))
    scan.attribute.append(helper.make_attribute("sparse", sparse))
    graph = helper.make_graph(
        [
            helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
            scan,
            helper.make_node("MyFunction", ["x"], ["y3"], domain="local"),
        ],
        "main",
        [value("x", TensorProto.FLOAT, ["n", 2, None]), value("c", boolean, [])],
        [value("y", TensorProto.FLOAT16, [1, -1]), value("free", TensorProto.INT64, None)],
        [
            helper.make_tensor("inline", TensorProto.FLOAT, [2], [1.0, 2.0]),
            helper.make_tensor("raw", TensorProto.FLOAT, [2], np.ones(2, "f4").tobytes(), raw=True),
            external("outer.w"),
        ],
        doc_string="a graph",
        value_info=[value("between", TensorProto.FLOAT, [1])],
        sparse_initializer=[sparse],
    )
    function = helper.make_function(
        "local",
        "MyFunction",
        ["a"],
        ["b"],
        [
            helper.make_node("Abs", ["a"], ["abs"]),
            helper.make_node("Constant", [], ["b"], value=external("function.w")),
        ],
        [helper.make_opsetid("", 21)],
    )
    model = helper.make_model(
        graph,
        functions=[function],
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("my.domain", 3)],
    )
    helper.set_model_props(model, {"ort_config": "{}", "author": "x"})
    training = model.training_info.add()
    training.algorithm.node.add(op_type="Gradient", domain="ai.onnx.preview.training")
    return model


RICH = rich_model().SerializeToString()


def graphs_of(nodes: Any) -> Iterator[GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            graphs = list(attribute.graphs)
            if attribute.type == AttributeProto.GRAPH:
                graphs.append(attribute.g)
            for graph in graphs:
                yield graph
                yield from graphs_of(graph.node)


def nodes_and_tensors(model: ModelProto) -> tuple[list[NodeProto], list[TensorProto]]:
    """What the onnx package finds, by its own walk."""
    roots = [model.graph, *(t.algorithm for t in model.training_info)]
    roots += [graph for root in list(roots) for graph in graphs_of(root.node)]
    roots += [graph for f in model.functions for graph in graphs_of(f.node)]
    nodes = [node for root in roots for node in root.node]
    nodes += [node for function in model.functions for node in function.node]
    tensors = [tensor for root in roots for tensor in root.initializer]
    sparse = [tensor for root in roots for tensor in root.sparse_initializer]
    for node in nodes:
        for attribute in node.attribute:
            tensors += attribute.tensors
            sparse += attribute.sparse_tensors
            if attribute.type == AttributeProto.TENSOR:
                tensors.append(attribute.t)
            if attribute.type == AttributeProto.SPARSE_TENSOR:
                sparse.append(attribute.sparse_tensor)
    return nodes, [*tensors, *(half for pair in sparse for half in (pair.values, pair.indices))]


def test_the_reader_finds_the_nodes_and_tensors_that_the_onnx_package_finds() -> None:
    header = parse_onnx_header(RICH, "rich")
    nodes, tensors = nodes_and_tensors(rich_model())
    assert sorted(
        (n.domain, n.op_type, n.name, n.inputs, n.outputs) for n in header.nodes
    ) == sorted((n.domain, n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in nodes)
    assert sorted((t.name, t.data_type, t.dims, t.external) for t in header.tensors) == sorted(
        (t.name, t.data_type, tuple(t.dims), tuple((e.key, e.value) for e in t.external_data))
        for t in tensors
    )
    assert len(header.nodes) == 3 + 2 * (2 + 2) + (1 + 2 + 2) + 2 + 1
    assert ("", "Neg") in header.operators


def test_the_reader_reports_what_decides_about_a_graph() -> None:
    header = parse_onnx_header(RICH, "rich")
    assert header.ir_version == 10
    assert header.opset_imports == (("", 21), ("my.domain", 3), ("", 21))
    assert header.functions == (("local", "MyFunction"),)
    assert header.num_training_graphs == 1
    assert header.num_subgraphs == 2 * (1 + 2) + 1 + (1 + 2)
    assert header.metadata_keys == ("ort_config", "author")
    assert [(v.name, v.dtype, v.shape) for v in header.inputs] == [
        ("x", "float32", ("n", 2, None)),
        ("c", "bool", ()),
    ]
    assert [(v.name, v.dtype, v.shape) for v in header.outputs] == [
        ("y", "float16", (1, -1)),
        ("free", "int64", None),
    ]
    by_name = {tensor.name: tensor for tensor in header.tensors}
    assert by_name["outer.w"].is_external
    assert not by_name["raw"].is_external
    assert {name: by_name[name].inline_bytes for name in ("inline", "raw", "outer.w")} == {
        "inline": 8,
        "raw": 8,
        "outer.w": 0,
    }


def test_element_types_are_named_as_the_onnx_package_numbers_them() -> None:
    names = {"FLOAT": "float32", "DOUBLE": "float64"}
    for name, number in TensorProto.DataType.items():
        if number in ELEMENT_TYPES:
            assert ELEMENT_TYPES[number] == names.get(name, name.lower())


def test_a_value_that_is_no_tensor_has_no_element_type() -> None:
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)
    graph = helper.make_graph([], "g", [sequence], [])
    header = parse_onnx_header(helper.make_model(graph).SerializeToString(), "s")
    assert header.inputs[0].dtype is None


# The wire format by hand: tag = field number << 3 | wire type.
def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, payload: bytes | int) -> bytes:
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def with_graph(graph: bytes, extra: bytes = b"") -> bytes:
    return field(1, 10) + field(7, graph) + extra


def nested_subgraphs(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))
    return with_graph(graph)


def nested_types(depth: int) -> bytes:
    kind = b""
    for _ in range(depth):
        kind = field(4, field(1, kind))
    return with_graph(field(11, field(2, kind)))


REFUSED = {
    "empty": (b"", "no graph"),
    "no graph": (field(1, 10), "no graph"),
    "no ir version": (field(7, b""), "no ir_version"),
    "text": (b"not a model at all", "wire type|unknown field"),
    "truncated tag": (b"\x88", "cut short"),
    "truncated number": (b"\x08\xff", "cut short"),
    "eleven bytes": (b"\x08" + b"\xff" * 10 + b"\x01", "more than ten bytes"),
    "65 bits": (b"\x08" + b"\xff" * 9 + b"\x03", "more than 64 bits"),
    "length too long": (b"\x3a\x05\x00", "claims 5 bytes where 1 are left"),
    "length 2^63": (b"\x3a" + b"\x80" * 9 + b"\x01", "claims"),
    "child longer than parent": (with_graph(b"\x0a\x7f"), "claims 127 bytes"),
    "group": (b"\x3b\x3c", "wire type 3"),
    "wire type 7": (b"\x0f", "wire type 7"),
    "field zero": (b"\x00\x00", "unknown field 0"),
    "unknown field": (with_graph(b"", field(99, 1)), "unknown field 99"),
    "ir version as text": (field(1, b"10"), "wire type 2"),
    "graph as number": (field(7, 1), "wire type 0"),
    "two graphs": (with_graph(b"") + field(7, b""), "graph is written twice"),
    "two operators": (with_graph(field(1, field(4, b"Add") + field(4, b"If"))), "written twice"),
    "name no utf-8": (with_graph(field(1, field(4, b"\xff"))), "not UTF-8"),
    "long name": (with_graph(field(1, field(4, b"x" * 65537))), "text of 65537 bytes"),
    "rank 17": (with_graph(field(5, field(1, 1) * 17)), "more than 16 entries"),
    "packed rank 17": (with_graph(field(5, field(1, b"\x01" * 17))), "more than 16 entries"),
    "packed cut": (with_graph(field(5, field(1, b"\x81"))), "cut short"),
    "number and name": (
        with_graph(field(11, field(2, field(1, field(2, field(1, field(1, 1) + field(2, b"n"))))))),
        "both a number and a name",
    ),
    "two types": (with_graph(field(11, field(2, field(1, b"") + field(4, b"")))), "two types"),
    "fixed cut": (with_graph(field(5, b"\x25\x00")), "cut short"),
    "data location 2": (with_graph(field(5, field(14, 2))), "data_location 2"),
    "data location 2^32": (with_graph(field(5, field(14, 1 << 32))), "data_location 4294967296"),
    "subgraph bomb": (nested_subgraphs(500), "nested deeper than 32"),
    "type bomb": (nested_types(5000), "nested deeper than 32"),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_malformed_bytes_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ArtifactError, match=f"^file is not a graph.*({reason})"):
        parse_onnx_header(data, "file")


def test_ten_nested_subgraphs_are_read() -> None:
    assert parse_onnx_header(nested_subgraphs(10), "file").num_subgraphs == 10


def test_dims_are_read_packed_and_one_by_one() -> None:
    single = field(1, 3) + field(1, 300)
    packed = field(1, varint(3) + varint(300))
    for dims in (single, packed):
        header = parse_onnx_header(with_graph(field(5, dims)), "file")
        assert header.tensors[0].dims == (3, 300)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (HeaderLimits(nodes=13), "more than 13 nodes"),
        (HeaderLimits(tensors=5), "more than 5 tensors"),
        (HeaderLimits(fields=100), "more than 100 fields"),
        (HeaderLimits(depth=5), "nested deeper than 5"),
        (HeaderLimits(text_bytes=4), "is text of"),
        (HeaderLimits(values=0), "given more than 0 times"),
    ],
)
def test_each_limit_holds(limits: HeaderLimits, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        parse_onnx_header(RICH, "rich", limits)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(RICH)
    assert read_onnx_header(OpenedFile(tmp_path / "model.onnx")) == parse_onnx_header(RICH, "rich")
    with pytest.raises(ArtifactError, match="at most 100 B are read"):
        read_onnx_header(OpenedFile(tmp_path / "model.onnx"), HeaderLimits(file_bytes=100))


@pytest.mark.parametrize(
    "data",
    [
        with_graph(b"\x0a\x00" * 600_000),
        with_graph(field(1, b"\x0a\x00" * 600_000)),
        with_graph(field(13, b"\x1a\x00" * 600_000)),
        with_graph(field(5, b"\x28\x01" * 600_000)),
    ],
    ids=["empty nodes", "empty names", "empty texts", "unpacked numbers"],
)
def test_many_tiny_fields_end_within_seconds(data: bytes) -> None:
    start = time.process_time()
    with pytest.raises(ArtifactError, match="more than"):
        parse_onnx_header(data, "file")
    assert time.process_time() - start < 10


def read_or_refuse(data: bytes) -> OnnxHeader | None:
    try:
        return parse_onnx_header(data, "fuzzed", HeaderLimits(fields=10_000))
    except ArtifactError:
        return None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
@example(b"\x0a" * 300)
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    read_or_refuse(data)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(RICH) - 1), st.sampled_from("xid"), st.binary(min_size=1, max_size=4)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_damaged_model_is_read_as_the_onnx_package_reads_it_or_refused(
    edits: list[tuple[int, str, bytes]],
) -> None:
    data = RICH
    for position, kind, content in edits:
        end = position + (0 if kind == "i" else len(content))
        data = data[:position] + (b"" if kind == "d" else content) + data[end:]
    header = read_or_refuse(data)
    if header is None:
        return
    # What is let through must be what protobuf sees: the graph that would really be run.
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:
        return
    operators = {(node.domain, node.op_type) for node in model.graph.node}
    assert operators <= header.operators
    locations = {e.value for t in model.graph.initializer for e in t.external_data}
    assert locations <= {value for t in header.tensors for _, value in t.external}
    assert len(header.functions) == len(model.functions)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(RICH) - 1))
def test_a_truncated_model_is_refused_or_ends_at_a_field(length: int) -> None:
    header = read_or_refuse(RICH[:length])
    if header is not None:
        assert onnx.ModelProto.FromString(RICH[:length]).HasField("graph")
