"""Measure every bounded row on sound artifacts, for the table of bounds.

    python -m tests.faults.measure_bounds [--first 0] [--seeds 10] [--jobs 2] [--realistic]
        [--int8-cache] [--gptq]

Bounds were set on the seeds from 0 to 4, later ones tell whether they hold. Prints the largest
value of each row by form, beside its bound and the room between them.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.verification.tolerances import form_of
from tests.faults.models.clean_models import clean_models, solved_models
from tests.faults.models.fault_models import FaultModels, Model
from tests.faults.models.realistic import REALISTIC_MODELS

Row = tuple[str, str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--realistic", action="store_true")
    parser.add_argument("--int8-cache", action="store_true", help="artifacts that have one")
    parser.add_argument("--gptq", action="store_true", help="solved, not rounded to nearest")
    options = parser.parse_args(arguments)
    seeds = range(options.first, options.first + options.seeds)
    work: list[tuple[str, Model]] = []
    for seed in seeds:
        models = solved_models(seed) if options.gptq else clean_models(seed)
        if options.realistic:
            models = {name: replace(m, seed=seed) for name, m in REALISTIC_MODELS.items()}
            if options.gptq:
                models = {n: replace(m, quantizer="gptq") for n, m in models.items() if _codes(m)}
        if options.int8_cache:
            models = {name: replace(m, cache="int8") for name, m in models.items()}
        work += [(f"{name}, seed {seed}", model) for name, model in models.items()]
    largest: dict[Row, tuple[float, float, str]] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs, maxtasksperchild=20) as pool:
        for name, verdict, rows in pool.imap_unordered(_measured, work):
            if verdict != "pass":
                print(f"{name}: {verdict}", file=sys.stderr)
            for key, (value, bound) in rows.items():
                if value >= largest.get(key, (-1.0, 0.0, ""))[0]:
                    largest[key] = (value, bound, name)
    for (stage, metric, form), (value, bound, name) in sorted(largest.items()):
        room = bound / value if value else float("inf")
        print(f"{stage:18} {metric:22} {form:18} {value:9.2e} {bound:9.2e} {room:8.1f}  {name}")
    return 0


def _codes(model: Model) -> bool:
    return model.precision != "fp16"


def _measured(item: tuple[str, Model]) -> tuple[str, str, Mapping[Row, tuple[float, float]]]:
    name, model = item
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="llava-edge-bounds-") as folder:
        made = FaultModels(Path(folder), {"model": model})["model"]
        manifest = open_artifact(made.artifact, verify_digests=False).manifest
        form = form_of(manifest.target, manifest.precision)
        certificate = made.verify(made.artifact)
    rows: dict[Row, tuple[float, float]] = {}
    for stage in certificate.stages:
        if stage.bound is None or stage.metric.startswith("differing") or stage.bound == 0.0:
            continue
        key = (stage.name, stage.metric, form)
        value = float("inf") if stage.value is None else stage.value
        rows[key] = max(rows.get(key, (0.0, 0.0)), (value, stage.bound))
    return name, certificate.verdict, rows


if __name__ == "__main__":
    sys.exit(main())
