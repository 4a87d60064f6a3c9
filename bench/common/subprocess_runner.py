"""run_fresh: a command in a process of its own, with its time and peak memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

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
        arrivals: seconds from the start until each of its lines reached this process.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    load: tuple[float, float]
    stdout: str
    arrivals: tuple[float, ...] = ()

    def result(self) -> Any:
        """The JSON object in the last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])


def run_fresh(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    look: Callable[[float], None] | None = None,
    folder: Path | None = None,
    timeout_seconds: float | None = None,
    log: TextIO | None = None,
) -> Spent:
    """Run a command to its end.

    Args:
        command: program and arguments.
        environment: added to this process's own.
        look: called every half second with the seconds since the start.
        folder: where it runs; this process's own unless given.
        timeout_seconds: the command and what it started are ended when it is over.
        log: file with a descriptor for its stderr; this process's own unless given.

    Raises:
        subprocess.CalledProcessError: the command failed; ``output`` is what it printed.
        subprocess.TimeoutExpired: it did not end in time.
    """
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, _looking(look):
        took = Path(name) / "took.json"
        spawn = [sys.executable, str(Path(__file__).with_name("spawn.py")), str(took), *command]
        surroundings = {**os.environ, **(environment or {})}
        lines, arrivals = _read_lines(spawn, surroundings, folder, timeout_seconds, log)
        found = json.loads(took.read_text("utf-8"))
    text = "".join(lines)
    if found["status"]:
        raise subprocess.CalledProcessError(found["status"], list(command), text)
    load = (load_before, os.getloadavg()[0])
    taken = (found["seconds"], found["cpu_seconds"], found["peak_bytes"])
    return Spent(*taken, load, text, tuple(arrivals))


def _read_lines(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path | None,
    timeout_seconds: float | None,
    log: TextIO | None,
) -> tuple[list[str], list[float]]:
    """Lines of a command's stdout as they come, and when they came."""
    lines, arrivals = [], []
    started = time.perf_counter()
    with (
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            cwd=folder,
            # A group of its own, so that what the command started ends with it.
            start_new_session=timeout_seconds is not None,
        ) as process,
        _ended_in_time(process, timeout_seconds) as is_over,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            arrivals.append(time.perf_counter() - started)
            lines.append(line.decode("utf-8", "replace"))
    if is_over.is_set():
        assert timeout_seconds is not None
        raise subprocess.TimeoutExpired(list(command), timeout_seconds, "".join(lines))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), "".join(lines))
    return lines, arrivals


@contextlib.contextmanager
def _ended_in_time(
    process: subprocess.Popen[bytes], seconds: float | None
) -> Iterator[threading.Event]:
    """End a process and its group when the time is over, or when this one is interrupted."""
    is_over = threading.Event()
    if seconds is None:
        yield is_over
        return

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def time_is_over() -> None:
        is_over.set()
        end()

    timer = threading.Timer(seconds, time_is_over)
    timer.start()
    try:
        yield is_over
        process.wait()
    except BaseException:
        end()
        raise
    finally:
        timer.cancel()


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


def edge_command(*arguments: str) -> list[str]:
    """``llava-edge``, by this interpreter: also where the project is only on the search path."""
    return [sys.executable, "-m", "llava_edge.runtime.cli.main", *arguments]


def program(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).with_name(name))
