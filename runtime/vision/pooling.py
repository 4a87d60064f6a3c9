"""Pooling: which patches of a tile or frame become one token of a video model.

Source: transformers 5.23.0 ``LlavaNextVideoPooler``: average over 2 x 2 patches with stride 2, in
front of the projector, for frames alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llava_edge.profiles.models.model_dims import VisionDims

STRIDE = 2


def pooling_index(vision: VisionDims, num_tokens: int) -> NDArray[np.int64]:
    """Patches behind each token of a tile or of a frame.

    Args:
        vision: of the model.
        num_tokens: ``num_patches`` for a tile, ``video_tokens_per_frame`` for a frame.

    Returns:
        int64 (num_tokens, 1) for a tile: each patch by itself, whose mean is itself, bit for bit;
        (num_tokens, 4) for a frame: the squares of 2 x 2 patches, row by row.

    Raises:
        ValueError: it is neither.
    """
    side = vision.patches_per_side
    patches = np.arange(side * side, dtype=np.int64)
    if num_tokens == side * side:
        return patches[:, None]
    pooled = side // STRIDE
    if num_tokens != pooled * pooled:
        raise ValueError(f"{num_tokens} tokens are neither {side * side} nor {pooled * pooled}")
    squares = patches.reshape(side, side)[: pooled * STRIDE, : pooled * STRIDE]
    squares = squares.reshape(pooled, STRIDE, pooled, STRIDE).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(squares.reshape(pooled * pooled, STRIDE * STRIDE))
