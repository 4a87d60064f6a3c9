"""Speed rows: what rounds came to, as the rows of ``bench --json``.

A figure of a round is the median of its repeats; a figure of a row is the median of its rounds,
with the lowest and the highest beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from llava_edge.bench.common.artifact_facts import artifact_facts
from llava_edge.bench.common.machine import Rates, machine_profile
from llava_edge.bench.speed.cases import FULL, SpeedCase, image_tokens
from llava_edge.bench.speed.run import SpeedRound
from llava_edge.profiles.boards.hardware import HardwareProfile
from llava_edge.profiles.memory.buffers import CacheType
from llava_edge.profiles.memory.estimate import estimate_memory
from llava_edge.profiles.memory.formats import PRECISIONS, VisionFormat
from llava_edge.profiles.memory.speed import (
    QUESTION_TOKENS,
    Prediction,
    predict_speed,
    streamed_bytes,
)
from llava_edge.profiles.memory.terms import Machine, MemoryEstimate, Workload
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.memory_estimate import on_the_host, stored_isa
from llava_edge.runtime.artifact.open import Artifact

STAGES = ("preprocess", "vision", "packing", "prefill", "sampling", "decode")
"""Parts of a request in order; ``sampling`` is seeing that memory suffices, and choosing the first
token."""

MOST_UNEXPLAINED, MOST_APART = 0.03, 0.02
_MIB = 1 << 20


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest, highest, and the values themselves in the order of the rounds."""
    median = statistics.median(values)
    return {"median": median, "low": min(values), "high": max(values), "rounds": list(values)}


@dataclass(frozen=True)
class SpeedRow:
    """One artifact and its rounds, at least one."""

    folder: str
    artifact: Artifact
    rounds: Sequence[SpeedRound]
    rates: Rates

    def to_json(self) -> dict[str, Any]:
        """The row without ``quality``."""
        manifest = self.artifact.manifest
        first = self.rounds[0].found
        device = first["device"]
        profile, source = machine_profile(device, self.rates)
        cases = [self._case(place, profile) for place in range(len(first["cases"]))]
        headline = next((c for c in cases if c["name"] == FULL), cases[-1])
        peaks = [float(each.peak_host_bytes) for each in self.rounds]
        on_device = [each.device_bytes for each in self.rounds if each.device_bytes is not None]
        peak = {
            "host_bytes": int(statistics.median(peaks)),
            "device_bytes": max(on_device) if on_device else None,
        }
        return {
            **artifact_facts(self.folder, self.artifact),
            "device": device,
            "engine": first["engine"],
            "off_device": first.get("off_device", []),
            "context_tokens": first["context_tokens"],
            "cache": first["cache"],
            "peak_memory": peak,
            "peak_host_rounds": peaks,
            "predicted_memory": self._predicted(profile, peak),
            "planned_memory": manifest.plan.get("memory"),
            "load_seconds": self._over(lambda found: found["load_seconds"]),
            "case": headline["name"],
            "ttft_seconds": headline["ttft_seconds"]["median"],
            "prefill_tokens_per_second": headline["prefill_tokens_per_second"]["median"],
            "decode_tokens_per_second": headline["decode_tokens_per_second"]["median"],
            "roofline_fraction": headline["roofline_fraction"],
            "rates": source,
            "cases": cases,
            "checks": self._checks(cases),
            "yardstick_seconds": self._over(
                lambda found: statistics.median(found["yardstick_seconds"])
            ),
            "load_average": [list(each.load) for each in self.rounds],
        }

    def _over(self, figure: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
        return spread([figure(each.found) for each in self.rounds])

    def _case(self, place: int, profile: HardwareProfile | None) -> dict[str, Any]:
        first = self.rounds[0].found["cases"][place]

        def over(figure: Callable[[dict[str, float]], float]) -> dict[str, Any]:
            return spread(
                [
                    statistics.median(figure(r) for r in each.found["cases"][place]["requests"])
                    for each in self.rounds
                ]
            )

        names = ("name", "num_images", "grid", "height", "width", "tiles_per_image", "degraded")
        counts = ("prompt_tokens", "image_tokens", "answer_tokens")
        tokens, answered = first["prompt_tokens"], first["answer_tokens"]
        rate = over(lambda r: (answered - 1) / max(r["decode_seconds"], 1e-9))
        return {
            **{name: first[name] for name in (*names, *counts)},
            "repeats": [len(each.found["cases"][place]["requests"]) for each in self.rounds],
            "stages": {stage: over(partial(stage_seconds, stage=stage)) for stage in STAGES},
            "end_to_end_seconds": over(lambda r: r["end_to_end_seconds"]),
            "ttft_seconds": over(lambda r: r["ttft_seconds"]),
            "prefill_tokens_per_second": over(lambda r: tokens / max(r["prefill_seconds"], 1e-9)),
            "decode_tokens_per_second": rate,
            "explained": over(explained),
            "predicted": self._speed(first, profile),
            "roofline_fraction": self._roofline(tokens + answered // 2, rate["median"], profile),
        }

    def _roofline(self, context: int, rate: float, profile: HardwareProfile | None) -> float | None:
        """Bytes that decoding streamed a second, over the machine's bandwidth."""
        if profile is None or profile.bandwidth is None:
            return None
        m = self.artifact.manifest
        precision = m.precision.language_model
        isa, cache = stored_isa(m), self.rounds[0].found["cache"]
        streamed = streamed_bytes(m.model, precision, m.target, isa, context, cache)
        return rate * streamed / profile.bandwidth

    def _speed(self, case: dict[str, Any], profile: HardwareProfile | None) -> dict[str, Any]:
        """Predicted for the same tokens and tiles."""
        manifest = self.artifact.manifest
        tiles = case["num_images"] * case["tiles_per_image"]
        found = _prediction(manifest, case["image_tokens"], case["text_tokens"], tiles, profile)
        return {
            "ttft_seconds": None if found is None else found.ttft_seconds,
            "decode_tokens_per_second": None if found is None else found.decode_tokens_per_second,
        }

    def _predicted(self, profile: HardwareProfile | None, peak: dict[str, Any]) -> dict[str, Any]:
        """The memory model about the case that needs most by it, beside what was measured."""
        manifest = self.artifact.manifest
        machine = Machine(manifest.target) if profile is None else Machine.of(profile)
        if machine.target != manifest.target:
            machine = Machine(manifest.target)
        machine = replace(machine, int8_isa=stored_isa(manifest))
        cases = self.rounds[0].found["cases"]
        found = self.rounds[0].found
        context, cache, ran_on = (found[name] for name in ("context_tokens", "cache", "device"))
        estimates = {
            case["name"]: _estimate(manifest, case, context, machine, cache) for case in cases
        }
        device = max(each.device_bytes for each in estimates.values())
        if ran_on == "cpu":
            estimates = {name: on_the_host(each) for name, each in estimates.items()}
        # Where loading needs most all cases tie; the largest prompt then stands for them.
        name = max(reversed(estimates), key=lambda n: estimates[n].peak.total)
        estimate = estimates[name]
        host = max(each.host_bytes for each in estimates.values())
        on_gpu = peak["device_bytes"] is not None and device > 0
        measured, predicted = (
            (peak["device_bytes"], device) if on_gpu else (peak["host_bytes"], host)
        )
        terms = estimate.device_peak if on_gpu else estimate.host_peak
        return {
            "case": name,
            "host_bytes": host,
            "device_bytes": device or None,
            "terms": {f"{key}_bytes": size for key, size in terms.as_dict().items() if size},
            "measured_over_predicted": measured / predicted,
            "holds": measured <= predicted <= 1.05 * measured + 64 * _MIB,
        }

    def _checks(self, cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Do the stages explain every case, and do clocks of two processes agree?"""
        worst = max((case["explained"]["median"] for case in cases), key=lambda x: abs(x - 1))
        inside = [each.found["inside"] for each in self.rounds]
        ratios = [
            each.observed_seconds / found["raw_seconds"]
            for each, found in zip(self.rounds, inside, strict=True)
        ]
        clocks = [found["perf_seconds"] / found["raw_seconds"] for found in inside]
        apart = max(abs(statistics.median(values) - 1) for values in (ratios, clocks))
        return {
            "stages_over_end_to_end": worst,
            "observer_over_raw_clock": statistics.median(ratios),
            "perf_over_raw_clock": statistics.median(clocks),
            "holds": all(_is_explained(case) for case in cases) and apart <= MOST_APART,
        }


def predicted_seconds(
    manifest: Manifest, case: SpeedCase, profile: HardwareProfile | None
) -> float:
    """What one request will take, about; 0 where nothing is known of the machine's rates."""
    tokens = image_tokens(manifest, case)
    tiles = case.num_images * case.tiles_per_image
    found = _prediction(manifest, tokens, case.text_tokens, tiles, profile)
    if found is None or found.ttft_seconds is None or found.decode_tokens_per_second is None:
        return 0.0
    return found.ttft_seconds + case.new_tokens / found.decode_tokens_per_second


def _prediction(
    manifest: Manifest,
    num_image_tokens: int,
    text_tokens: int,
    num_tiles: int,
    profile: HardwareProfile | None,
) -> Prediction | None:
    if profile is None or profile.target != manifest.target:
        return None
    return predict_speed(
        manifest.model,
        manifest.precision.language_model,
        profile,
        # The model counts a short question of its own.
        media_tokens=max(0, num_image_tokens + text_tokens - QUESTION_TOKENS),
        num_tiles=num_tiles,
        vision=vision_format(manifest),
        stored_isa=stored_isa(manifest),
    )


def stage_seconds(request: dict[str, float], stage: str) -> float:
    """Seconds of one stage of one request."""
    if stage != "sampling":
        return request[f"{stage}_seconds"]
    before = ("preprocess", "vision", "packing", "prefill")
    return request["ttft_seconds"] - sum(request[f"{name}_seconds"] for name in before)


def explained(request: dict[str, float]) -> float:
    """All stages together over the time from the call to its end."""
    return sum(stage_seconds(request, name) for name in STAGES) / request["end_to_end_seconds"]


def _is_explained(case: dict[str, Any]) -> bool:
    return bool(abs(1 - case["explained"]["median"]) <= MOST_UNEXPLAINED)


def vision_format(manifest: Manifest) -> VisionFormat:
    """How the tower is stored, with the weights that calibration left in float."""
    if manifest.precision.vision_tower != "int8":
        return VisionFormat("fp16")
    facts = manifest.conversion.get("vision")
    left = facts.get("weights_in_float", 0) if isinstance(facts, dict) else 0
    return VisionFormat("int8", left if isinstance(left, int) else 0)


def _estimate(
    manifest: Manifest,
    case: dict[str, Any],
    context: int,
    machine: Machine,
    cache: CacheType | None = None,
) -> MemoryEstimate:
    stored = manifest.precision.language_model
    work = Workload(
        context_tokens=context,
        num_images=case["num_images"],
        tiles_per_image=case["tiles_per_image"],
        cache=cache,
        chunk_tokens=manifest.prefill_chunk,
        image_pixels=case["height"] * case["width"],
        image_format="JPEG",
    )
    precision = stored if stored in PRECISIONS else "fp16"
    return estimate_memory(manifest.model, precision, work, machine, vision=vision_format(manifest))
