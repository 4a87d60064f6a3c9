"""Writing ``embeddings.safetensors`` as a stream: the table passes through memory block by block.

The number of rows is known when the last block has come, so room for the header is left at the
start and filled at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.generation.inputs.embedding_table import EMBED_TOKENS, IMAGE_NEWLINE
from llava_edge.runtime.util.arrays import Array

# safetensors allows spaces after the header's JSON; 8 + 504 keeps the data aligned to 512 bytes.
_HEADER_BYTES = 504


def write_embeddings(path: Path, embed_row_blocks: Iterable[Array], newline: Array | None) -> int:
    """Write the embedding table and the image newline as float16.

    Args:
        path: the file to write.
        embed_row_blocks: float blocks ``[rows, hidden_size]`` of ``embed_tokens`` from the first
            row to the last.
        newline: float ``[hidden_size]``; None for models without tiles.

    Returns:
        The number of rows written.

    Raises:
        CheckpointError: a value is not finite or beyond float16, or shapes do not go together;
            names the tensor.
    """
    rows, hidden = 0, 0 if newline is None else int(newline.size)
    with path.open("wb") as file:
        file.write(b" " * (8 + _HEADER_BYTES))
        for block in embed_row_blocks:
            if block.ndim != 2 or (hidden and block.shape[1] != hidden):
                raise CheckpointError(
                    f"{EMBED_TOKENS} has rows of shape {list(block.shape[1:])}; the model's "
                    f"hidden size is {hidden}. The checkpoint's tensors do not go together."
                )
            hidden = block.shape[1]
            file.write(_half(block, EMBED_TOKENS, rows))
            rows += block.shape[0]
        if rows == 0:
            raise CheckpointError(f"{EMBED_TOKENS} has no rows. Use a complete checkpoint.")
        header: dict[str, Any] = {}
        end = _add(header, EMBED_TOKENS, [rows, hidden], 0)
        if newline is not None:
            file.write(_half(newline.reshape(1, -1), IMAGE_NEWLINE, 0))
            _add(header, IMAGE_NEWLINE, [hidden], end)
        text = json.dumps(header, separators=(",", ":")).encode("ascii")
        file.seek(0)
        file.write(_HEADER_BYTES.to_bytes(8, "little") + text.ljust(_HEADER_BYTES))
    return rows


def _add(header: dict[str, Any], name: str, shape: list[int], start: int) -> int:
    end = start + 2 * int(np.prod(shape, dtype=np.int64))
    header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    return end


def _half(block: Array, name: str, first_row: int) -> bytes:
    with np.errstate(over="ignore"):
        half = block.astype("<f2")
    bad = np.argwhere(~np.isfinite(half))
    if bad.size:
        row, column = (int(k) for k in bad[0])
        raise CheckpointError(
            f"{name} holds {block[row, column]} at row {first_row + row}, column {column} "
            f"({len(bad)} such values in this block); float16 holds finite values up to 65504. "
            "Such a checkpoint cannot be converted faithfully."
        )
    return half.tobytes()
