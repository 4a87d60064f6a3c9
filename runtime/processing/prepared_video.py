"""PreparedVideo: a video whose frames are chosen and cut, told from others by their content."""

from __future__ import annotations

from dataclasses import dataclass

from llava_edge.runtime.processing.tile_pixels import Pixels


@dataclass(frozen=True, eq=False)
class PreparedVideo:
    """Frames of one video.

    Attributes:
        frame_pixels: float32 (num_frames, 3, T, T), in order.
        frame_digests: of each frame; see ``digest_tiles``.
        num_tokens: what they cost together.
        notes: what a user should know about how it was read; goes into the answer.
    """

    frame_pixels: Pixels
    frame_digests: tuple[bytes, ...]
    num_tokens: int
    notes: tuple[str, ...] = ()
