"""ActivationFile: rows of activations on disk, read and written some rows at a time.

Never mapped: pages of a mapping count as resident memory, so the peak would be the file. Rows are
float32: the residual stream of a large model holds single values beyond float16's range.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from llava_edge.convert.util.files import full_disk_reason
from llava_edge.profiles.errors import ExportError
from llava_edge.profiles.sizes import format_bytes

ITEM_BYTES = 4


class ActivationFile:
    """A file of float32 rows. Close it, or use it as a context manager.

    Args:
        path: of the file; made anew unless it has exactly the right size.
        num_rows: tokens of all samples.
        width: values a row.

    Raises:
        ExportError: the file cannot be made, for instance because the disk is full.
    """

    def __init__(self, path: Path, num_rows: int, width: int) -> None:
        self.path = path
        self.num_rows = num_rows
        self.width = width
        self.nbytes = num_rows * width * ITEM_BYTES
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if os.fstat(self._descriptor).st_size != self.nbytes:
                os.ftruncate(self._descriptor, 0)
                # Taken now, so that a full disk is met before the work and not in it.
                os.posix_fallocate(self._descriptor, 0, self.nbytes)
        except OSError as error:
            self.close()
            raise self._failed(error) from error

    def of_width(self, width: int) -> ActivationFile:
        """The same file with narrower rows; what it held is not to be read any more."""
        if width > self.width:
            raise ValueError(f"rows of {width} do not fit a file made for {self.width}")
        view = ActivationFile.__new__(ActivationFile)
        view.path, view.num_rows, view.width = self.path, self.num_rows, width
        view.nbytes = self.num_rows * width * ITEM_BYTES
        view._descriptor = self._descriptor
        return view

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop, float32 [stop - start, width], in memory that torch aligned.

        Raises:
            ExportError: the file became shorter or cannot be read.
        """
        # Matrix kernels may round differently for another alignment; torch's own is constant.
        rows = torch.empty(stop - start, self.width, dtype=torch.float32)
        view = _bytes(rows)
        offset = start * self.width * ITEM_BYTES
        try:
            while len(view):
                got = os.preadv(self._descriptor, [view], offset)
                if got == 0:
                    raise ExportError(f"{self.path} became shorter while it was read")
                view, offset = view[got:], offset + got
        except OSError as error:
            raise self._failed(error) from error
        return rows

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Write float32 rows [n, width] from row ``start`` on.

        Raises:
            ExportError: writing failed.
        """
        if rows.dtype != torch.float32 or rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"rows are {rows.dtype} {list(rows.shape)}, width is {self.width}")
        view = _bytes(rows.contiguous())
        offset = start * self.width * ITEM_BYTES
        try:
            while len(view):
                done = os.pwrite(self._descriptor, view, offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """Wait until everything written is on the disk.

        Raises:
            ExportError: it could not be written.
        """
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Give the file back; further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> ActivationFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _failed(self, error: OSError) -> ExportError:
        reason = full_disk_reason(error) or error.strerror or str(error)
        return ExportError(
            f"activations ({format_bytes(self.nbytes)}) could not be kept in {self.path}: "
            f"{reason}. The same command resumes once there is room."
        )


def _bytes(rows: torch.Tensor) -> memoryview:
    """The memory of contiguous rows itself."""
    array: np.ndarray[Any, np.dtype[np.float32]] = rows.numpy()
    return array.reshape(-1).view(np.uint8).data
