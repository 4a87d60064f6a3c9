"""TokenComparison: whether two models choose the same tokens, by a rule that knows near ties.

Both read the same tokens, so one choice does not lead to the next. Where the reference's two best
logits lie closer than twice the bound on a logit's error, either choice is right and the position
is *inconclusive*. A comparison passes when every conclusive position agrees, and at least 64
positions were looked at of which at least 90 % are conclusive; else there is not enough evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava_edge.runtime.artifact.certificate import StageResult, Verdict
from llava_edge.runtime.util.arrays import Array

MIN_POSITIONS = 64
MIN_CONCLUSIVE = 0.9
_END_TO_END = "differing_tokens_end_to_end"


@dataclass(frozen=True)
class TokenComparison:
    """Counts over the positions looked at; ``first_difference`` is among conclusive ones."""

    positions: int
    conclusive: int
    differing: int
    first_difference: str = ""

    @classmethod
    def of(
        cls, ours: Array, top_ids: Array, top_logits: Array, ranges: Array, bound: float, name: str
    ) -> TokenComparison:
        """Compare choices.

        Args:
            ours: int (positions,), the ids that were chosen.
            top_ids: int (positions, 2), the reference's best two.
            top_logits: float (positions, 2), their logits.
            ranges: float (positions,), largest minus smallest logit of the reference.
            bound: on a logit's error, as a share of the range.
            name: what to call the sequence.
        """
        margin = top_logits[:, 0] - top_logits[:, 1]
        conclusive = margin >= 2.0 * bound * ranges
        differs = conclusive & (ours != top_ids[:, 0])
        first = ""
        if differs.any():
            at = int(np.flatnonzero(differs)[0])
            first = f"{name}, position {at}: {int(ours[at])} for {int(top_ids[at, 0])}"
        return cls(len(ours), int(conclusive.sum()), int(differs.sum()), first)

    def __add__(self, other: TokenComparison) -> TokenComparison:
        return TokenComparison(
            self.positions + other.positions,
            self.conclusive + other.conclusive,
            self.differing + other.differing,
            self.first_difference or other.first_difference,
        )

    @property
    def verdict(self) -> Verdict:
        """By the rule above."""
        if self.differing:
            return "fail"
        enough = self.conclusive >= MIN_CONCLUSIVE * self.positions
        return "pass" if enough and self.positions >= MIN_POSITIONS else "inconclusive"

    def row(self, name: str, *, needs_evidence: bool = True) -> StageResult:
        """As a row of the certificate: the number of conclusive positions that differ.

        Args:
            name: of the stage.
            needs_evidence: whether few conclusive positions leave the verdict open. Not where the
                evidence comes from elsewhere, and only contradictions are looked for here.
        """
        if not needs_evidence and not self.differing:
            detail = f"{self.positions} positions, {self.conclusive} conclusive, none differs"
            return StageResult(name, _END_TO_END, 0.0, 0.0, "pass", "export", detail)
        detail = f"{self.positions} positions, {self.conclusive} conclusive"
        if self.first_difference:
            detail += f"; {self.first_difference}"
        elif self.verdict == "inconclusive":
            detail += f"; needed are {MIN_POSITIONS} with {MIN_CONCLUSIVE:.0%} conclusive"
        return StageResult(
            name, "differing_tokens", self.differing, 0.0, self.verdict, "export", detail
        )
