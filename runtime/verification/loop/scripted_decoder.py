"""ScriptedDecoder: a decoder that says what it is told, as long as its cache holds the right rows.

It has no weights. Its cache are the embedding rows that it was given, and its logits name the next
token of a script only where those rows are the ones that a fresh model would hold; anywhere else
they name a token that is in no script. So an answer is right exactly if every position was filled
with its own row: what was reused, rewound, drafted and cut into chunks included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.generation.decoder.decoder import FillEmbeddings, PlaceEmbeddings
from llava_edge.runtime.generation.decoder.topk_logits import TopkLogits
from llava_edge.runtime.util.arrays import Array

_HIGH = 8.0
_BEST = 64


class ScriptedDecoder:
    """Takes the place of ``Decoder``.

    Args:
        vocab_size: length of the logits.
        hidden_size: of the rows.
        dtype: of the rows.
        capacity: positions of the cache.
        chunk_tokens: positions that a prompt is cut into.
        picks_best: whether ``step_best`` may be called.

    Attributes:
        runs: calls that a model would have computed for.
        drafted: positions that were computed on trial.
        confirmed: those among them that became part of the cache.
        longest: most positions on trial at once.
        fails_at: number of the run that fails; 0 for none.
    """

    drafts = True
    can_shorten = False
    step_seconds = 0.0

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        dtype: type[np.float32] | type[np.float16],
        capacity: int,
        chunk_tokens: int,
        *,
        picks_best: bool = False,
    ) -> None:
        self.capacity = capacity
        self.chunk_tokens = chunk_tokens
        self.picks_best = picks_best
        self.length = 0
        self.runs = self.drafted = self.confirmed = self.longest = self.fails_at = 0
        self._held = np.empty((capacity, hidden_size), dtype)
        self._expected = self._held[:0]
        self._same = 0
        self._on_trial = 0
        self._prompt = 0
        self._vocab_size = vocab_size
        self._logits: Callable[[int], Array] = self._other
        self._wrong = 0

    def expect(
        self, rows: Array, num_prompt: int, logits: Callable[[int], Array], wrong: int
    ) -> None:
        """What comes next.

        Args:
            rows: (prompt and answer, hidden) that the cache must hold in the end.
            num_prompt: how many of them are the prompt.
            logits: float32 (vocab,) for each token of the answer by its number.
            wrong: the token that is named where the cache holds anything else.
        """
        self._expected, self._prompt, self._logits = rows, num_prompt, logits
        self._wrong, self._same = wrong, 0
        self.runs = self.drafted = self.confirmed = self.longest = 0

    def shared(self, rows: Array) -> int:
        """How many positions of the cache hold the first of these rows."""
        most = min(self.length, len(rows))
        differs = (self._held[:most] != rows[:most]).any(axis=1)
        return int(differs.argmax()) if differs.any() else most

    def holds(self, length: int) -> bool:
        """Whether the cache has so many positions, and each holds its own row."""
        return self.length == length and self._is_right(length)

    def prefill(
        self,
        num_tokens: int,
        fill: FillEmbeddings,
        logits_to_keep: int = 1,
        place: PlaceEmbeddings | None = None,
    ) -> Array:
        """See ``Decoder.prefill``."""
        for start in range(0, num_tokens, self.chunk_tokens):
            stop = min(start + self.chunk_tokens, num_tokens)
            # What nobody fills is no number, which equals nothing.
            rows = np.full((stop - start, self._held.shape[1]), np.nan, self._held.dtype)
            fill(start, stop, rows)
            self._take(rows)
        return self._answer(self.length)[None]

    def step(self, row: Array) -> Array:
        """See ``Decoder.step``."""
        self._take(row.reshape(1, -1))
        return self._answer(self.length)

    def step_best(self, row: Array) -> TopkLogits:
        """See ``Decoder.step_best``."""
        logits = self.step(row)
        order = np.argsort(-logits, kind="stable")[:_BEST]
        return TopkLogits(logits[order], order.astype(np.int64), logits.copy)

    def verify_draft(self, rows: Array) -> Array:
        """See ``Decoder.verify_draft``."""
        first = self.length + 1
        self._take(rows)
        found = np.stack([self._answer(first + index) for index in range(len(rows))])
        self.length, self._on_trial = first, len(rows) - 1
        self.drafted += len(rows) - 1
        self.longest = max(self.longest, len(rows) - 1)
        return found

    def accept(self) -> None:
        """See ``Decoder.accept``."""
        if not self._on_trial:
            raise ValueError("no position is on trial")
        self.length += 1
        self._on_trial -= 1
        self.confirmed += 1

    def rewind(self, length: int) -> None:
        """See ``Decoder.rewind``."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} positions was to be rewound to {length}")
        self.length, self._on_trial = length, 0

    def restore(self) -> None:
        """See ``Decoder.restore``."""

    def shorten(self, capacity: int) -> None:
        """See ``Decoder.shorten``; never called."""
        raise ValueError(f"a scripted cache was to be cut to {capacity}")

    def _take(self, rows: Array) -> None:
        self.runs += 1
        if self.fails_at and self.runs >= self.fails_at:
            raise EngineError("this run fails on purpose")
        stop = self.length + len(rows)
        if stop > self.capacity:
            raise ValueError(f"position {stop} of a context of {self.capacity} was written")
        self._held[self.length : stop] = rows
        self._same = min(self._same, self.length)
        self.length, self._on_trial = stop, 0

    def _answer(self, length: int) -> Array:
        """Logits after so many positions."""
        number = length - self._prompt
        if number < 0 or not self._is_right(length):
            return self._other(number)
        return self._logits(number)

    def _is_right(self, length: int) -> bool:
        """Whether the first positions hold their rows; what was compared is not compared again."""
        if length > len(self._expected):
            return False
        if length > self._same:
            part = slice(self._same, length)
            differs = (self._held[part] != self._expected[part]).any(axis=1)
            self._same += int(differs.argmax()) if differs.any() else len(differs)
        return self._same >= length

    def _other(self, number: int) -> Array:
        return one_best(self._vocab_size, self._wrong)


def one_best(vocab_size: int, token: int) -> Array:
    """Logits float32 (vocab,) of which that of one token is far above the others."""
    logits = np.zeros(vocab_size, np.float32)
    logits[token] = _HIGH
    return logits


class DigestEncoder:
    """Takes the place of the tower: features that tell every tile and every patch apart.

    Attributes:
        tiles: how many were encoded so far.
    """

    def __init__(self) -> None:
        self.tiles = 0

    def encode(self, pixel_values: Array, out: Array) -> None:
        """Tiles or frames float32 (n, 3, T, T) to features (n, rows, hidden)."""
        rows, width = out.shape[1:]
        for tile, features in zip(pixel_values, out, strict=True):
            self.tiles += 1
            digest = hashlib.sha256(np.ascontiguousarray(tile, np.float32).data).digest()
            # Whole numbers up to 2,048 are exact in float16 as well.
            features[...] = np.resize(np.frombuffer(digest, np.uint8), width)
            features[:, 0] = np.arange(rows) % 2048
