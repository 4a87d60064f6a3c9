"""Whether this processor computes what an artifact asks of it. Asked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from llava_edge.profiles.detect import read_int8_isa
from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.manifest import Precision

_CPUINFO = Path("/proc/cpuinfo")


def check_instructions(precision: Precision, cpuinfo: Path = _CPUINFO) -> None:
    """Refuse int8 weights of the integer route on a processor whose sums saturate.

    Measured on AVX2 without VNNI: outputs off by up to a fifth of the largest, and nothing says so.

    Raises:
        EngineError: the processor has no int8 dot products.
    """
    if precision.int8_route != "integer":
        return
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        text = ""
    if read_int8_isa(text) == "none":
        raise EngineError(
            "this artifact multiplies int8 by int8 (VNNI, AMX or NEON dot products); this "
            "processor has none of them, and its 16-bit sums would saturate and be wrong. Convert "
            "on this machine (llava-edge convert without --profile), or for a profile with "
            'int8_isa = "none".'
        )
