"""What processors without VNNI do: two products of uint8 and int8 are added in 16 bits.

The machine at hand may not do it, so graphs are rewritten when they are opened: standard operators
add each pair of products and cut the sum off, as the instruction does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from llava_edge.runtime.backends.onnxruntime import Session

_LEAST, _MOST = -32768.0, 32767.0


def saturate(patch: pytest.MonkeyPatch) -> None:
    """Have every session compute so from now on."""
    real = Session._open

    def opened(self: Session, model: bytes, *given: Any) -> None:
        proto = onnx.load_model_from_string(model)
        real(self, saturating(proto).SerializeToString(), *given)

    patch.setattr(Session, "_open", opened)


def saturating(model: Any) -> Any:
    """The model with every MatMulIntegerToFloat written out in saturating pairs."""
    graph = model.graph
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type != "MatMulIntegerToFloat":
            nodes.append(node)
            continue
        inner, outer = sizes[node.input[1]]
        nodes += _written_out(graph, node, inner, outer)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _written_out(graph: Any, node: Any, inner: int, outer: int) -> list[Any]:
    codes, weight, scale, scales, zero = node.input
    made: list[Any] = []

    def put(op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{node.name}.pairs.{len(made)}"
        made.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def constant(values: Any) -> str:
        name = f"{node.name}.constant.{len(graph.initializer)}"
        graph.initializer.append(numpy_helper.from_array(np.array(values), name))
        return name

    axis = constant(np.array([0], np.int64))
    float_codes = put("Cast", codes, to=onnx.TensorProto.FLOAT)
    float_weight = put("Cast", weight, to=onnx.TensorProto.FLOAT)
    rows = put("Reshape", float_codes, constant(np.array([-1, inner // 2, 2], np.int64)))
    rows = put("Transpose", rows, perm=[1, 0, 2])
    pairs = put("Reshape", float_weight, constant(np.array([inner // 2, 2, outer], np.int64)))
    columns = put("ReduceSum", float_weight, axis, keepdims=0)
    one_row = put("Gather", rows, constant(np.int64(0)), axis=0)
    one_pair = put("Gather", pairs, constant(np.int64(0)), axis=0)
    nothing = put("Mul", put("MatMul", one_row, one_pair), constant(np.float32(0)))
    # Pair by pair: all sums at once would not fit the memory of a wide model.
    total = put("Scan", nothing, rows, pairs, body=_pair(), num_scan_inputs=2)
    offset = put("Mul", columns, put("Cast", zero, to=onnx.TensorProto.FLOAT))
    centred = put("Sub", total, offset)
    scaled = put("Mul", put("Mul", centred, scale), scales)
    leading = put("Shape", codes, start=0, end=-1)
    shape = put("Concat", leading, constant(np.array([outer], np.int64)), axis=0)
    made.append(helper.make_node("Reshape", [scaled, shape], [node.output[0]], node.name))
    return made


def _pair() -> Any:
    """One step: the sum so far, and the cut sum of the next two products added to it."""
    limits = [
        numpy_helper.from_array(np.array(value, np.float32), name)
        for name, value in (("least", _LEAST), ("most", _MOST))
    ]
    nodes = [
        helper.make_node("MatMul", ["row", "pair"], ["product"]),
        helper.make_node("Clip", ["product", "least", "most"], ["cut"]),
        helper.make_node("Add", ["before", "cut"], ["behind"]),
    ]
    kind = onnx.TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info(name, kind, [None, None])
        for name in ("before", "row", "pair")
    ]
    outputs = [helper.make_tensor_value_info("behind", kind, [None, None])]
    return helper.make_graph(nodes, "pair", inputs, outputs, limits)
