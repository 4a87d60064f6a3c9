"""What the check on a GPU needs of a machine, asked before a minute of it is spent.

Nothing can be installed on some machines, so what is missing is said at once and together.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires, version
from importlib.util import find_spec

from llava_edge.profiles.boards.nvml import read_gpus
from llava_edge.runtime.backends.onnxruntime import ENGINE_VERSION, available_devices
from llava_edge.runtime.util.arrays import DeviceKind

PACKAGES = (
    *("numpy", "PIL", "tokenizers"),
    *("huggingface_hub", "jinja2", "ml_dtypes", "onnx", "onnx_ir", "safetensors", "sentencepiece"),
    *("torch", "tqdm", "transformers"),
)
"""Imported by the light half, by conversion and verification, and by the reference."""

_OLDEST_PYTHON = (3, 11)
_AT_LEAST = re.compile(r"([\w.-]+)>=([\d.]+)(?: *; *extra == ['\"]convert['\"])?")
"""A requirement of the light half or of conversion, as the installed metadata write it."""


def missing(device: DeviceKind) -> list[str]:
    """What is not there, in words; empty where the check can begin.

    Args:
        device: that is to be measured.
    """
    found = [f"the package {name}" for name in PACKAGES if find_spec(name) is None]
    if not found:
        found = _too_old()
    if sys.version_info < _OLDEST_PYTHON:
        found.append("Python 3.11")
    if device == "cuda":
        if "cuda" not in available_devices():
            found.append(f"a CUDA provider in ONNX Runtime {ENGINE_VERSION} (onnxruntime-gpu)")
        if not (report := read_gpus()).gpus:
            found.append(f"an NVIDIA GPU that its driver shows ({report.problem or 'no driver'})")
    return found


def _too_old() -> list[str]:
    """Packages below what the project's own metadata ask for."""
    found = []
    for line in requires("llava-edge") or ():
        asked = _AT_LEAST.fullmatch(line.strip())
        if asked and _numbers(present := version(asked[1])) < _numbers(asked[2]):
            found.append(f"{asked[1]} {asked[2]} or newer ({present} is there)")
    return found


def _numbers(text: str) -> tuple[int, ...]:
    """``2.11.0+cu130`` as numbers that compare: (2, 11), without zeros behind."""
    numbers = [int(part) for part in re.findall(r"\d+", text.partition("+")[0])]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
