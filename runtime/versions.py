"""Which version of this tool is running."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("llava-edge")
    except PackageNotFoundError:
        return "(not installed)"
