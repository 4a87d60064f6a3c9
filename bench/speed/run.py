"""Speed run: artifacts in turns, round by round, each round of each in a fresh process.

A machine's speed drifts; artifacts that take turns, forwards and backwards, meet the same drift. A
fresh process a round gives load time and peak memory the same repeats as everything else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_edge.bench.common.subprocess_runner import Spent, run_fresh
from llava_edge.profiles.boards.nvml import GpuReport, read_gpus
from llava_edge.profiles.errors import EngineError, LlavaEdgeError
from llava_edge.runtime.util.progress import Progress, no_progress

FEWEST_ROUNDS = 2


@dataclass(frozen=True)
class SpeedSettings:
    """How artifacts are measured.

    Attributes:
        rounds: at most so many; ``bench/measuring.py`` has the usual number.
        budget_seconds: no further round is begun that would end behind this; two are made anyway.
            None for no limit.
        thorough: more cases and longer answers.
        cases: names of those that are asked; None for all.
        device, threads, allow_slow, engine, trust_engines, strict_device: as ``LlavaEdge.load``
            takes them.
        cache: as ``--cache`` takes it.
        contexts: lengths of prompts of text that are asked as well, to see how decoding falls.
        prefill_chunk: positions computed at once in prefill; None for the artifact's own.
        cuda: fields of ``CudaOptions`` that differ from their defaults.
        environment: variables of the process that is measured, beside this one's.
        timeout_seconds: of a round; None for no limit.
    """

    rounds: int = 1
    budget_seconds: float | None = 120.0
    thorough: bool = False
    cases: tuple[str, ...] | None = None
    device: str = "auto"
    cache: str = "auto"
    threads: int = 0
    allow_slow: bool = False
    engine: str = "auto"
    trust_engines: bool = False
    strict_device: bool = False
    contexts: tuple[int, ...] = ()
    prefill_chunk: int | None = None
    cuda: Mapping[str, bool | int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float | None = None

    def arguments(self) -> list[str]:
        """As ``speed_probe`` takes them."""
        flags = ("thorough", "allow_slow", "trust_engines", "strict_device")
        set_flags = [f"--{name.replace('_', '-')}" for name in flags if getattr(self, name)]
        values = ["--device", self.device, "--threads", str(self.threads), "--engine", self.engine]
        values += ["--cache", self.cache]
        named = [] if self.cases is None else ["--cases", *self.cases]
        if self.contexts:
            named += ["--contexts", *map(str, self.contexts)]
        if self.prefill_chunk is not None:
            named += ["--prefill-chunk", str(self.prefill_chunk)]
        if self.cuda:
            named += ["--cuda", json.dumps(dict(self.cuda))]
        return [*values, *set_flags, *named]


@dataclass(frozen=True)
class SpeedRound:
    """One round over one artifact.

    Attributes:
        found: last line of ``speed_probe``.
        observed_seconds: from its ``begin`` to its ``end``, by this process's clock.
        peak_host_bytes: of the process, by the kernel.
        device_bytes: what the process held on the device. Where the driver does not know it, by how
            much the memory in use rose, at looks of half a second; other processes count as well.
            None without a GPU.
        load: of the machine, before and after.
    """

    found: dict[str, Any]
    observed_seconds: float
    peak_host_bytes: int
    device_bytes: int | None = None
    load: tuple[float, float] = (0.0, 0.0)


@dataclass
class DeviceWatch:
    """Largest rise of the memory in use on the GPUs since this was made."""

    read: Callable[[], GpuReport] = read_gpus
    highest: int | None = None
    _before: int | None = field(init=False)

    def __post_init__(self) -> None:
        self._before = self._used()

    def look(self, _seconds: float = 0.0) -> None:
        """Look once."""
        used = self._used()
        if used is not None and self._before is not None:
            self.highest = max(self.highest or 0, used - self._before)

    def _used(self) -> int | None:
        sizes = [(gpu.total_bytes, gpu.free_bytes) for gpu in self.read().gpus]
        known = [total - free for total, free in sizes if total is not None and free is not None]
        return sum(known) if known else None


def run_speed(
    artifacts: Sequence[str],
    settings: SpeedSettings,
    progress: Progress = no_progress,
    measure: Callable[[str, int, SpeedSettings], SpeedRound] | None = None,
    *,
    before_round: Callable[[], None] | None = None,
    on_failure: Callable[[str, LlavaEdgeError], None] | None = None,
) -> dict[str, list[SpeedRound]]:
    """Measure artifacts in turns.

    Args:
        artifacts: folders, each once.
        settings: see there.
        progress: told about processes; the total is that of all rounds allowed.
        measure: one round of one artifact; ``measure_round`` unless given.
        before_round: called before each round.
        on_failure: told about an artifact that could not be run; it is left out and the others go
            on. Unless given, it is raised.

    Returns:
        Rounds by artifact, equally many of each.

    Raises:
        EngineError: an artifact could not be run, and there is no ``on_failure``.
    """
    measure = measure or measure_round
    found: dict[str, list[SpeedRound]] = {artifact: [] for artifact in artifacts}
    started, done = time.perf_counter(), 0
    total = settings.rounds * len(artifacts)
    for number in range(settings.rounds):
        round_started = time.perf_counter()
        if before_round is not None:
            before_round()
        order = tuple(found) if number % 2 == 0 else tuple(reversed(found))
        for artifact in order:
            progress("rounds", done, total)
            try:
                found[artifact].append(measure(artifact, number, settings))
            except LlavaEdgeError as error:
                if on_failure is None:
                    raise
                on_failure(artifact, error)
                del found[artifact]
            done += 1
        if not found:
            break
        now = time.perf_counter()
        over = settings.budget_seconds is not None and (
            2 * now - round_started - started > settings.budget_seconds
        )
        if over and number + 1 >= FEWEST_ROUNDS:
            break
    progress("rounds", done, done)
    return found


def measure_round(artifact: str, number: int, settings: SpeedSettings) -> SpeedRound:
    """One round over one artifact in a process of its own.

    Raises:
        EngineError: it failed; says why.
        subprocess.TimeoutExpired: it took longer than it may.
    """
    watch = DeviceWatch() if settings.device != "cpu" and read_gpus().gpus else None
    probe = [sys.executable, "-m", "llava_edge.bench.speed.probe", artifact]
    command = [*probe, "--round", str(number), *settings.arguments()]
    try:
        look = watch.look if watch else None
        bound = settings.timeout_seconds
        spent = run_fresh(command, settings.environment, look=look, timeout_seconds=bound)
    except subprocess.CalledProcessError as error:
        raise EngineError(_reason(artifact, error)) from error
    found = spent.result()
    on_gpu = watch is not None and found["device"] != "cpu"
    return SpeedRound(
        found=found,
        observed_seconds=_observed(spent),
        peak_host_bytes=spent.peak_bytes,
        device_bytes=(found.get("device_bytes") or watch.highest) if watch and on_gpu else None,
        load=spent.load,
    )


def _observed(spent: Spent) -> float:
    events = [json.loads(line).get("event") for line in spent.stdout.splitlines()]
    return spent.arrivals[events.index("end")] - spent.arrivals[events.index("begin")]


def _reason(artifact: str, error: subprocess.CalledProcessError) -> str:
    lines = (error.output or "").splitlines()
    try:
        return str(json.loads(lines[-1])["error"]["message"])
    except (IndexError, KeyError, TypeError, ValueError):
        return (
            f"the process that ran {artifact} ended without a word (status {error.returncode}), as "
            "when memory runs out. Close other programs, or leave the artifact out."
        )
