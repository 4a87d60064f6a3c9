"""Print for each bound of quantised weights what sound models and planted faults reach.

    python -m tests.faults.print_bounds [--jobs 2] [--out build/bounds.md]

A fault counts for the row that it leaves furthest behind, value over bound; the smallest such value
of each row stands beside the largest that sound models reached when the bound was set. Bounds of
losses are a multiple of what rounding to nearest costs, so theirs are shares of the bound.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llava_edge.runtime.artifact.certificate import StageResult
from llava_edge.runtime.verification.tolerances import bound_rows
from tests.faults.models.fault_models import FaultModels
from tests.faults.seeded.model import faults_quantizer

_STAGES = ("weights", "quantized_layers", "quantization_loss")
_HEADINGS = ("stage", "row", "sound", "bound", "smallest fault", "which", "faults")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and keep it in a file; 1 where a fault leaves no row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bounds.md"))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    ids = [fault.id for fault in faults_quantizer.FAULTS]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs) as pool:
        parts = pool.map(_furthest, [ids[first :: options.jobs] for first in range(options.jobs)])
    found = [row for part in parts for row in part]
    lines = table([(fault, row) for fault, row in found if row is not None])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    missed = [fault for fault, row in found if row is None]
    print(f"{len(found)} faults, {len(missed)} missed {missed}", file=sys.stderr)
    return 1 if missed else 0


def table(found: Sequence[tuple[str, StageResult]]) -> list[str]:
    """Lines of the table, of faults and the row that each leaves furthest behind."""
    lines = [_line(_HEADINGS), _line(["---"] * len(_HEADINGS))]
    for stage, metric in sorted({(row.name, row.metric) for _, row in found}):
        own = [(row, fault) for fault, row in found if (row.name, row.metric) == (stage, metric)]
        row, fault = min(own, key=lambda each: _value(each[0]))
        sound, bound = _sound(stage, metric)
        value = _value(row) / (row.bound or 1.0) if stage == "quantization_loss" else _value(row)
        cells = [
            stage,
            metric,
            f"{sound:.3g}",
            f"{bound:.3g}",
            f"{value:.3g}",
            fault,
            f"{len(own)}",
        ]
        lines.append(_line(cells))
    return lines


def furthest(stages: Sequence[StageResult]) -> StageResult | None:
    """The row of a certificate that is furthest beyond its bound; None where none is."""
    failing = [row for row in stages if row.name in _STAGES and row.verdict == "fail"]
    return max(failing, key=lambda row: _value(row) / (row.bound or 1.0), default=None)


def _furthest(ids: Sequence[str]) -> list[tuple[str, StageResult | None]]:
    logging.disable(logging.WARNING)
    known = {fault.id: fault for fault in faults_quantizer.FAULTS}
    with tempfile.TemporaryDirectory(prefix="llava-edge-bounds-") as folder:
        models = FaultModels(Path(folder))
        return [(each, furthest(models.examine(known[each]).stages)) for each in ids]


def _sound(stage: str, metric: str) -> tuple[float, float]:
    """What sound models reach, and the bound; a loss as a share of its bound."""
    if metric.startswith("differing"):
        return 0.0, 0.0
    if stage == "quantization_loss":
        (row,) = (row for row in bound_rows() if row.metric == f"{metric}_over_rounding")
        return row.measured / row.value, 1.0
    row = next(row for row in bound_rows() if (row.stage, row.metric) == (stage, metric))
    return row.measured, row.value


def _value(row: StageResult) -> float:
    return float("inf") if row.value is None else row.value


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
