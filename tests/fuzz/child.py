"""The process that is fuzzed: takes numbers of inputs from stdin, tells of each what came of it.

What counts as a fault, beside a crash or a hang, which only the parent sees: an error that is no
``LlavaEdgeError``, a warning, a word on stderr, a file or thread left open, a file left behind,
memory beyond the plan, a sound request that is answered otherwise than before.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from llava_edge.profiles.errors import LlavaEdgeError
from tests.fuzz.families import Bench, Case

PROBE_EVERY = 100
ADDRESS_SPACE = 6 << 30
"""Beyond what is mapped at the start; a runaway allocation fails here and does not kill others."""


def main(artifacts: str, work: str, seed: str) -> None:
    """Serve until stdin ends."""
    folder = Path(work)
    temporary = folder / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(temporary)
    logging.getLogger().addHandler(logging.NullHandler())
    said = folder / "stderr"
    answers = os.fdopen(os.dup(1), "w")
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    bench = Bench(Path(artifacts), folder, int(seed))
    expected = bench.probe()
    size = _status("VmSize:") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    answers.write("ready\n")
    answers.flush()
    for count, line in enumerate(sys.stdin, start=1):
        family, number = line.split()
        report = _one(bench, family, int(number), temporary, said)
        if count % PROBE_EVERY == 0 and bench.probe() != expected:
            report["faults"].append("a sound request is answered otherwise than before")
        answers.write(json.dumps(report) + "\n")
        answers.flush()


def _one(bench: Bench, family: str, number: int, temporary: Path, said: Path) -> dict[str, Any]:
    faults: list[str] = []
    heard: list[str] = []
    case = bench.case(family, number)
    if case.evidence is not None:
        (bench.scratch / "evidence").write_bytes(case.evidence)
    (bench.scratch / "label").write_text(case.label[:2000], "utf-8", "replace")
    # Models that a family needs are loaded on first use, which is not its inputs' matter.
    most = bench.most_bytes(case)
    files, threads, before = _open_files(), _threads(), said.stat().st_size
    Path("/proc/self/clear_refs").write_text("5")
    held = _status("VmRSS:")
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, kind, file, *_: heard.append(
            f"{kind.__name__}: {message}"
        )
        outcome, fault = _asked(case)
    seconds = time.perf_counter() - started
    grown = _status("VmHWM:") - held
    faults += [fault] * bool(fault)
    faults += [f"a warning: {text:.300}" for text in heard[:3]]
    if grown > most:
        faults.append(f"took {grown >> 20} MiB; the plan has {most >> 20}")
    del case
    if _open_files() != files or _threads() > threads:
        gc.collect()
        time.sleep(0.05)
    if left := _open_files() - files:
        faults.append(f"left open: {sorted(left)[:5]}")
    if _threads() > threads:
        faults.append(f"{_threads() - threads} threads left")
    if said.stat().st_size != before:
        words = said.read_bytes()[before:]
        faults.append(f"on stderr: {words[:500]!r}")
    if left_files := list(temporary.iterdir()):
        faults.append(f"left behind: {left_files[:3]}")
    return {
        "family": family,
        "number": number,
        "outcome": outcome,
        "seconds": seconds,
        "bytes": grown,
        "most": most,
        "faults": faults,
    }


def _asked(case: Case) -> tuple[str, str]:
    """What came of it, and what is wrong with that."""
    try:
        case.act()
    except LlavaEdgeError as error:
        text = str(error)
        return type(error).__name__, "a message without words" if len(text) < 10 else ""
    except BaseException as error:
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        return type(error).__name__, "".join(lines)[-1800:]
    return "answered", ""


def _open_files() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return {entry for entry in found if not entry.endswith("/fd")}


def _threads() -> int:
    return max(len(os.listdir("/proc/self/task")), threading.active_count())


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
