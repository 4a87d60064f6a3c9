"""``make bench-pages``: what the small trained model answers, at every precision and done wrongly.

2,000 held-out questions go through artifacts of each precision, and through transformers in
float32: whole, with the thumbnail alone, and with single steps of AnyRes done wrongly. The results
go into the ledger, which the texts quote.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_edge.bench.common.results_store import RESULTS, Ledger
from llava_edge.bench.lab.pages.ablation import FAULTS
from llava_edge.bench.lab.pages.commands import ask, convert, write_calibration
from llava_edge.bench.lab.pages.drawing.draw import FILE, write_questions
from llava_edge.bench.lab.pages.evaluate import Evaluator, Result, held_out
from llava_edge.bench.lab.pages.training.checkpoint import SHIPPED

_PRECISIONS = {
    "fp16": ("fp16", False, ()),
    "int8": ("int8", True, ()),
    "int8, rounded": ("int8", False, ("--quantizer", "rtn")),
    "int4": ("int4", True, ()),
    "int4, rounded": ("int4", False, ("--quantizer", "rtn")),
}
"""Precision, whether it is calibrated, and options, by the name of the row."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the ledger and print what is new in it."""
    options = _parser().parse_args(arguments)
    samples = held_out(options.count, options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_questions(folder / "questions", options.count, options.seed)
        write_calibration(folder / "pages")
        artifacts = {}
        for place, (row, (precision, calibrated, more)) in enumerate(_PRECISIONS.items()):
            artifacts[row] = folder / f"artifact-{place}"
            chosen = ["--calibration", str(folder / "pages")] if calibrated else []
            convert(SHIPPED, artifacts[row], precision, [*chosen, *more])
        file = folder / "questions" / FILE
        rows, answers = ask(artifacts, file, folder / "answers.jsonl")
        first = {"fp16": artifacts["fp16"]}
        _, base = ask(first, file, folder / "base.jsonl", ("--grid", "base"))
    evaluator = Evaluator(SHIPPED)
    whole = evaluator.answers(samples)
    truths = [sample.questions[0] for sample in samples]
    reference = Result.of(truths, whole)
    found: dict[str, Any] = {
        "questions": options.count,
        "seed": options.seed,
        "artifacts": {row: _kept(rows[row], Result.of(truths, answers[row])) for row in rows},
        "fp16, --grid base": Result.of(truths, base["fp16"]).summary(),
        "transformers": reference.summary(),
        "transformers, thumbnail alone": evaluator.evaluate(samples, base=True).summary(),
        "same as transformers": {
            row: sum(a == b for a, b in zip(said, whole, strict=True))
            for row, said in answers.items()
        },
        "done wrongly": {fault: evaluator.evaluate(samples, fault).summary() for fault in FAULTS},
    }
    Ledger(options.results).put("pages", found)
    print(json.dumps(found, indent=1))
    return 0


def _kept(row: dict[str, Any], result: Result) -> dict[str, Any]:
    names = ("precision", "artifact_bytes", "peak_memory", "ttft_seconds")
    return {name: row[name] for name in (*names, "decode_tokens_per_second")} | result.summary()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava_edge.bench.lab.pages.measure")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "pages.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
