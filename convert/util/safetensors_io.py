"""Safetensors files, read and written tensor by tensor.

Reading goes through ``pread`` into the array that is returned, never through a mapping of the whole
file: a mapped page counts as resident memory, so the peak of a conversion would be the checkpoint
instead of its largest tensor. Every claim of the header is checked against the file before a byte
of data is read.

Source of the format: the safetensors README, "Format": an 8-byte little-endian header length, a
JSON header, then the data, without holes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.util.text_files import open_file, parse_json
from llava_edge.profiles.errors import CheckpointError, printable, shorten
from llava_edge.profiles.sizes import format_bytes
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.safe_open import read_at

MAX_HEADER_BYTES = 16 << 20
"""Enough for 100,000 tensors. The reference implementation reads up to 100 MB, which parsed take
more memory than a conversion."""

_MAX_RANK = 8
_MAX_SIDE = 1 << 40
"""No weights are as large; a product of ``_MAX_RANK`` such numbers still fits a message."""

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
"""Element sizes in bytes of the types whose headers are understood."""

_PACKED = ("F4", "F6_E2M3", "F6_E3M2")
"""Types of the format whose elements share bytes: those of quantised weights."""

_NUMPY: Mapping[str, str] = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies. ``offset`` counts from the start of the file; nothing is read yet.

    ``name`` is the name in the file, ``dtype`` the safetensors word (``F16``, ``BF16`` …).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorRef]:
    """Read and check the header of a safetensors file.

    Args:
        file: path of the file.

    Returns:
        One reference a tensor, in the order of the data.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or its header contradicts it; all
            faults of the header are listed.
    """
    with open_file(file) as descriptor:
        size = os.fstat(descriptor).st_size
        prefix = read_at(descriptor, 0, 8, file, CheckpointError)
        header_bytes = _read_header_bytes(file, prefix, size)
        raw = read_at(descriptor, 8, header_bytes, file, CheckpointError)
    entries = _parse_json(file, raw)
    data_start = 8 + header_bytes
    faults: list[str] = []
    refs = [
        ref
        for name, entry in entries.items()
        if (ref := _read_entry(name, entry, file, data_start, faults)) is not None
    ]
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    if not faults:
        _check_coverage(refs, data_start, size, faults)
    if faults:
        raise CheckpointError(f"{file.name} is damaged: {shorten(faults)}. Fetch the file again.")
    return {ref.name: ref for ref in refs}


def read_tensor(ref: TensorRef, rows: slice | None = None) -> Array:
    """Read one tensor, or a range of its rows, into a new array.

    Args:
        ref: the tensor.
        rows: range of the first axis, step 1; all rows when left out.

    Returns:
        Array of the stored shape (first axis cut to ``rows``) and type; BF16, which numpy does not
        have, comes back as float32 with the same values.

    Raises:
        CheckpointError: the file ended early or cannot be read, or numpy lacks the type.
    """
    if ref.dtype != "BF16" and ref.dtype not in _NUMPY:
        raise CheckpointError(
            f"tensor {ref.name} has type {ref.dtype}, which is not read; "
            f"read are {', '.join([*_NUMPY, 'BF16'])}. Save the checkpoint as float16 or bfloat16."
        )
    shape, skipped = _cut(ref, rows)
    count = math.prod(shape)
    start = ref.offset + skipped * DTYPE_BYTES[ref.dtype]
    try:
        with open_file(ref.file) as descriptor:
            if ref.dtype == "BF16":
                return _read_bfloat16(ref, descriptor, count, start).reshape(shape)
            array = np.empty(count, dtype=_NUMPY[ref.dtype])
            _fill(ref, descriptor, array, start)
    except OSError as error:
        raise CheckpointError(
            f"tensor {ref.name} cannot be read from {ref.file}: {error.strerror or error}"
        ) from error
    return array.reshape(shape)


def write_safetensors(
    file: Path,
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    blocks: Callable[[str], Iterable[Array]],
    metadata: Mapping[str, str] | None = None,
    threads: int = 1,
) -> None:
    """Write a safetensors file without holding more than one block a thread in memory.

    Args:
        file: path of the new file.
        tensors: (name, safetensors type, shape) in the order in which they are stored.
        blocks: gives the values of a tensor, in order, as arrays of the matching numpy type.
        metadata: string pairs stored under ``__metadata__``.
        threads: so many tensors are asked for and written at once, each where it belongs; for
            blocks whose making costs more than their writing.

    Raises:
        ValueError: the blocks of a tensor do not add up to its shape.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Data that starts on a multiple of 8 can be mapped by readers that want aligned tensors.
    raw += b" " * (-len(raw) % 8)
    head = len(raw).to_bytes(8, "little") + raw
    with open(file, "wb", buffering=0) as stream:
        descriptor = stream.fileno()
        _write_at(descriptor, head, 0)

        def write(tensor: tuple[str, str, tuple[int, ...]]) -> None:
            name, dtype, shape = tensor
            first, end = (len(head) + offset for offset in header[name]["data_offsets"])
            place = first
            for block in blocks(name):
                data = np.ascontiguousarray(block, dtype=_NUMPY[dtype]).reshape(-1).view(np.uint8)
                if place + data.nbytes > end:
                    place += data.nbytes
                    break
                _write_at(descriptor, data.data, place)
                place += data.nbytes
            if place != end:
                found = f"{place - first} bytes" + (" or more" if place > end else "")
                raise ValueError(f"{name}: {found} were given for shape {shape} {dtype}")

        if threads == 1:
            for tensor in tensors:
                write(tensor)
            return
        with ThreadPoolExecutor(threads, "tensors") as pool:
            try:
                for _ in pool.map(write, tensors):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _write_at(descriptor: int, data: bytes | memoryview, place: int) -> None:
    """All of it: one call of the system may take less than it is given."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(descriptor, rest, place)
        rest, place = rest[done:], place + done


def _read_header_bytes(file: Path, prefix: bytes, size: int) -> int:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length < 2 or length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(
            f"{file.name} is no whole safetensors file: {format_bytes(size)}, header length "
            f"{length if len(prefix) == 8 else 'missing'}; a header has 2 bytes to "
            f"{format_bytes(MAX_HEADER_BYTES)} and lies inside the file. Fetch the file again (a "
            "git-lfs pointer looks like this, too)."
        )
    return length


def _parse_json(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{file.name} is damaged: its header is no UTF-8 text ({error}). Fetch the file again."
        ) from error
    header = parse_json(text, f"{file.name} is damaged: its header", _unique_pairs)
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name} is damaged: its header is no JSON object.")
    header.pop("__metadata__", None)
    return header


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        raise ValueError(f"key {shorten(twice)} occurs twice")
    return found


def _read_entry(
    name: str, entry: object, file: Path, data_start: int, faults: list[str]
) -> TensorRef | None:
    shown = printable(name)
    if not isinstance(entry, dict):
        faults.append(f"{shown}: entry is no object")
        return None
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        known = " (of quantised weights, which are not read)" if dtype in _PACKED else ""
        faults.append(f"{shown}: unknown dtype {dtype!r:.40}{known}")
        return None
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        faults.append(f"{shown}: shape {shape!r:.80} or data_offsets {offsets!r:.80} malformed")
        return None
    begin, end = offsets
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        faults.append(
            f"{shown}: {dtype} {shape!s:.80} needs {expected} bytes, data_offsets span "
            f"{end - begin}"
        )
        return None
    return TensorRef(name, dtype, tuple(shape), file, data_start + begin, expected)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_RANK
        and all(type(item) is int and 0 <= item <= _MAX_SIDE for item in value)
    )


def _check_coverage(
    refs: Sequence[TensorRef], data_start: int, size: int, faults: list[str]
) -> None:
    position = data_start
    for ref in refs:
        if ref.offset != position:
            kind = "overlaps the tensor before" if ref.offset < position else "leaves a hole before"
            faults.append(f"{printable(ref.name)}: {kind} it")
        position = ref.offset + ref.nbytes
    if position > size:
        faults.append(f"truncated: the header asks for {position} bytes, the file has {size}")
    elif position < size:
        faults.append(f"{size - position} bytes lie behind the last tensor")


def _cut(ref: TensorRef, rows: slice | None) -> tuple[tuple[int, ...], int]:
    """Shape that is read, and how many elements lie before it."""
    if rows is None:
        return ref.shape, 0
    if not ref.shape:
        raise ValueError(f"{ref.name} is a scalar and has no rows")
    start, stop, step = rows.indices(ref.shape[0])
    if step != 1:
        raise ValueError(f"rows are read with step 1, asked was {step}")
    return (max(stop - start, 0), *ref.shape[1:]), start * math.prod(ref.shape[1:])


def _read_bfloat16(ref: TensorRef, descriptor: int, count: int, start: int) -> NDArray[np.float32]:
    """A bfloat16 is the upper half of a float32, so widening is a shift and exact."""
    widened = np.empty(count, dtype=np.float32)
    bits = widened.view(np.uint32)
    for first, block in _halves(ref, descriptor, count, start):
        np.left_shift(block, 16, out=bits[first : first + block.size], dtype=np.uint32)
    return widened


def _halves(
    ref: TensorRef, descriptor: int, count: int, start: int
) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    step = _BLOCK_BYTES // 2
    for first in range(0, count, step):
        block = np.empty(min(step, count - first), dtype="<u2")
        _fill(ref, descriptor, block, start + 2 * first)
        yield first, block


def _fill(ref: TensorRef, descriptor: int, array: Array, start: int) -> None:
    view = array.view(np.uint8).data if array.size else memoryview(b"")
    done = 0
    while done < len(view):
        # One call reads at most 2 GiB on Linux, so large tensors take several.
        got = os.preadv(descriptor, [view[done:]], start + done)
        if got == 0:
            raise CheckpointError(
                f"{ref.file.name} ends inside tensor {ref.name}: it shrank after it was opened. "
                "Fetch the file again."
            )
        done += got
