from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from llava_edge.runtime.util.host_memory import available_host_bytes, peak_host_bytes

GROW = """
import numpy as np
from llava_edge.runtime.util.host_memory import map_large_blocks

assert map_large_blocks()
# Without the setting the first release raises the threshold to 16 MiB, and the small block behind
# the second array keeps its 16 MiB from being given back.
del_me = np.ones(16 << 20, np.uint8); del del_me
big = np.ones(8 << 20, np.uint8); keep = np.ones(64 << 10, np.uint8); del big
rss = int(open("/proc/self/statm").read().split()[1]) * 4096
again = np.ones(8 << 20, np.uint8)
grown = int(open("/proc/self/statm").read().split()[1]) * 4096 - rss
print(grown)
"""


def test_a_released_large_block_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True)

    # Had the block stayed in the heap, taking as much again would cost nothing.
    assert int(done.stdout) >= 7 << 20


def test_the_peak_is_read_from_the_status_file(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("VmPeak:\t  99 kB\nVmHWM:\t   123 kB\n")

    assert peak_host_bytes(tmp_path) == 123 * 1024
    assert peak_host_bytes(tmp_path / "nothing") == 0
    assert peak_host_bytes() > 1 << 20


def test_the_smaller_of_machine_and_cgroup_is_available(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert available_host_bytes(tmp_path, tmp_path / "none") == 4000 * 1024

    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_host_bytes(tmp_path, tmp_path) == 4000 * 1024

    (tmp_path / "memory.max").write_text("101000\n")
    assert available_host_bytes(tmp_path, tmp_path) == 100_000
    (tmp_path / "memory.current").write_text("200000\n")
    assert available_host_bytes(tmp_path, tmp_path) == 1
    assert available_host_bytes(tmp_path / "none", tmp_path / "none") is None
