"""Ledger: measured results, one small JSON file, kept with the sources.

One entry a step, replaced as a whole when the step is measured again; with it the machine, so that
nobody compares figures of two machines unawares.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llava_edge.bench.common.atomic_write import atomic_write

RESULTS = Path(__file__).parents[1] / "results"


class Ledger:
    """Entries by name, read from a file and written to it after every change.

    Args:
        path: the file; made on the first change.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    @property
    def entries(self) -> Mapping[str, Any]:
        """All entries."""
        return self._entries

    def get(self, name: str) -> dict[str, Any] | None:
        """An entry, or None."""
        return self._entries.get(name)

    def put(self, name: str, result: Mapping[str, Any]) -> None:
        """Write an entry, with the machine and the day."""
        day = datetime.now(UTC).date().isoformat()
        # Read again: another step may have ended meanwhile.
        self._entries = self._read()
        self._entries[name] = {"measured": day, "machine": machine(), **result}
        atomic_write(self._path, json.dumps(self._entries, indent=1, sort_keys=True) + "\n")

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        found: dict[str, Any] = json.loads(self._path.read_text("utf-8"))
        return found


def machine() -> dict[str, Any]:
    """What timings depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "llava-edge": version("llava-edge"),
    }


def _processor() -> str:
    """The processor's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
