"""Certificate: what verifying an artifact found, as it travels with the artifact.

Plain data. ``convert`` writes it (``write_certificate``), opening an artifact reads it, and anyone
who wants to know how well an artifact keeps its checkpoint reads it too. Two questions are kept
apart in every row: ``export`` (the artifact against torch with the very same weights; tight) and
``loss`` (against the weights of the checkpoint; bounded and reported).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from llava_edge.profiles.boards.hardware import Target
from llava_edge.runtime.util.json_codec import KEY

CERTIFICATE_VERSION = 2
"""2 added ``quality``."""

QUALITY_STAGE = "quality"
"""Name of the row that belongs to ``Certificate.quality``."""

Verdict = Literal["pass", "fail", "inconclusive"]
Question = Literal["export", "loss"]
Mode = Literal["quick", "full", "none"]


@dataclass(frozen=True)
class StageResult:
    """One row: a thing that was compared, by one measure.

    Attributes:
        name: of the stage; several rows may share it.
        metric: what ``value`` is, as a key of the table of bounds.
        value: measured; None where there is nothing to measure.
        bound: what ``value`` must not exceed; None where the verdict does not come from a number.
        verdict: ``inconclusive`` where the evidence does not suffice either way.
        question: which of the two questions the row answers.
        detail: what was looked at, and where it differs.
    """

    name: str
    metric: str
    value: float | None
    bound: float | None
    verdict: Verdict
    question: Question = "export"
    detail: str = ""


@dataclass(frozen=True)
class Host:
    """Where the artifact ran while it was verified."""

    machine: str
    cpu: str
    int8_isa: str
    provider: str
    onnxruntime: str


@dataclass(frozen=True)
class Deviation:
    """The first place in the model where the artifact leaves the reference.

    ``value`` and ``bound`` are relative: the largest difference over the reference's largest
    magnitude. ``ours`` and ``theirs`` say mean, deviation and extremes of both tensors.
    """

    tensor: str
    value: float
    bound: float
    ours: dict[str, float]
    theirs: dict[str, float]


@dataclass(frozen=True)
class Quality:
    """Right answers to the user's questions before and after, see ``llava-edge convert --quality``.

    Before is the same checkpoint at fp16 in this runtime, computed in float32. What is right,
    ``quality_run`` says. ``loss`` is the share of right answers that are gone, on balance:
    ``(right_before - right_after) / right_before``, and 0 where it would be below.

    Attributes:
        questions: that were asked; ``questions_sha256`` is the digest of their file.
        right_before, right_after: answers that are right.
        lost: right before and wrong after.
        gained: wrong before and right after.
        changed: answers of another text, right or wrong.
        refused: questions that could not be asked of the artifact; they count as wrong.
        max_loss: largest ``loss`` that was allowed; None where none was named.
    """

    questions: int
    questions_sha256: str
    right_before: int
    right_after: int
    lost: int
    gained: int
    changed: int
    refused: int
    loss: float
    max_loss: float | None = None


@dataclass(frozen=True)
class Certificate:
    """Contents of ``certificate.json``.

    Attributes:
        schema_version: of this file.
        passed: whether the artifact counts as verified; true only where ``verdict`` is ``pass``.
        verdict: over all stages.
        mode: how much was verified; ``none`` where that was left out.
        issued: UTC, ISO 8601.
        target: of the artifact.
        host: machine and provider.
        reference: library and version that it was compared with.
        tools: versions.
        stages: in the order in which they ran.
        first_deviation: where a failed stage begins to fail, if it was looked for.
        conversion: what the manifest says of the conversion, quoted.
        seconds: that verifying took.
        peak_host_bytes: largest resident set of the process that verified.
        quality: on the user's questions; None where none were given.
    """

    schema_version: int
    passed: bool
    verdict: Verdict
    mode: Mode
    issued: str
    # Its key is the manifest's.
    target: Target = field(metadata={KEY: "flavour"})
    host: Host
    reference: str
    tools: dict[str, str]
    stages: tuple[StageResult, ...] = ()
    first_deviation: Deviation | None = None
    conversion: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_host_bytes: int = 0
    quality: Quality | None = None
    manifest_sha256: str = ""
    self_sha256: str = ""


def utc_now() -> str:
    """The time as certificates and records have it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def overall(stages: Iterable[StageResult]) -> Verdict:
    """The verdict over all stages: the worst of them."""
    verdicts = {stage.verdict for stage in stages}
    if "fail" in verdicts:
        return "fail"
    return "inconclusive" if "inconclusive" in verdicts else "pass"


def bounded(
    name: str,
    metric: str,
    value: float,
    bound: float,
    question: Question = "export",
    detail: str = "",
) -> StageResult:
    """A row that passes where ``value`` is a number of at most ``bound``."""
    # Written so that NaN fails.
    verdict: Verdict = "pass" if value <= bound else "fail"
    shown = value if value == value and abs(value) != float("inf") else None
    if shown is None:
        detail = f"{detail}; " * bool(detail) + f"the value is {value}"
    return StageResult(name, metric, shown, bound, verdict, question, detail)


def exact(name: str, metric: str, faults: Iterable[str], looked_at: str) -> StageResult:
    """A row that passes where nothing differs; ``faults`` says what does."""
    listed = list(faults)
    detail = looked_at if not listed else "; ".join(listed[:5])
    if len(listed) > 5:
        detail += f"; and {len(listed) - 5} more"
    return StageResult(
        name, metric, float(len(listed)), 0.0, "fail" if listed else "pass", "export", detail
    )
