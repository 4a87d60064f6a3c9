"""QuantizedStore: a working folder with the solved codes of a decoder, one file a layer.

    FOLDER/journal.json               what was asked, the finished layers with size and digest
    FOLDER/layer-00003.safetensors    <canonical prefix>.qweight, <canonical prefix>.scales

``qweight`` is uint8, one byte a code at 8 bits, two codes a byte (low bits first) at 4, which then
is called ``qweight_packed``; ``scales`` are float16 [N, K / group]. The journal is written after a
layer's file, in one step, so what it lists is there whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_edge.convert.checkpoint.formats.packing import pack_codes, unpack_codes
from llava_edge.convert.checkpoint.formats.rounding import QuantizationReport, QuantizedWeight
from llava_edge.convert.checkpoint.quantized.source import QuantizedSource, RtnSource
from llava_edge.convert.util.files import full_disk_reason
from llava_edge.convert.util.safetensors_io import (
    TensorRef,
    read_header,
    read_tensor,
    write_safetensors,
)
from llava_edge.profiles.errors import ArtifactError, CheckpointError, ExportError, RequestError
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.atomic_write import atomic_file, write_atomic
from llava_edge.runtime.util.checksummed_json import parse_strict
from llava_edge.runtime.util.json_codec import from_json, to_json
from llava_edge.runtime.util.safe_open import read_bounded

__all__ = [
    "Journal",
    "LayerRecord",
    "LinearRecord",
    "QuantizedSource",
    "QuantizedStore",
    "RtnSource",
    "read_journal",
    "stored",
    "write_journal",
    "write_layer",
]

JOURNAL = "journal.json"
MEASURED = "measured"
"""Key of a report: what differs from run to run."""

JOURNAL_VERSION = 1
_JOURNAL_LIMIT = 64 << 20
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class LinearRecord:
    """How one linear layer was quantised.

    ``quantizer`` is what really was done, ``note`` says why where that is not what was asked.
    ``error_by_kind`` holds ||X (W - Ŵ)^T||² / ||X W^T||² over rows X of one kind of token.
    """

    quantizer: Literal["gptq", "rtn"]
    report: QuantizationReport
    error_by_kind: dict[str, float] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class LayerRecord:
    """A finished layer: its file, and its linear layers by their name inside the layer."""

    file: str
    bytes: int
    sha256: str
    linears: dict[str, LinearRecord]
    seconds: float
    peak_host_bytes: int


@dataclass(frozen=True)
class Journal:
    """Contents of ``journal.json``.

    Attributes:
        version: of this format.
        key: everything that the codes depend on; only an equal request goes on from here.
        threads: torch threads, on which the last bits of a factorisation depend.
        bits: 4 or 8.
        group_size: columns that share a scale, or -1.
        num_layers: layers of the decoder.
        prepared: whether the samples' embeddings lie in the activations file.
        samples: what is to be said of the calibration set.
        layers: the finished ones, from the first on.
    """

    version: int
    key: dict[str, Any]
    threads: int
    bits: int
    group_size: int
    num_layers: int
    prepared: bool
    samples: dict[str, Any]
    layers: tuple[LayerRecord, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every layer is finished."""
        return len(self.layers) == self.num_layers


class QuantizedStore:
    """Reads a finished folder; a QuantizedSource.

    Args:
        folder: that ``quantize_language_model`` filled.

    Raises:
        RequestError: there is no journal, it is damaged, layers are missing, or a file has another
            size than the journal says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        journal = read_journal(self.folder)
        if journal is None:
            raise RequestError(
                f"{self.folder} holds no {JOURNAL}; it is no folder of quantised layers"
            )
        if not journal.is_complete:
            raise RequestError(
                f"{self.folder} holds {len(journal.layers)} of {journal.num_layers} quantised "
                "layers; the same conversion resumes and completes it"
            )
        for record in journal.layers:
            _check_size(self.folder, record)
        self.journal = journal

    @property
    def bits(self) -> int:
        """4 or 8."""
        return self.journal.bits

    @property
    def group_size(self) -> int:
        """Columns that share a scale; -1 for one scale a row."""
        return self.journal.group_size

    def linear(self, name: str) -> QuantizedWeight:
        """Read one weight by its canonical prefix; nothing else is read.

        Raises:
            CheckpointError: there is no such layer, or its file changed.
        """
        packed = self._tensors.get(f"{name}.qweight_packed")
        plain = self._tensors.get(f"{name}.qweight")
        scales = self._tensors.get(f"{name}.scales")
        codes = plain or packed
        if codes is None or scales is None:
            raise CheckpointError(
                f"{self.folder} holds no quantised layer {name!r}; it holds those of "
                f"language_model.layers.0 to .{self.journal.num_layers - 1}"
            )
        qweight = read_tensor(codes)
        if plain is None:
            qweight = unpack_codes(qweight, self.bits)
        return QuantizedWeight(
            qweight,
            read_tensor(scales).astype(np.float16, copy=False),
            self.bits,
            self.group_size,
            self._reports.get(name, QuantizationReport()),
        )

    @property
    def report(self) -> dict[str, Any]:
        """Settings, samples, and errors by layer, linear layer and kind of token, as plain JSON.

        ``measured`` holds what differs from run to run (seconds, memory); all else is the same for
        the same request.
        """
        journal = self.journal
        layers = [
            {
                "layer": index,
                "relative_error": layer_error(record),
                "rtn_relative_error": layer_error(record, rtn=True),
                "error_by_kind": layer_error_by_kind(record),
                "linears": {name: to_json(linear) for name, linear in record.linears.items()},
            }
            for index, record in enumerate(journal.layers)
        ]
        return {
            "settings": {**journal.key.get("settings", {}), "threads": journal.threads},
            "samples": journal.samples,
            "layers": layers,
            "notes": [
                f"{linear_prefix(index)}.{name}: {linear.note}"
                for index, record in enumerate(journal.layers)
                for name, linear in record.linears.items()
                if linear.note
            ],
            MEASURED: {
                "seconds_by_layer": [record.seconds for record in journal.layers],
                "peak_host_bytes": max(record.peak_host_bytes for record in journal.layers),
            },
        }

    @cached_property
    def _tensors(self) -> dict[str, TensorRef]:
        found: dict[str, TensorRef] = {}
        for record in self.journal.layers:
            found.update(read_header(self.folder / record.file))
        return found

    @cached_property
    def _reports(self) -> dict[str, QuantizationReport]:
        return {
            f"{linear_prefix(index)}.{name}": linear.report
            for index, record in enumerate(self.journal.layers)
            for name, linear in record.linears.items()
        }


@dataclass(frozen=True)
class StoredWeight:
    """A weight as it lies in a file: tensor names behind the prefix, and their arrays."""

    tensors: Mapping[str, Array]


def stored(weight: QuantizedWeight) -> StoredWeight:
    """Pack a weight for its file."""
    packs = weight.bits == 4 and weight.qweight.shape[1] % 2 == 0
    name = "qweight_packed" if packs else "qweight"
    codes = pack_codes(weight.qweight, weight.bits) if packs else weight.qweight
    return StoredWeight({name: codes, "scales": weight.scales})


def write_layer(
    folder: Path, layer: int, weights: Mapping[str, StoredWeight]
) -> tuple[str, int, str]:
    """Write a layer's file, there whole or not at all.

    Args:
        folder: of the store.
        layer: its number.
        weights: by their name inside the layer.

    Returns:
        Name, bytes and SHA-256 of the file.

    Raises:
        ExportError: writing failed.
    """
    arrays = {
        f"{linear_prefix(layer)}.{name}.{part}": array
        for name, weight in weights.items()
        for part, array in weight.tensors.items()
    }
    kinds = {np.dtype(np.uint8): "U8", np.dtype(np.float16): "F16"}
    listed = [(name, kinds[array.dtype], array.shape) for name, array in arrays.items()]

    def blocks(name: str) -> Iterable[Array]:
        yield arrays[name]

    path = folder / f"layer-{layer:05}.safetensors"
    try:
        with atomic_file(path, durable=True) as partial:
            write_safetensors(partial, listed, blocks)
            digest = file_digest(partial)
            size = partial.stat().st_size
    except OSError as error:
        reason = full_disk_reason(error) or error.strerror or error
        raise ExportError(f"{path} cannot be written: {reason}") from error
    return path.name, size, digest


def read_journal(folder: Path) -> Journal | None:
    """The journal of a folder; None where there is none.

    Raises:
        RequestError: it cannot be read or is of another version.
    """
    path = folder / JOURNAL
    if not path.exists():
        return None
    try:
        document = parse_strict(read_bounded(path, _JOURNAL_LIMIT), str(path))
        if isinstance(document, dict) and document.get("version") != JOURNAL_VERSION:
            raise ArtifactError(f"it is of version {document.get('version')!r:.40}")
        return from_json(Journal, document, "journal")
    except ArtifactError as error:
        raise RequestError(
            f"{path} is no journal of this version of the tool ({error}). Remove {folder} to "
            "start again."
        ) from error


def write_journal(folder: Path, journal: Journal) -> None:
    """Replace the journal in one step.

    Raises:
        ExportError: writing failed.
    """
    text = json.dumps(to_json(journal), indent=1, allow_nan=False)
    try:
        write_atomic(folder / JOURNAL, text.encode("utf-8"))
    except OSError as error:
        raise ExportError(
            f"{folder / JOURNAL} cannot be written: "
            f"{full_disk_reason(error) or error.strerror or error}"
        ) from error


def damaged_layers(folder: Path, journal: Journal) -> list[str]:
    """Files that are not what the journal lists, digest included."""
    return [
        record.file
        for record in journal.layers
        if not (folder / record.file).is_file()
        or file_digest(folder / record.file) != record.sha256
    ]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def linear_prefix(layer: int) -> str:
    """Canonical prefix of a layer."""
    return f"language_model.layers.{layer}"


def layer_error(record: LayerRecord, *, rtn: bool = False) -> float | None:
    """Mean of the linear layers' relative output errors; None where there were no samples."""
    reports = [linear.report for linear in record.linears.values()]
    errors = [r.rtn_relative_error if rtn else r.relative_error for r in reports]
    known = [error for error in errors if error is not None]
    return math.fsum(known) / len(known) if known else None


def layer_error_by_kind(record: LayerRecord) -> dict[str, float]:
    """Mean of the linear layers' relative output errors, by kind of token."""
    found: dict[str, list[float]] = {}
    for linear in record.linears.values():
        for kind, error in linear.error_by_kind.items():
            found.setdefault(kind, []).append(error)
    return {kind: math.fsum(errors) / len(errors) for kind, errors in found.items()}


def _check_size(folder: Path, record: LayerRecord) -> None:
    path = folder / record.file
    size = path.stat().st_size if path.is_file() else None
    if size != record.bytes:
        raise RequestError(
            f"{path} has {'no file' if size is None else f'{size} bytes'}; the journal lists "
            f"{record.bytes} bytes. Run the conversion again: a damaged folder starts anew."
        )
