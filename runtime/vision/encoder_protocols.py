"""What the prompt needs of whatever runs tower and projector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.gpu_features import GpuFeatures


class TileEncoder(Protocol):
    """Tower and projector."""

    def encode(self, pixel_values: Array, out: Array) -> None:
        """Tiles float32 (n, 3, T, T) to features (n, patches, hidden), written into ``out``."""


@runtime_checkable
class DeviceEncoder(Protocol):
    """Tower and projector whose features stay on the device."""

    def new_rows(self, shape: tuple[int, int]) -> GpuFeatures:
        """A matrix (rows, hidden) for features."""

    def encode_rows(self, pixel_values: Array, rows: GpuFeatures, first_row: int) -> None:
        """Tiles float32 (n, 3, T, T) to features, written from ``first_row`` on."""


@runtime_checkable
class CachingEncoder(Protocol):
    """Tower and projector that may have features already."""

    def encode(
        self, pixel_values: Array, out: Array, digests: Sequence[bytes] | None = None
    ) -> None:
        """As ``TileEncoder``, given the digest of each tile."""

    def num_missing(self, digests: Iterable[bytes], rows: int) -> int:
        """How many of these tiles or frames, of so many rows each, are still to be encoded."""

    def forget(self) -> None:
        """Have no features any more."""
