"""``make gpu-check``: is the cuda target right and fast on this GPU? Small models first.

Every measurement is a step of its own, in fresh processes, with a bound on its time. The results
file holds what is done, so the same command goes on where an earlier one stopped, also on another
machine of the same kind: --seconds 540 suits one that is lent for ten minutes at a time. A step
that fails is noted with its reason and the next one runs. --device cpu goes the same way with the
CPU provider and proves it on any machine. Nothing has to be installed but the packages: PYTHONPATH
may point at build/bare (make build/bare).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_edge.bench.common.machine import commit
from llava_edge.bench.common.results_store import RESULTS, Ledger
from llava_edge.bench.lab.gpu.models import GPU_MODELS, PRECISIONS
from llava_edge.bench.lab.gpu.requirements import missing
from llava_edge.bench.lab.gpu.steps import CARD, GpuStep, gpu_steps
from llava_edge.bench.lab.gpu.table import gpu_tables
from llava_edge.bench.lab.gpu.workspace import GpuPlace
from llava_edge.profiles.boards.nvml import read_gpus
from llava_edge.profiles.errors import LlavaEdgeError

_DEFAULT = ("pages", "7b")
_LEAST_SECONDS = 20.0
"""No step is begun with less."""


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, print the tables; 1 if something failed or is still missing."""
    options = _parser().parse_args(argv)
    models = [GPU_MODELS[name] for name in options.models]
    work = options.work / options.device
    ledger = Ledger(options.results or _results(options.device, work))
    steps = [
        step
        for step in gpu_steps(models, options.precisions)
        if step.name == CARD or all(part in step.name for part in options.only)
    ]
    if not options.tables:
        if lacking := missing(options.device):
            said = f"cannot measure here, missing: {', '.join(lacking)}"
            _say(said)
            print(json.dumps({"error": {"type": "DependencyError", "message": said}}))
            return 2
        place = GpuPlace(work, options.device, options.board, time.monotonic() + options.seconds)
        Runner(place, ledger, again=options.again, keep=options.keep).run(steps)
    entries = {step.name: ledger.get(step.name) for step in steps}
    print(gpu_tables(models, options.precisions, ledger.entries), file=sys.stderr)
    failed = [name for name, entry in entries.items() if entry and "error" in entry]
    unmeasured = [name for name, entry in entries.items() if entry is None]
    for name in failed:
        _say(f"failed: {name}: {ledger.entries[name]['error']}")
    if unmeasured:
        _say(f"not measured yet, run again: {', '.join(unmeasured)}")
    print(json.dumps({"failed": failed, "missing": unmeasured, "entries": dict(ledger.entries)}))
    return 1 if failed or unmeasured else 0


class Runner:
    """Runs steps that the ledger does not hold.

    Args:
        place: where models are made.
        ledger: what is done.
        again: measure also what the ledger holds.
        keep: leave models where they are.
    """

    def __init__(self, place: GpuPlace, ledger: Ledger, *, again: bool, keep: bool) -> None:
        self._place = place
        self._ledger = ledger
        self._again = again
        self._keep = keep
        self._gpu = _device_name(place.device)

    def run(self, steps: Sequence[GpuStep]) -> None:
        """Run steps in order until the time is over; those that failed before come last."""
        todo = [step for step in steps if self._again or not self._is_done(step)]
        # The device first, also where it failed: nothing goes without it.
        fresh = [step for step in todo if step.name == CARD or not self._has_failed(step)]
        order = [*fresh, *(step for step in todo if step not in fresh)]
        for index, step in enumerate(order):
            if self._place.seconds_left < _LEAST_SECONDS:
                _say(f"the time is over; {len(order) - index} steps are left")
                return
            self._measure(step)
            if step.name == CARD and self._has_failed(step):
                # Whatever follows would make its models first and then fail by the same.
                _say(f"the device does not work; {len(order) - index - 1} steps are left")
                return
            if not self._keep:
                self._drop(step, order[index + 1 :])

    def _measure(self, step: GpuStep) -> None:
        _say(f"{step.name} ({self._place.seconds_left:.0f} s left)")
        started = time.perf_counter()
        self._place.made.clear()
        result: dict[str, Any]
        try:
            result = step.act(self._place, self._ledger.entries)
        except subprocess.TimeoutExpired:
            if self._place.seconds_left < _LEAST_SECONDS:
                # Not its own fault: it gets the next visit's time.
                return
            result = {"error": f"it took longer than {time.perf_counter() - started:.0f} s"}
        except LlavaEdgeError as error:
            result = {"error": str(error)}
        except KeyError as error:
            result = {"error": f"it needs the step {error}, which was not measured"}
        self._ledger.put(
            step.name,
            {
                "step": step.digest(self._place.device, self._place.board),
                "gpu": self._gpu,
                "commit": commit(),
                "seconds": time.perf_counter() - started,
                "made": dict(self._place.made),
                **result,
            },
        )
        if "error" in result:
            _say(f"  failed: {result['error']}")

    def _is_done(self, step: GpuStep) -> bool:
        """Whether the ledger holds this form of the step, of a device of this name, and it ran."""
        entry = self._ledger.get(step.name)
        if entry is None or "error" in entry:
            return False
        now = (step.digest(self._place.device, self._place.board), self._gpu)
        return now == (entry["step"], entry["gpu"])

    def _has_failed(self, step: GpuStep) -> bool:
        return "error" in (self._ledger.get(step.name) or {})

    def _drop(self, step: GpuStep, rest: Sequence[GpuStep]) -> None:
        if step.model is None:
            return
        for part in step.parts:
            if not any(other.model == step.model and part in other.parts for other in rest):
                self._place.drop(step.model, part)


def _device_name(device: str) -> str:
    """What figures may be compared across: the GPU's name, or the word for the CPU."""
    gpus = read_gpus().gpus
    return gpus[0].name if device == "cuda" and gpus else device


def _results(device: str, work: Path) -> Path:
    # What the CPU provider says of the way goes nowhere near what was measured on a GPU.
    return RESULTS / "gpu.json" if device == "cuda" else work / "gpu.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check and measure the cuda target on this GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=GPU_MODELS, default=list(_DEFAULT))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--only", nargs="*", default=[], help="words that a step's name holds")
    parser.add_argument("--seconds", type=float, default=24 * 3600.0, help="end by then")
    parser.add_argument("--board", default="a100", help="profile that artifacts are made for")
    parser.add_argument("--work", type=Path, default=Path("artifacts/gpu-check"))
    parser.add_argument("--results", type=Path, help="default: bench/results/gpu.json")
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    parser.add_argument("--keep", action="store_true", help="leave models where they were made")
    parser.add_argument("--tables", action="store_true", help="print what is measured; no more")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
