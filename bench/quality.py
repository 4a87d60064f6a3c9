"""Quality of an artifact, asked in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.quality.questions import QualityQuestion
from llava_edge.runtime.quality.run import QualityResult, measure_quality
from llava_edge.runtime.util.host_memory import peak_host_bytes
from llava_edge.runtime.util.progress import ProgressLine


@dataclass(frozen=True)
class QualityTask:
    """What every artifact is asked, and how; ``loading`` are options of ``LlavaEdge.load``."""

    questions: tuple[QualityQuestion, ...]
    grid: str | None
    max_new_tokens: int
    loading: dict[str, Any]


def measure_alone(artifact: str, task: QualityTask) -> tuple[dict[str, Any], QualityResult]:
    """Ask one artifact everything.

    Returns:
        Device, peak memory and medians of times, as keys of a row; and the result.

    Raises:
        EngineError: the process ended without a word.
        LlavaEdgeError: as ``LlavaEdge.load``.
    """
    # Spawned, as a forked child would count this process's memory in its own peak.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as alone:
        try:
            return alone.submit(_measure, artifact, task).result()
        except BrokenProcessPool as error:
            raise EngineError(
                f"the process that ran {artifact} ended without a word, as when memory runs out. "
                "Close other programs, or ask with a lower --grid."
            ) from error
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def kept_answers(
    artifact: str, questions: Sequence[QualityQuestion], result: QualityResult
) -> list[dict[str, Any]]:
    """Questions and what was said, one entry each, for ``--answers``."""
    return [
        {
            "artifact": artifact,
            "question": question.question,
            "answers": list(question.answers),
            "kind": question.kind,
            "prediction": prediction,
        }
        for question, prediction in zip(questions, result.predictions, strict=True)
    ]


def _measure(artifact: str, task: QualityTask) -> tuple[dict[str, Any], QualityResult]:
    progress = ProgressLine()
    with LlavaEdge.load(artifact, progress=progress, prefix_reuse=False, **task.loading) as model:
        result = measure_quality(model, task.questions, task.grid, task.max_new_tokens, progress)
        progress.clear()
        row = {
            "device": model.device,
            "peak_memory": {
                "host_bytes": peak_host_bytes(),
                "device_bytes": result.device_bytes,
            },
            "ttft_seconds": result.ttft_seconds,
            "decode_tokens_per_second": result.decode_tokens_per_second,
        }
        return row, result
