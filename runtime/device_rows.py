"""DeviceRows: features that stay on the device from the tower to the decoder's input."""

from __future__ import annotations

import numpy as np

from llava_edge.runtime.cuda_runtime import CudaRuntime
from llava_edge.runtime.session import Array, Buffer


class DeviceRows:
    """A matrix of float16 rows in device memory.

    Args:
        shape: (rows, hidden).
        cuda: copies go through its stream.
    """

    def __init__(self, shape: tuple[int, int], cuda: CudaRuntime) -> None:
        self.shape = shape
        self._cuda = cuda
        self._buffer = Buffer.unwritten(shape, np.float16, "cuda")
        self._row_bytes = shape[1] * np.dtype(np.float16).itemsize

    def address(self, row: int) -> int:
        """Device address of a row."""
        return self._buffer.address + row * self._row_bytes

    def write(self, row: int, values: Array) -> None:
        """Set one row from host values (hidden,)."""
        contiguous = np.ascontiguousarray(values, np.float16)
        self._cuda.upload(self.address(row), contiguous)
        self._cuda.synchronize()

    def read(self) -> Array:
        """All rows, copied to the host."""
        found = np.empty(self.shape, np.float16)
        self._cuda.download(found, self.address(0))
        self._cuda.synchronize()
        return found

    def place(self, rows: Array, positions: Array, target: int) -> None:
        """Copy rows to other rows of the same width, on the device.

        Args:
            rows: int64 (n,), which rows.
            positions: int64 (n,), where each goes, counted in rows from ``target``.
            target: device address.
        """
        # Neighbours that stay neighbours move together: a whole line of patches at once.
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(positions) != 1)) + 1
        for start, stop in zip((0, *breaks), (*breaks, len(rows)), strict=True):
            if stop == start:
                continue
            place = target + int(positions[start]) * self._row_bytes
            nbytes = int(stop - start) * self._row_bytes
            self._cuda.move(place, self.address(int(rows[start])), nbytes)
        self._cuda.synchronize()
