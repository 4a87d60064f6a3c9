"""Machine card: everything about this machine that a figure depends on, rates measured here.

The two rates are what this machine reaches with plain loops, not what its data sheet says: reading
memory with every core, and products of float32 matrices by numpy's own library.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.bench.ledger import machine
from llava_edge.profiles.constants import speed_constants
from llava_edge.profiles.detect import MachineFacts, detect_profile, read_machine
from llava_edge.profiles.errors import ProfileError
from llava_edge.profiles.hardware import HardwareProfile
from llava_edge.runtime.session import ENGINE_VERSION, DeviceKind, available_providers

_READ_BYTES = 128 << 20
"""For each core; together far more than its caches hold."""
_SIDE = 1024
_PASSES = 6
_INT8_OVER_FLOAT = 4
"""int8 dot products over float32 ones, by width of a register; no loop in numpy reaches it."""


@dataclass(frozen=True)
class Rates:
    """Best of some passes on this machine."""

    bandwidth_bytes_per_second: float
    float32_operations_per_second: float

    def best(self, other: Rates) -> Rates:
        """The higher of each: what other work left over at a better moment."""
        return Rates(
            max(self.bandwidth_bytes_per_second, other.bandwidth_bytes_per_second),
            max(self.float32_operations_per_second, other.float32_operations_per_second),
        )


def machine_card(facts: MachineFacts, rates: Rates | None) -> dict[str, Any]:
    """What ``bench --json`` calls ``machine``; without rates where none were measured."""
    measured = {} if rates is None else asdict(rates)
    return {
        **machine(),
        "usable_cores": usable_cores(),
        "int8_isa": facts.int8_isa,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "onnxruntime": ENGINE_VERSION,
        "providers": list(available_providers()),
        "gpus": [
            {"name": gpu.name, "memory_bytes": gpu.total_bytes, "compute": gpu.compute_capability}
            for gpu in facts.gpus.gpus
        ],
        "commit": commit(),
        **measured,
        "load_average": os.getloadavg()[0],
    }


def measure_rates() -> Rates:
    """Read memory with every core, and multiply matrices; about a second."""
    cores = usable_cores()
    words = _READ_BYTES // 8
    blocks = [np.ones(words, np.uint64) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        seconds = _best(lambda: list(pool.map(np.bitwise_or.reduce, blocks)))
    left = np.full((_SIDE, _SIDE), 0.5, np.float32)
    product = np.empty_like(left)
    operations = 2 * _SIDE**3 / _best(lambda: np.matmul(left, left, out=product))
    return Rates(cores * _READ_BYTES / seconds, operations)


def machine_profile(device: DeviceKind, rates: Rates) -> tuple[HardwareProfile | None, str]:
    """This machine as a profile that speed can be predicted for, and where its rates come from.

    On a CPU they follow from the measured ones: numpy's products reach about the share of the peak
    that ONNX Runtime's do, and int8 products count as four times the float32 ones where there are
    instructions for them. A GPU has the stated rates of its shipped profile; None
    where it is none of those.
    """
    try:
        profile = detect_profile(read_machine(), device)
    except ProfileError:
        return None, "unknown"
    if device == "cuda":
        known = profile.bandwidth is not None
        return profile, "stated by the board's profile" if known else "unknown"
    peak = rates.float32_operations_per_second / speed_constants()["cpu"]["matmul_fp16"]
    counted = profile.int8_isa != "none"
    measured = replace(
        profile,
        bandwidth=rates.bandwidth_bytes_per_second,
        peak_fp16=peak,
        peak_int8=_INT8_OVER_FLOAT * peak if counted else None,
    )
    return measured, "measured here"


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the sources, with ``-dirty`` where they differ; None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _best(run: Callable[[], object]) -> float:
    """Seconds of the shortest pass."""
    seconds = []
    for _ in range(_PASSES):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
