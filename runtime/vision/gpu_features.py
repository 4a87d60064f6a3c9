"""GpuFeatures: features that stay on the device from the tower to the decoder's input."""

from __future__ import annotations

import weakref

import numpy as np

from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.util.arrays import Array


class GpuFeatures:
    """A matrix of float16 rows in device memory, of the driver's own, given back with the object.

    Each request has its own number of tiles. ONNX Runtime's memory for buffers never shrinks, and
    would keep a piece for each that was larger than all before.

    Args:
        shape: (rows, hidden).
        cuda: copies go through its stream.
    """

    def __init__(self, shape: tuple[int, int], cuda: CudaRuntime) -> None:
        self.shape = shape
        self._cuda = cuda
        self._row_bytes = shape[1] * np.dtype(np.float16).itemsize
        self._address = cuda.allocate(shape[0] * self._row_bytes)
        # With the process the driver takes it back itself, and may be gone by then.
        weakref.finalize(self, cuda.free, self._address).atexit = False

    def address(self, row: int) -> int:
        """Device address of a row."""
        return self._address + row * self._row_bytes

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
