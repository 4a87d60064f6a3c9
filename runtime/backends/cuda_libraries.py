"""Where pip puts CUDA's libraries: below its ``nvidia`` packages, wherever Python finds those."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path


def nvidia_folders(names: Sequence[str]) -> Iterator[Path]:
    """Folders of these names below any ``nvidia`` package, as far as they exist.

    Args:
        names: such as ``cu13/lib``, where CUDA 13 has all of its libraries.
    """
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        for name in names:
            folder = Path(place, name)
            if folder.is_dir():
                yield folder
