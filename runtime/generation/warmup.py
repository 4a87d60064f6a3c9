"""Warm-up: what a GPU is made to run before the first request.

ONNX Runtime's memory for activations only grows, by regions that never become one, so that small
requests could leave regions that large ones have no use for. Run in this order, and before any
request, the largest batch and chunk leave room for all others (``device_runs`` counts just that).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.profiles.memory.buffers import MAX_DRAFT_TOKENS, video_tokens_per_frame
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.cuda_encoder import OrtDeviceEncoder
from llava_edge.runtime.vision.encoder import VisionEncoder
from llava_edge.runtime.vision.encoder_protocols import DeviceEncoder, TileEncoder

LEAST_CHUNK = 64
"""Positions at once below which a chunk gives back little and costs much."""


def warm_up(
    encoder: TileEncoder | DeviceEncoder, decoder: Decoder, dims: ModelDims
) -> tuple[str, ...]:
    """Run tower and decoder at their largest; the decoder is empty behind it.

    Where memory does not suffice, tiles and positions are computed fewer at once and drafts are
    left out: slower, and nothing of an answer is lost. Where not even the least runs, requests find
    out themselves.

    Args:
        encoder: a tower in ONNX Runtime; of another engine, which takes its memory when it is
            opened, nothing is run.
        decoder: nothing in its cache.
        dims: of the model.

    Returns:
        What was reduced and why, a sentence each.

    Raises:
        EngineError: it does not run.
    """
    said = []
    if isinstance(encoder, VisionEncoder | OrtDeviceEncoder):
        asked = encoder.tiles_per_batch
        fits, why, _ = _most_that_run(asked, 1, lambda tiles: _run_tower(encoder, dims, tiles))
        encoder.tiles_per_batch = fits
        if why:
            said.append(f"tiles encoded {fits} at once, not {asked}: {why}")
    asked = decoder.chunk_tokens
    fits, why, ran = _most_that_run(
        asked, LEAST_CHUNK, lambda tokens: _run_prompts(decoder, tokens)
    )
    decoder.chunk_tokens = fits
    if why:
        said.append(f"prompts computed by {fits} tokens at once, not {asked}: {why}")
    rows = np.zeros(
        (min(1 + MAX_DRAFT_TOKENS, decoder.capacity), dims.text.hidden_size), np.float16
    )
    try:
        decoder.rewind(0)
        decoder.verify_draft(rows)
    except OutOfMemoryError as error:
        decoder.drafts = False
        said.append(f"no draft is checked ahead: {error}")
        # What failed gave everything back.
        with suppress(OutOfMemoryError):
            _run_prompts(decoder, decoder.chunk_tokens)
    decoder.rewind(0)
    # Last: all memory is there by now, and a session that has recorded gives none back any more.
    if ran:
        with suppress(OutOfMemoryError):
            decoder.step(rows[0])
        decoder.rewind(0)
    return tuple(said)


def _most_that_run(asked: int, least: int, run: Callable[[int], None]) -> tuple[int, str, bool]:
    """The first of a number, its half, and so on, that runs, or the least.

    Returns:
        It; why it is not the first; whether it ran.
    """
    size, why = asked, ""
    while True:
        try:
            run(size)
        except OutOfMemoryError as error:
            why = str(error)
        else:
            return size, why, True
        if size <= least:
            return size, why, False
        size = max(least, size // 2)


def _run_tower(encoder: VisionEncoder | OrtDeviceEncoder, dims: ModelDims, num_tiles: int) -> None:
    vision, hidden = dims.vision, dims.text.hidden_size
    tiles = np.zeros((num_tiles, 3, vision.image_size, vision.image_size), np.float32)
    if isinstance(encoder, VisionEncoder):
        for rows in [vision.num_patches, *([video_tokens_per_frame(vision)] * dims.takes_video)]:
            encoder.encode(tiles, np.zeros((num_tiles, rows, hidden), np.float16))
    else:
        encoder.encode_rows(tiles, encoder.new_rows((num_tiles * vision.num_patches, hidden)), 0)


def _run_prompts(decoder: Decoder, chunk: int) -> None:
    def fill(_start: int, _stop: int, out: Array) -> None:
        # Not whatever lay there: keys and values that are no numbers would stay in the cache.
        out[...] = 0

    decoder.rewind(0)
    decoder.prefill(chunk, fill)
    # Behind one position at least, which is no first chunk and may take other kernels.
    later = min(chunk, decoder.capacity - 1)
    if later:
        decoder.rewind(min(decoder.length, decoder.capacity - later))
        decoder.prefill(later, fill)
