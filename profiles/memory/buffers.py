"""Sizes of the buffers that the runtime allocates itself.

The plan sums these and the runtime calls the same functions for its own buffers, so that what was
planned and what is taken cannot drift apart. Pure arithmetic on dimensions; nothing is allocated.
"""

from __future__ import annotations

import math
from typing import Literal

from llava_edge.profiles.boards.hardware import Target
from llava_edge.profiles.models.model_dims import ModelDims, TextDims, VisionDims

CacheType = Literal["float32", "float16", "int8"]
_CACHE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "int8": 1}
_SCALE_BYTES = 4
CACHE_FLAGS: dict[str, CacheType] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""Cache types as commands name them."""

LOGIT_BYTES = 4
"""Logits leave the graph in float32 in both targets: sampling never sees fp16 ties."""

BEST_TOKENS = 64
"""Logits that a graph for GPUs hands out beside all of them, the largest first: enough for greedy
answers and for the top-k that people ask for, in 768 bytes a token."""

PIXEL_BYTES = 4
"""The image processor works in float32."""

MAX_DRAFT_TOKENS = 32
"""Longest draft of prompt lookup: beyond it a run costs more than it can give back."""

MIN_TEXT_TOKENS = 512
"""Room kept beside one full image for question and answer."""


def default_cache_type(target: Target) -> CacheType:
    """Cache type where nothing else was asked: the type the target computes in."""
    return "float32" if target == "cpu" else "float16"


def cache_value_bytes(cache: CacheType) -> int:
    """Bytes of one key or value."""
    return _CACHE_BYTES[cache]


def kv_cache_shape(text: TextDims, context_tokens: int) -> tuple[int, int, int, int]:
    """Shape of the keys, or of the values, of one layer."""
    return (1, text.num_key_value_heads, context_tokens, text.head_dim)


def cache_scale_shape(text: TextDims) -> tuple[int, int, int, int]:
    """Shape of the scales of an int8 cache's keys, or values, of one layer: one a channel."""
    return (1, text.num_key_value_heads, 1, text.head_dim)


def kv_cache_bytes(text: TextDims, context_tokens: int, cache: CacheType) -> int:
    """Keys and values of all layers for ``context_tokens`` positions.

    An int8 cache has one float32 scale a channel of each layer and part, which the graph carries.
    """
    values = math.prod(kv_cache_shape(text, context_tokens)) * _CACHE_BYTES[cache]
    scales = math.prod(cache_scale_shape(text)) * _SCALE_BYTES if cache == "int8" else 0
    return 2 * text.num_hidden_layers * (values + scales)


def rope_table_bytes(text: TextDims, context_tokens: int, target: Target) -> int:
    """Cosine and sine tables, ``[context_tokens, head_dim / 2]`` each."""
    return context_tokens * text.head_dim * (4 if target == "cpu" else 2)


def prefill_chunk_tokens(default_chunk: int, context_tokens: int) -> int:
    """Positions computed at once in prefill: the profile's chunk, never more than the context."""
    return max(1, min(default_chunk, context_tokens))


def prompt_embedding_bytes(text: TextDims, chunk_tokens: int, target: Target) -> int:
    """One chunk of ``inputs_embeds`` in host memory and the fp16 rows that are read into it."""
    return chunk_tokens * text.hidden_size * (_activation(target) + 2)


def logits_bytes(text: TextDims, kept_tokens: int = 1) -> int:
    """Logits of the last ``kept_tokens`` positions, float32."""
    return kept_tokens * text.vocab_size * LOGIT_BYTES


def tiles_per_batch(target: Target, num_tiles: int) -> int:
    """Tiles encoded at once.

    One on the CPU, where a batch is no faster and every tile costs its attention scores; on a GPU
    as many as the plan's largest image has, at most eight. Tiles of several images share batches.
    """
    return 1 if target == "cpu" else max(1, min(num_tiles, 8))


def pixel_value_bytes(vision: VisionDims, num_tiles: int) -> int:
    """``pixel_values`` of that many tiles or frames, float32 [tiles, 3, T, T]."""
    return num_tiles * 3 * vision.image_size**2 * PIXEL_BYTES


_DECODED_BYTES = {"WEBP": 18, "AVIF": 17, "TIFF": 14}
_UNKNOWN_FORMAT_BYTES = max(_DECODED_BYTES["WEBP"], _DECODED_BYTES["AVIF"])


def image_decoding_bytes(
    num_pixels: int, format: str = "", *, bands: int = 3, is_progressive: bool = False
) -> int:
    """An image file of that many pixels while it is decoded and becomes RGB.

    Pillow keeps 4 bytes a pixel; beside them stand the RGB image that is made of them, or the
    coefficients of a progressive JPEG, 2 bytes each. A WebP's decoder holds two canvases, what it
    hands over is there twice; an AVIF has planes of up to 16 bits. One byte more is for the file.

    Args:
        num_pixels: height times width.
        format: Pillow's name; empty for the largest of those that are read by default.
        bands: of a JPEG.
        is_progressive: whether a JPEG is.

    Measured with ``python -m llava_edge.bench.lab.memory.images`` (Pillow 13).
    """
    if not format:
        return num_pixels * _UNKNOWN_FORMAT_BYTES
    coefficients = 2 * bands if is_progressive else 0
    return num_pixels * _DECODED_BYTES.get(format, 5 + max(4, coefficients)) + _STRIP_BYTES


_STRIP_BYTES = 4 << 20


def image_conversion_bytes(num_pixels: int) -> int:
    """An image in memory while RGB is made of it, some rows at a time."""
    return num_pixels * 4 + _STRIP_BYTES


def video_decoding_bytes(num_pixels: int) -> int:
    """A video with frames of that many pixels while it is decoded.

    The decoder keeps the frames that others refer to: with five of them 17 (MPEG-4) to 26 (HEVC at
    4K) bytes a pixel, and PyAV itself takes 14 MiB (VmHWM, PyAV 18.1).
    """
    return 30 * num_pixels + (16 << 20)


def image_feature_shape(dims: ModelDims, num_tiles: int, num_frames: int = 0) -> tuple[int, int]:
    """Shape of the projected features of tiles, of frames behind them, and of the newline row."""
    rows = num_tiles * dims.vision.num_patches + num_frames * video_tokens_per_frame(dims.vision)
    return (rows + 1, dims.text.hidden_size)


def image_feature_bytes(dims: ModelDims, num_tiles: int, target: Target) -> int:
    """Projected features of that many tiles and the newline row."""
    return math.prod(image_feature_shape(dims, num_tiles)) * _activation(target)


def video_feature_bytes(dims: ModelDims, num_frames: int, target: Target) -> int:
    """Projected, pooled features of a video and the newline row."""
    rows = num_frames * video_tokens_per_frame(dims.vision) + 1
    return rows * dims.text.hidden_size * _activation(target)


def video_tokens_per_frame(vision: VisionDims) -> int:
    """Tokens of one frame after 2x2 pooling with stride 2; 144 at 336/14."""
    return (vision.patches_per_side // 2) ** 2


def _activation(target: Target) -> int:
    return 4 if target == "cpu" else 2
