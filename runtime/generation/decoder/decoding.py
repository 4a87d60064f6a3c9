"""Steps: from a chosen token to the logits behind it, plainly or with drafts checked ahead.

The loop asks for one token's logits at a time and need not know how they came about. Whatever is
drafted, every token is chosen by the sampler from the model's own logits, in order: greedy takes
the largest, sampling draws the same random numbers as without drafts, and the repetition penalty
has seen the same tokens. Only the last bits of logits differ, see ``Decoder.verify_draft``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.generation.decoder.prompt_lookup import DraftPace, PromptLookup
from llava_edge.runtime.generation.decoder.topk_logits import TopkLogits
from llava_edge.runtime.util.arrays import Array

EmbedTokens = Callable[[Sequence[int]], Array]
"""Token ids → embedding rows (n, hidden), valid until the next call."""


class Steps(Protocol):
    """What the loop needs.

    Attributes:
        drafted: tokens that were drafted and checked.
        accepted: those among them that were chosen.
    """

    drafted: int
    accepted: int

    @property
    def is_full(self) -> bool:
        """Whether the context has no room for a token."""

    def step(self, token: int, may_follow: int) -> Array | TopkLogits:
        """Append a token; float32 (vocab,) logits behind it, valid until the next call.

        Args:
            token: the one that was chosen.
            may_follow: most tokens that the answer may still get behind the one that is chosen
                next; more are not worth drafting.
        """


class PlainSteps:
    """One run of the decoder a token."""

    drafted = accepted = 0

    def __init__(self, decoder: Decoder, embed: EmbedTokens) -> None:
        self._decoder = decoder
        self._embed = embed

    @property
    def is_full(self) -> bool:
        """Whether the context has no room for a token."""
        return self._decoder.length >= self._decoder.capacity

    def step(self, token: int, may_follow: int) -> Array | TopkLogits:
        """Append a token; see ``Steps``."""
        return self._decoder.step(self._embed([token])[0])


class TopkSteps(PlainSteps):
    """One run of the decoder a token, of which the best logits come to the host."""

    def step(self, token: int, may_follow: int) -> TopkLogits:
        """Append a token; see ``Steps``."""
        return self._decoder.step_best(self._embed([token])[0])


class SpeculativeDecoding(PlainSteps):
    """A token and its draft in one run; the draft's logits are handed out while it holds.

    Args:
        decoder: holds the prompt.
        embed: looks embeddings up.
        lookup: makes drafts; has seen the prompt.
        most: longest draft.
    """

    def __init__(
        self, decoder: Decoder, embed: EmbedTokens, lookup: PromptLookup, most: int
    ) -> None:
        super().__init__(decoder, embed)
        self.drafted = self.accepted = 0
        self._lookup = lookup
        self._pace = DraftPace(most)
        self._draft: list[int] = []
        self._held = 0
        self._matched = 0
        self._rows: Array | None = None

    def step(self, token: int, may_follow: int) -> Array | TopkLogits:
        """Append a token; see ``Steps``."""
        self._lookup.append(token)
        if self._held < len(self._draft):
            if token == self._draft[self._held]:
                self._decoder.accept()
                self._held += 1
                self.accepted += 1
                return self._row()
            self._end_draft()
        room = self._decoder.capacity - self._decoder.length - 1
        matched = self._lookup.matched
        length = min(self._pace.length(matched), may_follow, room)
        draft = self._lookup.draft(length)
        if not draft:
            return super().step(token, may_follow)
        self._rows = self._decoder.verify_draft(self._embed([token, *draft]))
        self._draft, self._held, self._matched = draft, 0, matched
        self.drafted += len(draft)
        return self._row()

    def _row(self) -> Array:
        assert self._rows is not None
        row: Array = self._rows[self._held]
        if self._held == len(self._draft):
            self._end_draft()
        return row

    def _end_draft(self) -> None:
        self._pace.report(self._matched, len(self._draft), self._held)
        self._draft, self._held = [], 0
