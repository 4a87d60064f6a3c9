"""Losses: how far logits are from others of the same positions, in what it means for answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_edge.convert.verify.reference_answer import ReferenceAnswer
from llava_edge.runtime.bounds import Bounds
from llava_edge.runtime.certificate import StageResult, bounded
from llava_edge.runtime.session import Array

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


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
