"""Warm-up: what a GPU is made to run before the first request.

ONNX Runtime's memory for activations only grows, by regions that never become one, so that small
requests could leave regions that large ones have no use for. Run in this order, and before any
request, the largest batch and chunk leave room for all others (``device_runs`` counts just that).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from llava_edge.profiles.buffers import (
    MAX_DRAFT_TOKENS,
    runs_before_requests,
    video_tokens_per_frame,
)
from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.profiles.model_dims import ModelDims
from llava_edge.runtime.decoder import Decoder
from llava_edge.runtime.ort_device_vision import OrtDeviceEncoder
from llava_edge.runtime.prompt_embedder import DeviceEncoder, TileEncoder
from llava_edge.runtime.session import Array
from llava_edge.runtime.vision import VisionEncoder

_LOG = logging.getLogger(__name__)


def warm_up(
    encoder: TileEncoder | DeviceEncoder, decoder: Decoder, dims: ModelDims, batch_tiles: int
) -> None:
    """Run tower and decoder at their largest; the decoder is empty behind it.

    Where memory does not suffice for that, it may still do for smaller requests, which then find
    out themselves.

    Args:
        encoder: a tower in ONNX Runtime; of another engine, which takes its memory when it is
            opened, nothing is run.
        decoder: nothing in its cache.
        dims: of the model.
        batch_tiles: tiles encoded at once.

    Raises:
        EngineError: it does not run.
    """
    runs: list[tuple[str, Callable[[], None]]] = [
        ("batch of tiles", lambda: _run_tower(encoder, dims, batch_tiles)),
        ("chunk of a prompt", lambda: _run_prompts(decoder, dims.text.hidden_size)),
        ("decode step", lambda: _run_steps(decoder, dims.text.hidden_size)),
    ]
    for what, run in runs:
        try:
            run()
        except OutOfMemoryError as error:
            _LOG.warning("the largest %s does not fit; smaller ones may: %s", what, error)
        finally:
            decoder.rewind(0)


def _run_tower(encoder: TileEncoder | DeviceEncoder, dims: ModelDims, batch_tiles: int) -> None:
    vision, hidden = dims.vision, dims.text.hidden_size
    tiles = np.zeros((batch_tiles, 3, vision.image_size, vision.image_size), np.float32)
    if isinstance(encoder, VisionEncoder):
        for rows in [vision.num_patches, *([video_tokens_per_frame(vision)] * dims.takes_video)]:
            encoder.encode(tiles, np.zeros((batch_tiles, rows, hidden), np.float16))
    elif isinstance(encoder, OrtDeviceEncoder):
        matrix = encoder.new_rows((batch_tiles * vision.num_patches, hidden))
        encoder.encode_rows(tiles, matrix, 0)


def _run_prompts(decoder: Decoder, hidden: int) -> None:
    def fill(_start: int, _stop: int, out: Array) -> None:
        # Not whatever lay there: keys and values that are no numbers would stay in the cache.
        out[...] = 0

    chunk = decoder.chunk_tokens
    decoder.prefill(chunk, fill)
    for tokens in runs_before_requests(chunk):
        # Behind one position at least: the first chunk is the one above.
        tokens = min(tokens, decoder.capacity - 1)
        if tokens:
            decoder.rewind(min(decoder.length, decoder.capacity - tokens))
            decoder.prefill(tokens, fill)


def _run_steps(decoder: Decoder, hidden: int) -> None:
    rows = np.zeros((min(1 + MAX_DRAFT_TOKENS, decoder.capacity), hidden), np.float16)
    decoder.try_steps(rows)
    decoder.rewind(0)
    # Last: where a step is recorded, all memory is there by now.
    decoder.step(rows[0])
