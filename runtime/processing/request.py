"""Request: a question made ready for the model: ids, and the pixels behind some of them.

Every image and frame is expanded to its exact cost already. ``RequestBuilder`` makes requests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

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
class PlacedMedium:
    """An image or a video of a prompt by content: equal ones have equal features at equal places.

    Attributes:
        start: position of its first token.
        stop: position behind its last one.
        digests: of its tiles or frames.
        layout: geometry of an image; None for a video, whose frames have but one.
    """

    start: int
    stop: int
    digests: tuple[bytes, ...]
    layout: TileLayout | None = None


@dataclass(frozen=True)
class Request:
    """A question made ready.

    Attributes:
        ids: int64 (num_tokens,), each image and frame as many ids as it costs.
        layouts: geometry of each image, in order of appearance.
        pixel_values: tiles of each image, float32 (num_tiles, 3, T, T); empty when only counted.
        frame_pixels: frames of each video, float32 (num_frames, 3, T, T), in order of appearance;
            empty when only counted.
        video_counts: tokens of each video.
        placed: what each image and video is and where it stands, in order; empty when only counted.
        notes: what was done to images and videos that a user should know; goes into the answer.
    """

    ids: Array
    layouts: tuple[TileLayout, ...]
    pixel_values: tuple[Pixels, ...]
    frame_pixels: tuple[Pixels, ...] = ()
    video_counts: tuple[int, ...] = ()
    placed: tuple[PlacedMedium, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return int(self.ids.size)

    @property
    def image_tokens(self) -> int:
        """Tokens that stand for images."""
        return sum(layout.num_image_tokens for layout in self.layouts)

    @property
    def num_tiles(self) -> int:
        """Tiles of all images and frames of all videos that have pixels here."""
        return sum(map(len, self.pixel_values)) + sum(map(len, self.frame_pixels))

    @property
    def video_tokens(self) -> int:
        """Tokens that stand for videos."""
        return sum(self.video_counts)

    def without_prefix(self, position: int) -> Request:
        """The request, with pixels, from a position on, which lies in no image and no video."""
        if not position:
            return self
        before = [medium for medium in self.placed if medium.start < position]
        videos = sum(medium.layout is None for medium in before)
        images = len(before) - videos
        return Request(
            self.ids[position:],
            self.layouts[images:],
            self.pixel_values[images:],
            self.frame_pixels[videos:],
            self.video_counts[videos:],
            tuple(
                replace(medium, start=medium.start - position, stop=medium.stop - position)
                for medium in self.placed[len(before) :]
            ),
        )
