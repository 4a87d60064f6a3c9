"""Components: everything that one artifact needs to answer, opened and put together."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from llava_edge.profiles.memory.buffers import CacheType
from llava_edge.runtime.artifact.manifest import TokenIds
from llava_edge.runtime.artifact.memory_estimate import RequestMemory
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.generation.inputs.embedding_table import EmbeddingTable
from llava_edge.runtime.generation.inputs.prompt_encoder import PromptEmbedder
from llava_edge.runtime.processing.processor import RequestBuilder
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from llava_edge.runtime.vision.select import VisionBackend


@dataclass(frozen=True)
class Components:
    """What a loaded artifact consists of.

    Attributes:
        requests: makes requests.
        tokenizer: text to ids and back.
        tokens: ids that end an answer or are no words.
        table: embedding rows, from a file that stays open.
        tower: tower and projector.
        embedder: everything before the decoder.
        decoder: language model and its cache.
        dtype: float32 (cpu artifact) or float16 (cuda artifact) of embeddings.
        memory: what a request needs.
        device: where the decoder runs: ``cpu``, ``cuda``, ``cuda:1`` and so on.
        threads: of the CPU provider.
        cache: type of keys and values.
        least_context: positions that a cache which degrades keeps as long as that suffices.
        prefix_reuse: reuse what a request shares with what the cache holds.
        degraded: what was reduced to fit the memory that was free; empty if nothing.
        off_device: nodes that run elsewhere than on ``device``; see ``Answer``.
        pci_bus_id: of the GPU whose memory counts, where there is one.
        opened: closes everything that was opened, once nothing runs any more.
    """

    requests: RequestBuilder
    tokenizer: Tokenizer
    tokens: TokenIds
    table: EmbeddingTable
    tower: VisionBackend
    embedder: PromptEmbedder
    decoder: Decoder
    dtype: type[np.float32] | type[np.float16]
    memory: RequestMemory
    device: str
    threads: int
    cache: CacheType
    least_context: int
    prefix_reuse: bool = True
    degraded: tuple[str, ...] = ()
    off_device: tuple[str, ...] = ()
    pci_bus_id: str | None = None
    opened: ExitStack = field(default_factory=ExitStack)
