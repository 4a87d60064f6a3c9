"""Importing large libraries without looking for garbage among what they make.

torch and transformers make a million objects that stay as long as the process does. Looking through
them again and again takes a sixth of the time of importing them, and then time at every later look.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled_imports() -> Iterator[None]:
    """Collect no garbage in this block; what modules were made in it is never looked through again.

    For the beginning of a command, whose process is its own. Where nothing was imported, nothing
    else changes.
    """
    enabled, count = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if len(sys.modules) > count:
            gc.freeze()
