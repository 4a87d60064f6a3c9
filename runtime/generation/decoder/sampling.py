"""Sampling: the next token from logits, by numpy, seeded.

The order of operations is transformers': repetition penalty, temperature, top-k, top-p.

Source: transformers ``RepetitionPenaltyLogitsProcessor``, ``TemperatureLogitsWarper``,
``TopKLogitsWarper``, ``TopPLogitsWarper`` 5.23.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from llava_edge.profiles.errors import EngineError
from llava_edge.profiles.memory.buffers import BEST_TOKENS
from llava_edge.runtime.generation.decoder.topk_logits import TopkLogits
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.util.arrays import Array


class Sampler:
    """Chooses tokens and remembers which have occurred.

    Args:
        options: temperature, top-k, top-p, penalty and seed of it.
        vocab_size: length of the logits.
        num_text_tokens: rows at or above are padding of the table; they are never drawn.
        seen: int64 (tokens,) ids of the prompt, for the repetition penalty.
        never: ids that are places, not words (image, video); they are never drawn.
        uniform: gives numbers in [0, 1) in place of the seed's generator.
    """

    def __init__(
        self,
        options: GenerationConfig,
        vocab_size: int,
        num_text_tokens: int,
        seen: Array | None = None,
        never: Sequence[int] = (),
        *,
        uniform: Callable[[], float] | None = None,
    ) -> None:
        self._options = options
        self._num_text_tokens = num_text_tokens
        self._never = [token for token in never if token < num_text_tokens]
        self._uniform = uniform or np.random.default_rng(options.seed).random
        self._seen = np.zeros(vocab_size, bool)
        if seen is not None:
            self._seen[seen[seen < vocab_size]] = True

    @property
    def needs_few(self) -> bool:
        """Whether the best few logits decide, ties aside; a penalty may raise any other."""
        options = self._options
        few = options.is_greedy or 0 < options.top_k < BEST_TOKENS
        return few and options.repetition_penalty == 1.0

    def choose(self, logits: Array | TopkLogits) -> int:
        """The next token id from float32 (vocab,) logits, which are left unchanged.

        Where the best of them decide, the token is the one that all of them would give.

        Raises:
            EngineError: the largest logit is no finite number; the model overflowed.
        """
        options = self._options
        if isinstance(logits, TopkLogits):
            found = self._choose_of_best(logits) if self.needs_few else None
            if found is not None:
                return found
            logits = logits.read_all()
        if not math.isfinite(float(logits.max())):
            raise EngineError(
                "the model's logits are not finite numbers: an activation overflowed, or the "
                "artifact's values are wrong. Convert again, at another precision if it stays."
            )
        if options.repetition_penalty != 1.0:
            logits = self._penalised(logits)
        # Greedy is faithful to the reference: padding rows are masked only where chance decides.
        token = int(np.argmax(logits)) if options.is_greedy else self._draw(logits)
        if options.repetition_penalty != 1.0:
            self._seen[token] = True
        return token

    def probabilities(self, logits: Array) -> tuple[Array, Array]:
        """Kept token ids by falling logit, and their probabilities (float64, summing to 1)."""
        scaled = logits[: self._num_text_tokens].astype(np.float64)
        scaled[self._never] = -np.inf
        return self._probabilities(np.arange(scaled.size), self._scaled(scaled))

    def _scaled(self, logits: Array) -> Array:
        # The largest becomes 0, so that no temperature, however small, overflows it.
        with np.errstate(over="ignore"):
            scaled: Array = (logits - logits.max()) / self._options.temperature
        return scaled

    def _probabilities(self, ids: Array, scaled: Array) -> tuple[Array, Array]:
        """As ``probabilities``, of tokens with rising ids."""
        options = self._options
        kept = scaled > -np.inf
        if 0 < options.top_k < np.count_nonzero(kept):
            # Ties with the k-th logit stay, as in the reference.
            kept = scaled >= np.partition(scaled, -options.top_k)[-options.top_k]
        ids, scaled = ids[kept], scaled[kept]
        order = np.argsort(-scaled, kind="stable")
        ids, kept = ids[order], scaled[order]
        weights = np.exp(kept - kept[0])
        weights /= weights.sum()
        if options.top_p < 1.0:
            before = np.cumsum(weights) - weights
            last = int(np.searchsorted(before, options.top_p, side="left"))
            ids, weights = ids[:last], weights[:last] / weights[:last].sum()
        return ids, weights

    def _choose_of_best(self, best: TopkLogits) -> int | None:
        """The token, or None where tokens that are not among the best might be it."""
        options, values = self._options, best.values
        if not math.isfinite(float(values[0])):
            return None
        if options.is_greedy:
            first = values == values[0]
            # Of equal ones the lowest id is taken, which need not be among them.
            return None if first.all() else int(best.ids[first].min())
        words = (best.ids < self._num_text_tokens) & ~np.isin(best.ids, self._never)
        if np.count_nonzero(words) <= options.top_k:
            return None
        order = np.argsort(best.ids[words])
        ids, logits = best.ids[words][order], values[words][order].astype(np.float64)
        scaled = self._scaled(np.append(logits, np.float64(values[-1])))
        last, scaled = scaled[-1], scaled[:-1]
        if last >= np.partition(scaled, -options.top_k)[-options.top_k]:
            return None
        return self._drawn(*self._probabilities(ids, scaled))

    def _draw(self, logits: Array) -> int:
        return self._drawn(*self.probabilities(logits))

    def _drawn(self, ids: Array, weights: Array) -> int:
        index = int(np.searchsorted(np.cumsum(weights), self._uniform(), side="right"))
        return int(ids[min(index, ids.size - 1)])

    def _penalised(self, logits: Array) -> Array:
        penalty = self._options.repetition_penalty
        changed = np.where(logits > 0, logits / penalty, logits * penalty)
        return np.where(self._seen, changed, logits)
