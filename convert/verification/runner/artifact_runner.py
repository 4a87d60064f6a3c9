"""ArtifactRunner: the artifact under test, run by the runtime's code, whole or layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from llava_edge.convert.onnx.decoder_slice import DecoderGraph, DecoderSlice
from llava_edge.convert.verification.reference.answer import Positions
from llava_edge.convert.verification.reference.probes import Probe
from llava_edge.convert.verification.runner.vision_halves import VisionHalves
from llava_edge.convert.verification.tokenizer.artifact import artifact_tokenizer
from llava_edge.profiles.memory.buffers import default_cache_type, kv_cache_bytes, kv_cache_shape
from llava_edge.profiles.memory.formats import PRECISIONS, VisionFormat, weight_bytes
from llava_edge.runtime.artifact.memory_estimate import stored_isa
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.artifact.prompt_date import COMPARED_NOW
from llava_edge.runtime.backends.cpu_isa import needs_wide_sums
from llava_edge.runtime.backends.logits_to_keep import logits_input
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.generation.decoder.decoder import Decoder, FillEmbeddings
from llava_edge.runtime.generation.decoder.kv_cache import KVCache
from llava_edge.runtime.generation.inputs.embedding_table import EmbeddingTable
from llava_edge.runtime.generation.inputs.input_embeds import PromptEmbeddings
from llava_edge.runtime.generation.inputs.prompt_encoder import PromptEmbedder
from llava_edge.runtime.processing.processor import RequestBuilder
from llava_edge.runtime.processing.request import PromptOptions, Request, VideoInput
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.limits import Limits
from llava_edge.runtime.vision.encoder import VisionEncoder
from llava_edge.runtime.vision.encoder_protocols import TileEncoder


class ArtifactRunner:
    """An opened artifact and the sessions that its stages need; use as a context manager.

    Args:
        artifact: opened.
        memory_bytes: what the decoder's weights may take at once; layers are taken in groups of as
            many as fit, and all at once where all do. None takes all.
        threads: of the CPU provider; 0 for as many as are allowed.
    """

    def __init__(self, artifact: Artifact, memory_bytes: int | None, threads: int = 0) -> None:
        manifest = artifact.manifest
        self.artifact = artifact
        self.dims = manifest.model
        self.dtype: type[np.float32] | type[np.float16] = (
            np.float32 if manifest.target == "cpu" else np.float16
        )
        wide_sums = needs_wide_sums(manifest.precision)
        self.options = SessionOptions(device="cpu", threads=threads, wide_sums=wide_sums)
        self.tokenizer = artifact_tokenizer(artifact)
        self._requests = RequestBuilder(manifest, self.tokenizer, Limits())
        self.table = EmbeddingTable(artifact.files[manifest.embeddings], self.dims)
        self._memory_bytes = memory_bytes

    @cached_property
    def graph(self) -> DecoderGraph:
        """The decoder's graph.

        Raises:
            ArtifactError: it does not have the layers that the manifest says.
        """
        return DecoderGraph(self.artifact.path(self.artifact.manifest.decoder.file), self.dims)

    @cached_property
    def int8_cache_graph(self) -> DecoderGraph:
        """The decoder's graph with an int8 cache, where the artifact has one.

        Raises:
            ArtifactError: it does not have the layers that the manifest says.
        """
        spec = self.artifact.manifest.decoders["int8"]
        return DecoderGraph(self.artifact.path(spec.file), self.dims)

    @property
    def is_whole(self) -> bool:
        """Whether all layers and the head are run at once."""
        if self._memory_bytes is None:
            return True
        layer, head = self._layer_bytes()
        return layer * self.dims.text.num_hidden_layers + head <= self._memory_bytes

    @property
    def layers_beside_head(self) -> int:
        """Layers that the memory holds beside the head, one at least."""
        count = self.dims.text.num_hidden_layers
        if self._memory_bytes is None:
            return count
        layer, head = self._layer_bytes()
        return min(count, max(1, (self._memory_bytes - head) // max(1, layer)))

    def request(self, probe: Probe) -> Request:
        """A probe made ready as a user's question would be."""
        raw = self.artifact.manifest.prompt is None
        prompt = probe.prompt(raw=raw)
        frames = probe.frames()
        video = None if frames is None else VideoInput(frames, len(frames))
        options = PromptOptions(raw=raw, now=COMPARED_NOW)
        return self._requests.build(prompt, probe.arrays(), options, video=video)

    def vision_path(self) -> Path:
        """The vision graph."""
        return self.artifact.path(self.artifact.manifest.vision.file)

    def embed(self, request: Request) -> PromptEmbeddings:
        """Encode a request's tiles; the session lives only as long."""
        tokens = self.artifact.manifest.tokens
        embedder = PromptEmbedder(
            self.dims,
            tokens.image,
            self.table,
            _LazyEncoder(self.encoder),
            self.dtype,
            video_token_id=tokens.video,
        )
        return embedder.embed(request)

    def encoder(self) -> VisionEncoder | VisionHalves:
        """Tower and projector, in halves where the memory does not hold them whole."""
        if self._memory_bytes is not None and self._tower_bytes() > self._memory_bytes:
            return VisionHalves(self.vision_path(), self.dims, self.options, self.dtype)
        session = Session(self.vision_path(), self.options)
        return VisionEncoder(session, self.dims, 1, self.dtype)

    def rows(self, embeddings: PromptEmbeddings, request: Request, forced: Array) -> Array:
        """Decoder inputs of prompt and forced tokens, in the target's type [positions, hidden]."""
        count = request.num_tokens
        rows = np.empty((count + len(forced), self.dims.text.hidden_size), self.dtype)
        embeddings.fill(0, count, rows[:count])
        if len(forced):
            self.table.rows(forced, out=rows[count:])
        return rows

    def groups(self) -> Iterator[tuple[int, int]]:
        """First layer and layer after the last, of as many layers as the memory allows."""
        count = self.dims.text.num_hidden_layers
        fit = count
        if self._memory_bytes is not None and not self.is_whole:
            layer, _ = self._layer_bytes()
            fit = max(1, self._memory_bytes // max(1, layer))
        yield from ((first, min(first + fit, count)) for first in range(0, count, fit))

    def logits(self, rows: Array, positions: Positions, *, int8_cache: bool = False) -> Array:
        """Logits at the kept positions, float32 [kept, vocab]: chunks of prompt, then steps."""
        if self.is_whole:
            graph = self.int8_cache_graph if int8_cache else self.graph
            cut = graph.slice(0, self.dims.text.num_hidden_layers)
            decoder = self._decoder(cut, positions, int8_cache)
            return _driven(decoder, rows, positions, positions.keep_from, cut.text.vocab_size)
        for first, stop in self.groups():
            # Nothing of a group is left when the next is loaded.
            rows, _ = self._layers(first, stop, rows, positions, int8_cache)
        return self.head(rows[positions.keep_from :])

    def _decoder(self, cut: DecoderSlice, positions: Positions, int8_cache: bool) -> Decoder:
        return Decoder(
            cut.open(self.options),
            cut.text,
            positions.total,
            positions.chunk,
            self.dtype,
            int8_cache=int8_cache,
        )

    def _layers(
        self, first: int, stop: int, rows: Array, positions: Positions, int8_cache: bool = False
    ) -> tuple[Array, KVCache]:
        """Hidden states behind some layers, float32 [positions, hidden], and their cache."""
        graph = self.int8_cache_graph if int8_cache else self.graph
        cut = graph.slice(first, stop, head=False)
        decoder = self._decoder(cut, positions, int8_cache)
        given = rows.astype(self.dtype, copy=False)
        return _driven(decoder, given, positions, 0, cut.text.hidden_size), decoder.cache

    def layer(self, layer: int, rows: Array, positions: Positions) -> Array:
        """One layer by itself: float32 [positions, hidden] in and out."""
        return self._layers(layer, layer + 1, rows, positions)[0]

    def layer_and_cache(
        self, layer: int, rows: Array, positions: Positions, *, int8_cache: bool = False
    ) -> tuple[Array, Array, Array]:
        """The same, with its keys and values, [kv_heads, positions, head_dim] each."""
        out, cache = self._layers(layer, layer + 1, rows, positions, int8_cache)
        return out, cache.part(0, "key"), cache.part(0, "value")

    def attention(self, layer: int, rows: Array, positions: Positions) -> tuple[Array, Array]:
        """What attention with an int8 cache reads and hands on in one layer, at kept positions.

        Returns:
            Packed queries, keys and values before the rotary embedding, and the input of
            ``o_proj``, float32 [kept, …] each.
        """
        graph = self.int8_cache_graph
        values, prefix = graph.layer_values(layer), f"language_model.layers.{layer}.self_attn"
        names = [values[f"{prefix}.qkv"], values[prefix]]
        cut = graph.slice(layer, layer + 1, names, head=False)
        session = cut.open(self.options)
        shape = kv_cache_shape(cut.text, positions.total)
        caches = [np.zeros(shape, np.int8) for _ in range(2)]
        found: tuple[list[Array], list[Array]] = ([], [])
        for start, stop in positions.runs():
            feeds = {
                "inputs_embeds": rows[None, start:stop].astype(self.dtype),
                "seqlens_k": np.array([stop - 1], np.int32),
                "total_sequence_length": np.array(positions.total, np.int32),
                **logits_input(session, 1),
                "past_key_values.0.key": caches[0],
                "past_key_values.0.value": caches[1],
            }
            outputs = session.run(feeds, [*names, "present.0.key", "present.0.value"])
            caches = outputs[2:]
            from_row = max(0, positions.keep_from - start)
            for kept, output in zip(found, outputs, strict=False):
                kept.append(output[0, from_row:].astype(np.float32))
        return np.concatenate(found[0]), np.concatenate(found[1])

    def head(self, states: Array) -> Array:
        """Final norm and head by themselves: [rows, hidden] to logits float32 [rows, vocab]."""
        count = self.dims.text.num_hidden_layers
        session = self.graph.slice(count, count).open(self.options)
        feeds = {
            "inputs_embeds": states[None].astype(self.dtype),
            **logits_input(session, 0),
        }
        (logits,) = session.run(feeds, ["logits"])
        found: Array = logits[0]
        return found

    def _tower_bytes(self) -> int:
        """Bytes of tower and projector in memory."""
        manifest = self.artifact.manifest
        vision = VisionFormat("int8" if manifest.precision.vision_tower == "int8" else "fp16")
        sizes = weight_bytes(self.dims, "fp16", manifest.target, resident=True, vision=vision)
        return sizes.vision_tower + sizes.projector

    def _layer_bytes(self) -> tuple[int, int]:
        """Bytes of one layer's weights in memory and its cache, and of the head."""
        manifest = self.artifact.manifest
        stored = manifest.precision.language_model
        precision = stored if stored in PRECISIONS else "fp16"
        isa = stored_isa(manifest)
        sizes = weight_bytes(self.dims, precision, manifest.target, isa, resident=True)
        count = self.dims.text.num_hidden_layers
        cache = kv_cache_bytes(
            self.dims.text, manifest.prefill_chunk, default_cache_type(manifest.target)
        )
        return (sizes.decoder + cache) // count, sizes.lm_head

    def close(self) -> None:
        """Give the embedding file back."""
        self.table.close()

    def __enter__(self) -> ArtifactRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _LazyEncoder:
    """Tower and projector, loaded only where there is a tile."""

    def __init__(self, open_encoder: Callable[[], TileEncoder]) -> None:
        self._open = open_encoder
        self._encoder: TileEncoder | None = None

    def encode(self, pixel_values: Array, out: Array) -> None:
        self._encoder = self._encoder or self._open()
        self._encoder.encode(pixel_values, out)


def _driven(
    decoder: Decoder, rows: Array, positions: Positions, keep_from: int, width: int
) -> Array:
    """Outputs from position ``keep_from`` on, float32 [positions, width]."""
    out = np.empty((positions.total - keep_from, width), np.float32)

    def fill_from(base: int) -> FillEmbeddings:
        def fill(start: int, stop: int, target: Array) -> None:
            target[...] = rows[base + start : base + stop]

        return fill

    prompt, chunk = positions.num_prompt, positions.chunk
    if keep_from == positions.keep_from:
        # One call: the runtime's own loop over the chunks.
        kept = prompt - keep_from
        out[:kept] = decoder.prefill(prompt, fill_from(0), logits_to_keep=kept)
    else:
        # Every position is wanted, and a call returns those of its last chunk only.
        for start in range(0, prompt, chunk):
            count = min(chunk, prompt - start)
            out[start : start + count] = decoder.prefill(
                count, fill_from(start), logits_to_keep=count
            )
    for place in range(prompt, positions.total):
        out[place - keep_from] = decoder.step(rows[place])
    return out
