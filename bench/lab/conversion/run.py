"""``python -m llava_edge.bench.lab.conversion.run``: what converting costs, and beside GPTQModel.

    rtn     a 7B of random weights rounded to int4: peak memory, time
    gptq    its first four layers by GPTQ: peak memory, time a layer
    peer    our solver and GPTQModel on the same model, tokens and settings: error, time, memory

Each step takes from ten minutes to an hour on two cores. What is measured goes into a ledger and
is not measured again without ``--again``; an interrupted conversion goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_edge.bench.common.results_store import RESULTS, Ledger
from llava_edge.bench.lab.conversion.estimate import larger_models
from llava_edge.bench.lab.conversion.memory import (
    GPTQ,
    MISTRAL_7B,
    RTN,
    MemoryStep,
    measure_conversion,
)
from llava_edge.bench.lab.conversion.peer import measure_peer
from llava_edge.bench.lab.conversion.table import estimate_table, memory_table, peer_table
from llava_edge.profiles.boards.cpu_limit import read_cpu_limit

MEMORY_STEPS = {step.name: step for step in (RTN, GPTQ)}
STEPS = (*MEMORY_STEPS, "peer")
SAMPLES = 8
"""A quarter of what a conversion takes unless asked otherwise, for the sake of time."""


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked for and print the whole ledger; 1 if an aim is not met."""
    options = _parser().parse_args(argv)
    ledger = Ledger(options.results)
    for name in options.only or STEPS:
        if ledger.get(name) is None or options.again:
            _say(f"{name}: measuring")
            ledger.put(name, _measure(name, options))
    _say(_tables(ledger))
    if options.json:
        print(json.dumps(ledger.entries))
    entries = [ledger.get(name) for name in options.only or STEPS]
    return 0 if all(entry is not None and entry["holds"] for entry in entries) else 1


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    if name == "peer":
        if not options.interpreter.exists():
            raise SystemExit(f"{options.interpreter} is not there; make bench-convert sets it up")
        return measure_peer(options.work / name, options.interpreter, options.threads, _say)
    step: MemoryStep = MEMORY_STEPS[name]
    if step.quantizer == "gptq":
        step = replace(step, options=("--samples", str(options.samples)))
    return measure_conversion(step, MISTRAL_7B, options.work / name, _say)


def _tables(ledger: Ledger) -> str:
    memory = {n: entry for n in MEMORY_STEPS if (entry := ledger.get(n)) is not None}
    tables = [memory_table(memory)] if memory else []
    if "gptq" in memory:
        tables.append(estimate_table(larger_models(memory["gptq"])))
    if (peer := ledger.get("peer")) is not None:
        tables.append(peer_table(peer))
    return "\n\n".join(tables)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=STEPS, metavar="STEP")
    parser.add_argument("--again", action="store_true", help="measure what the ledger holds anew")
    parser.add_argument("--work", type=Path, default=Path("artifacts/convert"))
    parser.add_argument("--results", type=Path, default=RESULTS / "convert.json")
    parser.add_argument(
        "--interpreter",
        type=Path,
        default=Path(".venv-interop/bin/python"),
        help="Python of an environment with GPTQModel",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        help="of the calibration in gptq; time grows with them, the peak does not",
    )
    parser.add_argument(
        "--threads", type=int, default=read_cpu_limit().threads, help="of both, in peer"
    )
    parser.add_argument("--json", action="store_true", help="the ledger as last stdout line")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
