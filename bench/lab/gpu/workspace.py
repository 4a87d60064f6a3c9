"""GpuPlace: the folder that the check on a GPU works in, and the models it makes there.

Models are made by the project's commands when a step needs them and removed when none does any
more: a rented machine has room for one or two. What a command takes of time and memory is noted.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_edge.bench.common.random_models import random_command
from llava_edge.bench.common.subprocess_runner import Spent, edge_command, run_fresh
from llava_edge.bench.lab.gpu.models import GpuModel
from llava_edge.bench.lab.pages.commands import write_calibration
from llava_edge.bench.lab.pages.training.checkpoint import SHIPPED
from llava_edge.profiles.errors import EngineError, RequestError

_CPU_PATIENCE = 6
"""Bounds are made for visits to a GPU; float16 in transformers on a CPU takes minutes."""
_MANIFEST = "manifest.json"
_CHECKPOINT = "checkpoint"
_BYTES_A_WEIGHT = {_CHECKPOINT: 2.0, "fp16": 2.0, "int8": 1.2, "int4": 0.7}
_WITH_INT8_CACHE = ", int8 cache"


def with_int8_cache(precision: str) -> str:
    """Name of the artifact of that precision which has a decoder graph with an int8 cache too."""
    return precision + _WITH_INT8_CACHE


@dataclass
class GpuPlace:
    """Where models lie and how commands are run.

    Attributes:
        work: the folder.
        device: ``cuda``, or ``cpu`` to prove the way.
        board: profile that artifacts are converted for; one of a GPU.
        deadline: by ``time.monotonic``; nothing runs beyond it.
        made: what making models took, since this object was made.
    """

    work: Path
    device: str
    board: str
    deadline: float
    made: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    def run(self, command: Sequence[str], bound: float) -> Spent:
        """A command, ended at its bound or at the deadline.

        Raises:
            EngineError: it failed; says why.
            subprocess.TimeoutExpired: it was ended.
        """
        if self.device == "cpu":
            bound *= _CPU_PATIENCE
        try:
            return run_fresh(command, timeout_seconds=max(1.0, min(bound, self.seconds_left)))
        except subprocess.CalledProcessError as error:
            raise EngineError(_reason(error)) from error

    def module(self, name: str, *arguments: object, bound: float) -> Any:
        """A module of the bench, by its name; its last line as JSON."""
        command = [sys.executable, "-m", f"llava_edge.bench.lab.gpu.{name}", *map(str, arguments)]
        return self.run([*command, "--device", self.device], bound).result()

    def edge(self, *arguments: object, bound: float) -> Any:
        """A command of the project; its last line as JSON."""
        return self.run(edge_command(*map(str, arguments), "--json"), bound).result()

    def checkpoint(self, model: GpuModel, bound: float) -> Path:
        """The model's checkpoint, written if it is not there."""
        if model.is_trained:
            return SHIPPED
        folder = self.work / model.name / _CHECKPOINT
        if not folder.exists():
            self._check_disk(model, _CHECKPOINT)
            # Written beside its place: what was ended half way is no checkpoint.
            partial = folder.with_name("checkpoint.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
            self._note(
                f"{model.name} checkpoint",
                lambda: self.run(random_command(partial, model.sizes), bound),
            )
            partial.rename(folder)
        return folder

    def artifact(self, model: GpuModel, part: str, bound: float) -> Path:
        """An artifact for the cuda target, converted if it is not there; goes on where it was.

        Random weights are rounded to nearest, and one sample says how wide their int8 cache is; the
        trained model is solved, calibrated and verified.

        Args:
            model: whose.
            part: a precision, or ``with_int8_cache`` of one.
            bound: seconds that it may take.
        """
        folder = self.work / model.name / part
        if (folder / _MANIFEST).exists():
            return folder
        checkpoint = self.checkpoint(model, bound)
        self._check_disk(model, part)
        precision = part.removesuffix(_WITH_INT8_CACHE)
        options: list[object] = ["--profile", self.board, "--precision", precision]
        if part != precision:
            options += ["--cache", "int8"]
        if model.context is not None:
            options += ["--context", model.context]
        if not model.is_trained:
            options += ["--verify", "none"]
            options += ["--quantizer", "rtn"] if precision != "fp16" else []
            options += ["--samples", 1] if part != precision else []
        elif part != "fp16":
            calibration = self.work / model.name / "calibration"
            if not calibration.exists():
                write_calibration(calibration)
            options += ["--calibration", calibration]
        self._note(
            f"{model.name} {part}",
            lambda: self.run(
                edge_command("convert", *map(str, (checkpoint, folder, *options)), "--json"), bound
            ),
        )
        return folder

    def drop(self, model: GpuModel, part: str) -> None:
        """Remove a checkpoint or an artifact."""
        shutil.rmtree(self.work / model.name / part, ignore_errors=True)

    def _note(self, name: str, make: Callable[[], Spent]) -> None:
        print(f"  making {name}", file=sys.stderr, flush=True)
        spent = make()
        self.made[name] = {"seconds": spent.seconds, "peak_host_bytes": spent.peak_bytes}

    def _check_disk(self, model: GpuModel, part: str) -> None:
        kind = part.removesuffix(_WITH_INT8_CACHE)
        needed = int(model.parameters * _BYTES_A_WEIGHT[kind])
        self.work.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.work).free
        if free < needed:
            raise RequestError(
                f"{part} of {model.name} takes about {needed / 2**30:.0f} GiB; {self.work} has "
                f"{free / 2**30:.0f} GiB free. Give --work on another disk or in memory."
            )


def _reason(error: subprocess.CalledProcessError) -> str:
    """What a command said of its failure: the JSON of its last line, or the line itself."""
    lines = (error.output or "").splitlines()
    command = " ".join(str(part) for part in error.cmd[2:5])
    try:
        return f"{command}: {json.loads(lines[-1])['error']['message']}"
    except (IndexError, KeyError, TypeError, ValueError):
        last = lines[-1] if lines else "it printed nothing; see stderr"
        return f"{command} ended with status {error.returncode}: {last:.300}"
