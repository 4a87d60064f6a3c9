"""Judging a graph before ONNX Runtime opens it: operators, weights files, inputs and outputs.

Only operators that the exporters emit are let through. None of them branches, loops, calls a local
function or reads a file, so what a graph can do is bounded by its size; what it can read is the
listed weights files of its own folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod

from llava_edge.profiles.errors import shorten
from llava_edge.runtime.artifact.manifest import GraphSpec, TensorSpec
from llava_edge.runtime.artifact.onnx_proto import (
    OnnxHeader,
    TensorHeader,
    ValueHeader,
)
from llava_edge.runtime.artifact.onnx_schema import ELEMENT_TYPES

ALLOWED_OPERATORS: Mapping[str, frozenset[str]] = {
    "": frozenset(
        {
            "Abs",
            "Add",
            "AveragePool",
            "Cast",
            "Clip",
            "Concat",
            "Constant",
            "DequantizeLinear",
            "Div",
            "Erf",
            "Expand",
            "Gather",
            "Gelu",
            "Identity",
            "LayerNormalization",
            "MatMul",
            "Max",
            "Mul",
            "Neg",
            "Pow",
            "QuantizeLinear",
            "ReduceMax",
            "ReduceMean",
            "ReduceSum",
            "Reshape",
            "Shape",
            "Sigmoid",
            # ONNX Runtime registers this one in the standard domain, outside the standard.
            "SimplifiedLayerNormalization",
            "Slice",
            "Softmax",
            "Split",
            "Sqrt",
            "Squeeze",
            "Sub",
            "Tanh",
            "TopK",
            "Transpose",
            "Unsqueeze",
        }
    ),
    "com.microsoft": frozenset(
        {
            "BiasGelu",
            "DynamicQuantizeMatMul",
            "GroupQueryAttention",
            "MatMulIntegerToFloat",
            "MatMulNBits",
            "MultiHeadAttention",
            "QuickGelu",
            "SkipSimplifiedLayerNormalization",
        }
    ),
}
"""Operators by domain: what the exporters emit, and nothing that holds a subgraph."""

MAX_EXTENT = 1 << 62
"""Offsets and sizes beyond this would overflow in a reader that counts in 64 bits."""

_BITS = {
    **dict.fromkeys(("float32", "int32", "uint32"), 32),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 16),
    **dict.fromkeys(("int64", "uint64", "float64"), 64),
    **dict.fromkeys(("int8", "uint8", "bool"), 8),
    **dict.fromkeys(("int4", "uint4"), 4),
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")


def graph_faults(header: OnnxHeader, sizes: Mapping[str, int]) -> list[str]:
    """Everything about a graph that forbids opening it; empty when there is nothing.

    Args:
        header: what was read from the graph file.
        sizes: bytes of the files beside it, by plain name; external data may lie in these only.
    """
    return [
        *_operator_faults(header),
        *_structure_faults(header),
        *(f"tensor {t.name!r:.80}: {fault}" for t in header.tensors for fault in _tensor(t, sizes)),
    ]


def spec_faults(header: OnnxHeader, spec: GraphSpec) -> list[str]:
    """Where a graph's inputs and outputs differ from what the manifest says of them."""
    faults: list[str] = []
    for what, actual, stated in (
        ("inputs", header.inputs, spec.inputs),
        ("outputs", header.outputs, spec.outputs),
    ):
        if len(actual) != len(stated):
            faults.append(f"has {len(actual)} {what}; the manifest lists {len(stated)}")
            continue
        faults += [
            f"{what[:-1]} is {_show(have)}; the manifest says {_show(want)}"
            for have, want in zip(actual, stated, strict=True)
            if _key(have) != _key(want)
        ]
    return faults


def _operator_faults(header: OnnxHeader) -> list[str]:
    foreign = sorted(
        f"{domain}::{op_type}" if domain else op_type
        for domain, op_type in header.operators
        if op_type not in ALLOWED_OPERATORS.get(domain, frozenset())
    )
    faults = [f"operators outside the allowed set: {shorten(foreign)}"] if foreign else []
    domains = [domain for domain, _ in header.opset_imports]
    if unknown := sorted({domain for domain in domains if domain not in ALLOWED_OPERATORS}):
        faults.append(f"operator sets of other domains: {shorten(unknown)}")
    if len(set(domains)) != len(domains):
        faults.append("an operator set is imported twice")
    if any(node.overload for node in header.nodes):
        faults.append("a node names an overload of a local function")
    return faults


def _structure_faults(header: OnnxHeader) -> list[str]:
    faults: list[str] = []
    if header.functions:
        names = [f"{domain}::{name}" for domain, name in header.functions]
        faults.append(f"local functions: {shorten(names)}")
    if header.num_subgraphs:
        faults.append(f"{header.num_subgraphs} subgraphs")
    if header.num_training_graphs:
        faults.append(f"{header.num_training_graphs} training graphs")
    # ONNX Runtime can be told to take session options from this entry.
    if "ort_config" in header.metadata_keys:
        faults.append("session options in its metadata (ort_config)")
    return faults


def _tensor(tensor: TensorHeader, sizes: Mapping[str, int]) -> Iterator[str]:
    dtype = ELEMENT_TYPES.get(tensor.data_type)
    if dtype not in _BITS:
        yield f"element type {dtype or tensor.data_type} is not one that graphs use"
        return
    if any(dim < 0 for dim in tensor.dims) or prod(tensor.dims) > MAX_EXTENT // 8:
        yield f"has the impossible shape {list(tensor.dims)}"
        return
    nbytes = (prod(tensor.dims) * _BITS[dtype] + 7) // 8
    if tensor.is_external:
        if tensor.inline_bytes:
            yield "has its values both inside and outside the graph"
        yield from _external(dict(tensor.external), len(tensor.external), nbytes, sizes)
    elif tensor.external:
        yield "names external data without being external"


def _external(
    entries: Mapping[str, str], count: int, nbytes: int, sizes: Mapping[str, int]
) -> Iterator[str]:
    # ONNX Runtime knows further keys, and locations that are addresses in memory.
    if count != len(entries) or not {"location"} <= set(entries) <= {
        "location",
        "offset",
        "length",
    }:
        yield f"external data has the keys {', '.join(sorted(entries))[:200]!r}"
        return
    location = entries["location"]
    if not _PLAIN_NAME.fullmatch(location):
        yield f"external data is at {location!r:.120}, which is no plain file name"
        return
    if location not in sizes:
        yield f"external data is in {location}, which the manifest does not list beside the graph"
        return
    numbers = [entries.get("offset", "0"), entries.get("length", str(nbytes))]
    if not all(_NUMBER.fullmatch(number) for number in numbers):
        yield f"external data has offset and length {numbers!r:.120}"
        return
    offset, length = map(int, numbers)
    if length != nbytes:
        yield f"external data has {length} bytes where shape and type need {nbytes}"
    if offset > MAX_EXTENT or offset + nbytes > sizes[location]:
        yield f"external data ends at {offset + nbytes}; {location} has {sizes[location]} bytes"


def _key(value: ValueHeader | TensorSpec) -> tuple[str, str | None, str]:
    # repr keeps 1, True and "1" apart.
    return (value.name, value.dtype, repr(None if value.shape is None else list(value.shape)))


def _show(value: ValueHeader | TensorSpec) -> str:
    shape = None if value.shape is None else list(value.shape)
    return f"{value.name} {value.dtype} {shape}"[:200]
