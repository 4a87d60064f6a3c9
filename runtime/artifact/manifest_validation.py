"""What a manifest must fulfil beyond its types, so that no number in it can break the runtime.

The digest in a manifest says that it was not damaged, not that it was written by this tool: anyone
who makes a manifest can make its digest. A head count of zero must end here, not in a division.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.artifact.manifest import (
    FileEntry,
    GraphSpec,
    ImageProcessing,
    Manifest,
    PromptFormat,
    TokenIds,
    VideoProcessing,
)
from llava_edge.runtime.artifact.prompt_date import is_date_form

MANIFEST = "manifest.json"
CERTIFICATE = "certificate.json"
CARD = "README.md"
CONVERSION = "conversion.json"
UNLISTED = frozenset({MANIFEST, CERTIFICATE, CARD, CONVERSION})
"""Files of an artifact that its manifest does not list."""

LOST_AND_FOUND = "lost+found"
"""What a file system has of its own at its top, such as a volume of a container."""

NOT_OPENED = ("gptq/", "engines/")
"""Folders that answering does not read; what lies there is neither hashed nor judged on opening."""

MAX_FILES = 4096
MAX_NAME_DEPTH = 4
_DECODERS = {"float32": "decoder", "float16": "decoder", "int8": "decoder_int8_cache"}
_MAX_SIZE = 1 << 31
_MAX_REAL = 1e6
_MAX_COPIES = 8
_PART = re.compile(r"[A-Za-z0-9_.+-]{1,200}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_safe_name(name: str) -> bool:
    """Whether a name is a relative path of plain parts, none of which leads upwards."""
    parts = name.split("/")
    return len(parts) <= MAX_NAME_DEPTH and all(
        _PART.fullmatch(part) and part not in (".", "..") for part in parts
    )


def manifest_faults(manifest: Manifest) -> list[str]:
    """Everything impossible in a manifest; empty when there is nothing."""
    return [
        *_files(manifest.files),
        *_references(manifest),
        *_dims(manifest.model),
        *_images(manifest.image_processing, manifest.model),
        *_video(manifest.video_processing, manifest.model),
        *_tokens(manifest.tokens, manifest.model),
        *_prompt(manifest.prompt),
        *_positive(
            "",
            {
                "context_tokens": manifest.context_tokens,
                "prefill_chunk": manifest.prefill_chunk,
            },
        ),
        *_graph("vision", manifest.vision),
        *_graph("decoder", manifest.decoder),
        *_int8_cache(manifest),
    ]


def _files(files: Mapping[str, FileEntry]) -> Iterator[str]:
    if len(files) > MAX_FILES:
        yield f"lists {len(files)} files; at most {MAX_FILES} are read"
        return
    for name, entry in files.items():
        if not is_safe_name(name):
            yield f"lists {name!r:.120}, which is no plain path inside the artifact"
        elif name in UNLISTED:
            yield f"lists {name}, which is not to be listed"
        if entry.bytes < 0 or not _DIGEST.fullmatch(entry.sha256):
            yield f"has an impossible size or digest for {name!r:.120}"


def _references(manifest: Manifest) -> Iterator[str]:
    for what, name in (
        ("vision.file", manifest.vision.file),
        *((f"{_DECODERS[cache]}.file", spec.file) for cache, spec in manifest.decoders.items()),
        ("embeddings", manifest.embeddings),
        ("tokenizer", manifest.tokenizer),
    ):
        if name not in manifest.files:
            yield f"names {name!r:.120} as {what} and does not list it"
        elif name.startswith(NOT_OPENED):
            yield f"names {name!r:.120} as {what}, in a folder that is not judged on opening"


def _graph(what: str, spec: GraphSpec) -> Iterator[str]:
    if not spec.file.endswith(".onnx"):
        yield f"{what}.file is {spec.file!r:.120}, not an .onnx file"
    for tensor in (*spec.inputs, *spec.outputs):
        for size in tensor.shape:
            # bool passes for int, and True for 1.
            if not (size is None or isinstance(size, str) or (type(size) is int and size >= 0)):
                yield f"{what} tensor {tensor.name!r:.80} has a size {size!r:.40}"


def _int8_cache(manifest: Manifest) -> Iterator[str]:
    spec = manifest.decoder_int8_cache
    if spec is None:
        return
    yield from _graph("decoder_int8_cache", spec)
    if spec.file == manifest.decoder.file:
        yield f"names {spec.file!r:.120} for both types of cache"


def _dims(dims: ModelDims) -> Iterator[str]:
    vision, text = dims.vision, dims.text
    counts = {
        "vision.hidden_size": vision.hidden_size,
        "vision.intermediate_size": vision.intermediate_size,
        "vision.num_hidden_layers": vision.num_hidden_layers,
        "vision.num_attention_heads": vision.num_attention_heads,
        "vision.image_size": vision.image_size,
        "vision.patch_size": vision.patch_size,
        "text.vocab_size": text.vocab_size,
        "text.hidden_size": text.hidden_size,
        "text.intermediate_size": text.intermediate_size,
        "text.num_hidden_layers": text.num_hidden_layers,
        "text.num_attention_heads": text.num_attention_heads,
        "text.num_key_value_heads": text.num_key_value_heads,
        "text.head_dim": text.head_dim,
        "text.max_position_embeddings": text.max_position_embeddings,
    }
    yield from _positive("model.", counts)
    reals = {
        "vision.layer_norm_eps": vision.layer_norm_eps,
        "text.rms_norm_eps": text.rms_norm_eps,
        "text.rope_theta": text.rope_theta,
        "text.rope_factor": text.rope_factor,
    }
    for name, value in reals.items():
        if not (math.isfinite(value) and value > 0):
            yield f"model.{name} is {value}; it must be finite and above zero"
    if vision.patch_size > vision.image_size:
        yield f"model.vision.patch_size {vision.patch_size} exceeds the tile {vision.image_size}"
    layers = vision.feature_layers
    if not layers or not all(0 < layer <= vision.num_hidden_layers for layer in layers):
        yield f"model.vision.feature_layers {list(layers)[:8]} are outside the tower"
    if len(text.sliding_windows) != text.num_hidden_layers or any(
        window < 0 for window in text.sliding_windows
    ):
        yield "model.text.sliding_windows does not hold one window a layer"


def _images(images: ImageProcessing, dims: ModelDims) -> Iterator[str]:
    yield from _positive(
        "image_processing.",
        {"tile_size": images.tile_size, "patch_size": images.patch_size},
    )
    if (images.tile_size, images.patch_size) != (dims.vision.image_size, dims.vision.patch_size):
        yield (
            f"image_processing has tile {images.tile_size} and patch {images.patch_size}; the "
            f"model has {dims.vision.image_size} and {dims.vision.patch_size}"
        )
    sides = [side for point in images.image_grid_pinpoints for side in point]
    if len(sides) > 2 * MAX_FILES or not all(
        0 < side < _MAX_SIZE and images.tile_size > 0 and side % images.tile_size == 0
        for side in sides
    ):
        yield "image_processing.image_grid_pinpoints are not all multiples of the tile"
        return
    has_tiles = images.view == "tiles"
    if has_tiles != dims.takes_tiles:
        yield f"image_processing.view is {images.view}; the model is a {dims.model_type}"
    try:
        AnyRes(
            images.tile_size,
            images.patch_size,
            images.image_grid_pinpoints,
            images.reference,
            has_newline=has_tiles,
        )
    except RequestError as error:
        yield f"image_processing: {error}"
    values = (*images.image_mean, *images.image_std, images.rescale_factor)
    if not _are_possible(values, images.image_std):
        yield "image_processing holds a mean, deviation or factor that is impossible"


def _video(video: VideoProcessing | None, dims: ModelDims) -> Iterator[str]:
    if (video is not None) != dims.takes_video:
        yield f"video_processing does not go with a {dims.model_type}"
    if video is None:
        return
    yield from _positive("video_processing.", {"max_frames": video.max_frames})
    if video.frame_size != dims.vision.image_size:
        yield (
            f"video_processing.frame_size is {video.frame_size}; the model has "
            f"{dims.vision.image_size}"
        )
    factor = video.rescale_factor
    values = (*video.image_mean, *video.image_std, factor)
    if not _are_possible(values, (*video.image_std, factor)):
        yield "video_processing holds a mean, deviation or factor that is impossible"


def _are_possible(values: Iterable[float], divisors: Iterable[float]) -> bool:
    return all(abs(value) <= _MAX_REAL for value in values) and all(
        value >= 1 / _MAX_REAL for value in divisors
    )


def _tokens(tokens: TokenIds, dims: ModelDims) -> Iterator[str]:
    named = {"image": tokens.image, "video": tokens.video, "bos": tokens.bos}
    for name, value in named.items():
        # The image mark may lie beyond the table: it has no embedding.
        if value is not None and not 0 <= value < _MAX_SIZE:
            yield f"tokens.{name} is {value}"
    if not all(0 <= stop < _MAX_SIZE for stop in tokens.stop):
        yield f"tokens.stop holds an impossible id: {list(tokens.stop)[:8]}"
    if not 0 < tokens.num_text_tokens <= dims.text.vocab_size:
        yield f"tokens.num_text_tokens is {tokens.num_text_tokens} of {dims.text.vocab_size} rows"


def _prompt(prompt: PromptFormat | None) -> Iterator[str]:
    if prompt is None:
        return
    for kind, segment in (("image", prompt.image), ("video", prompt.video)):
        if segment.count(f"<{kind}>") != 1:
            yield f"prompt.{kind} is {segment!r:.80}; it must hold one <{kind}>"
    if sorted(kind for group in prompt.part_order for kind in group) != ["image", "text", "video"]:
        yield f"prompt.part_order is {prompt.part_order!r:.80}; it must name each kind once"
    for form in prompt.dates:
        if not is_date_form(form):
            yield f"prompt.dates holds {form!r:.80}, which is no plain form of a date"
    turns = [turn for turn in (prompt.system, prompt.user, prompt.assistant) if turn is not None]
    if any(turn.cut is not None and not turn.cut.through for turn in turns):
        yield "prompt cuts texts at an empty mark"
    # A text is written once more for each.
    if any(len(turn.copies) > _MAX_COPIES for turn in turns):
        yield f"prompt copies a text more than {_MAX_COPIES} times"


def _positive(prefix: str, values: Mapping[str, int]) -> Iterator[str]:
    for name, value in values.items():
        if not 0 < value < _MAX_SIZE:
            yield f"{prefix}{name} is {value}; it must lie between 1 and {_MAX_SIZE - 1}"
