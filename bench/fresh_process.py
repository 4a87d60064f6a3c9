"""run_fresh: a command in a process of its own, with its time and peak memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Spent:
    """What a command took.

    Attributes:
        seconds: wall time.
        cpu_seconds: of all its threads together; less moved by what else the machine does.
        peak_bytes: largest resident set of the process or of a child that it waited for, as the
            kernel counted it (what VmHWM of a living process says).
        load: of the machine, mean of one minute, before and after.
        stdout: what it printed.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    load: tuple[float, float]
    stdout: str

    def result(self) -> Any:
        """The JSON object in the last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])


def run_fresh(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    look: Callable[[float], None] | None = None,
    folder: Path | None = None,
) -> Spent:
    """Run a command to its end.

    Args:
        command: program and arguments; it inherits stderr.
        environment: added to this process's own.
        look: called every half second with the seconds since the start.
        folder: where it runs; this process's own unless given.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, _looking(look):
        took, printed = Path(name) / "took.json", Path(name) / "stdout"
        spawn = [sys.executable, str(Path(__file__).with_name("spawn.py")), str(took)]
        with open(printed, "wb") as stdout:
            together = {**os.environ, **(environment or {})}
            subprocess.run([*spawn, *command], check=True, stdout=stdout, env=together, cwd=folder)
        found = json.loads(took.read_text("utf-8"))
        text = printed.read_text("utf-8", "replace")
    if found["status"]:
        raise subprocess.CalledProcessError(found["status"], list(command))
    load = (load_before, os.getloadavg()[0])
    return Spent(found["seconds"], found["cpu_seconds"], found["peak_bytes"], load, text)


@contextlib.contextmanager
def _looking(look: Callable[[float], None] | None) -> Iterator[None]:
    if look is None:
        yield
        return
    started = time.perf_counter()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            look(time.perf_counter() - started)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def program(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).with_name(name))
