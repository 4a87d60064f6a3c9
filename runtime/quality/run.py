"""Quality run: one artifact answers all questions of a file.

A question is answered right where the answer is one of those given, up to case, white space and a
full stop at the end (``exact_match``), or names the right letter of a multiple choice.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_edge.profiles.errors import ImageError, PromptError, VideoError
from llava_edge.runtime.model import LlavaEdge
from llava_edge.runtime.quality.metrics import (
    anls,
    choice_letter,
    choice_prompt,
    exact_match,
    relaxed_accuracy,
)
from llava_edge.runtime.quality.questions import QualityQuestion
from llava_edge.runtime.util.progress import Progress, no_progress


@dataclass(frozen=True)
class Given:
    """What was said to one question; ``text`` is None where it could not be asked, for a reason."""

    text: str | None
    refused: str = ""


def _keep_nothing(given: Given) -> None:
    """Keep no answer."""


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
        right: whether each is right, see above.
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
    right: tuple[bool, ...] = field(repr=False)
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
    progress: Progress = no_progress,
    known: Sequence[Given] = (),
    keep: Callable[[Given], None] = _keep_nothing,
) -> QualityResult:
    """Ask everything greedily and compare.

    Args:
        model: the artifact.
        questions: at least one.
        grid: lower the AnyRes grid.
        max_new_tokens: of an answer.
        progress: told about questions.
        known: what was said to the first questions before; they are not asked again.
        keep: given what is said to each of the others.

    Raises:
        RequestError: the grid is not one that the artifact has.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, list[float]] = defaultdict(list)
    refused: list[str] = []
    predictions: list[str | None] = []
    right: list[bool] = []
    waits: list[float] = []
    rates: list[float] = []
    held: list[int] = []
    for place, question in enumerate(questions):
        progress("questions", place, len(questions))
        if place < len(known):
            given = known[place]
        else:
            try:
                answer = model.generate(
                    prompt_of(question),
                    images=question.images,
                    video=question.video,
                    image_marks=False,
                    grid=grid,
                    max_new_tokens=max_new_tokens,
                )
                given = Given(answer.text)
                waits.append(answer.timings.ttft_seconds)
                if answer.peak_memory.device_bytes is not None:
                    held.append(answer.peak_memory.device_bytes)
                if answer.timings.decode_tokens_per_second is not None:
                    rates.append(answer.timings.decode_tokens_per_second)
            except (ImageError, PromptError, VideoError) as error:
                given = Given(None, str(error))
            keep(given)
        if given.text is None:
            refused.append(f"question {place + 1}: {given.refused}")
        predictions.append(given.text)
        main = _score(question, given.text, scores)
        kinds[question.kind].append(main)
        right.append(main == 1.0)
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
        right=tuple(right),
        ttft_seconds=statistics.median(waits) if waits else None,
        decode_tokens_per_second=statistics.median(rates) if rates else None,
        device_bytes=max(held, default=None),
    )


def prompt_of(question: QualityQuestion) -> str:
    """What is asked: the question, with its choices where it has some."""
    if question.choices:
        return choice_prompt(question.question, question.choices)
    return question.question


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
