"""``python -m tests.convert.killed_conversion``: conversions that are killed at given places.

Reads JSON from standard input: a list of ``[checkpoint, out, options, place]``. Each runs in a
process of its own, which kills itself with SIGKILL where progress of the stage ``place[0]`` is
reported for the ``place[1]``-th time; with ``place`` null it ends by itself. Writes the exit status
of each, negative for a signal, as one JSON list.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.profiles.plan_request import PlanRequest


def request_of(checkpoint: str, out: str, options: dict[str, Any]) -> ConvertRequest:
    """Options are ``precision``, ``quantizer`` and ``verify``."""
    return ConvertRequest(
        checkpoint=checkpoint,
        out=Path(out),
        wishes=PlanRequest(precision=options["precision"], context_tokens=640),
        quantization=QuantizationRequest(options.get("quantizer", "gptq"), num_samples=2),
        verify=options.get("verify", "none"),
    )


def _convert(request: ConvertRequest, place: tuple[str, int] | None) -> None:
    seen = 0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal seen
        if place is not None and stage.startswith(place[0]):
            seen += 1
            if seen == place[1]:
                os.kill(os.getpid(), signal.SIGKILL)

    convert_checkpoint(request, report, lambda _: None)


def _run(checkpoint: str, out: str, options: dict[str, Any], place: Any) -> int:
    # Nothing has computed in this process, so no thread is lost in the child.
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _convert(request_of(checkpoint, out, options), place and tuple(place))
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    print(json.dumps([_run(*job) for job in json.load(sys.stdin)]))
