"""ForcedDecoder: the model's own decoder, computing as ever, whose logits name given tokens.

What it computed is kept. So a path through chunks, reused positions and drafts can be compared with
a plain one token by token, whatever the model would have said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.loop.scripted_decoder import one_best


class ForcedDecoder:
    """Takes the place of ``Decoder``; what is not here is the decoder's own.

    Args:
        decoder: computes.
        vocab_size: length of the logits.
        num_prompt: tokens of the prompt.
        ids: that are named, one after another.

    Attributes:
        logits: float32 (vocab,) before each token of the answer, by its number.
        accepted: positions that were drafted and held.
        rejected: runs of several positions of which some did not hold.
    """

    picks_best = False

    def __init__(
        self, decoder: Decoder, vocab_size: int, num_prompt: int, ids: Sequence[int]
    ) -> None:
        self._decoder = decoder
        self._vocab_size = vocab_size
        self._num_prompt = num_prompt
        self._ids = tuple(ids)
        self._on_trial: list[Array] = []
        self.logits: dict[int, Array] = {}
        self.accepted = self.rejected = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def prefill(self, *arguments: Any, **options: Any) -> Array:
        """See ``Decoder.prefill``."""
        return self._named(self._decoder.prefill(*arguments, **options)[-1])[None]

    def step(self, row: Array) -> Array:
        """See ``Decoder.step``."""
        self._give_up()
        return self._named(self._decoder.step(row))

    def verify_draft(self, rows: Array) -> Array:
        """See ``Decoder.verify_draft``."""
        self._give_up()
        found = self._decoder.verify_draft(rows)
        first = self._named(found[0])
        self._on_trial = [row.copy() for row in found[1:]]
        number = self._decoder.length - self._num_prompt
        others = [self._name(number + 1 + index) for index in range(len(self._on_trial))]
        return np.stack([first, *others])

    def accept(self) -> None:
        """See ``Decoder.accept``."""
        self._decoder.accept()
        self.accepted += 1
        self._named(self._on_trial.pop(0))

    def _give_up(self) -> None:
        self.rejected += bool(self._on_trial)
        self._on_trial = []

    def _named(self, logits: Array) -> Array:
        number = self._decoder.length - self._num_prompt
        self.logits[number] = logits.copy()
        return self._name(number)

    def _name(self, number: int) -> Array:
        return one_best(self._vocab_size, self._ids[min(max(number, 0), len(self._ids) - 1)])
