"""Decoder: prefill in chunks, decode steps, and steps on trial, over the decoder graph.

Knows embeddings and logits, nothing of text or images. Everything a step needs is bound once; a
step writes one embedding row and two lengths in place and runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_edge.profiles.errors import PromptError
from llava_edge.profiles.memory.buffers import MAX_DRAFT_TOKENS
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.runtime.backends.logits_to_keep import logits_input
from llava_edge.runtime.backends.onnxruntime import Buffer, Session
from llava_edge.runtime.generation.decoder.kv_cache import KVCache
from llava_edge.runtime.generation.decoder.topk_logits import TopkLogits
from llava_edge.runtime.util.allocation import allocate
from llava_edge.runtime.util.arrays import Array

PlaceEmbeddings = Callable[[int, int, int], None]
"""``place(start, stop, address)`` writes what it has of positions start..stop on the device."""

FillEmbeddings = Callable[[int, int, Array], None]
"""``fill(start, stop, out)`` writes the embeddings of positions start..stop into ``out``."""


class Decoder:
    """The language model behind its graph.

    Args:
        session: the decoder graph.
        text: dimensions of the language model.
        capacity: positions of the cache.
        chunk_tokens: largest number of positions computed at once in prefill; bounds activations.
        dtype: float32 (cpu target) or float16 (cuda target) of embeddings and cache.
        num_best: logits that the graph picks out itself; 0 where it does not.
        int8_cache: whether the session's graph has an int8 cache instead.

    Attributes:
        chunk_tokens: as given, unless memory does not suffice for so many.
        drafts: whether there is memory for runs of several positions whose logits are all wanted.
        step_seconds: time spent inside ONNX Runtime by all decode steps so far, on trial or not.
    """

    def __init__(
        self,
        session: Session,
        text: TextDims,
        capacity: int,
        chunk_tokens: int,
        dtype: type[np.float32] | type[np.float16],
        num_best: int = 0,
        *,
        int8_cache: bool = False,
    ) -> None:
        place = session.place
        self.capacity = capacity
        self.chunk_tokens = chunk_tokens
        self.drafts = True
        self._session = session
        self._dtype = dtype
        self._text = text
        self._hidden = text.hidden_size
        self.step_seconds = 0.0
        self._cache_type: type[np.generic] = np.int8 if int8_cache else dtype
        self._cache: KVCache | None = None
        # Lengths: total minus one on the device, the total itself in host memory.
        self._last = Buffer((1,), np.int32, *place)
        self._total = Buffer.over(np.array(capacity, np.int32))
        ((self._keep_name, one),) = logits_input(session, 1).items()
        self._keep = Buffer.over(one)
        self._logits = Buffer((1, 1, text.vocab_size), np.float32, *place)
        self._row = Buffer((1, 1, text.hidden_size), dtype, *place)
        self._num_best = num_best
        self._best: tuple[Buffer, Buffer] | None = None
        self._step: Any = None
        self._prefill: Any = None
        self.restore()
        self._on_trial = 0
        self._widest = (self._row, self._logits)
        self._several: dict[int, _Rows] = {}
        if session.device != "cpu":
            # Before anything that comes and goes, whose place they would take for good.
            self._widen(min(1 + MAX_DRAFT_TOKENS, capacity))

    def _bind(self) -> Any:
        binding = self._session.binding()
        binding.inputs(
            {
                "seqlens_k": self._last,
                "total_sequence_length": self._total,
                self._keep_name: self._keep,
            }
        )
        binding.output("logits", self._logits)
        self.cache.bind(binding)
        return binding

    @property
    def length(self) -> int:
        """Valid positions in the cache."""
        return self.cache.length

    def prefill(
        self,
        num_tokens: int,
        fill: FillEmbeddings,
        logits_to_keep: int = 1,
        place: PlaceEmbeddings | None = None,
    ) -> Array:
        """Append ``num_tokens`` positions and return the logits of the last ones.

        Args:
            num_tokens: positions to append.
            fill: writes their embeddings, chunk by chunk.
            logits_to_keep: how many of the last positions to return logits for; no more than the
                last chunk holds.
            place: called behind ``fill``, with the address of the chunk where the graph reads it;
                for embeddings that are on the device already.

        Returns:
            float32 (logits_to_keep, vocab). Valid until the next call.

        Raises:
            PromptError: the cache has no room, or there is nothing to compute.
        """
        if num_tokens < 1:
            raise PromptError("an empty prompt was given; at least one token is needed")
        if self.length + num_tokens > self.capacity:
            raise PromptError(
                f"{num_tokens} tokens were asked behind {self.length}; the context holds "
                f"{self.capacity}. Shorten the prompt, lower the grid, or load a larger context."
            )
        size = min(num_tokens, self.chunk_tokens)
        last_start = (num_tokens - 1) // size * size
        if not 1 <= logits_to_keep <= num_tokens - last_start:
            raise ValueError(
                f"logits of {logits_to_keep} positions asked, the last chunk has "
                f"{num_tokens - last_start}"
            )
        chunk = allocate((1, size, self._hidden), self._dtype, "embeddings of a part of the prompt")
        for start in range(0, num_tokens, size):
            stop = min(start + size, num_tokens)
            rows = chunk[:, : stop - start]
            fill(start, stop, rows[0])
            keep = logits_to_keep if start == last_start else 1
            buffer = Buffer.holding(rows, *self._session.place)
            if place is not None:
                place(start, stop, buffer.address)
            logits = self._run_chunk(buffer, stop - start, keep)
            # Not two at once on a GPU.
            del buffer
        kept: Array = logits.read()[0]
        return kept

    def _run_chunk(self, rows: Buffer, num_tokens: int, keep: int) -> Buffer:
        logits = self._logits
        if keep > 1:
            shape = (1, keep, logits.shape[-1])
            logits = Buffer.unwritten(shape, np.float32, *self._session.place)
        self._ask_logits(keep)
        self._prefill.input("inputs_embeds", rows)
        self._prefill.output("logits", logits)
        try:
            self._run(self._prefill, num_tokens, shrink=True)
        finally:
            # Buffers of one call must not outlive it: a binding would pin their memory.
            self._prefill.input("inputs_embeds", self._row)
            self._prefill.output("logits", self._logits)
            self._ask_logits(1)
        return logits

    def _ask_logits(self, count: int) -> None:
        """Of the last ``count`` positions of the next run."""
        self._keep.write(logits_input(self._session, count)[self._keep_name])

    @property
    def picks_best(self) -> bool:
        """Whether ``step_best`` may be asked."""
        return self._best is not None

    def step(self, row: Array) -> Array:
        """Append one position given its embedding (hidden,) and return its logits (vocab,)."""
        self._append(row)
        return self._last_logits()

    def step_best(self, row: Array) -> TopkLogits:
        """As ``step``; on another device only the best logits are copied from there."""
        if self._best is None:
            raise ValueError("this graph does not pick logits out")
        self._append(row)
        values, ids = (buffer.read()[0, 0] for buffer in self._best)
        return TopkLogits(values, ids, self._last_logits)

    def _append(self, row: Array) -> None:
        if self.length >= self.capacity:
            raise PromptError(f"the context of {self.capacity} tokens is full")
        self._row.write(row.reshape(1, 1, -1))
        before = self._session.run_seconds
        # Bound once, and what a recorded step reads in host memory (how many logits, the capacity)
        # never differs: a recording holds for all of them. The length lies on the device.
        self._run(self._step, 1, replay=True)
        self.step_seconds += self._session.run_seconds - before

    def _last_logits(self) -> Array:
        last: Array = self._logits.read()[0, 0]
        return last

    def verify_draft(self, rows: Array) -> Array:
        """Append one position, and compute those that may follow it in the same run.

        Only the first counts from here on. The others are on trial: ``accept`` appends the next of
        them without computing anything; any other call forgets them. So the length is right at
        every moment, whatever ends the request.

        A run of several positions takes other kernels than ``step`` does, in attention and in most
        matrix products, so the last bits of logits and cache differ from it.

        Args:
            rows: embeddings (n, hidden), n at least 1.

        Returns:
            float32 (n, vocab), logits behind each. Valid until the next call that computes.

        Raises:
            PromptError: the cache has no room for all of them.
        """
        count = len(rows)
        if self.length + count > self.capacity:
            raise PromptError(
                f"{count} tokens were asked behind {self.length}; the context holds {self.capacity}"
            )
        bound = self._rows(count)
        bound.embeddings.write(rows[None])
        self._ask_logits(count)
        first, before = self.length + 1, self._session.run_seconds
        try:
            self._run(bound.binding, count)
        finally:
            self._ask_logits(1)
        self.step_seconds += self._session.run_seconds - before
        self.cache.rewind(first)
        self._on_trial = count - 1
        kept: Array = bound.logits.read()[0]
        return kept

    def accept(self) -> None:
        """Append the next of the positions on trial."""
        if not self._on_trial:
            raise ValueError("no position is on trial")
        self.cache.length += 1
        self._on_trial -= 1

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` positions."""
        self._on_trial = 0
        self.cache.rewind(length)

    def shorten(self, capacity: int) -> None:
        """Give up what the cache holds, and all positions behind ``capacity`` for good.

        Raises:
            OutOfMemoryError: not even memory for the rest is there; ``restore`` asks again.
        """
        if not 0 < capacity < self.capacity:
            raise ValueError(f"{capacity} positions asked of {self.capacity}")
        self.capacity = capacity
        self._on_trial = 0
        # Whatever is bound keeps the old cache alive.
        self._several.clear()
        self._forget_cache()
        self.restore()

    def _forget_cache(self) -> None:
        self._step = self._prefill = self._cache = None

    def restore(self) -> None:
        """Take memory for the cache, where ``shorten`` found none; else do nothing.

        Raises:
            OutOfMemoryError: there still is none.
        """
        if self._cache is not None:
            return
        try:
            self._take_cache()
        except BaseException:
            # All of it or nothing: half of it would pass for a decoder that works.
            self._forget_cache()
            raise

    def _take_cache(self) -> None:
        self._cache = KVCache(self._text, self.capacity, self._cache_type, *self._session.place)
        self._step = self._bind()
        self._step.input("inputs_embeds", self._row)
        if self._num_best:
            place = self._session.place
            kinds: tuple[type[np.generic], ...] = (np.float32, np.int64)
            values, ids = (Buffer((1, 1, self._num_best), kind, *place) for kind in kinds)
            self._step.output("best_logits", values)
            self._step.output("best_ids", ids)
            self._best = values, ids
        self._prefill = self._bind()

    @property
    def can_shorten(self) -> bool:
        """Whether ``shorten`` may be asked: a recorded CUDA graph keeps the addresses it saw."""
        return not self._session.captures

    @property
    def cache(self) -> KVCache:
        """Keys and values."""
        assert self._cache is not None
        return self._cache

    def _widen(self, count: int) -> None:
        self._several.clear()
        place = self._session.place
        self._widest = (
            Buffer((1, count, self._hidden), self._dtype, *place),
            Buffer((1, count, self._logits.shape[-1]), np.float32, *place),
        )

    def _rows(self, count: int) -> _Rows:
        """What runs that many positions: bound once, in memory for the most that were asked."""
        if count > self._widest[0].shape[1]:
            self._widen(count)
        if count not in self._several:
            embeddings, logits = (buffer.first(count) for buffer in self._widest)
            binding = self._bind()
            binding.input("inputs_embeds", embeddings)
            binding.output("logits", logits)
            self._several[count] = _Rows(embeddings, logits, binding)
        return self._several[count]

    def _run(
        self, binding: Any, num_tokens: int, *, shrink: bool = False, replay: bool = False
    ) -> None:
        self._on_trial = 0
        total = self.length + num_tokens
        self._last.write(np.array([total - 1], np.int32))
        # The total bounds what attention works on and may be anything up to the capacity, which is
        # what a recorded step is given, since its recording keeps what it read in host memory.
        # Where it is the true one, the CUDA kernel knows the first part of a prompt, which needs no
        # cache to be read, and splits its work by the positions that there are.
        recorded = replay and self._session.captures
        self._total.write(np.array(self.capacity if recorded else total, np.int32))
        binding.run(shrink=shrink, replay=replay)
        # Only now: a failed call leaves the old length, and what it wrote is ignored.
        self.cache.length = total


@dataclass(frozen=True)
class _Rows:
    """Several positions at once: embeddings [1, n, hidden], logits [1, n, vocab], bound."""

    embeddings: Buffer
    logits: Buffer
    binding: Any
