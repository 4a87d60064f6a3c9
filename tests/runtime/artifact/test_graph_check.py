"""A graph is let through when it can do nothing but compute on the weights beside it."""

from __future__ import annotations

import dataclasses

import pytest

from llava_edge.runtime.artifact.graph_validation import (
    ALLOWED_OPERATORS,
    graph_faults,
    spec_faults,
)
from llava_edge.runtime.artifact.manifest import GraphSpec, TensorSpec
from llava_edge.runtime.artifact.onnx_proto import NodeHeader, OnnxHeader, TensorHeader, ValueHeader

SIZES = {"weights.bin": 4096 + 24}


def tensor(
    *entries: tuple[str, str],
    data_type: int = 1,
    dims: tuple[int, ...] = (2, 3),
    inline_bytes: int = 0,
    is_external: bool = True,
) -> TensorHeader:
    return TensorHeader("w", data_type, dims, inline_bytes, is_external, entries)


LOCATION = ("location", "weights.bin")
GOOD = OnnxHeader(
    ir_version=10,
    opset_imports=(("", 21), ("com.microsoft", 1)),
    nodes=(NodeHeader("", "MatMul", "a"), NodeHeader("com.microsoft", "MatMulNBits", "b")),
    inputs=(ValueHeader("x", "float32", (1, "n")),),
    outputs=(ValueHeader("y", "float16", (None,)), ValueHeader("z", "int64", ())),
    tensors=(tensor(LOCATION, ("offset", "4096"), ("length", "24")),),
    functions=(),
    num_subgraphs=0,
    num_training_graphs=0,
    metadata_keys=("author",),
)


def test_an_ordinary_graph_has_no_faults() -> None:
    assert graph_faults(GOOD, SIZES) == []


@pytest.mark.parametrize("op", ["If", "Loop", "Scan", "SequenceMap", "Optional", "", "matmul"])
def test_an_operator_outside_the_list_is_named(op: str) -> None:
    header = dataclasses.replace(GOOD, nodes=(NodeHeader("", op, "n"),))
    assert graph_faults(header, SIZES) == [f"operators outside the allowed set: {op}"]


@pytest.mark.parametrize(
    ("domain", "op"),
    [
        ("com.microsoft", "EPContext"),
        ("com.microsoft", "MatMul"),
        ("", "GroupQueryAttention"),
        ("ai.onnx", "MatMul"),
        ("my.domain", "Anything"),
    ],
)
def test_an_operator_counts_in_its_own_domain_only(domain: str, op: str) -> None:
    header = dataclasses.replace(GOOD, nodes=(NodeHeader(domain, op, "n"),))
    assert len(graph_faults(header, SIZES)) == 1


def test_no_allowed_operator_holds_a_subgraph() -> None:
    holders = {"If", "Loop", "Scan", "SequenceMap", "BeamSearch", "GreedySearch", "Sampling"}
    assert not holders & {op for ops in ALLOWED_OPERATORS.values() for op in ops}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"functions": (("local", "F"),)}, "local functions: local::F"),
        ({"num_subgraphs": 2}, "2 subgraphs"),
        ({"num_training_graphs": 1}, "1 training graphs"),
        ({"metadata_keys": ("ort_config",)}, "session options in its metadata (ort_config)"),
        ({"opset_imports": (("", 21), ("evil", 1))}, "operator sets of other domains: evil"),
        ({"opset_imports": (("", 21), ("", 20))}, "an operator set is imported twice"),
        (
            {"nodes": (NodeHeader("", "MatMul", "n", overload="x"),)},
            "a node names an overload of a local function",
        ),
    ],
)
def test_structure_that_exporters_never_write_is_a_fault(
    changes: dict[str, object], fault: str
) -> None:
    assert graph_faults(dataclasses.replace(GOOD, **changes), SIZES) == [fault]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "entries",
    [
        (LOCATION,),
        (LOCATION, ("offset", "0")),
        (LOCATION, ("offset", "4096")),
        (LOCATION, ("length", "24")),
    ],
    ids=str,
)
def test_offset_and_length_may_be_left_out(entries: tuple[tuple[str, str], ...]) -> None:
    header = dataclasses.replace(GOOD, tensors=(tensor(*entries),))
    assert graph_faults(header, SIZES) == []


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ((("location", "../weights.bin"),), "no plain file name"),
        ((("location", "/weights.bin"),), "no plain file name"),
        ((("location", ".."),), "no plain file name"),
        ((("location", ""),), "no plain file name"),
        ((("location", "a\\b"),), "no plain file name"),
        ((("location", "weights.bin\x00.x"),), "no plain file name"),
        ((("location", "weights.bin\n"),), "no plain file name"),
        ((("location", "*/_ORT_MEM_ADDR_/*"),), "no plain file name"),
        ((("location", "file:x"),), "no plain file name"),
        ((("location", "other.bin"),), "does not list beside the graph"),
        ((("offset", "0"),), "has the keys"),
        ((LOCATION, ("checksum", "0")), "has the keys"),
        ((LOCATION, ("basepath", "/")), "has the keys"),
        ((LOCATION, LOCATION), "has the keys"),
        ((LOCATION, ("offset", "-1")), "has offset and length"),
        ((LOCATION, ("offset", "0x10")), "has offset and length"),
        ((LOCATION, ("offset", "010")), "has offset and length"),
        ((LOCATION, ("offset", "1e3")), "has offset and length"),
        ((LOCATION, ("offset", "٣")), "has offset and length"),
        ((LOCATION, ("offset", "9" * 400)), "has offset and length"),
        ((LOCATION, ("offset", "4097")), "ends at 4121; weights.bin has 4120 bytes"),
        ((LOCATION, ("offset", str((1 << 63) - 1))), "ends at"),
        ((LOCATION, ("length", "23")), "has 23 bytes where shape and type need 24"),
        ((LOCATION, ("length", "25")), "has 25 bytes where shape and type need 24"),
    ],
    ids=str,
)
def test_external_data_beyond_a_listed_file_is_a_fault(
    entries: tuple[tuple[str, str], ...], fault: str
) -> None:
    header = dataclasses.replace(GOOD, tensors=(tensor(*entries),))
    (found,) = graph_faults(header, SIZES)
    assert fault in found


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (tensor(LOCATION, dims=(-1, 3)), "impossible shape"),
        (tensor(LOCATION, dims=(1 << 62, 1 << 62)), "impossible shape"),
        (tensor(LOCATION, dims=(1 << 40,)), "ends at 4398046511104"),
        (tensor(LOCATION, data_type=8), "element type string"),
        (tensor(LOCATION, data_type=0), "element type 0"),
        (tensor(LOCATION, data_type=(1 << 32) + 1), "element type 4294967297"),
        (tensor(LOCATION, inline_bytes=4), "both inside and outside"),
        (tensor(LOCATION, is_external=False), "without being external"),
        (tensor(), "has the keys"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_contradicts_itself_is_a_fault(bad: TensorHeader, fault: str) -> None:
    (found,) = graph_faults(dataclasses.replace(GOOD, tensors=(bad,)), SIZES)
    assert fault in found


@pytest.mark.parametrize(
    ("data_type", "dims", "nbytes"),
    [(21, (3,), 2), (22, (4,), 2), (10, (2, 3), 12), (7, (), 8), (1, (0, 5), 0), (9, (7,), 7)],
    ids=["uint4 odd", "int4 even", "float16", "int64 scalar", "empty", "bool"],
)
def test_bytes_follow_from_type_and_shape(
    data_type: int, dims: tuple[int, ...], nbytes: int
) -> None:
    good = tensor(LOCATION, ("length", str(nbytes)), data_type=data_type, dims=dims)
    assert graph_faults(dataclasses.replace(GOOD, tensors=(good,)), {"weights.bin": nbytes}) == []


X = TensorSpec("x", "float32", (1, "n"))
Y, Z = TensorSpec("y", "float16", (None,)), TensorSpec("z", "int64", ())


def test_inputs_and_outputs_equal_to_the_manifest_have_no_faults() -> None:
    assert spec_faults(GOOD, GraphSpec("m.onnx", (X,), (Y, Z))) == []


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        (GraphSpec("m", (), (Y, Z)), "has 1 inputs; the manifest lists 0"),
        (GraphSpec("m", (X,), (Y,)), "has 2 outputs; the manifest lists 1"),
        (GraphSpec("m", (dataclasses.replace(X, name="w"),), (Y, Z)), "manifest says w"),
        (GraphSpec("m", (dataclasses.replace(X, shape=(1, "m")),), (Y, Z)), "says x float32"),
        (GraphSpec("m", (dataclasses.replace(X, shape=(True, "n")),), (Y, Z)), "says x float32"),
        (GraphSpec("m", (dataclasses.replace(X, dtype="float16"),), (Y, Z)), "says x float16"),
    ],
)
def test_a_difference_from_the_manifest_is_shown_with_both_sides(
    spec: GraphSpec, fault: str
) -> None:
    (found,) = spec_faults(GOOD, spec)
    assert fault in found


def test_swapped_outputs_are_two_differences() -> None:
    assert len(spec_faults(GOOD, GraphSpec("m", (X,), (Z, Y)))) == 2
