"""Fuzz the runtime: thousands of inputs in child processes, each within its deadline.

    python -m tests.fuzz.run [--seed N] [--share 0.1] [--only image,graph] [--replay graph:17]

Inputs are numbered and made from the seed, so that a number is enough to have one again. What is
found is printed and kept, with the input, below ``build/fuzz/found``.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import select
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

SEED = 20261126
DEADLINE_SECONDS = 30.0
READY_SECONDS = 180.0
_IDLE_SHARE = 0.02
"""Of the clock's time; who works less than this waits for something that does not come."""


@dataclass
class Found:
    """What came of a run."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    slowest: dict[str, Any] = field(default_factory=dict)
    largest: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Inputs that were given."""
        return sum(counter.total() for counter in self.outcomes.values())


class Child:
    """A fuzzed process, started again where it ends."""

    def __init__(self, artifacts: Path, work: Path, seed: int, deadline: float) -> None:
        self._artifacts, self.work, self._seed = artifacts, work, seed
        self._deadline = deadline
        self._process: subprocess.Popen[str] | None = None

    def ask(self, family: str, number: int) -> dict[str, Any]:
        """The child's report of an input, or of its own end."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{family} {number}\n")
            process.stdin.flush()
            line = self._answer(process)
        except BrokenPipeError:
            line = ""
        if line:
            report: dict[str, Any] = json.loads(line)
            return report
        fault = f"no answer within {self._deadline:.0f} s"
        if line is not None:
            status = process.wait(30)
            fault = f"the process ended with {status}: {self._last_words()}"
        self.stop()
        return {
            "family": family,
            "number": number,
            "outcome": "hang" if line is None else "crash",
            "seconds": self._deadline if line is None else 0.0,
            "bytes": 0,
            "most": 0,
            "faults": [fault],
        }

    def _answer(self, process: subprocess.Popen[str]) -> str | None:
        """A line; None where the process worked for the deadline, or waits for something.

        The deadline is the processor's time: on a busy machine the clock says nothing of a hang.
        """
        assert process.stdout is not None
        began, worked = time.monotonic(), _processor_seconds(process.pid)
        while True:
            line = _line(process.stdout, self._deadline / 8)
            if line is not None:
                return line
            waited = time.monotonic() - began
            took = _processor_seconds(process.pid) - worked
            if took > self._deadline or (waited > self._deadline and took < _IDLE_SHARE * waited):
                return None

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _start(self) -> subprocess.Popen[str]:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        environment = dict(os.environ, XDG_CACHE_HOME=str(self.work / "cache"))
        environment |= {"TMPDIR": str(self.work / "tmp"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.fuzz.child"]
        arguments = [str(self._artifacts), str(self.work), str(self._seed)]
        self._process = process = subprocess.Popen(
            command + arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        if _line(process.stdout, READY_SECONDS) != "ready\n":
            words = self._last_words()
            self.stop()
            raise RuntimeError(f"the fuzzed process did not start: {words}")
        return process

    def _last_words(self) -> str:
        path = self.work / "stderr"
        return path.read_text("utf-8", "replace")[-1500:] if path.exists() else ""


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _line(pipe: TextIO, seconds: float) -> str | None:
    """A line, empty at the end, None where none comes in time."""
    ready, _, _ = select.select([pipe], [], [], seconds)
    return pipe.readline() if ready else None


def fuzz(
    numbers: Sequence[tuple[str, int]],
    artifacts: Path,
    build: Path,
    seed: int = SEED,
    processes: int = 2,
    deadline: float = DEADLINE_SECONDS,
) -> Found:
    """Give inputs to children and gather what they tell.

    Args:
        numbers: family and number of each.
        artifacts: folder of the sound artifacts.
        build: folder to work in and to keep what is found.
        seed: of the inputs.
        processes: children at once.
        deadline: seconds of the processor for one input, and of the clock where it only waits.
    """
    found, lock = Found(), threading.Lock()
    left: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for entry in numbers:
        left.put(entry)

    def work(index: int) -> None:
        child = Child(artifacts, build / f"child-{index}", seed, deadline)
        try:
            while True:
                try:
                    family, number = left.get_nowait()
                except queue.Empty:
                    return
                report = child.ask(family, number)
                with lock:
                    _enter(found, report)
                    if report["faults"]:
                        _keep(report, child.work / "scratch", build / "found", seed)
        finally:
            child.stop()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _enter(found: Found, report: dict[str, Any]) -> None:
    found.outcomes.setdefault(report["family"], Counter())[report["outcome"]] += 1
    if report["faults"]:
        found.faults.append(report)
    if report["seconds"] > found.slowest.get("seconds", -1):
        found.slowest = report
    share = report["bytes"] / max(report["most"], 1)
    if share > found.largest.get("bytes", -1) / max(found.largest.get("most", 1), 1):
        found.largest = report


def _keep(report: dict[str, Any], scratch: Path, folder: Path, seed: int) -> None:
    """Print a fault, and keep its input with its number."""
    name = f"{report['family']}-{report['number']}"
    print(f"FAULT {name} (seed {seed}):", *report["faults"], sep="\n  ", flush=True)
    out = folder / name
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(scratch, out, symlinks=True, ignore=_only_files)
    (out / "report.json").write_text(json.dumps({**report, "seed": seed}, indent=2))


def _only_files(folder: str, names: list[str]) -> list[str]:
    """Pipes and sparse giants are not to be copied."""
    skipped = []
    for name in names:
        path = Path(folder, name)
        if path.is_symlink() or path.is_dir():
            continue
        if not path.is_file() or path.stat().st_size > 256 << 20:
            skipped.append(name)
    return skipped


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 1 where a fault was found."""
    from tests.fuzz.artifacts import SPECS, make_artifact
    from tests.fuzz.families import COUNTS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run")
    parser.add_argument("--seed", type=int, default=SEED, help="of all inputs")
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs of each family")
    parser.add_argument("--only", default="", help="families, by comma")
    parser.add_argument("--replay", default="", help="family:number, one input alone")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    build = Path("build/fuzz")
    build.mkdir(parents=True, exist_ok=True)
    for name in SPECS:
        make_artifact(name, build, lambda _: None)
    families = [name for name in given.only.split(",") if name] or list(COUNTS)
    numbers = [
        (family, number)
        for family in families
        for number in range(round(COUNTS[family] * given.share))
    ]
    if given.replay:
        family, number = given.replay.split(":")
        numbers = [(family, int(number))]
    print(f"seed {given.seed}: {len(numbers)} inputs in {given.processes} processes", flush=True)
    started = time.monotonic()
    found = fuzz(numbers, build, build, given.seed, given.processes)
    for family, counter in found.outcomes.items():
        listed = ", ".join(f"{count} {name}" for name, count in counter.most_common())
        print(f"{family:12} {counter.total():5}: {listed}")
    slow, large = found.slowest, found.largest
    print(f"{found.count} inputs in {time.monotonic() - started:.0f} s")
    print(f"slowest {slow['seconds']:.2f} s ({slow['family']}:{slow['number']})")
    taken = f"{large['bytes'] >> 20} of {large['most'] >> 20} MiB"
    print(f"nearest to the plan's memory {taken} ({large['family']}:{large['number']})")
    print(f"faults: {len(found.faults)}")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
