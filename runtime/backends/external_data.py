"""Where a graph says that its weights lie, written anew.

ONNX Runtime opens the files that a graph names, by their names. Named by the paths of descriptors
that are open already, they are the very files that were hashed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llava_edge.profiles.errors import ArtifactError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_HOLDERS = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
"""Fields of ``onnx.proto`` through which a tensor's ``external_data`` is reached."""
_KEY, _VALUE = 1, 2


def relocate(model: bytes, place: Callable[[str], str]) -> bytes:
    """A model whose tensors lie elsewhere; all else is left as it is.

    Args:
        model: a serialised ``ModelProto``.
        place: from where the weights of a tensor lie to where they shall lie.

    Raises:
        ArtifactError: the model is cut short or no protobuf message.
    """
    return _message(memoryview(model), "ModelProto", place)


def _message(data: memoryview, kind: str, place: Callable[[str], str]) -> bytes:
    if kind == "StringStringEntryProto":
        return _entry(data, place)
    held = _HOLDERS[kind]
    parts: list[bytes | memoryview] = []
    for start, number, payload, end in _fields(data):
        if payload is None or number not in held:
            parts.append(data[start:end])
            continue
        changed = _message(payload, held[number], place)
        parts += [_varint(number << 3 | _BYTES), _varint(len(changed)), changed]
    return b"".join(parts)


def _entry(data: memoryview, place: Callable[[str], str]) -> bytes:
    """One key and value of a tensor's ``external_data``."""
    fields = {number: payload for _, number, payload, _ in _fields(data) if payload is not None}
    if bytes(fields.get(_KEY, b"")) != b"location":
        return bytes(data)
    try:
        value = place(bytes(fields.get(_VALUE, b"")).decode("utf-8")).encode()
    except UnicodeDecodeError as error:
        raise ArtifactError("a tensor's weights lie in a file whose name is no text") from error
    return b"".join(
        _varint(number << 3 | _BYTES) + _varint(len(part)) + part
        for number, part in ((_KEY, b"location"), (_VALUE, value))
    )


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview | None, int]]:
    """Start, number, payload (of fields of bytes) and end of each field of a message."""
    at = 0
    while at < len(data):
        start = at
        tag, at = _read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        payload = None
        if wire == _VARINT:
            _, at = _read_varint(data, at)
        elif wire == _BYTES:
            length, at = _read_varint(data, at)
            payload, at = data[at : at + length], at + length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ArtifactError(f"the graph has a field of wire type {wire}")
        if at > len(data):
            raise ArtifactError("the graph is cut short")
        yield start, number, payload, at


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ArtifactError("the graph is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ArtifactError("a number in the graph has more than ten bytes")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
