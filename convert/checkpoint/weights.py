"""Checkpoint tensors as the graphs store them: fp16, [K, N], checked for range.

A linear layer is [out, in] in a checkpoint and [K, N] = [in, out] in a MatMul.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch

from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.util.arrays import Array

FLOAT16 = np.dtype(np.float16)
_FLOAT16_INFINITY = 0x7C00


@dataclass(frozen=True)
class LazyWeight:
    """A tensor that is loaded when it is written. ``load`` returns ``shape`` in ``dtype``."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Bytes in the external data file."""
        bits = ir.DataType.from_numpy(self.dtype).bitwidth
        return -(-int(np.prod(self.shape, dtype=np.int64)) * bits // 8)


class TensorSource(Protocol):
    """What graphs need of a checkpoint: tensors by canonical name."""

    def read(self, name: str) -> Array:
        """Load one tensor: float16, or float32 where the checkpoint holds more than fp16."""


def as_float16(name: str, array: Array) -> Array:
    """Round to fp16.

    Raises:
        CheckpointError: a value is not finite, or larger than fp16 holds; names tensor and value.
    """
    if array.dtype == FLOAT16:
        # numpy's arithmetic on float16 is slow: an all-ones exponent is found on the bits.
        bits = np.bitwise_and(array.view(np.uint16), 0x7FFF)
        largest = float("inf") if int(bits.max(initial=0)) >= _FLOAT16_INFINITY else 0.0
    else:
        # A nan or inf survives min and max.
        low, high = float(np.min(array, initial=0.0)), float(np.max(array, initial=0.0))
        largest = max(-low, high) if np.isfinite(low + high) else float("inf")
    if not np.isfinite(largest):
        raise CheckpointError(
            f"tensor {name} holds a value that is not a finite number; weights must be finite. "
            "The checkpoint is damaged or its training diverged: fetch or save it again."
        )
    if largest > float(np.finfo(np.float16).max):
        raise CheckpointError(
            f"tensor {name} reaches {largest:.6g}; fp16 holds at most 65504. Storing it would "
            "change the model, so it is refused."
        )
    return array.astype(np.float16, copy=False)


def linear(source: TensorSource, names: Sequence[str], in_size: int, out_size: int) -> LazyWeight:
    """Linear weights side by side along N, fp16 [in_size, out_size]; several names are packed."""

    def load() -> Array:
        parts = [as_float16(name, source.read(name)) for name in names]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)
        # torch copies a transpose in cache-sized blocks on all cores; numpy walks it by columns.
        turned: Array = torch.from_numpy(joined).t().contiguous().numpy()
        return turned

    return LazyWeight((in_size, out_size), FLOAT16, load)


def reshaped(
    source: TensorSource, name: str, shape: tuple[int, ...], change: Callable[[Array], Array]
) -> LazyWeight:
    """One tensor passed through ``change``, fp16 of ``shape``."""
    return LazyWeight(shape, FLOAT16, lambda: change(as_float16(name, source.read(name))))


def vectors(source: TensorSource, names: Sequence[str]) -> Array:
    """Small parameters end to end, fp16-rounded, float32 (sum of lengths,)."""
    parts = [as_float16(name, source.read(name)).astype(np.float32) for name in names]
    return np.concatenate(parts)
