"""``python -m llava_edge.bench.lab.speed_fit``: how far off are predicted times?

Reads the ledger of ``make bench``, whose artifacts still lie where they were measured. Of every
request the stages are known, and each is a sum of kinds of work that the speed model takes to be
done at a share of the machine's rates:

    seconds = sum over kinds of (work / rate) * (1 / share)

The shares named by ``--free`` are the non-negative least squares over the rungs named by ``--fit``,
each request counting by its relative error; the other shares stay as they ship, the other rungs are
held out. Nothing is written: a share that is taken goes into
``profiles/data/speed_constants.json`` with its source.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.bench.common.machine import INT8_OVER_FLOAT
from llava_edge.bench.common.results_store import RESULTS, Ledger
from llava_edge.bench.speed.rows import vision_format
from llava_edge.profiles.memory.constants import speed_constants
from llava_edge.profiles.memory.speed import (
    attention_operations,
    prefill_operations,
    streamed_bytes,
    vision_operations,
)
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.memory_estimate import stored_isa
from llava_edge.runtime.artifact.open import read_manifest

STAGES = ("vision", "prefill", "decode")
STEP = "step"
"""The one constant that is no share but seconds a token."""


@dataclass(frozen=True)
class Sample:
    """One stage of one prompt.

    Attributes:
        rung: of the ladder.
        what: artifact and prompt, for people.
        stage: of ``STAGES``; decode is of one token.
        seconds: median of the rounds.
        work: seconds that each kind of work would take at the whole rate, by constant; of
            ``step``, 1.
    """

    rung: str
    what: str
    stage: str
    seconds: float
    work: Mapping[str, float]

    def predicted(self, constants: Mapping[str, float]) -> float:
        """Seconds that the kinds of work with these constants take."""
        return sum(
            work * (constants[name] if name == STEP else 1 / constants[name])
            for name, work in self.work.items()
            if name in constants
        )


def samples(rung: str, document: Mapping[str, Any]) -> list[Sample]:
    """Stages of every prompt of a ``bench`` document that ran on the CPU.

    Raises:
        ArtifactError: an artifact is not there any more.
    """
    machine = document["machine"]
    shipped = speed_constants()["cpu"]
    # As predictions take them, see ``machine_profile``.
    peak = machine["float32_operations_per_second"] / shipped["matmul_fp16"]
    counted = machine["int8_isa"] != "none"
    found = []
    for row in document["rows"]:
        if row["device"] != "cpu" or "cases" not in row:
            continue
        manifest, _ = read_manifest(Path(row["artifact"]))
        dims, precision = manifest.model, manifest.precision.language_model
        int8_tower = vision_format(manifest).precision == "int8" and counted
        tower = {"vision_int8" if int8_tower else "vision": vision_operations(dims)}
        int8_prompt = precision != "fp16" and counted
        matmul = f"matmul_{precision}" if int8_prompt else "matmul_fp16"
        for case in row["cases"]:
            what = f"{precision} {case['name']}"
            stages = {name: case["stages"][name]["median"] for name in STAGES}
            tiles = case["num_images"] * case["tiles_per_image"]
            if tiles:
                work = {
                    name: count * tiles / (peak * (INT8_OVER_FLOAT if int8_tower else 1))
                    for name, count in tower.items()
                }
                found.append(Sample(rung, what, "vision", stages["vision"], work))
            tokens, answered = case["prompt_tokens"], case["answer_tokens"]
            linear = prefill_operations(dims.text, tokens)
            work = {
                matmul: linear / (peak * (INT8_OVER_FLOAT if int8_prompt else 1)),
                "attention": attention_operations(dims.text, tokens) / peak,
            }
            found.append(Sample(rung, what, "prefill", stages["prefill"], work))
            if answered > 1:
                work = _step_work(manifest, row, tokens + answered // 2, machine, peak)
                seconds = stages["decode"] / (answered - 1)
                found.append(Sample(rung, what, "decode", seconds, work))
    return found


def _step_work(
    manifest: Manifest,
    row: Mapping[str, Any],
    context: int,
    machine: Mapping[str, Any],
    peak: float,
) -> dict[str, float]:
    dims, precision = manifest.model, manifest.precision.language_model
    streamed = streamed_bytes(
        dims, precision, manifest.target, stored_isa(manifest), context, row["cache"]
    )
    return {
        "bandwidth": streamed / machine["bandwidth_bytes_per_second"],
        "attention_decode": attention_operations(dims.text, context) / context * 2 / peak,
        STEP: 1.0,
    }


def fit(
    given: Sequence[Sample], shipped: Mapping[str, float], free: Sequence[str] = ()
) -> dict[str, float]:
    """Constants that explain the samples best, stage by stage.

    Args:
        given: stages of requests.
        shipped: constants that stay.
        free: names of those that do not; all unless given.

    Returns:
        Those of the free ones that the samples speak of and that are not infinite.
    """
    found: dict[str, float] = {}
    for stage in STAGES:
        chosen = [sample for sample in given if sample.stage == stage]
        known = {name for sample in chosen for name in sample.work}
        names = sorted(known & set(free or known))
        if not names:
            continue
        fixed = {name: shipped[name] for name in known - set(names)}
        matrix = np.array([[s.work.get(n, 0.0) / s.seconds for n in names] for s in chosen])
        target = np.array([1 - s.predicted(fixed) / s.seconds for s in chosen])
        for name, value in zip(names, non_negative(matrix, target), strict=True):
            if name == STEP:
                found[name] = value
            elif value:
                found[name] = 1 / value
    return found


def non_negative(
    matrix: np.ndarray[Any, np.dtype[np.float64]], target: np.ndarray[Any, np.dtype[np.float64]]
) -> list[float]:
    """Non-negative least squares of a few unknowns, by trying which of them are zero.

    Args:
        matrix: float64 (equations, unknowns).
        target: float64 (equations,).
    """
    count = matrix.shape[1]
    best: tuple[float, list[float]] = (float(target @ target), [0.0] * count)
    for size in range(1, count + 1):
        for kept in itertools.combinations(range(count), size):
            part = matrix[:, kept]
            values = np.linalg.lstsq(part, target, rcond=None)[0]
            left = float(np.sum((part @ values - target) ** 2))
            if np.all(values >= 0) and left < best[0]:
                whole = [0.0] * count
                for place, value in zip(kept, values, strict=True):
                    whole[place] = float(value)
                best = left, whole
    return best[1]


def table(
    given: Sequence[Sample], fitted: Mapping[str, float], shipped: Mapping[str, float]
) -> str:
    """Markdown: constants, then each sample as measured and as predicted by both."""
    both = {**shipped, **fitted}
    lines = ["| constant | shipped | fitted |", "|---|---|---|"]
    lines += [f"| {name} | {shipped[name]:.3g} | {fitted[name]:.3g} |" for name in sorted(fitted)]
    lines += ["", "| rung | prompt | stage | measured | predicted, shipped | predicted, fitted |"]
    lines.append("|---" * 6 + "|")
    for each in given:
        times = (each.seconds, each.predicted(shipped), each.predicted(both))
        cells = [each.rung, each.what, each.stage, *(f"{1e3 * t:,.1f} ms" for t in times)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print what fits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "bench.json")
    parser.add_argument(
        "--fit", nargs="+", default=["large"], metavar="RUNG", help="large unless given"
    )
    parser.add_argument(
        "--free", nargs="+", default=[], metavar="CONSTANT", help="all unless given"
    )
    options = parser.parse_args(argv)
    entries = Ledger(options.results).entries
    given = [
        sample
        for name, entry in entries.items()
        if name != "pages"  # Its weights fit a processor's caches: no rate of memory.
        for sample in samples(name, entry["bench"])
    ]
    shipped = speed_constants()["cpu"].values
    if unknown := set(options.free) - set(shipped):
        parser.error(
            f"--free: unknown are {', '.join(sorted(unknown))}; known {', '.join(shipped)}"
        )
    held = dict.fromkeys(sample.rung for sample in given)
    if missing := [name for name in options.fit if name not in held]:
        parser.error(
            f"--fit: {options.results} holds no times on a CPU of {', '.join(missing)}; "
            f"it holds {', '.join(held) or 'none'}. Run make bench."
        )
    fitted = fit([s for s in given if s.rung in options.fit], shipped, options.free)
    print(table(given, fitted, shipped))
    print(json.dumps({"fitted": fitted, "shipped": dict(shipped), "fitted_on": options.fit}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
