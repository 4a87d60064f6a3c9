"""Run a command and write what it took: ``python spawn.py RESULT COMMAND…``.

A process of its own, as small as Python gets: until it becomes its program, a child counts the
memory of the process that started it, and the kernel keeps that in the child's peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Run the command to its end; exit as it did."""
    started = time.perf_counter()
    process = subprocess.Popen(sys.argv[2:])
    # Not Popen.wait: the resources of this very process are wanted.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    # The kernel counts in KiB.
    took = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "status": process.returncode,
    }
    Path(sys.argv[1]).write_text(json.dumps(took), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
