"""ScratchFolder: a temporary folder that goes with its owner, or when it is closed."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path


class ScratchFolder:
    """Made when it is first used; may be used again after it was closed.

    Args:
        prefix: of its name.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._remove: Callable[[], object] = lambda: None

    @cached_property
    def path(self) -> Path:
        """The folder."""
        folder = tempfile.mkdtemp(prefix=self._prefix)
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def close(self) -> None:
        """Remove the folder and what is in it."""
        self._remove()
        self.__dict__.pop("path", None)
