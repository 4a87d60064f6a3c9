from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from llava_edge.profiles.errors import RequestError, VideoError
from llava_edge.runtime.processing.video.frame_sampling import choose_frames


@given(total=st.integers(1, 100_000), wanted=st.integers(1, 256))
def test_frames_are_those_of_the_reference(total: int, wanted: int) -> None:
    metadata = VideoMetadata(total_num_frames=total, fps=30.0)
    if wanted > total:
        with pytest.raises(VideoError, match=f"{wanted} frames were asked for"):
            choose_frames(total, wanted)
        return

    theirs = default_sample_indices_fn(metadata, num_frames=wanted)

    assert choose_frames(total, wanted) == tuple(theirs.tolist())


@pytest.mark.parametrize(
    ("total", "wanted", "chosen"),
    [
        (10, 4, (0, 2, 5, 7)),
        (10, 10, tuple(range(10))),
        (1, 1, (0,)),
        (300, 8, (0, 37, 75, 112, 150, 187, 225, 262)),
    ],
)
def test_the_last_frame_is_never_seen(total: int, wanted: int, chosen: tuple[int, ...]) -> None:
    assert choose_frames(total, wanted) == chosen


@given(total=st.integers(1, 20_000), share=st.floats(0.001, 1.0))
def test_the_original_sees_first_and_last(total: int, share: float) -> None:
    wanted = max(1, int(total * share))

    chosen = choose_frames(total, wanted, "original")

    assert chosen == tuple(np.linspace(0, total - 1, wanted, dtype=int))
    assert chosen[0] == 0
    assert chosen[-1] == (total - 1 if wanted > 1 else 0)


def test_another_rule_is_refused() -> None:
    with pytest.raises(RequestError, match="'middle' is unknown; there are reference, original"):
        choose_frames(10, 2, "middle")  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", ["first", None, ["reference"], np.zeros(2)])
def test_a_rule_that_there_is_not_is_refused(choice: Any) -> None:
    with pytest.raises(RequestError, match=r"frame choice .* is unknown"):
        choose_frames(5, 2, choice)
