"""Training of the small model.

``python -m llava_edge.bench.lab.pages.training.train --out DIR --minutes N --threads T``

First the tower alone, told what lies under each patch; then the whole, with the questions. The same
command goes on where the last one stopped. ``DIR/state.safetensors`` holds all that this needs,
``DIR/log.jsonl`` a line every few steps. Which pages a step sees follows from its number alone.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer

from llava_edge.bench.lab.pages.drawing.sample import training_sample
from llava_edge.bench.lab.pages.training.batch import Batch, collate, encode_sample
from llava_edge.bench.lab.pages.training.model import Losses, PageModel, mean_losses, to_tensors
from llava_edge.bench.lab.pages.training.spec import Spec
from llava_edge.bench.lab.pages.training.state import load_state, save_state
from llava_edge.bench.lab.pages.training.tokenizer import train_tokenizer
from llava_edge.profiles.boards.cpu_limit import read_cpu_limit

_POOL = 4
"""Batches that are drawn together and sorted by length, so that there is little padding."""
_WARMUP = 60


@dataclass(frozen=True)
class Settings:
    """What decides the weights, beside the number of steps.

    Attributes:
        spec: sizes.
        seed: of the initial weights; the pages are always the same.
        pages: a step.
        micro: pages that are computed at once; what they keep should fit the processor's cache.
        questions: of a page, at most.
        tower_steps: steps that teach the tower alone.
        matrix_rate, rate: highest learning rates, of matrices (Muon) and of the rest (AdamW).
        decay: share of the steps, the last, in which the rates fall to nothing.
    """

    spec: Spec = field(default_factory=Spec)
    seed: int = 0
    pages: int = 32
    micro: int = 8
    questions: int = 8
    tower_steps: int = 300
    matrix_rate: float = 3e-3
    rate: float = 2e-3
    decay: float = 0.35


class Trainer:
    """A model, its optimisers and the number of steps done.

    Raises:
        ValueError: ``state`` exists and belongs to other settings.
    """

    def __init__(
        self,
        settings: Settings,
        state: Path,
        device: torch.device,
        half: bool = True,
        threads: int = 1,
    ) -> None:
        self.settings = settings
        self.step = 0
        self.tokenizer: Tokenizer = train_tokenizer()
        self.model = PageModel(settings.spec, self.tokenizer, settings.seed).to(device)
        self._device = device
        self._half = half
        self._state = state
        # A micro-batch a thread: threads that share each small product mostly wait, the more so on
        # a busy machine.
        self._workers = ThreadPoolExecutor(
            threads, initializer=torch.set_num_threads, initargs=(1,)
        )
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            is_matrix = parameter.ndim == 2 and "head" not in name and "embed" not in name
            (matrices if is_matrix else others).append(parameter)
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(
                matrices, lr=settings.matrix_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
            ),
            "adamw": torch.optim.AdamW(
                others, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01
            ),
        }
        if state.exists():
            self.step = load_state(state, self.model, self._optimizers, self._agreed())

    def train_step(self, batches: list[Batch], total_steps: int) -> Losses:
        """One step over the micro-batches of one batch; their mean losses."""
        settings = self.settings
        tower_only = self.step < settings.tower_steps
        share = self._rate_share(total_steps)
        for optimizer, rate in zip(
            self._optimizers.values(), (settings.matrix_rate, settings.rate), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        parameters = list(self.model.parameters())
        # What a stage does not use keeps no gradient, and the optimisers leave it alone.
        for parameter in parameters:
            parameter.grad = None
        # In order, so that the sum does not depend on who was first.
        found: list[Losses] = []
        for losses, gradients in self._workers.map(
            lambda batch: self._gradients(batch, parameters, tower_only), batches
        ):
            found.append(losses)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    part = gradient / len(batches)
                    parameter.grad = part if parameter.grad is None else parameter.grad + part
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers.values():
            optimizer.step()
        self.step += 1
        return mean_losses(found)

    def _gradients(
        self, batch: Batch, parameters: list[torch.nn.Parameter], tower_only: bool
    ) -> tuple[Losses, Sequence[torch.Tensor | None]]:
        tensors = to_tensors(batch, self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            losses: Losses = self.model(tensors, tower_only)
        gradients = torch.autograd.grad(losses.total, parameters, allow_unused=True)
        return losses, gradients

    def save(self) -> None:
        """Write the state to its file."""
        save_state(self._state, self.model, self._optimizers, self.step, self._agreed())

    def _agreed(self) -> str:
        agreed = asdict(self.settings)
        # Neither changes what was learnt so far.
        for free in ("decay", "micro"):
            del agreed[free]
        return json.dumps(agreed, sort_keys=True)

    def _rate_share(self, total_steps: int) -> float:
        """Warm-up at the start of both parts, then even, then falling to nothing."""
        tower = self.settings.tower_steps
        since = self.step if self.step < tower else self.step - tower
        warm = min(1.0, (since + 1) / _WARMUP)
        left = (total_steps - self.step) / max(1.0, self.settings.decay * (total_steps - tower))
        return min(warm, max(0.0, left), 1.0)


def batches_from(settings: Settings, tokenizer: Tokenizer, step: int) -> Iterator[list[Batch]]:
    """Micro-batches of each step from ``step`` on, drawn one pool ahead in a thread."""
    with ThreadPoolExecutor(1) as executor:
        pool = step // _POOL
        later = executor.submit(_pool, settings, tokenizer, pool)
        while True:
            drawn = later.result()
            pool += 1
            later = executor.submit(_pool, settings, tokenizer, pool)
            yield from drawn[max(0, step - (pool - 1) * _POOL) :]


def _pool(settings: Settings, tokenizer: Tokenizer, number: int) -> list[list[Batch]]:
    count = settings.pages * _POOL
    drawn = [
        encode_sample(training_sample(number * count + place, settings.questions), tokenizer)
        for place in range(count)
    ]
    order = sorted(range(count), key=lambda place: drawn[place].ids.shape[1])
    # Each step gets pages of all lengths, each micro-batch of one.
    micro = [order[first : first + settings.micro] for first in range(0, count, settings.micro)]
    return [
        [collate([drawn[place] for place in places]) for places in micro[turn::_POOL]]
        for turn in range(_POOL)
    ]


def _minutes(since: float) -> float:
    return (time.monotonic() - since) / 60


def main(arguments: list[str] | None = None) -> int:
    """Train until the steps are done, the time is up or the process is asked to end; then save."""
    parser = argparse.ArgumentParser(prog="python -m llava_edge.bench.lab.pages.training.train")
    parser.add_argument("--out", type=Path, required=True, help="folder of state and log")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int, default=read_cpu_limit().threads)
    parser.add_argument("--steps", type=int, default=4400, help="of the whole run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    settings = Settings()
    device = torch.device(given.device)
    threads = given.threads if device.type == "cpu" else 1
    trainer = Trainer(settings, given.out / "state.safetensors", device, threads=threads)
    stop: list[int] = []
    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked, lambda number, _: stop.append(number))
    started = time.monotonic()
    saved = started
    batches = batches_from(settings, trainer.tokenizer, trainer.step)
    with (given.out / "log.jsonl").open("a", encoding="utf-8") as log:
        while trainer.step < given.steps and not stop and _minutes(started) < given.minutes:
            losses = trainer.train_step(next(batches), given.steps)
            now = time.monotonic()
            if trainer.step % 10 == 0 or trainer.step == given.steps:
                line = {"step": trainer.step, "seconds": round(now - started, 1)}
                line |= {
                    name: round(float(value.detach()), 4) for name, value in vars(losses).items()
                }
                print(json.dumps(line), file=log, flush=True)
                print(json.dumps(line), file=sys.stderr, flush=True)
            if now - saved > 120:
                trainer.save()
                saved = now
    trainer.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
