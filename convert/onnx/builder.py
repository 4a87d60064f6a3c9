"""GraphBuilder: a thin hand on onnx-ir for building graphs node by node.

Knows nothing of LLaVA. Large weights are lazy: only name, shape and a loader stand in the graph,
and the bytes pass through memory one tensor at a time while the external data file is written, so
that a graph of any size is built in little memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from llava_edge.convert.checkpoint.weights import LazyWeight
from llava_edge.runtime.artifact.manifest import GraphSpec, TensorSpec
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import Progress

OPSET = 21
"""First opset with 4-bit types; everything here exists in it and supported runtimes know it."""
IR_VERSION = 10
MICROSOFT = "com.microsoft"
INLINE_BYTES = 1024
"""Tensors up to this size stay inside the graph: shapes and scalars, which optimisers must read."""


class GraphBuilder:
    """Collects nodes and initializers of one graph that computes in ``compute`` (float32|float16).

    Values are onnx-ir values; ``op`` returns the first output, ``ops`` all of them. ``nodes`` are
    in order.
    """

    def __init__(self, name: str, compute: type[np.float32] | type[np.float16]) -> None:
        self.name = name
        self.compute = np.dtype(compute)
        self.nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._counts: dict[str, int] = {}

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input; names in ``shape`` are symbolic sizes."""
        value = ir.Value(name=name, type=_tensor_type(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare a graph output."""
        value.name = name
        value.type = _tensor_type(dtype)
        value.shape = ir.Shape(shape)
        self._outputs.append(value)

    def is_output(self, value: ir.Value) -> bool:
        """Whether the graph hands out a value."""
        return any(value is output for output in self._outputs)

    def replace_output(self, old: ir.Value, new: ir.Value) -> None:
        """Have another value be what the graph hands out, where it handed out ``old``."""
        for place, value in enumerate(self._outputs):
            if value is old:
                new.type, new.shape = old.type, old.shape
                # It is an inner value now, of which the graph says nothing.
                old.type = old.shape = None
                self._outputs[place] = new

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        num_outputs: int = 1,
        name: str | None = None,
    ) -> Sequence[ir.Value]:
        """Append a node and return its outputs. ``name`` defaults to op type and a number."""
        if name is None:
            count = self._counts.get(op_type, 0)
            self._counts[op_type] = count + 1
            name = f"{op_type}_{count}"
        node = ir.node(
            op_type,
            list(inputs),
            attributes=dict(attributes or {}),
            domain=domain,
            num_outputs=num_outputs,
            name=name,
        )
        for index, output in enumerate(node.outputs):
            output.name = name if index == 0 else f"{name}.{index}"
        self.nodes.append(node)
        return node.outputs

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Append a node with one output and return it."""
        return self.ops(op_type, inputs, attributes, domain=domain, name=name)[0]

    def constant(self, name: str, array: Array) -> ir.Value:
        """An initializer whose bytes are at hand; equal names must mean equal values."""
        if name not in self._initializers:
            tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
        return self._initializers[name]

    def integers(self, *values: int) -> ir.Value:
        """A small int64 vector constant, shared by value."""
        return self.constant("int64_" + "_".join(map(str, values)), np.array(values, np.int64))

    def weight(self, name: str, weight: LazyWeight) -> ir.Value:
        """A lazy initializer as it is stored, without a cast."""

        def evaluate() -> ir.TensorProtocol:
            array = np.ascontiguousarray(weight.load())
            if array.shape != weight.shape or array.dtype != weight.dtype:
                raise ValueError(f"{name}: loaded {array.dtype}{array.shape}, expected {weight}")
            return ir.Tensor(array, name=name)

        dtype = ir.DataType.from_numpy(weight.dtype)
        shape = ir.Shape(weight.shape)
        tensor = ir.LazyTensor(evaluate, dtype=dtype, shape=shape, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
        self._initializers[name] = value
        return value

    def compute_weight(self, name: str, weight: LazyWeight) -> ir.Value:
        """A lazy initializer cast to the compute type; ONNX Runtime folds the cast at load."""
        value = self.weight(name, weight)
        if weight.dtype == self.compute:
            return value
        return self.op("Cast", value, name=f"{name}.cast", to=self.compute_type)

    def vector(self, name: str, array: Array) -> ir.Value:
        """A small parameter (bias, gain, table) stored in the compute type itself."""
        return self.constant(name, array.astype(self.compute))

    @property
    def compute_type(self) -> int:
        """ONNX element type that the graph computes in."""
        return int(ir.DataType.from_numpy(self.compute))

    @property
    def compute_name(self) -> str:
        """``float32`` or ``float16``."""
        return self.compute.name

    @property
    def nbytes(self) -> int:
        """Bytes of all initializers."""
        tensors = (value.const_value for value in self._initializers.values())
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def save(self, folder: Path, progress: Progress | None = None) -> None:
        """Write ``model.onnx`` and ``weights.bin`` into ``folder``, one tensor in memory at a time.

        Offsets of large tensors are multiples of 4 KiB, so that they can be mapped and copied
        to a device page by page.
        """
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self.nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name=self.name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="llava-edge")
        written, done, total = threading.Lock(), 0, self.nbytes

        def report(tensor: ir.TensorProtocol, _: Any) -> None:
            nonlocal done
            if progress is not None:
                with written:
                    done += tensor.nbytes
                    progress(folder.name, done, total)

        ir.save(
            model,
            folder / "model.onnx",
            external_data="weights.bin",
            size_threshold_bytes=INLINE_BYTES,
            alignment=4096,
            callback=report,
        )

    def spec(self, file: str) -> GraphSpec:
        """The graph's inputs and outputs as the manifest states them."""
        return GraphSpec(
            file=file,
            inputs=tuple(_tensor_spec(value) for value in self._inputs),
            outputs=tuple(_tensor_spec(value) for value in self._outputs),
        )


def _tensor_type(dtype: str) -> ir.TensorType:
    return ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    sizes = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=sizes)
