"""Names that callers and commands choose from; importing them costs nothing."""

from __future__ import annotations

from typing import Literal

AskedEngine = Literal["auto", "tensorrt", "tensorrt-rtx", "ort"]
"""What runs the vision tower."""
AskedCache = Literal["auto", "float32", "float16", "int8"]
"""Type of the KV cache."""
FrameChoice = Literal["reference", "original"]
"""Rule by which frames of a video are sampled."""
