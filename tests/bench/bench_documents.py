"""Results of a bench that never ran: times drawn from a seed, with the shape of real ones."""

from __future__ import annotations

import random
from typing import Any

from llava_edge.bench.report.schema import SCHEMA_VERSION
from llava_edge.bench.speed.rows import STAGES, spread

MACHINE = {
    "processor": "Test 9000",
    "cores": 4,
    "usable_cores": 4,
    "memory_bytes": 16 << 30,
    "llava-edge": "0.1.0",
    "onnxruntime": "1.32.0",
    "commit": "0123456789ab",
    "gpus": [],
    "bandwidth_bytes_per_second": 2e10,
    "float32_operations_per_second": 3e11,
    "load_average": 0.5,
}
_CASES = (("text", 0, 62, 0), ("1 image, base", 1, 100, 1), ("1 image", 1, 255, 5))
_STAGE_SHARES = (0.05, 0.2, 0.01, 0.4, 0.01, 0.33)


def document(
    seed: int,
    *,
    slower: float = 1.0,
    machine_slower: float = 1.0,
    noise: float = 0.03,
    drift: float = 0.0,
    rounds: int = 5,
    more_bytes: int = 0,
    precisions: tuple[str, ...] = ("fp16", "int8", "int4"),
    **facts: Any,
) -> dict[str, Any]:
    """A result.

    ``slower`` multiplies times, ``noise`` is their spread from round to round and ``drift`` that of
    all of a run together, of which the yardstick sees nothing.
    """
    draw = random.Random(seed)
    rows = [
        _row(
            place,
            name,
            draw,
            slower * draw.lognormvariate(0, drift),
            machine_slower,
            noise,
            rounds,
            more_bytes,
        )
        for place, name in enumerate(precisions)
    ]
    for row in rows:
        row.update(facts)
    made = "2026-11-24T10:00:00+00:00"
    return {"schema_version": SCHEMA_VERSION, "made": made, "machine": dict(MACHINE), "rows": rows}


def _row(
    place: int,
    name: str,
    draw: random.Random,
    slower: float,
    machine_slower: float,
    noise: float,
    rounds: int,
    more_bytes: int,
) -> dict[str, Any]:
    # What a round meets, it meets in all its cases.
    common = [draw.lognormvariate(0, noise) for _ in range(rounds)]
    factor = slower * machine_slower
    cases = [
        _case(number, 0.2 * (1 + number + place) * factor, common, draw)
        for number in range(len(_CASES))
    ]
    yard = [0.03 * machine_slower * draw.lognormvariate(0, 0.01) for _ in range(rounds)]
    peak = (100 + place) * (1 << 20) + more_bytes
    terms = {"decoder_weights_bytes": 40 << 20, "process_bytes": 70 << 20}
    return {
        "artifact": f"artifacts/{name}",
        "variant": "test",
        "precision": name,
        "vision_precision": "fp16",
        "weights": "from test",
        "parameters": 10**6,
        "artifact_bytes": (6 - place) << 20,
        "verified": True,
        "device": "cpu",
        "engine": "ort",
        "peak_memory": {"host_bytes": peak, "device_bytes": None},
        "predicted_memory": {
            "case": "1 image",
            "host_bytes": 110 << 20,
            "device_bytes": None,
            "terms": terms,
            "measured_over_predicted": 0.95,
            "holds": True,
        },
        "load_seconds": spread([0.3 * factor * each for each in common]),
        "case": "1 image",
        "ttft_seconds": cases[-1]["ttft_seconds"]["median"],
        "prefill_tokens_per_second": 1000.0,
        "decode_tokens_per_second": cases[-1]["decode_tokens_per_second"]["median"],
        "roofline_fraction": 0.4,
        "rates": "measured here",
        "cases": cases,
        "checks": {
            "stages_over_end_to_end": 0.995,
            "observer_over_raw_clock": 1.0002,
            "perf_over_raw_clock": 1.0,
            "holds": True,
        },
        "yardstick_seconds": spread(yard),
        "load_average": [[0.5, 0.6]] * rounds,
        "quality": {"certificate": {"kl_divergence": 0.01 * place}},
    }


def _case(number: int, seconds: float, common: list[float], draw: random.Random) -> dict[str, Any]:
    name, images, tokens, tiles = _CASES[number]
    times = [seconds * each * draw.lognormvariate(0, 0.01) for each in common]
    stages = {
        stage: spread([share * value for value in times])
        for stage, share in zip(STAGES, _STAGE_SHARES, strict=True)
    }
    return {
        "name": name,
        "num_images": images,
        "tiles_per_image": tiles,
        "prompt_tokens": tokens,
        "image_tokens": tokens if images else 0,
        "answer_tokens": 32,
        "repeats": [1] * len(times),
        "stages": stages,
        "end_to_end_seconds": spread(times),
        "ttft_seconds": spread([0.67 * value for value in times]),
        "decode_tokens_per_second": spread([31 / (0.33 * value) for value in times]),
        "predicted": {"ttft_seconds": 0.6 * seconds, "decode_tokens_per_second": 90.0},
    }
