"""OnnxHeader: what an ONNX file refers to, read without the ``onnx`` package and within bounds.

ONNX Runtime parses, optimises and maps whatever it is given, so an artifact's graphs are read here
first. The reader walks the protobuf wire format by a table of all message types of ``onnx.proto``,
``onnx_schema.py``. It is stricter than protobuf: a field that the table does not know, a field of
another wire type, a singular field written twice and any text that is not UTF-8 are refused. Two
readers that settle such cases differently would see two different graphs.

Source of the wire format: protobuf's encoding guide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.onnx_schema import (
    BYTES,
    ELEMENT_TYPES,
    INT,
    INTS,
    SCALAR_WIRE,
    SCHEMA,
    SIZE,
    SKIP_4,
    SKIP_8,
    SKIP_TEXT,
    TEXT,
    TEXTS,
    Field,
)
from llava_edge.runtime.util.opened_file import OpenedFile


@dataclass(frozen=True)
class HeaderLimits:
    """Bounds on one graph file; a graph with external weights stays far below them."""

    file_bytes: int = 64 << 20
    fields: int = 500_000
    nodes: int = 100_000
    tensors: int = 100_000
    text_bytes: int = 1 << 16
    depth: int = 32
    rank: int = 16
    values: int = 4096


@dataclass(frozen=True)
class ValueHeader:
    """A graph input or output: element type (``float32`` …) and sizes.

    A size is a number, the name of a symbolic one, or None. ``dtype`` is None where the value is no
    dense tensor; ``shape`` is None where the rank is not given.
    """

    name: str
    dtype: str | None
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class NodeHeader:
    """One operator; ``overload`` is empty for everything but overloaded local functions.

    ``inputs`` and ``outputs`` are names of values; an input that is left out has an empty one.
    """

    domain: str
    op_type: str
    name: str
    overload: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor: initializer, attribute, or half of a sparse tensor.

    ``data_type`` is ONNX's number. ``inline_bytes`` counts payload in the file itself;
    ``external`` holds the key-value pairs as written, which nobody has judged yet.
    """

    name: str
    data_type: int
    dims: tuple[int, ...]
    inline_bytes: int
    is_external: bool
    external: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class OnnxHeader:
    """Everything in an ONNX file that decides what running it may touch.

    ``nodes`` and ``tensors`` are those of the main graph, of all subgraphs, local functions and
    training graphs together. ``inputs`` and ``outputs`` are the main graph's.
    """

    ir_version: int
    opset_imports: tuple[tuple[str, int], ...]
    nodes: tuple[NodeHeader, ...]
    inputs: tuple[ValueHeader, ...]
    outputs: tuple[ValueHeader, ...]
    tensors: tuple[TensorHeader, ...]
    functions: tuple[tuple[str, str], ...]
    num_subgraphs: int
    num_training_graphs: int
    metadata_keys: tuple[str, ...]

    @property
    def operators(self) -> frozenset[tuple[str, str]]:
        """Distinct (domain, op_type) of all nodes."""
        return frozenset((node.domain, node.op_type) for node in self.nodes)


def read_onnx_header(opened: OpenedFile, limits: HeaderLimits | None = None) -> OnnxHeader:
    """Read the header of an ONNX file; its bytes are kept, see ``OpenedFile.content``.

    Raises:
        ArtifactError: the file is too large, or not an ONNX model within bounds.
    """
    limits = limits or HeaderLimits()
    return parse_onnx_header(opened.content(limits.file_bytes), str(opened.path), limits)


def parse_onnx_header(data: bytes, where: str, limits: HeaderLimits | None = None) -> OnnxHeader:
    """Read the header from the bytes of an ONNX file; ``where`` names it in messages.

    Raises:
        ArtifactError: as ``read_onnx_header``.
    """
    reader = _Reader(data, limits or HeaderLimits())
    try:
        model = reader.message("ModelProto", 0, len(data), 1)
        return _header(model, reader)
    except _RefusedError as refusal:
        raise ArtifactError(
            f"{where} is not a graph this tool writes: {refusal}. "
            "Copy or convert the artifact again."
        ) from refusal


class _RefusedError(Exception):
    """Carries the reason up to where the file's name is known."""


_Message = dict[str, Any]


class _Reader:
    """Walks the bytes by the table; counts what it meets so that work and memory are bounded."""

    def __init__(self, data: bytes, limits: HeaderLimits) -> None:
        self._data = data
        self._limits = limits
        self._fields = 0
        self.nodes = 0
        self.tensors = 0
        self.subgraphs = 0

    def message(self, kind: str, at: int, end: int, depth: int) -> _Message:
        """Fields of one message: values by field name, lists where the field repeats."""
        if depth > self._limits.depth:
            raise _RefusedError(f"messages are nested deeper than {self._limits.depth}")
        self._count(kind)
        schema = SCHEMA[kind]
        values: _Message = {}
        seen = set()
        while at < end:
            self._fields += 1
            if self._fields > self._limits.fields:
                raise _RefusedError(f"it has more than {self._limits.fields} fields")
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            known = schema.get(number)
            if known is None:
                raise _RefusedError(f"{kind} has an unknown field {number} (wire type {wire})")
            name, _, repeats = known
            if number in seen and not repeats:
                raise _RefusedError(f"{kind}.{name} is written twice")
            seen.add(number)
            at = self._field(values, f"{kind}.{name}", known, wire, at, end, depth)
        return values

    def _count(self, kind: str) -> None:
        if kind == "NodeProto":
            self.nodes += 1
        elif kind == "TensorProto":
            self.tensors += 1
        elif kind == "GraphProto":
            self.subgraphs += 1
        if self.nodes > self._limits.nodes:
            raise _RefusedError(f"it has more than {self._limits.nodes} nodes")
        if self.tensors > self._limits.tensors:
            raise _RefusedError(f"it has more than {self._limits.tensors} tensors")

    def _field(
        self, values: _Message, label: str, known: Field, wire: int, at: int, end: int, depth: int
    ) -> int:
        """Read one field into ``values``; return where the next one starts."""
        name, kind, repeats = known
        scalar = SCALAR_WIRE.get(kind)
        if scalar is not None and wire == scalar:
            return self._scalar(values, name, kind, at, end)
        # Packed form exists for repeated scalars only.
        if wire != BYTES or (scalar is not None and not repeats):
            raise _RefusedError(f"{label} has wire type {wire}")
        length, at = self._varint(at, end)
        stop = at + length
        if stop > end:
            raise _RefusedError(f"{label} claims {length} bytes where {end - at} are left")
        if kind == INTS:
            self._packed(values.setdefault(name, []), label, at, stop)
        elif kind == TEXT:
            values[name] = self._text(label, at, stop)
        elif kind == TEXTS:
            texts = values.setdefault(name, [])
            if len(texts) >= self._limits.values:
                raise _RefusedError(f"{label} is given more than {self._limits.values} times")
            texts.append(self._text(label, at, stop))
        elif kind == SIZE or scalar is not None:
            values[name] = values.get(name, 0) + length
        elif kind != SKIP_TEXT:
            child = self.message(kind, at, stop, depth + 1)
            if repeats:
                values.setdefault(name, []).append(child)
            else:
                values[name] = child
        return stop

    def _scalar(self, values: _Message, name: str, kind: str, at: int, end: int) -> int:
        if kind in (SKIP_4, SKIP_8):
            width = 4 if kind == SKIP_4 else 8
            if at + width > end:
                raise _RefusedError(f"field {name} is cut short")
            values[name] = values.get(name, 0) + width
            return at + width
        number, after = self._varint(at, end)
        if kind == INT:
            values[name] = _signed(number)
        elif kind == INTS:
            self._append(values.setdefault(name, []), name, number)
        else:
            values[name] = values.get(name, 0) + after - at
        return after

    def _packed(self, numbers: list[int], label: str, at: int, stop: int) -> None:
        while at < stop:
            number, at = self._varint(at, stop)
            self._append(numbers, label, number)

    def _append(self, numbers: list[int], label: str, number: int) -> None:
        if len(numbers) >= self._limits.rank:
            raise _RefusedError(f"{label} has more than {self._limits.rank} entries")
        numbers.append(_signed(number))

    def _text(self, label: str, at: int, stop: int) -> str:
        if stop - at > self._limits.text_bytes:
            raise _RefusedError(f"{label} is text of {stop - at} bytes")
        try:
            return self._data[at:stop].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _RefusedError(f"{label} is not UTF-8") from error

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """An unsigned number of at most 64 bits in at most ten bytes, and what follows it."""
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise _RefusedError("a number is cut short")
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    raise _RefusedError("a number has more than 64 bits")
                return value, at
        raise _RefusedError("a number has more than ten bytes")


def _signed(number: int) -> int:
    """Two's complement of 64 bits, as protobuf's int64 and int32 are written."""
    return number - (1 << 64) if number >> 63 else number


def _header(model: _Message, reader: _Reader) -> OnnxHeader:
    graph = model.get("graph")
    if graph is None:
        raise _RefusedError("it holds no graph")
    if "ir_version" not in model:
        raise _RefusedError("it has no ir_version")
    parts = _Parts()
    roots = [graph]
    functions = model.get("functions", [])
    for training in model.get("training_info", []):
        roots += [training[key] for key in ("initialization", "algorithm") if key in training]
    for root in [*roots, *functions]:
        parts.collect(root)
    return OnnxHeader(
        ir_version=model["ir_version"],
        opset_imports=tuple(
            (entry.get("domain", ""), entry.get("version", 0))
            for owner in (model, *functions)
            for entry in owner.get("opset_import", [])
        ),
        nodes=tuple(parts.nodes),
        inputs=tuple(map(_value, graph.get("input", []))),
        outputs=tuple(map(_value, graph.get("output", []))),
        tensors=tuple(parts.tensors),
        functions=tuple((f.get("domain", ""), f.get("name", "")) for f in functions),
        num_subgraphs=reader.subgraphs - len(roots),
        num_training_graphs=len(model.get("training_info", [])),
        metadata_keys=tuple(e.get("key", "") for e in model.get("metadata_props", [])),
    )


@dataclass
class _Parts:
    """Nodes and tensors gathered from graphs, functions and attributes at any depth."""

    nodes: list[NodeHeader] = field(default_factory=list)
    tensors: list[TensorHeader] = field(default_factory=list)

    def collect(self, root: _Message) -> None:
        """Walk one graph or function with a stack, in the order of the file."""
        stack: list[Iterator[tuple[str, _Message]]] = [iter([("root", root)])]
        while stack:
            entry = next(stack[-1], None)
            if entry is None:
                stack.pop()
                continue
            kind, owner = entry
            self.tensors.extend(_tensor(t) for t in _tensors_of(owner))
            if kind == "node":
                self.nodes.append(
                    NodeHeader(
                        domain=owner.get("domain", ""),
                        op_type=owner.get("op_type", ""),
                        name=owner.get("name", ""),
                        overload=owner.get("overload", ""),
                        inputs=tuple(owner.get("input", ())),
                        outputs=tuple(owner.get("output", ())),
                    )
                )
            stack.append(_children(owner))


def _children(owner: _Message) -> Iterator[tuple[str, _Message]]:
    for key in ("node", "attribute", "attribute_proto", "graphs"):
        yield from ((key, child) for child in owner.get(key, []))
    if "g" in owner:
        yield "g", owner["g"]


def _tensors_of(owner: _Message) -> Iterator[_Message]:
    yield from owner.get("initializer", [])
    yield from owner.get("tensors", [])
    if "t" in owner:
        yield owner["t"]
    sparse = [*owner.get("sparse_initializer", []), *owner.get("sparse_tensors", [])]
    if "sparse_tensor" in owner:
        sparse.append(owner["sparse_tensor"])
    for pair in sparse:
        yield from (pair[half] for half in ("values", "indices") if half in pair)


_PAYLOADS = (
    "raw_data",
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
)


def _tensor(tensor: _Message) -> TensorHeader:
    location = tensor.get("data_location", 0)
    if location not in (0, 1):
        raise _RefusedError(f"a tensor has data_location {location}")
    return TensorHeader(
        name=tensor.get("name", ""),
        data_type=tensor.get("data_type", 0),
        dims=tuple(tensor.get("dims", [])),
        inline_bytes=sum(tensor.get(payload, 0) for payload in _PAYLOADS),
        is_external=location == 1,
        external=tuple(
            (entry.get("key", ""), entry.get("value", ""))
            for entry in tensor.get("external_data", [])
        ),
    )


def _value(info: _Message) -> ValueHeader:
    name = info.get("name", "")
    kind = info.get("type", {})
    if len(kind.keys() - {"denotation"}) > 1:
        raise _RefusedError("a value has two types")
    tensor = kind.get("tensor_type")
    if tensor is None:
        return ValueHeader(name=name, dtype=None, shape=None)
    number = tensor.get("elem_type", 0)
    shape = tensor.get("shape")
    return ValueHeader(
        name=name,
        dtype=ELEMENT_TYPES.get(number, f"type {number}"),
        shape=None if shape is None else tuple(map(_size, shape.get("dim", []))),
    )


def _size(dim: _Message) -> int | str | None:
    if "dim_value" in dim and "dim_param" in dim:
        raise _RefusedError("a size is both a number and a name")
    value: int | str | None = dim.get("dim_value", dim.get("dim_param") or None)
    return value
