"""Manifest: what an artifact says of itself. Plain data; open.py reads and checks files.

One dataclass a topic. Whatever the runtime needs to answer a question stands here, so that it never
reads a checkpoint's configuration and never guesses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llava_edge.profiles.boards.hardware import Target
from llava_edge.profiles.memory.buffers import CacheType
from llava_edge.profiles.memory.formats import Int8Route
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.util.json_codec import KEY

SCHEMA_VERSION = 4
"""2 added ``decoder_int8_cache``; 3 has a wider ``PromptFormat``; 4 holds nothing that differs
between two runs of one conversion: timings, peaks and the board's free memory stand in
``conversion.json``."""

SINCE_4: tuple[str, ...] = ()
"""Optional fields of ``Manifest`` that version 4 added; manifests of earlier versions have none."""

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


Space = Literal["none", "any", "newline", "blank"]
"""White space that a template removes: none, all of it, newlines alone, or blanks alone."""

PartKind = Literal["image", "video", "text"]


@dataclass(frozen=True)
class Trim:
    """What is removed at the two ends of a text."""

    left: Space = "none"
    right: Space = "none"


@dataclass(frozen=True)
class Copy:
    """One more copy of a text: what precedes it, and its own trim."""

    before: str
    trim: Trim = Trim()


@dataclass(frozen=True)
class Cut:
    """A text begins after a mark in it (an earlier answer without its reasoning).

    Attributes:
        trim: white space that goes with the mark.
        place: of the mark that counts.
    """

    through: str
    trim: Space = "none"
    place: Literal["first", "last"] = "last"


@dataclass(frozen=True)
class Turn:
    """What surrounds the text of a role, and what happens to the text.

    Attributes:
        trim: of each text part.
        copies: further copies of the text, after the first and before ``after``.
        cut: leaves out the beginning of the text; None keeps it.
    """

    before: str
    after: str
    trim: Trim = Trim()
    copies: tuple[Copy, ...] = ()
    cut: Cut | None = None


@dataclass(frozen=True)
class Joint:
    """Text between two neighbouring parts, in place of what usually surrounds them."""

    left: Literal["start", "image", "video", "text"]
    right: Literal["image", "video", "text", "end"]
    text: str


@dataclass(frozen=True)
class PromptFormat:
    """A chat template compiled into plain text, from which ``chat_prompt.py`` composes prompts.

    A prompt is ``prefix``, then ``default_system`` or the system turn, then user and assistant
    turns, then ``generation_prompt``. The body of a user's turn is its parts, in ``part_order``:
    ``text_before`` and ``text_after`` surround each text, ``image`` and ``video`` are what one
    medium renders as, mark included. A ``Joint`` replaces what stands between two kinds of parts.

    Attributes:
        default_system: literal text in place of a system turn where none is given.
        system: None where the template refuses system turns, or shows none of their text.
        user_after_system: opens a user turn right after a system turn, in place of
            ``user.before``.
        user_after_default: opens the first user turn where no system turn is given; None for
            ``user.before``.
        part_order: groups of kinds. Parts are sorted by group, and keep their order inside one.
        body_trim: of a user's whole body, media included.
        body_joins: what a user's body begins with where it comes first (a given system turn, the
            default one), so that ``body_trim`` does not reach the body's own left end.
        system_place: the system turn precedes the first user turn or the last one.
        dates: forms of ``strftime`` in use. Each stands as ``<date:FORM>`` in the segments, and is
            replaced by the time of the request.
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
    image: str
    video: str
    special_tokens: tuple[str, ...]
    text_before: str = ""
    text_after: str = ""
    joints: tuple[Joint, ...] = ()
    part_order: tuple[tuple[PartKind, ...], ...] = (("image",), ("video",), ("text",))
    body_trim: Trim = Trim()
    body_joins: tuple[Literal["system", "default"], ...] = ()
    user_after_default: str | None = None
    system_place: Literal["first", "last"] = "first"
    dates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Precision:
    """How each part is stored, and the type it computes in.

    ``int8_route`` is ``integer`` where products of uint8 and int8 are summed by the processor's own
    instructions for that; on a processor without them the sums saturate and are wrong. Codes of
    ``two-term`` are small enough to be summed exactly everywhere (``formats.Int8Route``).
    """

    language_model: str
    lm_head: str
    vision_tower: str
    embeddings: str
    computes: Literal["float32", "float16"]
    int8_route: Int8Route | None = None


@dataclass(frozen=True)
class Source:
    """The checkpoint: hub id or folder name, hub revision if any, digest of its files."""

    id: str
    revision: str | None
    sha256: str
    layout: str


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``; the same conversion gives the same bytes of it.

    ``files`` lists every other file except the certificate, the record of the conversion and the
    card. ``plan`` is the deployment plan without what the board had free at that time. Keys within
    ``plan`` and ``conversion`` may be added under any version; nothing is read from them that
    answers depend on.
    """

    schema_version: int
    variant: str
    # Its key keeps the name that it had first, until the schema next changes.
    target: Target = field(metadata={KEY: "flavour"})
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
