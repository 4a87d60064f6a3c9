"""CalibrationSet: what the language model sees of image-question-answer samples.

Conversations come from a folder, or are drawn by the project (``drawn_conversations``). Each goes
the way of a real request: the runtime's template segments, tokenizer, image processor, tower,
projector and packing. Nothing is padded, so no position has to be ignored; the answer's tokens are
part of the sample, because they are what the model will write itself.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.quantization.calibration.conversation_entry import reason_of
from llava_edge.convert.quantization.calibration.conversations import Conversation
from llava_edge.convert.quantization.calibration.token_weights import (
    Kinds,
    count_kinds,
    token_kinds,
)
from llava_edge.profiles.boards.hardware import Target
from llava_edge.profiles.errors import ImageError, RequestError
from llava_edge.profiles.models.anyres import TileLayout
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.artifact.manifest import ImageProcessing, PromptFormat, TokenIds
from llava_edge.runtime.artifact.opened_files import OpenedFiles
from llava_edge.runtime.artifact.prompt_date import COMPARED_NOW
from llava_edge.runtime.backends.cpu_isa import sums_saturate
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.generation.inputs.embedding_table import EmbeddingTable
from llava_edge.runtime.generation.inputs.prompt_encoder import PromptEmbedder
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.processing.images.loading import open_image
from llava_edge.runtime.processing.request import Medium, Request, place_media
from llava_edge.runtime.processing.text.chat_prompt import (
    MARKS,
    Message,
    Piece,
    Text,
    compose,
    user_message,
)
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.encoder import VisionEncoder
from llava_edge.runtime.vision.encoder_protocols import TileEncoder

_LOG = logging.getLogger(__name__)

_MOST_REASONS = 20


def _nothing() -> None:
    """Let nothing go."""


@dataclass(frozen=True)
class CalibrationSample:
    """One sample, as tokens.

    Attributes:
        name: what messages call it.
        kinds: uint8 [tokens], see ``token_kinds.KINDS``.
        embed: computes the decoder's input, float32 [tokens, hidden size].
    """

    name: str
    kinds: Kinds
    embed: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class CalibrationSet:
    """Samples to calibrate with.

    Attributes:
        samples: in order.
        digest: SHA-256, in hex, of all that they hold: ids, kinds, images.
        report: what is to be said of them, as plain JSON.
        embedded: called once all samples are embedded; what that took can be let go.
    """

    samples: tuple[CalibrationSample, ...]
    digest: str
    report: dict[str, Any]
    embedded: Callable[[], None] = _nothing

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample.kinds) for sample in self.samples)


class _OpenedLater:
    """A tile encoder that is loaded when the first image needs it, and can be let go."""

    def __init__(self, open_encoder: Callable[[], TileEncoder]) -> None:
        self._open = open_encoder
        self._encoder: TileEncoder | None = None

    @property
    def is_open(self) -> bool:
        """Whether it takes memory."""
        return self._encoder is not None

    def encode(self, pixel_values: Array, out: Array) -> None:
        """As ``TileEncoder``."""
        if self._encoder is None:
            self._encoder = self._open()
        self._encoder.encode(pixel_values, out)

    def drop(self) -> None:
        """Let it go; the next image loads it again."""
        self._encoder = None


class CalibrationModel:
    """The light half of a model in the making: everything before the decoder.

    Close it, or use it as a context manager.

    Args:
        dims: of the model.
        tokenizer: of the artifact.
        prompt: template segments; None for an artifact without a template.
        processing: values of the image processor, with the artifact's candidates.
        table: embedding rows.
        open_encoder: loads tower and projector; called when the first image is embedded.
        dtype: in which the encoder hands features out.
        context_tokens: longer samples are left out.
    """

    def __init__(
        self,
        dims: ModelDims,
        tokenizer: Tokenizer,
        prompt: PromptFormat | None,
        processing: ImageProcessing,
        table: EmbeddingTable,
        open_encoder: Callable[[], TileEncoder],
        dtype: type[np.float32] | type[np.float16],
        context_tokens: int,
    ) -> None:
        self._dims = dims
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._processor = ImageProcessor(processing)
        self._table = table
        self._encoder = _OpenedLater(open_encoder)
        self._embedder = PromptEmbedder(dims, tokenizer.image_id, table, self._encoder, dtype)
        self._dtype = dtype
        self._context_tokens = context_tokens

    @classmethod
    def open(
        cls,
        folder: Path,
        dims: ModelDims,
        tokens: TokenIds,
        prompt: PromptFormat | None,
        processing: ImageProcessing,
        target: Target,
        context_tokens: int,
        *,
        vision: str = "vision/model.onnx",
        embeddings: str = "embeddings.safetensors",
        tokenizer: str = "tokenizer.json",
        threads: int = 0,
        int8_vision: bool = False,
    ) -> CalibrationModel:
        """Open the finished light parts of an artifact: vision graph, embeddings, tokenizer.

        Args:
            folder: where the parts lie.
            dims: of the model.
            tokens: special ids.
            prompt: template segments, or None.
            processing: values of the image processor.
            target: of the vision graph; it runs on the CPU either way.
            context_tokens: of the artifact.
            vision: graph, below ``folder``.
            embeddings: table, below ``folder``.
            tokenizer: below ``folder``.
            threads: of the vision graph; 0 for as many as are allowed.
            int8_vision: whether the vision graph multiplies int8.

        Raises:
            ArtifactError: tokenizer or embeddings are missing or do not fit.
        """
        dtype: type[np.float32] | type[np.float16] = np.float32 if target == "cpu" else np.float16

        def open_encoder() -> TileEncoder:
            wide_sums = int8_vision and sums_saturate()
            options = SessionOptions(device="cpu", threads=threads, wide_sums=wide_sums)
            session = Session(folder / vision, options)
            return VisionEncoder(session, dims, 1, dtype)

        with OpenedFiles(folder) as files:
            return cls(
                dims,
                Tokenizer.open(files[tokenizer], tokens, prompt),
                prompt,
                processing,
                EmbeddingTable(files[embeddings], dims),
                open_encoder,
                dtype,
                context_tokens,
            )

    def prepare(
        self, conversations: Sequence[Conversation], source: dict[str, Any]
    ) -> CalibrationSet:
        """Make samples of conversations; images that cannot be read are left out, by name.

        Args:
            conversations: in order.
            source: where they come from and what was left out there, for the report.

        Raises:
            RequestError: no sample is left; reasons are listed.
        """
        samples: list[CalibrationSample] = []
        left_out: list[dict[str, str]] = list(source.get("left_out", []))
        grids: dict[str, int] = {}
        text_only = 0
        digest = hashlib.sha256()
        for conversation in conversations:
            try:
                sample, layouts, seal = self._sample(conversation)
            except (ImageError, RequestError) as error:
                _LOG.warning("calibration sample %s is left out: %s", conversation.name, error)
                reason = reason_of(error, conversation)
                left_out.append({"sample": conversation.name, "reason": reason})
                continue
            samples.append(sample)
            text_only += not layouts
            digest.update(seal)
            for layout in layouts:
                grid = f"{layout.rows}x{layout.columns}" if layout.rows else "base"
                grids[grid] = grids.get(grid, 0) + 1
        if not samples:
            shown = left_out[:_MOST_REASONS]
            reasons = "".join(f"\n  - {each['sample']}: {each['reason']}" for each in shown)
            if len(left_out) > len(shown):
                reasons += f"\n  and {len(left_out) - len(shown)} more"
            raise RequestError(
                f"no calibration sample can be used; {len(left_out)} were left out:{reasons}"
            )
        kinds = np.concatenate([sample.kinds for sample in samples])
        report = {
            **source,
            "num_samples": len(samples),
            "num_text_only": text_only,
            "tokens": count_kinds(kinds),
            "grids": dict(sorted(grids.items())),
            "grids_without_sample": [grid for grid in self._grids() if grid not in grids],
            "left_out": left_out,
        }
        return CalibrationSet(tuple(samples), digest.hexdigest(), report, self._encoder.drop)

    def close(self) -> None:
        """Give the embedding file and the encoder back."""
        self._table.close()
        self._encoder.drop()

    def __enter__(self) -> CalibrationModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _grids(self) -> list[str]:
        tile = self._processor.anyres.tile_size
        candidates = self._processor.anyres.candidates
        return [f"{height // tile}x{width // tile}" for height, width in candidates] or ["base"]

    def _sample(
        self, conversation: Conversation
    ) -> tuple[CalibrationSample, tuple[TileLayout, ...], bytes]:
        found: list[TileLayout] = []
        seal = hashlib.sha256()
        for opened in conversation.images:
            # Decoded here as well, so that a damaged image is met before hours of work.
            image = open_image(opened(), conversation.limits)
            seal.update(f"{image.width}x{image.height}".encode())
            seal.update(image.tobytes())
            found.append(self._processor.anyres.layout(image.height, image.width))
        layouts = tuple(found)
        counts = [layout.num_image_tokens for layout in layouts]
        encoded = self._tokenizer.encode_pieces(self._pieces(conversation))
        ids = np.asarray(self._tokenizer.expand_media(encoded, counts), np.int64)
        if len(ids) > self._context_tokens:
            raise RequestError(
                f"it takes {len(ids)} tokens; the context holds {self._context_tokens}. Shorten it "
                "or convert with a larger --context."
            )
        side = self._dims.vision.patches_per_side
        kinds = token_kinds(ids, self._tokenizer.image_id, layouts, side)
        seal.update(ids.tobytes())
        seal.update(kinds.tobytes())
        embed = partial(self._embed, conversation, ids, layouts)
        return CalibrationSample(conversation.name, kinds, embed), layouts, seal.digest()

    def _pieces(self, conversation: Conversation) -> tuple[Piece, ...]:
        if self._prompt is not None:
            messages = []
            if conversation.system is not None:
                messages.append(Message("system", (Text(conversation.system),)))
            for turn in conversation.turns:
                messages.append(user_message(turn.question, len(turn.images)))
                messages.append(Message("assistant", (Text(turn.answer),)))
            return compose(
                self._prompt,
                messages,
                image_marks=bool(conversation.images),
                generation_prompt=False,
                now=COMPARED_NOW,
            )
        pieces: list[Piece] = []
        for turn in conversation.turns:
            question = turn.question.replace(MARKS["image"], "") if turn.images else turn.question
            pieces += [Piece("image", MARKS["image"])] * len(turn.images)
            pieces.append(Piece("text", f"\n{question}\n{turn.answer}"))
        return tuple(pieces)

    def _embed(
        self, conversation: Conversation, ids: NDArray[np.int64], layouts: tuple[TileLayout, ...]
    ) -> NDArray[np.float32]:
        places = place_media(
            ids, self._tokenizer.image_id, [layout.num_image_tokens for layout in layouts]
        )
        media = []
        for place, layout, image in zip(places, layouts, conversation.images, strict=True):
            opened = open_image(image(), conversation.limits)
            pixels = self._processor.preprocess(opened).pixel_values
            media.append(Medium(*place, layout, pixels=pixels))
        request = Request(ids, tuple(media))
        rows = np.empty((len(ids), self._dims.text.hidden_size), self._dtype)
        self._embedder.embed(request).fill(0, len(ids), rows)
        return rows.astype(np.float32, copy=False)
