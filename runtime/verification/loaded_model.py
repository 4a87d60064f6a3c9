"""LoadedModel: what the self-test uses of ``LlavaEdge``, which runs it at load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from llava_edge.profiles.boards.engines import EngineName
from llava_edge.profiles.memory.buffers import CacheType
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.chat import Chat
from llava_edge.runtime.generation.deadline import TimeBudget
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.generation.engine import Engine
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.generation.inputs.embedding_table import EmbeddingTable
from llava_edge.runtime.generation.output import Answer
from llava_edge.runtime.generation.stream import AnswerStream
from llava_edge.runtime.generation.teacher_forcing import ForcedRun
from llava_edge.runtime.processing.degradation import Degradation
from llava_edge.runtime.processing.images.loading import ImageSource
from llava_edge.runtime.processing.processor import RequestBuilder
from llava_edge.runtime.processing.request import PromptOptions, Request, VideoInput
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import Progress, no_progress
from llava_edge.runtime.verification.media_reader import MediaReader


class LoadedModel(Protocol):
    """``LlavaEdge``, with the parts that a check replaces or reads; see there."""

    artifact: Artifact
    device: str
    engine: EngineName
    cache: CacheType
    degraded: tuple[str, ...]
    _requests: RequestBuilder
    _tokenizer: Tokenizer
    _table: EmbeddingTable
    _decoder: Decoder
    _engine: Engine

    @property
    def context_tokens(self) -> int:
        """Positions of the cache."""

    def generate(
        self, prompt: str, images: Iterable[ImageSource] | None = (), **options: Any
    ) -> Answer:
        """The whole answer."""

    def stream(
        self, prompt: str, images: Iterable[ImageSource] | None = (), **options: Any
    ) -> AnswerStream:
        """The answer piece by piece."""

    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """A conversation."""

    def replay(
        self,
        prompt: str,
        images: Sequence[ImageSource],
        token_ids: Sequence[int],
        on_logits: Callable[[int, Array], None],
        options: PromptOptions | None = None,
        video: VideoInput | None = None,
    ) -> ForcedRun:
        """An answer of given tokens, with the logits that come up."""

    def _open_files(self) -> MediaReader:
        """What opens the files that travel in the artifact."""

    def _embed_rows(self, request: Request, positions: Array) -> Array:
        """What the decoder reads at some positions of a prompt."""

    def _start(
        self,
        degradation: Degradation,
        config: GenerationConfig,
        time: TimeBudget,
        *,
        progress: Progress = no_progress,
    ) -> AnswerStream: ...
