"""Engine: a request goes in, pieces of text come out and the whole answer at the end.

Everything behind a loaded artifact that one request runs through, in order: embed, prefill, tokens,
text. It knows neither files nor threads; who may use it when is LlavaEdge's matter.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llava_edge.profiles.boards.nvml import process_bytes
from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.runtime.artifact.memory_estimate import RequestMemory
from llava_edge.runtime.generation.components import Components
from llava_edge.runtime.generation.deadline import ThroughputEstimate, TimeBudget
from llava_edge.runtime.generation.deadline_guard import CancelledError, DeadlineGuard, TooSlowError
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.generation.decoder.decoding import (
    PlainSteps,
    SpeculativeDecoding,
    TopkSteps,
)
from llava_edge.runtime.generation.decoder.prefix_cache import PrefixCache
from llava_edge.runtime.generation.decoder.prompt_lookup import PromptLookup
from llava_edge.runtime.generation.decoder.sampling import Sampler
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.generation.inputs.input_embeds import PromptEmbeddings
from llava_edge.runtime.generation.inputs.prompt_encoder import PromptEmbedder
from llava_edge.runtime.generation.loop import LoopResult, generate_tokens
from llava_edge.runtime.generation.output import Answer, PeakMemory, Timings
from llava_edge.runtime.generation.stream import Pieces
from llava_edge.runtime.generation.teacher_forcing import ForcedRun
from llava_edge.runtime.processing.degradation import Degradation
from llava_edge.runtime.processing.request import Request
from llava_edge.runtime.util.allocation import allocate, require_free
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.host_memory import peak_host_bytes
from llava_edge.runtime.util.progress import Progress, no_progress


class Engine:
    """Answers one request at a time.

    Args:
        components: of a loaded artifact.
    """

    def __init__(self, components: Components) -> None:
        self._components = components
        self._tower = components.tower
        self._embedder = components.embedder
        self._decoder = components.decoder
        self._table = components.table
        self._tokenizer = components.tokenizer
        self._tokens = components.tokens
        self._dtype = components.dtype
        self._memory = components.memory
        self._prefix_reuse = components.prefix_reuse
        self._shortened = ""
        self._planned = components.decoder.capacity
        self._pace = ThroughputEstimate()
        tokens = components.tokens
        self._places = tuple(i for i in (tokens.image, tokens.video) if i is not None)
        self._contents = PrefixCache(self._places)

    def over(
        self,
        decoder: Decoder,
        embedder: PromptEmbedder | None = None,
        memory: RequestMemory | None = None,
        *,
        prefix_reuse: bool,
        stops: bool = True,
    ) -> Engine:
        """The same over another decoder that holds nothing yet: for checking the loop.

        Args:
            decoder: runs in place of the own one.
            embedder: in place of the own one, where given.
            memory: in place of the own one, where given.
            prefix_reuse: as for ``Components``.
            stops: whether stop tokens end an answer.
        """
        return Engine(
            replace(
                self._components,
                decoder=decoder,
                embedder=embedder or self._embedder,
                memory=memory or self._memory,
                prefix_reuse=prefix_reuse,
                tokens=self._tokens if stops else replace(self._tokens, stop=()),
            )
        )

    def stream(
        self,
        degradation: Degradation,
        preprocess_seconds: float,
        config: GenerationConfig,
        is_cancelled: Callable[[], bool],
        budget: TimeBudget,
        progress: Progress = no_progress,
    ) -> Pieces:
        """Answer.

        Args:
            degradation: the request, with pixels, and what it may give up; it fits the context.
            preprocess_seconds: what the request took to be made ready, from the call on.
            config: how tokens are chosen and how many.
            is_cancelled: asked at each tile, chunk and token; the answer then ends without an
                ``Answer``.
            budget: time for all of it.
            progress: told about tiles and prompt chunks.

        Returns:
            A generator of text whose value is the answer.

        Raises:
            OutOfMemoryError: memory runs out, and nothing is left to reduce.
            DeadlineError: the time is up before the first token.
        """
        started = time.perf_counter()
        while True:
            try:
                self._decoder.restore()
                begun = self._begin(degradation, progress, is_cancelled, budget)
                break
            except CancelledError:
                return None
            except (TooSlowError, OutOfMemoryError, MemoryError) as error:
                room = self._shorter_context(degradation.request.num_tokens + config.max_new_tokens)
                may_shorten = not isinstance(error, TooSlowError) and room is not None
                if not degradation.can_lower and not may_shorten:
                    raise
                reason = str(error) or "memory ran out"
            # Behind the handler: an error holds the frames it came through, and their arrays.
            if degradation.can_lower:
                degradation.lower(reason)
            elif room is not None:
                # For good, so every answer from here on says so.
                self._shortened = f"context lowered from {self._planned} to {room} tokens: {reason}"
                # Where not even that is there, the loop asks for it once more and goes on from it.
                with contextlib.suppress(OutOfMemoryError):
                    self._decoder.shorten(room)
        # Tokens take long, and neither pixels nor pictures are needed for them.
        degradation.settle()
        request, logits, reused = degradation.request, begun.logits, begun.reused
        sampler = Sampler(
            config,
            self._table.vocab_size,
            self._tokens.num_text_tokens,
            request.ids,
            self._places,
        )
        steps = self._steps(request, config.prompt_lookup_num_tokens, sampler.needs_few)
        stop_ids = frozenset(self._tokens.stop)
        result = LoopResult()
        decoder = self._tokenizer.stream()
        token_ids: list[int] = []
        text: list[str] = []
        for token in generate_tokens(
            steps, logits, sampler, stop_ids, config.max_new_tokens, result, lambda: budget.is_over
        ):
            if is_cancelled():
                return None
            self._contents.append(token)
            token_ids.append(token)
            ended = result.finish_reason is not None
            piece = "" if token in stop_ids else decoder.push(token)
            if ended:
                piece += decoder.finish()
            if piece:
                text.append(piece)
                yield piece
        rate = None
        if result.num_tokens > 1:
            rate = (result.num_tokens - 1) / max(result.decode_seconds, 1e-9)
        waited = result.first_token_at - started
        timings = Timings(
            preprocess_seconds=preprocess_seconds,
            vision_seconds=begun.vision_seconds,
            prefill_seconds=begun.prefill_seconds,
            decode_seconds=result.decode_seconds,
            ttft_seconds=preprocess_seconds + waited,
            decode_tokens_per_second=rate,
            packing_seconds=begun.packing_seconds,
        )
        assert result.finish_reason is not None
        return Answer(
            text="".join(text),
            token_ids=tuple(token_ids),
            prompt_tokens=request.num_tokens,
            image_tokens=request.image_tokens,
            video_tokens=request.video_tokens,
            reused_tokens=reused,
            degraded=tuple(
                filter(None, (*self._components.degraded, *degradation.degraded, self._shortened))
            ),
            finish_reason=result.finish_reason,
            timings=timings,
            # ONNX Runtime keeps what it once took, so what it holds now is the most it held.
            peak_memory=PeakMemory(
                host_bytes=peak_host_bytes(),
                device_bytes=max(begun.device_bytes, self._device_bytes()) or None,
            ),
            device=self._components.device,
            engine=self._tower.engine,
            other_engines=dict(self._tower.other_engines),
            draft_tokens=steps.drafted,
            accepted_tokens=steps.accepted,
            off_device=self._components.off_device,
            notes=request.notes,
        )

    def replay(
        self, request: Request, token_ids: Sequence[int], on_logits: Callable[[int, Array], None]
    ) -> ForcedRun:
        """Answer with given tokens; see ``LlavaEdge.replay``.

        Nothing is reused, before or after: this is what certificates are made with.
        """
        self._contents.clear()
        self._decoder.restore()
        self._decoder.rewind(0)
        embeddings = self._embedder.embed(request, no_progress)
        on_logits(0, self._prefill(request, embeddings, no_progress))
        for index, token in enumerate(token_ids, start=1):
            row = self._table.rows(np.array([token]), dtype=self._dtype)
            on_logits(index, self._decoder.step(row[0]))
        return ForcedRun(request, embeddings.features[:-1])

    def embed_rows(self, request: Request, positions: Array) -> Array:
        """What the decoder reads at some positions of a prompt; see ``LlavaEdge._embed_rows``."""
        return self._embedder.embed(request, no_progress).at(positions, self._dtype)

    def forget(self) -> None:
        """Let no later answer reuse what was computed so far."""
        self._contents.clear()
        self._embedder.forget()

    def _shorter_context(self, needed: int) -> int | None:
        """Positions to cut the cache to for a request of that many; None where it cannot be cut.

        What is cut is gone for good, so first an image and some text still fit, as after loading.
        """
        capacity = self._decoder.capacity
        if not self._decoder.can_shorten or needed >= capacity:
            return None
        roomy = max(needed, self._components.least_context)
        return roomy if roomy < capacity else needed

    def _steps(self, request: Request, most: int, needs_few: bool) -> PlainSteps:
        if not self._decoder.drafts:
            most = 0
        rows = allocate((1 + most, self._table.hidden_size), self._dtype, "embeddings of a draft")

        def embed(tokens: Sequence[int]) -> Array:
            return self._table.rows(np.array(tokens), out=rows[: len(tokens)])

        if not most:
            few = needs_few and self._decoder.picks_best
            return (TopkSteps if few else PlainSteps)(self._decoder, embed)
        lookup = PromptLookup(request.ids.tolist(), self._places)
        return SpeculativeDecoding(self._decoder, embed, lookup, most)

    def _begin(
        self,
        degradation: Degradation,
        progress: Progress,
        is_cancelled: Callable[[], bool],
        budget: TimeBudget,
    ) -> _Begun:
        """Everything before the first token is chosen."""
        request = degradation.request
        reused = 0
        if self._prefix_reuse:
            reused = self._contents.match(request, self._decoder.length)
        self._decoder.rewind(reused)
        self._contents.commit(request)
        # Tiles and frames of media that the cache holds are not even encoded.
        rest = request.without_prefix(reused)
        work = f"a request of {rest.num_tiles} tiles and {rest.num_tokens} tokens"
        needed = self._memory.host_bytes(
            sum(map(len, rest.pixel_values)), sum(map(len, rest.frame_pixels)), rest.num_tokens
        )
        require_free(needed, work)
        num_tiles = self._embedder.num_to_encode(rest)
        watch = DeadlineGuard(
            budget,
            self._pace,
            num_tiles,
            rest.num_tokens,
            progress,
            is_cancelled,
            # Less of a picture that the KV cache holds would be more to compute.
            may_lower=degradation.can_lower and bool(rest.media),
        )
        watch.require_time(work)
        started = time.perf_counter()
        embeddings = self._embedder.embed(rest, watch)
        encoded = time.perf_counter()
        logits = self._prefill(rest, embeddings, watch)
        prefilled = time.perf_counter()
        # Features that stay on a device are gone at the end; for others the driver is asked once.
        device_bytes = self._device_bytes() if embeddings.on_device else 0
        indexing, gathering = embeddings.index_seconds, embeddings.gather_seconds
        begun = _Begun(
            logits=logits,
            reused=reused,
            vision_seconds=encoded - started - indexing,
            prefill_seconds=prefilled - encoded - gathering,
            packing_seconds=indexing + gathering,
            device_bytes=device_bytes,
        )
        self._pace.report(num_tiles, begun.vision_seconds, rest.num_tokens, begun.prefill_seconds)
        return begun

    def _device_bytes(self) -> int:
        if self._components.device == "cpu":
            return 0
        return process_bytes(os.getpid(), pci_bus_id=self._components.pci_bus_id) or 0

    def _prefill(self, request: Request, embeddings: PromptEmbeddings, progress: Progress) -> Array:
        """Logits (vocab,) of the last position of a request, or of its rest."""
        total = request.num_tokens

        def fill(start: int, stop: int, out: Array) -> None:
            progress("prompt", start, total)
            embeddings.fill(start, stop, out)

        logits: Array = self._decoder.prefill(total, fill, place=embeddings.place)[0]
        progress("prompt", total, total)
        return logits


@dataclass(frozen=True)
class _Begun:
    """Logits (vocab,) of a prompt's last position, and what it took to get there.

    ``device_bytes`` are this process's on a GPU with features that are not kept; 0 without any.
    """

    logits: Array
    reused: int
    vision_seconds: float
    prefill_seconds: float
    packing_seconds: float
    device_bytes: int
