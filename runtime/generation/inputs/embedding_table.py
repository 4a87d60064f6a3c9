"""EmbeddingTable: rows of ``embed_tokens`` read from the file by position.

The table of a large vocabulary is hundreds of megabytes of which a prompt needs a few rows. Reading
them with ``pread`` keeps it out of the process: mapped pages would count as its memory.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

import numpy as np

from llava_edge.profiles.errors import ArtifactError, PromptError, shorten
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.util.allocation import allocate
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.checksummed_json import parse_strict
from llava_edge.runtime.util.opened_file import OpenedFile
from llava_edge.runtime.util.safe_open import read_at

EMBED_TOKENS = "embed_tokens"
IMAGE_NEWLINE = "image_newline"

_HALF = np.dtype("<f2")
_HEADER_LIMIT = 64 << 10
BLOCK_ROWS = 2048


class EmbeddingTable:
    """The ``embeddings.safetensors`` of an artifact.

    Threads may share one table. Close it, or use it as a context manager.

    Args:
        opened: the file; the table keeps a descriptor of its own.
        dims: the model it must agree with.

    Raises:
        ArtifactError: its header is not what these dimensions call for.

    Attributes:
        image_newline: float16 [hidden_size]; None for models without tiles (``llava``).
    """

    def __init__(self, opened: OpenedFile, dims: ModelDims) -> None:
        self.path = opened.path
        self.vocab_size = dims.text.vocab_size
        self.hidden_size = dims.text.hidden_size
        self._lock = threading.Lock()
        self._descriptor = -1
        starts = _read_header(opened, _expected(dims))
        newline = None
        if IMAGE_NEWLINE in starts:
            data = opened.read_at(starts[IMAGE_NEWLINE], 2 * self.hidden_size)
            if len(data) != 2 * self.hidden_size:
                raise _truncated(opened.path)
            newline = np.frombuffer(data, _HALF).astype(np.float16)
            newline.flags.writeable = False
        self._start = starts[EMBED_TOKENS]
        self._descriptor = os.dup(opened.descriptor)
        self.image_newline: Array | None = newline

    def rows(
        self,
        ids: Array,
        *,
        dtype: type[np.float32] | type[np.float16] = np.float32,
        out: Array | None = None,
    ) -> Array:
        """Embeddings of token ids.

        Args:
            ids: integers [n]; each in ``[0, vocab_size)``.
            dtype: of the result where ``out`` is not given.
            out: float32 or float16 [n, hidden_size] to fill instead of a new array.

        Returns:
            ``[n, hidden_size]``, the stored float16 values in the type asked for.

        Raises:
            PromptError: an id has no row.
            ArtifactError: the file became shorter or unreadable, or the table is closed.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or not (ids.size == 0 or np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"ids must be a list of integers, got {ids.dtype} {ids.shape}")
        if out is None:
            out = allocate((ids.size, self.hidden_size), dtype, "embeddings of text")
        elif out.shape != (ids.size, self.hidden_size) or out.dtype not in (np.float32, np.float16):
            raise ValueError(
                f"out must be float32 or float16 [{ids.size}, {self.hidden_size}], "
                f"got {out.dtype} {list(out.shape)}"
            )
        if ids.size == 0:
            return out
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            outside = np.unique(ids[(ids < 0) | (ids >= self.vocab_size)])
            raise PromptError(
                f"token ids {shorten([str(i) for i in outside])} have no embedding; this model "
                f"has rows 0 to {self.vocab_size - 1}. Encode the prompt with its own tokenizer."
            )
        if ids.size == 1:
            # A decode step: sorting out neighbours would cost more than the read.
            out[0] = self._run(int(ids[0]), 1)[0]
            return out
        for start in range(0, ids.size, BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            distinct, places = np.unique(ids[block], return_inverse=True)
            out[block] = self._distinct_rows(distinct)[places.reshape(-1)]
        return out

    def _distinct_rows(self, ids: Array) -> Array:
        """Rows of ascending distinct ids; neighbours come with one read."""
        table = allocate((ids.size, self.hidden_size), _HALF, "embeddings of text as stored")
        runs = np.split(np.arange(ids.size), np.flatnonzero(np.diff(ids) != 1) + 1)
        for run in runs:
            first, count = int(run[0]), len(run)
            table[first : first + count] = self._run(int(ids[first]), count)
        return table

    def _run(self, first: int, count: int) -> Array:
        """``count`` neighbouring rows from ``first`` on, by one read."""
        stride = 2 * self.hidden_size
        # The lock keeps close() from giving the descriptor away in the middle of a read.
        with self._lock:
            if self._descriptor < 0:
                raise ArtifactError(f"{self.path} is closed; load the artifact again")
            offset = self._start + first * stride
            data = read_at(self._descriptor, offset, count * stride, self.path)
        if len(data) != count * stride:
            raise _truncated(self.path)
        return np.frombuffer(data, _HALF).reshape(count, -1)

    def close(self) -> None:
        """Give the file back; further calls do nothing."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)

    def __enter__(self) -> EmbeddingTable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


def _expected(dims: ModelDims) -> dict[str, list[int]]:
    shapes = {EMBED_TOKENS: [dims.text.vocab_size, dims.text.hidden_size]}
    if dims.takes_tiles:
        shapes[IMAGE_NEWLINE] = [dims.text.hidden_size]
    return shapes


def _truncated(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} ends before its last row. Copy the artifact again.")


def _read_header(opened: OpenedFile, expected: dict[str, list[int]]) -> dict[str, int]:
    """Check a safetensors header; return where each tensor starts in the file."""
    path, size = opened.path, opened.size
    prefix = opened.read_at(0, 8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(_HEADER_LIMIT, size - 8):
        raise ArtifactError(
            f"{path} has no safetensors header of at most {_HEADER_LIMIT} bytes. "
            "Copy or convert the artifact again."
        )
    header = parse_strict(opened.read_at(8, length), f"the header of {path}")
    tensors = dict(header) if isinstance(header, dict) else {}
    tensors.pop("__metadata__", None)
    faults: list[str] = []
    if set(tensors) != set(expected):
        faults.append(f"holds {shorten(sorted(tensors)) or 'nothing'}, not {', '.join(expected)}")
    starts: dict[str, int] = {}
    for name, shape in expected.items():
        entry = tensors.get(name)
        nbytes = 2 * int(np.prod(shape, dtype=object))
        match entry:
            case {"dtype": "F16", "shape": found, "data_offsets": [int(start), int(end)]} if (
                found == shape and start >= 0 and end - start == nbytes
            ):
                starts[name] = 8 + length + start
                if 8 + length + end > size:
                    faults.append(f"{name} ends at byte {8 + length + end} of {size}")
            case None:
                pass
            case _:
                faults.append(f"{name} is {entry!r:.160}, not F16 {shape}")
    if faults:
        raise ArtifactError(
            f"{path} does not fit the model: {'; '.join(faults)}. "
            "Copy or convert the artifact again."
        )
    return starts
