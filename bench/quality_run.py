"""Quality run: one artifact answers all questions of a file."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_edge.bench.quality import (
    anls,
    choice_letter,
    choice_prompt,
    exact_match,
    relaxed_accuracy,
)
from llava_edge.bench.quality_questions import QualityQuestion
from llava_edge.profiles.errors import ImageError, PromptError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.progress import ReportProgress, no_progress


@dataclass(frozen=True)
class QualityResult:
    """Means over all questions, in percent; a question that was refused counts as wrong.

    Attributes:
        questions: how many were asked.
        exact_match, anls, relaxed_accuracy: see ``quality``; None where all are multiple choice.
        multiple_choice: share of right letters; None where no question has choices.
        kinds: exact match, or right letters, by kind.
        refused: what was said of questions that could not be asked.
        predictions: the answers, in the order of the questions; None for a refused one.
        ttft_seconds, decode_tokens_per_second: medians.
        device_bytes: most that an answer says was held on the GPU; None on the CPU.
    """

    questions: int
    exact_match: float | None
    anls: float | None
    relaxed_accuracy: float | None
    multiple_choice: float | None
    kinds: dict[str, float]
    refused: tuple[str, ...]
    predictions: tuple[str | None, ...] = field(repr=False)
    ttft_seconds: float | None
    decode_tokens_per_second: float | None
    device_bytes: int | None

    def summary(self) -> dict[str, Any]:
        """What ``bench --json`` calls ``quality``."""
        shares = ("exact_match", "anls", "relaxed_accuracy", "multiple_choice")
        return {
            "questions": self.questions,
            **{name: getattr(self, name) for name in shares},
            "kinds": self.kinds,
            "refused": list(self.refused),
        }


def measure_quality(
    model: LlavaEdge,
    questions: Sequence[QualityQuestion],
    grid: str | None = None,
    max_new_tokens: int = 64,
    progress: ReportProgress = no_progress,
) -> QualityResult:
    """Ask everything greedily and compare.

    Args:
        model: the artifact.
        questions: at least one.
        grid: lower the AnyRes grid.
        max_new_tokens: of an answer.
        progress: told about questions.

    Raises:
        RequestError: the grid is not one that the artifact has.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, list[float]] = defaultdict(list)
    refused: list[str] = []
    predictions: list[str | None] = []
    waits: list[float] = []
    rates: list[float] = []
    held: list[int] = []
    for place, question in enumerate(questions):
        progress("questions", place, len(questions))
        prompt = question.question
        if question.choices:
            prompt = choice_prompt(prompt, question.choices)
        text: str | None = None
        try:
            answer = model.generate(
                prompt,
                images=question.images,
                image_marks=False,
                grid=grid,
                max_new_tokens=max_new_tokens,
            )
            text = answer.text
            waits.append(answer.timings.ttft_seconds)
            if answer.peak_memory.device_bytes is not None:
                held.append(answer.peak_memory.device_bytes)
            if answer.timings.decode_tokens_per_second is not None:
                rates.append(answer.timings.decode_tokens_per_second)
        except (ImageError, PromptError) as error:
            refused.append(f"question {place + 1}: {error}")
        predictions.append(text)
        main = _score(question, text, scores)
        kinds[question.kind].append(main)
    progress("questions", len(questions), len(questions))
    return QualityResult(
        questions=len(questions),
        exact_match=_percent(scores["exact_match"]),
        anls=_percent(scores["anls"]),
        relaxed_accuracy=_percent(scores["relaxed_accuracy"]),
        multiple_choice=_percent(scores["multiple_choice"]),
        kinds={kind: _percent(values) or 0.0 for kind, values in sorted(kinds.items()) if kind},
        refused=tuple(refused),
        predictions=tuple(predictions),
        ttft_seconds=statistics.median(waits) if waits else None,
        decode_tokens_per_second=statistics.median(rates) if rates else None,
        device_bytes=max(held, default=None),
    )


def _score(question: QualityQuestion, text: str | None, scores: dict[str, list[float]]) -> float:
    if question.choices:
        letter = None if text is None else choice_letter(text, question.choices)
        right = float(letter in question.answers)
        scores["multiple_choice"].append(right)
        return right
    for measure in (exact_match, anls, relaxed_accuracy):
        value = 0.0 if text is None else measure(text, question.answers)
        scores[measure.__name__].append(value)
    return scores["exact_match"][-1]


def _percent(values: Sequence[float]) -> float | None:
    return round(100 * statistics.fmean(values), 3) if values else None
