"""GpuStep: one measurement of the check on a GPU, small enough to be one of a short visit.

In order: the device, then every model from small to large; of each the answers beside those of
transformers, verification on the device, time and memory in turns with transformers, the provider's
memory limit, and last the choices that only a measurement decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_edge.bench.lab.gpu.kernels import kernel_sizes
from llava_edge.bench.lab.gpu.models import GpuModel
from llava_edge.bench.lab.gpu.round import ROUND_SECONDS, largest_session, measured_round
from llava_edge.bench.lab.gpu.workspace import GpuPlace, with_int8_cache
from llava_edge.bench.speed.cases import FULL, TEXT
from llava_edge.profiles.errors import EngineError

CARD = "device"
CONTEXTS = (1024, 4096)
REFERENCE = "transformers"
LIMITS = {"limit = plan": 1.0, "limit = 0.9 plan": 0.9}
_THREE = ("3 images", "3 images, 1x2", "3 images, base")
_MAKING, _ASKING = 590.0, 400.0

CHOICES: Mapping[str, Mapping[str, Any]] = {
    "graph": {"cuda": {"graph": True}},
    "graph, all logits": {"cuda": {"graph": True, "best_on_device": False}},
    "all logits": {"cuda": {"best_on_device": False}},
    "features on the device": {"cuda": {"features_on_device": True}},
    "doubling arena": {"cuda": {"exact_arena": False}},
    # XQA takes three launches a layer and a fill, flash attention one; a switch of ONNX Runtime's.
    "flash steps": {"environment": {"ORT_ENABLE_XQA": "0"}},
    "graph, flash steps": {"cuda": {"graph": True}, "environment": {"ORT_ENABLE_XQA": "0"}},
    **{f"chunk {tokens}": {"prefill_chunk": tokens} for tokens in (256, 512, 1024, 2048, 4096)},
}
"""Settings of a round beside those of the artifact as it is."""

INT8_CACHE = "cache = int8"
"""A choice at every precision, of an artifact of its own: its scales take a calibration."""

_OF_QUANTISED = ("graph", "flash steps", "graph, flash steps", "chunk 512", "chunk 2048")

Entries = Mapping[str, Any]
Act = Callable[[GpuPlace, Entries], dict[str, Any]]


@dataclass(frozen=True)
class GpuStep:
    """One entry of the ledger.

    Attributes:
        name: of the entry.
        act: measures; gets the place and the entries so far.
        model: whose; None for the device's own.
        parts: ``checkpoint`` and precisions that it needs.
        settings: what its result depends on beside the model.
    """

    name: str
    act: Act
    model: GpuModel | None = None
    parts: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def digest(self, device: str, board: str) -> str:
        """Of everything that the result depends on but sources and machine."""
        sizes = None if self.model is None else [dict(self.model.sizes), self.model.context]
        made = [self.name, sizes, dict(self.settings), device, board]
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]


def gpu_steps(models: Sequence[GpuModel], precisions: Sequence[str]) -> tuple[GpuStep, ...]:
    """All steps in order."""
    steps = [GpuStep(CARD, lambda place, _: place.module("card", bound=120.0))]
    for model in models:
        steps += _steps_of(model, precisions)
    return tuple(steps)


def _steps_of(model: GpuModel, precisions: Sequence[str]) -> Iterator[GpuStep]:
    first = precisions[0]
    for precision in precisions:
        parts = ("checkpoint", precision)
        yield GpuStep(f"{model.name} {precision} parity", _parity(model, precision), model, parts)
        if model.is_trained:
            act = _verified(model, precision)
            yield GpuStep(f"{model.name} {precision} verified", act, model, parts)
        if precision == first:
            # In turns, forwards and backwards, so that both meet the same drift.
            yield _round(model, precision, 0)
            for number in (0, 1):
                name = f"{model.name} {REFERENCE} round {number}"
                act = _reference_round(model, precision, number)
                yield GpuStep(name, act, model, ("checkpoint",))
            yield _round(model, precision, 1)
        else:
            yield from (_round(model, precision, number) for number in (0, 1))
        if not model.has_choices:
            yield from _limits(model, precision)
    if model.has_choices:
        yield from _deciding(model, precisions)
    if model.has_choices or model.is_trained:
        # Last: conversions of their own, which nothing else waits for.
        for precision in precisions:
            yield from _with_int8_cache(model, precision)


def _deciding(model: GpuModel, precisions: Sequence[str]) -> Iterator[GpuStep]:
    """Behind the figures that everybody asks for: limits, and what measurements decide."""
    last = precisions[-1]
    act = _vision(model, last)
    yield GpuStep(f"{model.name} vision batches", act, model, (last,))
    sizes = json.dumps(kernel_sizes(model.sizes))
    yield GpuStep(
        f"{model.name} kernels",
        lambda place, _: place.module("kernels", sizes, bound=ROUND_SECONDS),
        model,
    )
    for precision in reversed(precisions):
        for name, settings in CHOICES.items():
            if precision == "fp16" or name in _OF_QUANTISED:
                yield _round(model, precision, 0, name, settings)
        yield from _limits(model, precision)


def _with_int8_cache(model: GpuModel, precision: str) -> Iterator[GpuStep]:
    """Answers, then time and memory, beside those of the float16 cache."""
    part, asked = with_int8_cache(precision), {"cache": "int8"}
    act, name = _parity(model, part, "int8"), f"{model.name} {precision} {INT8_CACHE}"
    yield GpuStep(f"{name}, parity", act, model, ("checkpoint", part), asked)
    yield _round(model, precision, 0, INT8_CACHE, asked, part)


def _limits(model: GpuModel, precision: str) -> Iterator[GpuStep]:
    for name, share in LIMITS.items():
        act = _limited(model, precision, share)
        yield GpuStep(f"{model.name} {precision} {name}", act, model, (precision,))


def _parity(model: GpuModel, part: str, cache: str = "auto") -> Act:
    def act(place: GpuPlace, _: Entries) -> dict[str, Any]:
        artifact = place.artifact(model, part, _MAKING)
        kept = place.work / model.name / "answers.npz"
        if not kept.exists():
            checkpoint = place.checkpoint(model, _MAKING)
            asked = ("answers", model.name, checkpoint, kept)
            place.module("reference", *asked, bound=_ASKING)
        found: dict[str, Any] = place.module(
            "parity", model.name, artifact, kept, "--cache", cache, bound=_ASKING
        )
        return found

    return act


def _verified(model: GpuModel, precision: str) -> Act:
    def act(place: GpuPlace, _: Entries) -> dict[str, Any]:
        artifact = place.artifact(model, precision, _MAKING)
        slow = ["--allow-slow"] if place.device == "cpu" else []
        where = ["--device", place.device, *slow]
        checkpoint = place.checkpoint(model, _MAKING)
        against = place.edge("verify", artifact, "--against", checkpoint, *where, bound=_ASKING)
        here = place.edge("verify", artifact, "--on-device", *where, bound=_ASKING)
        return {
            name: {"verdict": found["verdict"], "stages": found["stages"]}
            for name, found in (("against_checkpoint", against), ("golden_prompts", here))
        }

    return act


def _round(
    model: GpuModel,
    precision: str,
    number: int,
    choice: str | None = None,
    settings: Mapping[str, Any] | None = None,
    part: str | None = None,
) -> GpuStep:
    part = part or precision

    def act(place: GpuPlace, entries: Entries) -> dict[str, Any]:
        folder = place.artifact(model, part, _MAKING)
        return measured_round(place, _bandwidth(entries), folder, number, asked)

    asked = {**(settings or {})}
    asked |= {"cases": (TEXT, FULL) if choice else (TEXT, FULL, *_THREE), "contexts": CONTEXTS}
    name = f"{model.name} {precision} " + (choice or f"round {number}")
    return GpuStep(name, act, model, (part,), asked)


def _bandwidth(entries: Entries) -> float:
    return float(entries[CARD]["bandwidth_bytes_per_second"])


def _limited(model: GpuModel, precision: str, share: float) -> Act:
    """With the provider's memory limit; whether it runs is the result, either way."""

    def act(place: GpuPlace, entries: Entries) -> dict[str, Any]:
        folder = place.artifact(model, precision, _MAKING)
        planned = entries[f"{model.name} {precision} round 0"]["predicted_memory"]
        limit = int(largest_session(planned) * share)
        asked = {"cuda": {"memory_limit_bytes": limit}, "cases": (TEXT, FULL), "contexts": ()}
        try:
            found = measured_round(place, _bandwidth(entries), folder, 0, asked)
        except EngineError as error:
            return {"limit_bytes": limit, "answered": False, "said": str(error)}
        return {"limit_bytes": limit, "answered": True, **found}

    return act


def _reference_round(model: GpuModel, precision: str, number: int) -> Act:
    def act(place: GpuPlace, entries: Entries) -> dict[str, Any]:
        asked = place.work / model.name / "cases.json"
        asked.parent.mkdir(parents=True, exist_ok=True)
        asked.write_text(json.dumps(entries[f"{model.name} {precision} round 0"]["cases"]))
        checkpoint = place.checkpoint(model, _MAKING)
        found: dict[str, Any] = place.module(
            "reference", "time", checkpoint, asked, "--round", number, bound=ROUND_SECONDS
        )
        return found

    return act


def _vision(model: GpuModel, precision: str) -> Act:
    def act(place: GpuPlace, _: Entries) -> dict[str, Any]:
        artifact = place.artifact(model, precision, _MAKING)
        found: dict[str, Any] = place.module("vision", artifact, bound=ROUND_SECONDS)
        return found

    return act
