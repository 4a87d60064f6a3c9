"""Which frames of a video are looked at, in integers.

``reference``: transformers 5.23.0 ``default_sample_indices_fn``: frame i·total // N, so the last
one is never seen. ``original``: LLaVA-NeXT ``video_demo.py``: N points from the first frame to the
last, cut to whole numbers.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from llava_edge.profiles.errors import RequestError, VideoError
from llava_edge.runtime.util.choices import FrameChoice as FrameChoice


def require_frame_choice(choice: object) -> None:
    """Refuse what names no rule.

    Raises:
        RequestError: lists those that there are.
    """
    if not isinstance(choice, str) or choice not in get_args(FrameChoice):
        raise RequestError(
            f"frame choice {choice!r:.40} is unknown; there are {', '.join(get_args(FrameChoice))}"
        )


def choose_frames(total: int, wanted: int, choice: FrameChoice = "reference") -> tuple[int, ...]:
    """Numbers of the frames, ascending.

    Args:
        total: frames of the video.
        wanted: frames to look at.
        choice: the rule.

    Raises:
        VideoError: there are fewer frames than wanted.
        RequestError: there is no such rule.
    """
    require_frame_choice(choice)
    if wanted > total:
        raise VideoError(
            f"{wanted} frames were asked for; the video has {total}. Ask for at most {total}."
        )
    if choice == "original":
        # Its own function: a product of integers would round otherwise at whole numbers.
        return tuple(np.linspace(0, total - 1, wanted, dtype=int).tolist())
    return tuple(i * total // wanted for i in range(wanted))
