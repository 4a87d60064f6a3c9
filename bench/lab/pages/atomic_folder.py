"""whole_folder: a folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_edge.profiles.errors import OutputExistsError
from llava_edge.runtime.util.atomic_write import atomic_folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes ``folder`` where nothing fails.

    Raises:
        OutputExistsError: ``folder`` exists.
    """
    if folder.exists():
        raise OutputExistsError(f"{folder} exists. Choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as partial:
        yield partial
