"""Request: a question made ready for the model: ids, and what some of them stand for.

Every image and frame is expanded to its exact cost already. ``RequestBuilder`` makes requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import numpy as np

from llava_edge.profiles.models.anyres import TileLayout
from llava_edge.runtime.processing.tile_pixels import Pixels
from llava_edge.runtime.processing.video.frame_sampling import FrameChoice, require_frame_choice
from llava_edge.runtime.processing.video.video_reader import VideoSource
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.validation import require_count, require_flag, settle


@dataclass(frozen=True)
class PromptOptions:
    """How prompt and images are read; see ``LlavaEdge.stream``.

    ``now`` is the time that a template with a date writes; None for this machine's clock.

    Raises:
        RequestError: a switch is neither True nor False.
    """

    raw: bool = False
    image_marks: bool = True
    grid: str | None = None
    now: datetime | None = None

    def __post_init__(self) -> None:
        for name in ("raw", "image_marks"):
            settle(self, **{name: require_flag(name, getattr(self, name))})


@dataclass(frozen=True)
class VideoInput:
    """A video to ask about.

    Attributes:
        source: path, bytes, or frames; see ``open_video``.
        num_frames: frames to look at; None for as many as the artifact was planned for, or as
            there are.
        frame_choice: which ones; see ``choose_frames``.

    Raises:
        RequestError: the number of frames is below 1, or there is no such choice.
    """

    source: VideoSource
    num_frames: int | None = None
    frame_choice: FrameChoice = "reference"

    def __post_init__(self) -> None:
        if self.num_frames is not None:
            settle(self, num_frames=require_count("num_frames", self.num_frames, 1))
        require_frame_choice(self.frame_choice)

    @classmethod
    def given(
        cls,
        source: VideoSource | None,
        num_frames: int | None = None,
        frame_choice: FrameChoice = "reference",
    ) -> VideoInput | None:
        """A video, or None where there is no source; the other arguments are checked either way."""
        video = cls(b"" if source is None else source, num_frames, frame_choice)
        return None if source is None else video


@dataclass(frozen=True)
class Medium:
    """An image or a video of a prompt: where it stands, and what it shows.

    Two are equal where equal contents stand at equal places. Pixels are not compared, digests are.

    Attributes:
        start: position of its first token.
        num_tokens: tokens that stand for it.
        layout: geometry of an image; None for a video, whose frames have but one.
        digests: of its tiles or frames; empty when only counted.
        pixels: tiles or frames, float32 (num_tiles or num_frames, 3, T, T); None when only counted
            or no longer needed.
    """

    start: int
    num_tokens: int
    layout: TileLayout | None = None
    digests: tuple[bytes, ...] = ()
    pixels: Pixels | None = field(default=None, compare=False, repr=False)

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return self.start + self.num_tokens


@dataclass(frozen=True)
class Request:
    """A question made ready.

    Attributes:
        ids: int64 (num_tokens,), each image and frame as many ids as it costs.
        media: images and videos in order of appearance.
        notes: what was done to images and videos that a user should know; goes into the answer.
    """

    ids: Array
    media: tuple[Medium, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return int(self.ids.size)

    @property
    def layouts(self) -> tuple[TileLayout, ...]:
        """Geometry of each image."""
        return tuple(medium.layout for medium in self.media if medium.layout is not None)

    @property
    def videos(self) -> tuple[Medium, ...]:
        """The videos."""
        return tuple(medium for medium in self.media if medium.layout is None)

    @property
    def pixel_values(self) -> tuple[Pixels, ...]:
        """Tiles of each image that has pixels here, float32 (num_tiles, 3, T, T)."""
        images = (medium for medium in self.media if medium.layout is not None)
        return tuple(image.pixels for image in images if image.pixels is not None)

    @property
    def frame_pixels(self) -> tuple[Pixels, ...]:
        """Frames of each video that has pixels here, float32 (num_frames, 3, T, T)."""
        return tuple(video.pixels for video in self.videos if video.pixels is not None)

    @property
    def image_tokens(self) -> int:
        """Tokens that stand for images."""
        return sum(medium.num_tokens for medium in self.media) - self.video_tokens

    @property
    def video_tokens(self) -> int:
        """Tokens that stand for videos."""
        return sum(video.num_tokens for video in self.videos)

    @property
    def num_tiles(self) -> int:
        """Tiles of all images and frames of all videos that have pixels here."""
        return sum(map(len, self.pixel_values)) + sum(map(len, self.frame_pixels))

    def without_prefix(self, position: int) -> Request:
        """The request from a position on, which lies in no image and no video; without notes."""
        if not position:
            return self
        rest = (medium for medium in self.media if medium.start >= position)
        media = tuple(replace(medium, start=medium.start - position) for medium in rest)
        return Request(self.ids[position:], media)

    def without_pixels(self) -> Request:
        """The same, which keeps no pixels alive."""
        return replace(self, media=tuple(replace(medium, pixels=None) for medium in self.media))


def place_media(ids: Array, token_id: int | None, counts: Sequence[int]) -> list[tuple[int, int]]:
    """Where each medium of one kind stands.

    Args:
        ids: of the prompt.
        token_id: that stands for media of this kind.
        counts: tokens of each, in order.

    Returns:
        First position and number of tokens of each.
    """
    places = np.flatnonzero(ids == token_id)
    firsts = np.cumsum((0, *counts))[: len(counts)]
    return [(int(places[first]), count) for first, count in zip(firsts, counts, strict=True)]
