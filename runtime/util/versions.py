"""Which version of this tool is running, and of what it stands on."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

_OTHER_BUILDS = {"onnxruntime": ("onnxruntime-gpu",)}
"""An environment holds exactly one of them."""


def own_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("llava-edge")
    except PackageNotFoundError:
        return "(not installed)"


def tool_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of installed distributions by name.

    ONNX Runtime goes by the name of its package, whichever of its distributions is there.

    Raises:
        PackageNotFoundError: one is not installed.
    """
    return {name: _installed(name) for name in names}


def _installed(name: str) -> str:
    others = _OTHER_BUILDS.get(name, ())
    for build in (name, *others):
        try:
            return version(build)
        except PackageNotFoundError:
            continue
    raise PackageNotFoundError(name)
