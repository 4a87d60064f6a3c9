"""Estimate: about how long verifying will take, said before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from llava_edge.convert.verify.probes import NUM_STEPS, Probe
from llava_edge.profiles.anyres import AnyRes
from llava_edge.profiles.buffers import video_tokens_per_frame
from llava_edge.profiles.model_dims import ModelDims
from llava_edge.profiles.parameters import decoder_matrices, vision_parameters

_SIDE = 1024
_TEXT_TOKENS = 48
_PASSES = 3
"""The reference by the artifact's weights, by the checkpoint's, and the artifact itself."""
_OVERHEAD_SECONDS = 5.0
_BYTES_PER_SECOND = 1e9
"""Reading and converting weights, for every pass of every probe."""


def estimate_seconds(dims: ModelDims, anyres: AnyRes, probes: Sequence[Probe]) -> float:
    """Seconds of verifying with some probes, from this machine's rate on one matrix product."""
    rate = _measured_rate()
    tokens = tiles = 0
    for probe in probes:
        tokens += _TEXT_TOKENS + NUM_STEPS
        for image in probe.images:
            layout = anyres.layout(image.height, image.width)
            tokens += layout.num_image_tokens
            tiles += layout.num_tiles
        tokens += len(probe.video) * video_tokens_per_frame(dims.vision)
        tiles += len(probe.video)
    body = sum(m.rows * m.columns * m.count for m in decoder_matrices(dims.text))
    vision = vision_parameters(dims.vision, dims.vision.num_blocks_used)
    work = 2.0 * (tokens * body + tiles * dims.vision.num_patches * vision)
    reading = len(probes) * 2.0 * body / _BYTES_PER_SECOND
    return _OVERHEAD_SECONDS + _PASSES * (work / rate + reading)


def _measured_rate() -> float:
    """Float operations a second of a matrix product on this machine."""
    left, right = torch.ones(_SIDE, _SIDE), torch.ones(_SIDE, _SIDE)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2.0 * _SIDE**3 / max(best, 1e-6)
