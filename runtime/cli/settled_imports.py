"""Importing large libraries without looking for garbage among what they make.

torch and transformers make a million objects that stay as long as the process does. Looking through
them again and again takes a sixth of the time of importing them, and then time at every later look.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llava_edge.profiles.errors import DependencyError


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


def import_for(command: str, module: str, extra: str, otherwise: str = "") -> Any:
    """Import what a command needs once its arguments were checked.

    Args:
        command: for the message.
        module: its full name.
        extra: that installs its packages.
        otherwise: another next step, such as ``, or leave --against out``.

    Raises:
        DependencyError: a package is not installed; holds the install command.
    """
    try:
        with settled_imports():
            return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"llava-edge {command} needs the package {error.name or error}, which is not "
            f"installed. Install it with: pip install 'llava-edge[{extra}]'{otherwise}"
        ) from error
