"""GraphFile: one ONNX file as it lies in an artifact: wiring by name, initializers by offset.

Reads what the file says and nothing else: no builder of this package is asked. External data is
read tensor by tensor (or rows of one), never mapped, so memory holds what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.util.arrays import Array

INT64_MAX = int(np.iinfo(np.int64).max)
_NUMPY: Mapping[int, str] = {
    1: "<f4",
    2: "u1",
    3: "i1",
    6: "<i4",
    7: "<i8",
    9: "?",
    10: "<f2",
    11: "<f8",
}
_UINT4, _INT4 = 21, 22
_TYPE_NAMES: Mapping[int, str] = {
    **{code: np.dtype(dtype).name for code, dtype in _NUMPY.items()},
    _UINT4: "uint4",
    _INT4: "int4",
}
_EXTERNAL = 1
_FLOAT32, _FLOAT16 = 1, 10
_FLOATS = (_FLOAT32, _FLOAT16)


@dataclass
class Casts:
    """Casts between float16 and float32 in a graph.

    Attributes:
        float32_nodes: names of the nodes that read float32.
        num_weights: elements of the weights that are cast.
        doubled: casts of what a cast made: what was wide has been rounded in between.
    """

    float32_nodes: set[str] = field(default_factory=set)
    num_weights: int = 0
    doubled: list[str] = field(default_factory=list)


class GraphFile:
    """Nodes and initializers of one file.

    Args:
        path: the ``.onnx`` file; its external data lies beside it.
        label: what messages call the graph, such as ``decoder``.

    Raises:
        ArtifactError: the file is no ONNX model, or a value comes from two places.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path = path
        self.label = label
        try:
            self._model = onnx.load(str(path), load_external_data=False)
        except Exception as error:  # protobuf's own errors share no base of their own
            raise ArtifactError(f"{path} cannot be read as an ONNX model: {error}") from error
        graph = self._model.graph
        self.nodes: list[Any] = list(graph.node)
        self.initializers: dict[str, Any] = {t.name: t for t in graph.initializer}
        if len(self.initializers) != len(graph.initializer):
            # ONNX Runtime takes the last of them, other readers the first.
            raise ArtifactError(f"{path}: two tensors have one name")
        self.inputs: list[str] = [value.name for value in graph.input]
        self.outputs: list[str] = [value.name for value in graph.output]
        self._producers: dict[str, Any] = {}
        self._consumers: dict[str, list[Any]] = {}
        self._index()

    def _index(self) -> None:
        self._producers.clear()
        self._consumers.clear()
        given = {*self.initializers, *self.inputs}
        for node in self.nodes:
            for output in node.output:
                if not output:
                    continue
                if output in self._producers or output in given:
                    raise ArtifactError(f"{self.path}: {output} comes from two places")
                self._producers[output] = node
            for name in dict.fromkeys(node.input):
                self._consumers.setdefault(name, []).append(node)

    def bypass_casts(self) -> Casts:
        """Leave casts between float16 and float32 out of the wiring, as if all were one type."""
        source: dict[str, str] = {}
        wide: set[str] = set()
        found = Casts()
        kept = []
        for node in self.nodes:
            if node.op_type == "Cast" and attribute(node, "to") in _FLOATS:
                given = node.input[0]
                if given in source:
                    found.doubled.append(node.name)
                if given in self.initializers:
                    found.num_weights += math.prod(self.shape(given))
                source[node.output[0]] = source.get(given, given)
                if attribute(node, "to") == _FLOAT32:
                    wide.add(node.output[0])
                continue
            if any(name in wide for name in node.input):
                found.float32_nodes.add(node.name)
                wide |= set(node.output)
            for place, name in enumerate(node.input):
                node.input[place] = source.get(name, name)
            kept.append(node)
        self.nodes = kept
        self._index()
        for name, behind in source.items():
            if behind in self._producers:
                self._producers[name] = self._producers[behind]
        return found

    @property
    def model(self) -> Any:
        """The parsed ONNX model; external data is not loaded."""
        return self._model

    def producer(self, value: str) -> Any | None:
        """The node that makes a value; None for inputs and initializers."""
        return self._producers.get(value)

    def consumers(self, value: str) -> list[Any]:
        """Nodes that read a value, in the file's order."""
        return self._consumers.get(value, [])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an initializer."""
        return tuple(self._tensor(name).dims)

    def dtype(self, name: str) -> str:
        """Element type of an initializer as numpy (or ml_dtypes) calls it."""
        code = self._tensor(name).data_type
        return _TYPE_NAMES.get(code, f"ONNX type {code}")

    def nbytes(self, name: str) -> int:
        """Bytes of an initializer as stored."""
        tensor = self._tensor(name)
        count = int(math.prod(tensor.dims))
        if tensor.data_type in (_UINT4, _INT4):
            return -(-count // 2)
        return count * np.dtype(self._numpy_type(tensor)).itemsize

    def read(self, name: str, rows: slice | None = None) -> Array:
        """An initializer's values.

        Args:
            name: of the initializer.
            rows: range of the first axis, step 1; all of it when left out.

        Returns:
            Array of the stored type and shape; 4-bit types come back as int8 or uint8, one value
            an element.

        Raises:
            ArtifactError: there is no such initializer, its type is not read, or its bytes are not
                where it says.
        """
        tensor = self._tensor(name)
        shape = tuple(tensor.dims)
        if tensor.data_type in (_UINT4, _INT4):
            count = math.prod(shape)
            packed = self._raw(tensor, np.dtype(np.uint8), 0, -(-count // 2))
            values = _unpack_nibbles(packed, count, signed=tensor.data_type == _INT4)
            values = values.reshape(shape)
            return values if rows is None else values[rows]
        dtype = np.dtype(self._numpy_type(tensor))
        if rows is None or not shape:
            return self._raw(tensor, dtype, 0, math.prod(shape)).reshape(shape)
        first, last, _ = rows.indices(shape[0])
        inner = math.prod(shape[1:])
        count = max(0, last - first) * inner
        return self._raw(tensor, dtype, first * inner, count).reshape(-1, *shape[1:])

    def constant(self, name: str) -> Array | None:
        """Values of a small initializer; None where ``name`` is none."""
        return self.read(name) if name in self.initializers else None

    def _tensor(self, name: str) -> Any:
        if name not in self.initializers:
            raise ArtifactError(f"{self.path} holds no initializer {name!r}")
        return self.initializers[name]

    def _numpy_type(self, tensor: Any) -> str:
        if tensor.data_type not in _NUMPY:
            raise ArtifactError(
                f"{self.path}: initializer {tensor.name} has ONNX type {tensor.data_type}, which "
                "is not read"
            )
        return _NUMPY[tensor.data_type]

    def _raw(self, tensor: Any, dtype: np.dtype[Any], first: int, count: int) -> Array:
        """``count`` elements from element ``first`` on."""
        if tensor.data_location != _EXTERNAL:
            if not tensor.raw_data:
                whole = np.asarray(numpy_helper.to_array(tensor)).reshape(-1)
                return whole[first : first + count]
            start = first * dtype.itemsize
            return np.frombuffer(tensor.raw_data, dtype, count, start).copy()
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = self.path.parent / Path(entries["location"]).name
        start = int(entries.get("offset", 0)) + first * dtype.itemsize
        values = np.fromfile(file, dtype, count, offset=start)
        if values.size != count:
            raise ArtifactError(f"{file} ends within {tensor.name}")
        return values


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """An attribute's value; ``default`` where the node lacks it. Bytes come back as text."""
    for entry in node.attribute:
        # A reference has no value: a function would give it one, and graphs have none.
        if entry.name == name and not entry.ref_attr_name:
            value = onnx.helper.get_attribute_value(entry)
            return value.decode() if isinstance(value, bytes) else value
    return default


def _unpack_nibbles(packed: NDArray[np.uint8], count: int, *, signed: bool) -> Array:
    """4-bit values in the order of the ONNX specification: the low half of a byte comes first."""
    values = np.empty(packed.size * 2, np.uint8)
    values[0::2] = packed & 15
    values[1::2] = packed >> 4
    values = values[:count]
    # Sign of a 4-bit number: 8 … 15 stand for -8 … -1.
    return ((values ^ 8).astype(np.int8) - np.int8(8)) if signed else values
