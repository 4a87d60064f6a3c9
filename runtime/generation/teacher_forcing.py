"""ForcedRun: what a request came to on its way to the decoder."""

from __future__ import annotations

from dataclasses import dataclass

from llava_edge.runtime.processing.request import Request
from llava_edge.runtime.util.arrays import Array


@dataclass(frozen=True)
class ForcedRun:
    """Intermediate values of one request, see ``LlavaEdge.replay``.

    Attributes:
        request: ids, geometry and pixels.
        features: (rows, hidden) in the target's type: the patches of all tiles of all images, one
            tile behind the other, then the pooled ones of all frames, without the newline row.
    """

    request: Request
    features: Array
