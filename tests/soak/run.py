"""Soak the runtime: thousands of requests by several threads, and what the process holds meanwhile.

python -m tests.soak.run [--requests 10000] [--threads 3] [--seed N]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from llava_edge.runtime import LlavaEdge
from tests.soak.requests import Questions, ask, probes

SEED = 20261126
WARM_UP = 0.2
"""Share of the samples at the beginning in which caches and arenas still fill."""
MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """What the process holds behind so many requests; memory in bytes.

    ``in_use`` is what the C library's allocator has given out, without what its arenas keep.
    """

    requests: int
    resident: int
    in_use: int
    files: int
    threads: int


@dataclass
class Soaked:
    """What came of it."""

    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    other_answers: int = 0
    num_probes: int = 0
    seconds: float = 0.0

    def growth(self, name: str) -> float:
        """Bytes gained behind the warm-up: slope of the regression times the requests."""
        settled = self.samples[int(len(self.samples) * WARM_UP) :]
        requests = np.array([sample.requests for sample in settled], float)
        values = np.array([getattr(sample, name) for sample in settled], float)
        slope = float(np.polyfit(requests, values, 1)[0])
        return slope * float(requests[-1] - requests[0])


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def sample(requests: int) -> Sample:
    """Look at this process; what only waits for the garbage collector is not counted."""
    gc.collect()
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Mallinfo
    told = library.mallinfo2()
    with open("/proc/self/status") as file:
        resident = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS:"))
    return Sample(
        requests,
        resident,
        told.uordblks + told.hblkhd,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


def soak(
    model: LlavaEdge,
    given: Questions,
    requests: int,
    *,
    threads: int = 3,
    seed: int = SEED,
    every: int = 100,
) -> Soaked:
    """Ask, in rounds of ``every`` requests with probes and a sample behind each.

    Args:
        model: loaded.
        given: what to ask.
        requests: how many in all.
        threads: that ask at once, the same ones all along.
        seed: of the requests.
        every: requests of a round.
    """
    found, started = Soaked(), time.monotonic()
    expected = probes(model, given)
    work: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[str] = queue.SimpleQueue()

    def serve() -> None:
        while (number := work.get()) is not None:
            fault = ""
            try:
                ask(model, given, seed, number)
            except BaseException as error:
                fault = f"request {number}: {type(error).__name__}: {error}"
            done.put(fault)

    crew = [threading.Thread(target=serve) for _ in range(threads)]
    for thread in crew:
        thread.start()
    try:
        for start in range(0, requests, every):
            numbers = range(start, min(start + every, requests))
            for number in numbers:
                work.put(number)
            found.failures += [fault for _ in numbers if (fault := done.get(timeout=300))]
            found.num_probes += 1
            found.other_answers += probes(model, given) != expected
            found.samples.append(sample(numbers.stop))
    finally:
        for _ in crew:
            work.put(None)
        for thread in crew:
            thread.join()
    found.seconds = time.monotonic() - started
    return found


def pages_questions(count: int = 24) -> Questions:
    """Pages that the small trained model was made for, and questions about them."""
    from llava_edge.bench.lab.pages.drawing.sample import held_out_sample

    samples = [held_out_sample(77, index) for index in range(count)]
    texts = [question.text for drawn in samples for question in drawn.questions]
    return Questions([drawn.image for drawn in samples], texts, 24)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run on the small trained model; 1 where something grew, failed or changed."""
    # What draws and asks does without torch, whose memory would stand beside the runtime's.
    from llava_edge.bench.lab.pages.commands import convert
    from llava_edge.bench.lab.pages.drawing import sample as pages

    parser = argparse.ArgumentParser(prog="python -m tests.soak.run")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args(arguments)
    build = Path("build/soak")
    artifact = build / "pages"
    if not artifact.exists():
        build.mkdir(parents=True, exist_ok=True)
        convert(Path(pages.__file__).parents[1] / "llava-next-pages", artifact, "fp16")
    print(f"seed {given.seed}: {given.requests} requests by {given.threads} threads", flush=True)
    with LlavaEdge.load(artifact, threads=1, vision_cache_bytes=4 * MIB) as model:
        first = sample(0)
        found = soak(
            model, pages_questions(), given.requests, threads=given.threads, seed=given.seed
        )
    last = sample(given.requests)
    settled = found.samples[int(len(found.samples) * WARM_UP)]
    end = found.samples[-1]
    report = {
        "seconds": round(found.seconds, 1),
        "failures": found.failures[:20],
        "probes": found.num_probes,
        "other_answers": found.other_answers,
        "resident_mib": {
            "start": first.resident / MIB,
            "warm": settled.resident / MIB,
            "end": end.resident / MIB,
        },
        "in_use_mib": {
            "start": first.in_use / MIB,
            "warm": settled.in_use / MIB,
            "end": end.in_use / MIB,
        },
        "growth_mib": {name: found.growth(name) / MIB for name in ("resident", "in_use")},
        "files": {"start": first.files, "end": end.files, "closed": last.files},
        "threads": {"start": first.threads, "end": end.threads, "closed": last.threads},
    }
    (build / "samples.json").write_text(json.dumps([asdict(entry) for entry in found.samples]))
    print(json.dumps(report, indent=1))
    grew = found.growth("resident") > 8 * MIB or found.growth("in_use") > 2 * MIB
    left = end.files != found.samples[0].files or end.threads != found.samples[0].threads
    return int(grew or left or bool(found.failures) or bool(found.other_answers))


if __name__ == "__main__":
    sys.exit(main())
