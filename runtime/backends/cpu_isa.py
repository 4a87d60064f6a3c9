"""Whether this processor computes what an artifact asks of it. Asked before anything is loaded."""

from __future__ import annotations

import platform
from pathlib import Path

from llava_edge.profiles.boards.detect import read_int8_isa
from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.artifact.manifest import Precision

_CPUINFO = Path("/proc/cpuinfo")
_X86 = frozenset({"x86_64", "AMD64"})


def needs_wide_sums(
    precision: Precision, cpuinfo: Path = _CPUINFO, machine: str | None = None
) -> bool:
    """Whether int8 products must be summed by another kernel than the processor's fastest.

    On x86 without VNNI or AMX the fast kernel sums u8 x s8 in 16 bits, which saturate: measured on
    AVX2, full-range weights gave outputs off by 5 to 62 % of the largest. ONNX Runtime has a kernel
    of 32-bit sums for such processors, exact and as fast in the same measurement.

    Args:
        precision: of the artifact.
        cpuinfo: the kernel's description of the processor.
        machine: architecture, this machine's when left out.

    Raises:
        EngineError: there is no such kernel for this architecture.
    """
    if precision.int8_route != "integer" and precision.vision_tower != "int8":
        return False
    return sums_saturate(cpuinfo, machine)


def sums_saturate(cpuinfo: Path = _CPUINFO, machine: str | None = None) -> bool:
    """Whether this processor's fastest int8 kernel sums in 16 bits; see ``needs_wide_sums``."""
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        text = ""
    if read_int8_isa(text) != "none":
        return False
    if (machine or platform.machine()) not in _X86:
        raise EngineError(
            "this artifact multiplies int8 by int8; this processor has no instructions for it "
            "(NEON dot products), and what it does instead is not known to be exact. Convert on "
            "this machine (llava-edge convert without --profile), or for a profile with "
            'int8_isa = "none"; where only the tower has 8 bits, with --vision-precision fp16.'
        )
    return True
