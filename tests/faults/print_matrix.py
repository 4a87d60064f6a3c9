"""Plant every fault and print which stage found it, as a table in Markdown.

python -m tests.faults.print_matrix [--realistic] [--out build/fault_matrix.md]
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_edge.runtime.artifact.certificate import Certificate, StageResult
from tests.faults.fault import Fault
from tests.faults.models.fault_models import FaultModels
from tests.faults.models.realistic import REALISTIC_MODELS, realistic_faults
from tests.faults.seeded.faults import EQUIVALENT, FAULTS, LOOP_FAULTS
from tests.faults.seeded.model.faults_attributes import FAULTS as ATTRIBUTES

_HEADINGS = (
    "part",
    "fault",
    "what is wrong",
    "planted in",
    "found by",
    "value",
    "bound",
    "logits (bound)",
    "first deviation",
)
_LOGITS = ("prefill_logits", "decode_logits")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and keep it in a file; 1 where a fault was not found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--realistic", action="store_true", help="weights of realistic scale")
    options = parser.parse_args(arguments)
    faults = _faults(options.realistic)
    out = options.out or Path("build") / f"fault_matrix{'_realistic' * options.realistic}.md"
    started = time.perf_counter()
    shares = [faults[first :: options.jobs] for first in range(options.jobs)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs) as pool:
        # Ids and not faults travel: what plants a fault is a function made on the spot.
        named = [([fault.id for fault in share], options.realistic) for share in shares]
        parts = pool.starmap(_examined, named)
    found = {fault_id: (row, caught) for part in parts for fault_id, row, caught in part}
    lines = [_line(_HEADINGS), _line(["---"] * len(_HEADINGS))]
    lines += [found[fault.id][0] for fault in faults]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    equivalent = {fault.id for fault in EQUIVALENT}
    missed = [each for each, (_, caught) in found.items() if not caught and each not in equivalent]
    print(
        f"{len(found) - len(equivalent & set(found))} faults, {len(missed)} missed {missed}, "
        f"{time.perf_counter() - started:.0f} s; kept in {out}",
        file=sys.stderr,
    )
    return 1 if missed else 0


def _examined(ids: Sequence[str], realistic: bool) -> list[tuple[str, str, bool]]:
    logging.disable(logging.WARNING)
    known = {fault.id: fault for fault in _faults(realistic)}
    faults = [known[each] for each in ids]
    with tempfile.TemporaryDirectory(prefix="llava-edge-faults-") as folder:
        given = {"models": REALISTIC_MODELS} if realistic else {}
        models = FaultModels(Path(folder), **given)
        return [(fault.id, *_row(fault, models.examine(fault))) for fault in faults]


def _faults(realistic: bool) -> tuple[Fault, ...]:
    whole = (*FAULTS, *ATTRIBUTES, *LOOP_FAULTS, *EQUIVALENT)
    return realistic_faults() if realistic else whole


def _row(fault: Fault, certificate: Certificate) -> tuple[str, bool]:
    failing = [stage for stage in certificate.stages if stage.verdict == "fail"]
    own = [stage for stage in failing if stage.name == fault.stage]
    deviation = certificate.first_deviation
    cells = [
        fault.part,
        fault.id,
        fault.wrong,
        fault.where,
        fault.stage if own else "nothing",
        _shown(own[0]) if own else "",
        "" if not own or own[0].bound is None else f"{own[0].bound:.3g}",
        "; ".join(_logits(certificate)),
        "" if deviation is None else f"`{deviation.tensor}`",
    ]
    return _line(cells), bool(own)


def _shown(stage: StageResult) -> str:
    value = "not a number" if stage.value is None else f"{stage.value:.3g}"
    return f"{stage.metric} {value}"


def _logits(certificate: Certificate) -> Iterator[str]:
    rows = [stage for stage in certificate.stages if stage.name in _LOGITS]
    values = [row for row in rows if row.value is not None and row.metric != "errors"]
    if values:
        worst = max(values, key=lambda row: row.value or 0.0)
        yield f"{worst.value:.2g} ({worst.bound:.2g})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
