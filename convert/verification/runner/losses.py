"""Losses: how far logits are from others of the same positions, in what it means for answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llava_edge.convert.verification.reference.answer import ReferenceAnswer
from llava_edge.runtime.artifact.certificate import StageResult, bounded
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.tolerances import Bounds

_UNITS = {
    "kl_divergence": "nats a position, mean",
    "top1_disagreement": "share of positions",
    "answer_loss_rise": "nats a token of the true answer",
}


@dataclass(frozen=True)
class Losses:
    """Of one probe: divergence, share of other choices, rise of the true answer's loss."""

    kl_divergence: float
    top1_disagreement: float
    answer_loss_rise: float

    @classmethod
    def of(cls, logits: Array, wanted: Array, answer: ReferenceAnswer) -> Losses:
        """Compare logits [kept, vocab] with those they should be."""
        ours, theirs = _log_softmax(logits), _log_softmax(wanted)
        # Position p foretells token p + 1: the last of the prompt the first of the answer.
        first = answer.positions.num_prefill - 1
        told = np.arange(first, first + answer.num_answer)
        ids = answer.forced[: answer.num_answer]
        return cls(
            kl_divergence=float((np.exp(theirs) * (theirs - ours)).sum(-1).mean()),
            top1_disagreement=float((ours.argmax(-1) != theirs.argmax(-1)).mean()),
            answer_loss_rise=float((theirs[told, ids] - ours[told, ids]).mean()),
        )

    def fair(self, metric: str) -> float:
        """What others of the same size may cost by this metric.

        True answers have few tokens, and the rise of their loss goes either way: its spread is
        about the root of twice the divergence.
        """
        value: float = getattr(self, metric)
        if metric == "answer_loss_rise":
            value = max(value, math.sqrt(2 * max(0.0, self.kl_divergence)))
        return value

    @staticmethod
    def rows_over_rounding(
        losses: Mapping[str, Losses], rounding: Mapping[str, Losses], stage: str, bounds: Bounds
    ) -> list[StageResult]:
        """Each metric's worst probe, held against what rounding to nearest costs on that probe.

        Args:
            losses: of the artifact, by probe.
            rounding: of the same weights rounded to nearest by the verifier, by probe; others are
                not judged.
            stage: that the rows belong to.
            bounds: the table. A loss may reach ``<metric>_over_rounding`` times that of rounding,
                and the metric's own bound beside it.
        """
        found: list[StageResult] = []
        for metric, unit in _UNITS.items():
            times, beside = (
                bounds.value(stage, key) for key in (f"{metric}_over_rounding", metric)
            )
            judged = [
                (float(getattr(losses[probe], metric)), theirs.fair(metric), probe)
                for probe, theirs in rounding.items()
                if probe in losses
            ]
            rows = [
                (value, times * theirs + beside, theirs, probe) for value, theirs, probe in judged
            ]
            if not rows:
                continue
            value, bound, theirs, probe = max(rows, key=lambda row: _share(row[0], row[1]))
            detail = f"{unit}; {probe}, where rounding to nearest costs {theirs:.2g}"
            found.append(bounded(stage, metric, value, bound, "loss", detail))
        return found

    @staticmethod
    def rows(losses: Sequence[Losses], stage: str, bounds: Bounds) -> list[StageResult]:
        """Each metric's worst probe; nothing where no probe was looked at."""
        if not losses:
            return []
        return [
            bounded(
                stage,
                metric,
                max(float(getattr(each, metric)) for each in losses),
                bounds.value(stage, metric),
                "loss",
                f"{unit}; worst of {len(losses)} probes",
            )
            for metric, unit in _UNITS.items()
        ]


def _share(value: float, bound: float) -> float:
    # NaN is worse than any number.
    return value / bound if value == value else float("inf")


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
