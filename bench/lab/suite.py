"""``make bench``: the project's own models from small to large, at every precision.

    pages   the small trained model that ships with the project, asked questions as well
    mid     random weights, about 140 M parameters
    large   random weights, 1.4 B parameters: CLIP-L tower, 16 decoder layers of 2,048

Each rung is made through the commands, converted, measured and written into the ledger, then all
of the ledger goes into one report. An interrupted run goes on with the same command: what is
converted stays in the work folder, and what the ledger holds of this machine and commit is not
measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava_edge.bench.common.atomic_write import atomic_write
from llava_edge.bench.common.machine import commit
from llava_edge.bench.common.random_models import CLIP_L, DECODER_1B, write_random
from llava_edge.bench.common.results_store import RESULTS, Ledger, machine
from llava_edge.bench.common.subprocess_runner import program, run_fresh
from llava_edge.bench.lab.pages.commands import write_calibration
from llava_edge.bench.lab.pages.drawing.draw import FILE, write_questions
from llava_edge.bench.lab.pages.training.checkpoint import SHIPPED
from llava_edge.bench.report.html import ladder_page
from llava_edge.bench.report.table import MIB, bench_table, ranged, seconds, share_of_bandwidth

PRECISIONS = ("fp16", "int8", "int4")
NUM_QUESTIONS, SEED = 300, 3
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Rung:
    """One model; ``sizes`` are fields of a random checkpoint, none for the trained one."""

    name: str
    title: str
    sizes: Mapping[str, int | str] = field(default_factory=dict)
    options: Sequence[str] = ()

    @property
    def is_trained(self) -> bool:
        """Whether it is the model that ships with the project."""
        return not self.sizes

    @property
    def digest(self) -> str:
        """Of everything that its artifacts depend on but the sources."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]


RUNGS = (
    Rung("pages", "The small trained model, 3.4 M parameters", options=("--profile", "cpu-16gb")),
    Rung(
        "mid",
        "Random weights, 140 M parameters",
        {
            **{"backbone": "mistral", "hidden_size": 768, "intermediate_size": 2048},
            **{"layers": 8, "heads": 12, "kv_heads": 4, "vocab_size": 32064},
            **{"vision_hidden_size": 512, "vision_intermediate_size": 2048},
            **{"vision_layers": 12, "vision_heads": 8},
        },
        ("--profile", "cpu-16gb", "--context", "4096", "--quantizer", "rtn", "--verify", "none"),
    ),
    Rung(
        "large",
        "Random weights, 1.4 B parameters",
        {
            **DECODER_1B,
            **CLIP_L,
        },
        ("--profile", "cpu-16gb", "--context", "4096", "--quantizer", "rtn", "--verify", "none"),
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Measure what the ledger lacks, write the report, print the tables."""
    options = _parser().parse_args(argv)
    rungs = [rung for rung in RUNGS if not options.only or rung.name in options.only]
    ledger = Ledger(options.results)
    for rung in () if options.markdown else rungs:
        if options.again or not is_current(ledger.get(rung.name), rung):
            ledger.put(rung.name, _measure(rung, options))
    if options.markdown:
        print(_markdown(ledger))
        return 0
    held = [(rung.title, entry["bench"]) for rung in RUNGS if (entry := ledger.get(rung.name))]
    report = options.work / "report.html"
    atomic_write(report, ladder_page(held))
    for title, document in held:
        _say(f"\n{title}\n\n{bench_table(document)}")
    _say(f"\nreport: {report}")
    if options.json:
        print(json.dumps(ledger.entries))
    return 0


def is_current(entry: Mapping[str, Any] | None, rung: Rung) -> bool:
    """Whether an entry is of this machine, this commit and this form of the rung."""
    if entry is None or entry["rung"] != rung.digest or entry["machine"] != machine():
        return False
    found: bool = entry["bench"]["machine"]["commit"] == commit()
    return found


def _measure(rung: Rung, options: argparse.Namespace) -> dict[str, Any]:
    folder = options.work / f"{rung.name}-{rung.digest}"
    started = time.perf_counter()
    was_made = not all((folder / name / _MANIFEST).exists() for name in PRECISIONS)
    artifacts = [_artifact(rung, folder, precision) for precision in PRECISIONS]
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    made = time.perf_counter()
    _say(f"{rung.name}: measuring")
    command = [program("llava-edge"), "bench", *map(str, artifacts), "--json", *options.bench]
    if rung.is_trained:
        questions = folder / "questions"
        if not questions.exists():
            write_questions(questions, NUM_QUESTIONS, SEED)
        command += ["--quality", str(questions / FILE)]
    document = run_fresh(command).result()
    seconds = {"measuring": time.perf_counter() - made}
    if was_made:
        seconds["making"] = made - started
    _say(f"{rung.name}: made in {made - started:.0f} s, measured in {seconds['measuring']:.0f} s")
    return {"rung": rung.digest, "seconds": seconds, "bench": document}


def _artifact(rung: Rung, folder: Path, precision: str) -> Path:
    """Convert, unless an earlier run has; an interrupted conversion goes on."""
    artifact = folder / precision
    if (artifact / _MANIFEST).exists():
        return artifact
    _say(f"{rung.name}: llava-edge convert --precision {precision}")
    options = [*rung.options, "--precision", precision]
    if precision == "fp16" and "--quantizer" in options:
        at = options.index("--quantizer")
        del options[at : at + 2]
    if rung.is_trained and precision != "fp16":
        calibration = folder / "calibration"
        if not calibration.exists():
            write_calibration(calibration)
        options += ["--calibration", str(calibration)]
    run_fresh(
        [program("llava-edge"), "convert", str(_checkpoint(rung, folder)), str(artifact), *options]
    )
    return artifact


def _checkpoint(rung: Rung, folder: Path) -> Path:
    if rung.is_trained:
        return SHIPPED
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write_random(checkpoint, rung.sizes)
    return checkpoint


def _markdown(ledger: Ledger) -> str:
    """The ledger as the table that the README shows."""
    heads = ["model", "language model", "size MiB", "peak MiB", "predicted MiB", "load"]
    heads += ["first token", "answer tokens/s", "of bandwidth", "right", "loss (KL)"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for rung in RUNGS:
        entry = ledger.get(rung.name)
        for row in entry["bench"]["rows"] if entry else ():
            quality = row["quality"] or {}
            loss = (quality.get("certificate") or {}).get("kl_divergence")
            right = quality.get("exact_match")
            case = next(case for case in row["cases"] if case["name"] == row["case"])
            rate = case["decode_tokens_per_second"]
            cells = [
                rung.name + " *" * (row["weights"] == "random"),
                row["precision"],
                f"{row['artifact_bytes'] / MIB:,.1f}",
                f"{row['peak_memory']['host_bytes'] / MIB:,.0f}",
                f"{row['predicted_memory']['host_bytes'] / MIB:,.0f}",
                seconds(row["load_seconds"]["median"]),
                ranged(case["ttft_seconds"]),
                ranged(rate, lambda value: f"{value:,.1f}"),
                share_of_bandwidth(row),
                "" if right is None else f"{right:.2f} %",
                "" if loss is None else f"{loss:.2g}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the project's own models.")
    parser.add_argument("--only", action="append", choices=[rung.name for rung in RUNGS])
    parser.add_argument("--again", action="store_true", help="measure what the ledger holds anew")
    parser.add_argument("--work", type=Path, default=Path("artifacts/bench"))
    parser.add_argument("--results", type=Path, default=RESULTS / "bench.json")
    parser.add_argument(
        "--markdown", action="store_true", help="print what the ledger holds as one table; no more"
    )
    parser.add_argument("--json", action="store_true", help="the ledger as last stdout line")
    parser.add_argument(
        "bench", nargs="*", help="behind --: options of llava-edge bench, such as --thorough"
    )
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
