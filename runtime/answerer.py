"""Answerer: a request goes in, pieces of text come out and the whole answer at the end.

Everything behind a loaded artifact that one request runs through, in order: embed, prefill, tokens,
text. It knows neither files nor threads; who may use it when is LlavaEdge's matter.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from llava_edge.profiles.nvml import process_bytes
from llava_edge.runtime.answer import Answer, PeakMemory, Timings
from llava_edge.runtime.cache_contents import CacheContents
from llava_edge.runtime.decode_steps import BestSteps, DraftedSteps, PlainSteps
from llava_edge.runtime.decoder import Decoder
from llava_edge.runtime.embeddings import EmbeddingTable
from llava_edge.runtime.generate import LoopResult, generate_tokens
from llava_edge.runtime.host_memory import peak_host_bytes
from llava_edge.runtime.manifest import TokenIds
from llava_edge.runtime.progress import ReportProgress, no_progress
from llava_edge.runtime.prompt_embedder import PromptEmbedder
from llava_edge.runtime.prompt_embeddings import PromptEmbeddings
from llava_edge.runtime.prompt_lookup import PromptLookup
from llava_edge.runtime.replay import Replay
from llava_edge.runtime.request import Request
from llava_edge.runtime.sampling import Sampler, SamplingOptions
from llava_edge.runtime.session import Array, DeviceKind
from llava_edge.runtime.stream import Pieces
from llava_edge.runtime.tokenizer import Tokenizer
from llava_edge.runtime.tower import Tower


class Answerer:
    """Answers one request at a time.

    Args:
        tower: what ran the tiles, for the answer.
        device: where the decoder runs, for the answer.
        embedder: everything before the decoder.
        decoder: with its cache.
        table: rows of answered tokens.
        tokenizer: ids to text.
        tokens: ids that end an answer or are no words.
        dtype: float32 (cpu flavour) or float16 (cuda flavour) of embeddings.
        prefix_reuse: go on behind what a request shares with what the cache holds.
        off_device: nodes that run elsewhere than on ``device``, for the answer.
    """

    def __init__(
        self,
        tower: Tower,
        device: DeviceKind,
        embedder: PromptEmbedder,
        decoder: Decoder,
        table: EmbeddingTable,
        tokenizer: Tokenizer,
        tokens: TokenIds,
        dtype: type[np.float32] | type[np.float16],
        prefix_reuse: bool,
        off_device: tuple[str, ...] = (),
    ) -> None:
        self._tower = tower
        self._device = device
        self._embedder = embedder
        self._decoder = decoder
        self._table = table
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._dtype = dtype
        self._prefix_reuse = prefix_reuse
        self._off_device = off_device
        self._places = tuple(i for i in (tokens.image, tokens.video) if i is not None)
        self._contents = CacheContents(self._places)

    def pieces(
        self,
        request: Request,
        sampling: SamplingOptions,
        max_new_tokens: int,
        prompt_lookup_num_tokens: int,
        progress: ReportProgress,
        is_cancelled: Callable[[], bool],
    ) -> Pieces:
        """Answer.

        Args:
            request: with pixels; it fits the context.
            sampling: how tokens are chosen.
            max_new_tokens: at least 1.
            prompt_lookup_num_tokens: longest draft; 0 drafts nothing.
            progress: told about tiles and prompt chunks.
            is_cancelled: asked at each token; the answer then ends without an ``Answer``.

        Returns:
            A generator of text whose value is the answer.
        """
        started = time.perf_counter()
        reused = 0
        if self._prefix_reuse:
            reused = self._contents.reusable(request, self._decoder.length)
        self._decoder.rewind(reused)
        self._contents.hold(request)
        # Tiles and frames of media that the cache holds are not even encoded.
        rest = request.behind(reused)
        embeddings = self._embedder.embed(rest, progress)
        encoded = time.perf_counter()
        logits = self._prefill(rest, embeddings, progress)
        prefilled = time.perf_counter()
        indexing, gathering = embeddings.index_seconds, embeddings.gather_seconds
        # Features are not kept while the answer is made.
        del embeddings
        sampler = Sampler(
            sampling,
            self._table.vocab_size,
            self._tokens.num_text_tokens,
            request.ids,
            self._places,
        )
        steps = self._steps(request, prompt_lookup_num_tokens, sampler.needs_few)
        stop_ids = frozenset(self._tokens.stop)
        result = LoopResult()
        decoder = self._tokenizer.stream()
        token_ids: list[int] = []
        text: list[str] = []
        for token in generate_tokens(steps, logits, sampler, stop_ids, max_new_tokens, result):
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
            preprocess_seconds=request.preprocess_seconds,
            vision_seconds=encoded - started - indexing,
            prefill_seconds=prefilled - encoded - gathering,
            decode_seconds=result.decode_seconds,
            ttft_seconds=request.preprocess_seconds + waited,
            decode_tokens_per_second=rate,
            packing_seconds=indexing + gathering,
        )
        assert result.finish_reason is not None
        return Answer(
            text="".join(text),
            token_ids=tuple(token_ids),
            prompt_tokens=request.num_tokens,
            image_tokens=request.image_tokens,
            video_tokens=request.video_tokens,
            reused_tokens=reused,
            finish_reason=result.finish_reason,
            timings=timings,
            # ONNX Runtime keeps what it once took, so what it holds now is the most it held.
            peak_memory=PeakMemory(
                host_bytes=peak_host_bytes(),
                device_bytes=process_bytes(os.getpid()) if self._device == "cuda" else None,
            ),
            device=self._device,
            engine=self._tower.engine,
            other_engines=dict(self._tower.other_engines),
            draft_tokens=steps.drafted,
            accepted_tokens=steps.accepted,
            off_device=self._off_device,
        )

    def replay(
        self, request: Request, token_ids: Sequence[int], on_logits: Callable[[int, Array], None]
    ) -> Replay:
        """Answer with given tokens; see ``LlavaEdge.replay``.

        Nothing is reused, before or after: this is what certificates are made with.
        """
        self._contents.clear()
        self._decoder.rewind(0)
        embeddings = self._embedder.embed(request, no_progress)
        on_logits(0, self._prefill(request, embeddings, no_progress))
        for index, token in enumerate(token_ids, start=1):
            row = self._table.rows(np.array([token]), dtype=self._dtype)
            on_logits(index, self._decoder.step(row[0]))
        return Replay(request, embeddings.features[:-1])

    def _steps(self, request: Request, most: int, needs_few: bool) -> PlainSteps:
        rows = np.empty((1 + most, self._table.hidden_size), self._dtype)

        def embed(tokens: Sequence[int]) -> Array:
            return self._table.rows(np.array(tokens), out=rows[: len(tokens)])

        if not most:
            few = needs_few and self._decoder.picks_best
            return (BestSteps if few else PlainSteps)(self._decoder, embed)
        lookup = PromptLookup(request.ids.tolist(), self._places)
        return DraftedSteps(self._decoder, embed, lookup, most)

    def _prefill(
        self, request: Request, embeddings: PromptEmbeddings, progress: ReportProgress
    ) -> Array:
        """Logits (vocab,) of the last position of a request, or of its rest."""
        total = request.num_tokens

        def fill(start: int, stop: int, out: Array) -> None:
            progress("prompt", start, total)
            embeddings.fill(start, stop, out)

        logits: Array = self._decoder.prefill(total, fill, place=embeddings.place)[0]
        progress("prompt", total, total)
        return logits
