"""Machine card: everything about this machine that a figure depends on, rates measured here.

The two rates are what this machine reaches with plain loops, not what its data sheet says: reading
memory with every core, and products of float32 matrices by numpy's own library.
"""

from __future__ import annotations

import hashlib
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

from llava_edge.bench.common.results_store import machine
from llava_edge.profiles.boards.cpu_limit import read_cpu_limit
from llava_edge.profiles.boards.detect import MachineFacts, detect_profile, read_machine
from llava_edge.profiles.boards.hardware import HardwareProfile
from llava_edge.profiles.errors import ProfileError
from llava_edge.profiles.memory.constants import speed_constants
from llava_edge.runtime.backends.onnxruntime import ENGINE_VERSION, available_providers

_READ_BYTES = 128 << 20
"""For each core; together far more than its caches hold."""
_SIDE = 1024
_PASSES = 6
INT8_OVER_FLOAT = 4
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
        "threads": facts.cpu_cores,
        "cpu_quota": None if facts.cpus is None else facts.cpus.quota,
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


def measure_rates(available_bytes: int | None = None) -> Rates:
    """Read memory with every core, and multiply matrices; about a second.

    Args:
        available_bytes: what can be taken now, by the system unless given; a quarter at most is, as
            a machine of many cores may lend little memory to a container.
    """
    if available_bytes is None:
        available_bytes = read_machine().available_bytes
    cores = usable_cores()
    words = max(1, min(_READ_BYTES, available_bytes // (4 * cores)) // 8)
    blocks = [np.ones(words, np.uint64) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        seconds = _best(lambda: list(pool.map(np.bitwise_or.reduce, blocks)))
    left = np.full((_SIDE, _SIDE), 0.5, np.float32)
    product = np.empty_like(left)
    operations = 2 * _SIDE**3 / _best(lambda: np.matmul(left, left, out=product))
    return Rates(cores * words * 8 / seconds, operations)


def machine_profile(device: str, rates: Rates) -> tuple[HardwareProfile | None, str]:
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
    if profile.kind != "cpu":
        known = profile.bandwidth is not None
        return profile, "stated by the board's profile" if known else "unknown"
    peak = rates.float32_operations_per_second / speed_constants()["cpu"]["matmul_fp16"]
    counted = profile.int8_isa != "none"
    measured = replace(
        profile,
        bandwidth=rates.bandwidth_bytes_per_second,
        peak_fp16=peak,
        peak_int8=INT8_OVER_FLOAT * peak if counted else None,
    )
    return measured, "measured here"


def usable_cores() -> int:
    """Processors that this process may keep busy, by affinity, cpusets and quotas."""
    return read_cpu_limit().usable


def commit(folder: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the sources, with ``-dirty-`` and a digest of how they differ.

    What the bench itself writes into ``results`` is no difference: a run that was interrupted must
    find what it measured before. None outside a checkout, and for sources that lie in one of
    something else, as an installed package in a virtual environment does.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", "common/machine.py")
        head = _git(folder, "rev-parse", "--short=12", "HEAD").decode().strip()
        changes = _git(folder, "diff", "--no-ext-diff", "HEAD", "--", ":(top)", ":(exclude)results")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}-dirty-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else head


def _git(folder: Path, *arguments: str) -> bytes:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=20, check=True).stdout


def _best(run: Callable[[], object]) -> float:
    """Seconds of the shortest pass."""
    seconds = []
    for _ in range(_PASSES):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
