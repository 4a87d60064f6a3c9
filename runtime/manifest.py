"""Manifest: what an artifact says of itself. Plain data; reading and checking files is artifact.py.

One dataclass a topic. Whatever the runtime needs to answer a question stands here, so that it never
reads a checkpoint's configuration and never guesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llava_edge.profiles.buffers import CacheType
from llava_edge.profiles.model_dims import ModelDims

SCHEMA_VERSION = 2
"""2 added ``decoder_int8_cache``."""

Flavour = Literal["cpu", "cuda"]
Reference = Literal["hf", "original"]


@dataclass(frozen=True)
class FileEntry:
    """Size and digest of one file of the artifact."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """Name, ONNX element type (``float32``, ``int64`` …) and shape; symbolic sizes are names."""

    name: str
    dtype: str
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file: where it lies and what goes in and out."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class ImageProcessing:
    """Values of the image processor; ``image_grid_pinpoints`` are (height, width) in pixels.

    ``reference`` decides ties between equally good grids: ``hf`` takes the earlier candidate as the
    list stands, ``original`` reads the list as (width, height). ``view`` is ``tiles`` (AnyRes), or
    ``crop``: the shorter side is resized to a tile's and only the middle is seen (LLaVA-1.5).
    """

    tile_size: int
    patch_size: int
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float
    reference: Reference = "hf"
    view: Literal["tiles", "crop"] = "tiles"


@dataclass(frozen=True)
class VideoProcessing:
    """Values of the video processor: of a frame the middle is seen, ``frame_size`` pixels a side.

    ``max_frames`` is what the plan counted with; a request may look at fewer.
    """

    frame_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float
    max_frames: int


@dataclass(frozen=True)
class TokenIds:
    """Special ids. ``stop`` ends an answer; ``image`` marks a place and has no embedding row."""

    image: int
    video: int | None
    bos: int | None
    stop: tuple[int, ...]
    num_text_tokens: int
    """Ids at or above this are padding rows of the table; their logits are masked."""


@dataclass(frozen=True)
class Turn:
    """Plain text around what a role says."""

    before: str
    after: str


@dataclass(frozen=True)
class PromptFormat:
    """A chat template compiled into plain text; runtime/prompt.py puts prompts together from it.

    A prompt is ``prefix``, then ``default_system`` or the system turn, then user and assistant
    turns, then ``generation_prompt``. Inside a user turn ``image`` and ``video`` are what one
    medium renders as, mark included; ``text_separator`` stands between two text parts that follow
    each other, ``text_after`` behind the last one and before a medium.

    Attributes:
        default_system: literal text in place of a system turn where none is given.
        system: None where the template refuses system turns.
        user_after_system: opens a user turn right after a system turn, in place of
            ``user.before``.
        media_first: media stand before all text of their turn, images before videos; else in the
            order of the parts.
        stripped_roles: roles whose text loses its outer white space.
        special_tokens: control tokens that the segments themselves may hold.
    """

    source: Literal["template", "builtin"]
    family: str
    prefix: str
    default_system: str
    system: Turn | None
    user: Turn
    user_after_system: str
    assistant: Turn
    generation_prompt: str
    text_separator: str
    text_after: str
    image: str
    video: str
    media_first: bool
    stripped_roles: tuple[str, ...]
    special_tokens: tuple[str, ...]


@dataclass(frozen=True)
class Precision:
    """How each part is stored, and the type it computes in.

    ``int8_route`` is ``integer`` where products of uint8 and int8 are summed by the processor's own
    instructions for that; on a processor without them the sums saturate and are wrong.
    """

    language_model: str
    lm_head: str
    vision_tower: str
    embeddings: str
    computes: Literal["float32", "float16"]
    int8_route: Literal["integer", "nbits"] | None = None


@dataclass(frozen=True)
class Source:
    """The checkpoint: hub id or folder name, hub revision if any, digest of its files."""

    id: str
    revision: str | None
    sha256: str
    layout: str


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``; ``files`` lists all but the certificate and the card."""

    schema_version: int
    variant: str
    flavour: Flavour
    precision: Precision
    plan: dict[str, Any]
    model: ModelDims
    image_processing: ImageProcessing
    tokens: TokenIds
    prompt: PromptFormat | None
    vision: GraphSpec
    decoder: GraphSpec
    embeddings: str
    tokenizer: str
    context_tokens: int
    source: Source
    reference: str
    tools: dict[str, str]
    conversion: dict[str, Any]
    files: dict[str, FileEntry]
    prefill_chunk: int = 512
    """Positions that the plan counted with for one run of a prompt; the runtime takes no more."""
    video_processing: VideoProcessing | None = None
    """None for a model without videos."""
    decoder_int8_cache: GraphSpec | None = None
    """The decoder once more, over the same weights file, with an int8 KV cache; None without it."""
    self_sha256: str = ""

    @property
    def decoders(self) -> dict[CacheType, GraphSpec]:
        """The decoder's graphs by the type of their KV cache; the float one comes first."""
        own: CacheType = self.precision.computes
        if self.decoder_int8_cache is None:
            return {own: self.decoder}
        return {own: self.decoder, "int8": self.decoder_int8_cache}
