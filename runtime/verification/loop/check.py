"""check_loop: the loop as it is used, on a machine without torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llava_edge.runtime.artifact.certificate import StageResult, exact
from llava_edge.runtime.verification.golden.loop import GoldenLoop
from llava_edge.runtime.verification.loaded_model import LoadedModel
from llava_edge.runtime.verification.loop.answers import check_answers
from llava_edge.runtime.verification.loop.bench import LoopBench
from llava_edge.runtime.verification.loop.choice import Choose, choose_plainly
from llava_edge.runtime.verification.loop.draws import draw_faults
from llava_edge.runtime.verification.loop.limits import check_limits
from llava_edge.runtime.verification.loop.model import STAGE
from llava_edge.runtime.verification.loop.reuse import check_drafts, check_reuse


def check_loop(
    model: LoadedModel, loop: GoldenLoop, choose: Choose = choose_plainly
) -> list[StageResult]:
    """Rows for drawing, for answers and their text, for reuse, for drafts and for bounds.

    Nothing here runs a graph: decoder and tower are scripted.

    Args:
        model: loaded, with or without graphs.
        loop: what must come.
        choose: how tokens follow from logits.
    """
    return [make() for make in loop_rows(model, loop, choose).values()]


def loop_rows(
    model: LoadedModel, loop: GoldenLoop, choose: Choose
) -> dict[str, Callable[[], StageResult]]:
    """What makes each row of ``check_loop``, by what it is about."""

    def draws() -> StageResult:
        looked = f"{len(loop.draws)} choices of sampling options"
        return exact(STAGE, "differing_draws", draw_faults(loop.draws), looked)

    checks: dict[str, Callable[[LoopBench], None]] = {
        "answers": lambda bench: check_answers(bench, loop.texts, choose),
        "reuse": check_reuse,
        "drafts": check_drafts,
        "limits": check_limits,
    }
    return {
        "draws": draws,
        **{
            name: partial(_row, f"differing_{name}", model, check) for name, check in checks.items()
        },
    }


def _row(metric: str, model: LoadedModel, check: Callable[[LoopBench], None]) -> StageResult:
    faults: list[str] = []
    looked = ""
    try:
        bench = LoopBench(model, faults)
        check(bench)
        looked = f"{bench.count} requests"
    except Exception as error:
        faults.append(f"{type(error).__name__}: {error}"[:300])
    return exact(STAGE, metric, faults, looked)
