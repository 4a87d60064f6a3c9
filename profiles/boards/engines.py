"""What can run the vision tower, best first, and what that takes.

The decoder always runs in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

LibraryName = Literal["tensorrt", "tensorrt-rtx"]
EngineName = Literal["tensorrt", "tensorrt-rtx", "ort"]

LIBRARIES: tuple[LibraryName, ...] = ("tensorrt", "tensorrt-rtx")
"""In the order in which they are tried; ONNX Runtime comes behind them."""

ENGINE_PACKAGES: Mapping[LibraryName, str] = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}
"""Import package of each."""

INSTALL: Mapping[LibraryName, str] = {
    "tensorrt": "Install TensorRT 11 from NVIDIA (JetPack has it; else pip install tensorrt with "
    "access to pypi.nvidia.com).",
    "tensorrt-rtx": "Install it with: pip install 'llava-edge[tensorrt]'",
}
"""What to do where a library is missing."""

RTX_CAPABILITIES = ("7.5", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities in NVIDIA's support matrix of TensorRT for RTX (read up to 1.5)."""

RTX_UNPROVEN = ("8.0",)
"""It compiles for these as well, but they stand outside the matrix and nobody ran one here."""


def rtx_target(compute_capability: str | None, *, unproven: bool = False) -> str | None:
    """Name of the target that TensorRT-RTX compiles for, such as ``SM89``; None where none.

    Args:
        compute_capability: such as ``8.9``.
        unproven: also those outside NVIDIA's support matrix.
    """
    known = RTX_CAPABILITIES + (RTX_UNPROVEN if unproven else ())
    if compute_capability not in known:
        return None
    return "SM" + str(compute_capability).replace(".", "")
