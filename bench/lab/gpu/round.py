"""GpuRound: one round over one artifact on a GPU, and what a row of the table keeps of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_edge.bench.common.machine import Rates
from llava_edge.bench.lab.gpu.workspace import GpuPlace
from llava_edge.bench.speed.rows import SpeedRow
from llava_edge.bench.speed.run import SpeedRound, SpeedSettings, measure_round
from llava_edge.profiles.memory.buffers import CacheType
from llava_edge.profiles.memory.speed import streamed_bytes
from llava_edge.runtime.artifact.open import Artifact, open_artifact

ROUND_SECONDS = 300.0
"""Most that a round may take."""

_OF_THE_TOWER = ("vision_tower", "projector", "vision_activations")
_OF_NO_SESSION = (
    *("driver_context", "kv_cache", "pixel_values", "image_features", "prompt_embeddings"),
    "logits",
)


def measured_round(
    place: GpuPlace,
    bandwidth: float,
    folder: Path,
    number: int,
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """One round over one artifact: what a row of the table needs of it.

    Args:
        place: where.
        bandwidth: bytes a second that copies on the device reach.
        folder: the artifact.
        number: other words and pictures in each.
        asked: fields of ``SpeedSettings``.

    Raises:
        EngineError: it failed.
        subprocess.TimeoutExpired: it took too long.
    """
    settings = SpeedSettings(
        device=place.device,
        allow_slow=place.device == "cpu",
        engine="ort",
        timeout_seconds=max(1.0, min(ROUND_SECONDS, place.seconds_left)),
    )
    made = measure_round(str(folder), number, replace(settings, **asked))
    return round_figures(folder, made, bandwidth)


def round_figures(folder: Path, made: SpeedRound, bandwidth: float) -> dict[str, Any]:
    """A round as the ledger keeps it."""
    artifact = open_artifact(folder)
    row = SpeedRow(folder.name, artifact, [made], Rates(bandwidth, 1.0)).to_json()
    kept = ("precision", "device", "engine", "off_device", "context_tokens", "cache", "peak_memory")
    return {
        **{name: row[name] for name in kept},
        "parameters": row["parameters"],
        "artifact_bytes": row["artifact_bytes"],
        "predicted_memory": row["predicted_memory"],
        "load_seconds": row["load_seconds"]["median"],
        "cases": [_case(artifact, case, row["cache"], bandwidth) for case in row["cases"]],
    }


def _case(
    artifact: Artifact, case: Mapping[str, Any], cache: CacheType, bandwidth: float
) -> dict[str, Any]:
    manifest = artifact.manifest
    names = ("name", "num_images", "grid", "height", "width", "prompt_tokens", "answer_tokens")
    figures = ("ttft_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")
    rate = case["decode_tokens_per_second"]["median"]
    context = case["prompt_tokens"] + case["answer_tokens"] // 2
    precision = manifest.precision.language_model
    streamed = streamed_bytes(manifest.model, precision, manifest.target, "none", context, cache)
    return {
        **{name: case[name] for name in names},
        **{name: case[name]["median"] for name in figures},
        "stages": {name: spread["median"] for name, spread in case["stages"].items()},
        "degraded": list(case["degraded"]),
        "roofline_fraction": rate * streamed / bandwidth,
    }


def largest_session(planned: Mapping[str, Any]) -> int:
    """Bytes that the plan counts for decoder or tower, whichever takes more.

    The provider's limit holds for each session by itself, and for what a session allocates: neither
    buffers nor the driver's context.
    """

    def planned_for(names: Sequence[str]) -> int:
        return sum(planned["terms"].get(f"{name}_bytes", 0) for name in names)

    tower, total = planned_for(_OF_THE_TOWER), int(planned["device_bytes"])
    return max(tower, total - planned_for(_OF_NO_SESSION) - tower)
