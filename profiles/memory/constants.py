"""Fitted constants: the numbers no shape gives, kept as data with the source of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from llava_edge.profiles.errors import ProfileError


@dataclass(frozen=True)
class Constants:
    """Values of one group (``cpu``, ``cuda`` …) by name; see the data file for their sources."""

    values: Mapping[str, float]
    sources: Mapping[str, str]

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def bytes(self, name: str) -> int:
        """A value that counts bytes."""
        return int(self.values[name])

    def replace(self, **values: float) -> Constants:
        """The same with some values changed; what a fit tries out.

        Raises:
            KeyError: a name is unknown.
        """
        if unknown := set(values) - set(self.values):
            raise KeyError(", ".join(sorted(unknown)))
        return Constants({**self.values, **values}, self.sources)


def memory_constants(path: Path | None = None) -> dict[str, Constants]:
    """Constants of the memory model by group; ``path`` for another file of the same form."""
    return _load("memory_constants.json", path)


def speed_constants(path: Path | None = None) -> dict[str, Constants]:
    """Constants of the speed model by group; ``path`` for another file of the same form."""
    return _load("speed_constants.json", path)


def _load(name: str, path: Path | None) -> dict[str, Constants]:
    file = path or resources.files("llava_edge.profiles").joinpath("data", name)
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        groups = {group: entry for group, entry in data.items() if group != "about"}
        return {
            group: Constants(
                {key: float(item["value"]) for key, item in entry.items()},
                {key: str(item["source"]) for key, item in entry.items()},
            )
            for group, entry in groups.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProfileError(f"The constants in {file} cannot be read: {error!r}.") from error
