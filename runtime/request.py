"""Request: a question made ready for the model, all of it checked before any work starts.

Prompt, images and a video go in; token ids with every image and frame expanded to its exact cost,
and their pixels, come out. Knows no session.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llava_edge.profiles.anyres import TileLayout, lower_pinpoints
from llava_edge.profiles.buffers import video_tokens_per_frame
from llava_edge.profiles.errors import PromptError, VideoError
from llava_edge.runtime.arguments import require_count
from llava_edge.runtime.clip import VideoSource, open_clip
from llava_edge.runtime.frame_choice import FrameChoice, choose_frames
from llava_edge.runtime.image_processor import ImageProcessor
from llava_edge.runtime.images import ImageSource, open_image
from llava_edge.runtime.limits import Limits
from llava_edge.runtime.manifest import ImageProcessing, Manifest
from llava_edge.runtime.prompt import Piece, compose, raw_pieces, user_message
from llava_edge.runtime.session import Array
from llava_edge.runtime.tokenizer import Tokenizer
from llava_edge.runtime.video_processor import VideoProcessor


@dataclass(frozen=True)
class PromptOptions:
    """How prompt and images are read; see ``LlavaEdge.stream``."""

    raw: bool = False
    image_marks: bool = True
    grid: str | None = None


@dataclass(frozen=True)
class VideoInput:
    """A video to ask about.

    Attributes:
        source: path, bytes, or frames; see ``open_clip``.
        num_frames: frames to look at; None for as many as the artifact was planned for, or as
            there are.
        frame_choice: which ones; see ``choose_frames``.
    """

    source: VideoSource
    num_frames: int | None = None
    frame_choice: FrameChoice = "reference"


@dataclass(frozen=True)
class Request:
    """A question made ready.

    Attributes:
        ids: int64 (num_tokens,), each image and frame as many ids as it costs.
        layouts: geometry of each image, in order of appearance.
        pixel_values: tiles of each image, float32 (num_tiles, 3, T, T); empty when only counted.
        preprocess_seconds: what making it took.
        frame_pixels: of the video's frames, float32 (num_frames, 3, T, T); None without a video,
            and when only counted.
        video_tokens: tokens that stand for the video.
    """

    ids: Array
    layouts: tuple[TileLayout, ...]
    pixel_values: tuple[Array, ...]
    preprocess_seconds: float
    frame_pixels: Array | None = None
    video_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return int(self.ids.size)

    @property
    def image_tokens(self) -> int:
        """Tokens that stand for images."""
        return sum(layout.num_image_tokens for layout in self.layouts)


class RequestBuilder:
    """Makes requests for one artifact."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, limits: Limits) -> None:
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._limits = limits

    @property
    def max_tiles(self) -> int:
        """Most tiles of one image on the artifact's own grid, thumbnail included."""
        return ImageProcessor(self._manifest.image_processing).anyres.max_tiles

    def build(
        self,
        prompt: str,
        images: Sequence[ImageSource],
        options: PromptOptions,
        *,
        video: VideoInput | None = None,
        with_pixels: bool = True,
    ) -> Request:
        """Check and prepare.

        Args:
            prompt: text of the user, or a finished prompt with ``options.raw``.
            images: one for each mark.
            options: how to read them.
            video: one at most.
            with_pixels: cut the tiles as well; without, only tokens are counted.

        Raises:
            ImageError: an image is refused.
            VideoError: the video is refused.
            DependencyError: a video is to be decoded and PyAV is not installed.
            PromptError: the prompt is empty or too large, or marks and images do not match.
            RequestError: the grid is unknown or larger than the artifact's.
        """
        start = time.perf_counter()
        self._check_sizes(prompt, images)
        pieces = self._pieces(prompt, len(images), options, num_videos=int(video is not None))
        processor = ImageProcessor(self._processing(options.grid))
        layouts: list[TileLayout] = []
        pixel_values: list[Array] = []
        for source in images:
            image = open_image(source, self._limits)
            if with_pixels:
                tiles = processor.preprocess(image)
                layouts.append(tiles.layout)
                pixel_values.append(tiles.pixel_values)
            else:
                layouts.append(processor.anyres.layout(image.height, image.width))
        counts = [layout.num_image_tokens for layout in layouts]
        encoded = self._tokenizer.encode_pieces(pieces)
        frame_pixels, frame_counts = None, []
        if video is not None:
            frame_pixels, num_frames = self._frames(video, with_pixels=with_pixels)
            frame_counts = [num_frames * video_tokens_per_frame(self._manifest.model.vision)]
        ids = self._tokenizer.expand_media(encoded, counts, frame_counts)
        return Request(
            ids=np.asarray(ids, np.int64),
            layouts=tuple(layouts),
            pixel_values=tuple(pixel_values),
            preprocess_seconds=time.perf_counter() - start,
            frame_pixels=frame_pixels,
            video_tokens=sum(frame_counts),
        )

    def _frames(self, video: VideoInput, *, with_pixels: bool) -> tuple[Array | None, int]:
        """Pixels of the chosen frames, and their number."""
        processing = self._manifest.video_processing
        if processing is None:
            raise VideoError(
                f"a video was given; {self._manifest.variant} is no video model. Give pictures, or "
                "convert a LLaVA-NeXT-Video checkpoint."
            )
        most = processing.max_frames
        if video.num_frames is not None:
            require_count("num_frames", video.num_frames, 1)
            if video.num_frames > most:
                raise VideoError(
                    f"{video.num_frames} frames were asked for; the artifact was planned for at "
                    f"most {most}. Ask for fewer, or convert again with --video "
                    f"{video.num_frames}."
                )
        with open_clip(video.source, self._limits) as clip:
            wanted = min(most, clip.total) if video.num_frames is None else video.num_frames
            numbers = choose_frames(clip.total, wanted, video.frame_choice)
            if not with_pixels:
                return None, wanted
            pixels = VideoProcessor(processing).preprocess(clip.frames(numbers), wanted)
        return pixels, wanted

    def _check_sizes(self, prompt: str, images: Sequence[ImageSource]) -> None:
        if not isinstance(prompt, str):
            raise PromptError(f"the prompt is a {type(prompt).__name__}; it must be a str")
        if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
            # An array is iterable as well, and its rows would pass for pictures.
            raise PromptError(
                f"images is a {type(images).__name__}; it must be a list of images. Wrap the one "
                "you have: [image]"
            )
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise PromptError(
                "the prompt holds bytes that are no text (lone surrogates); give it as UTF-8"
            )
        if len(images) > self._limits.max_images:
            raise PromptError(
                f"{len(images)} images were given; at most {self._limits.max_images} are accepted"
            )
        if len(prompt) > self._limits.max_prompt_characters:
            raise PromptError(
                f"the prompt has {len(prompt)} characters; at most "
                f"{self._limits.max_prompt_characters} are accepted"
            )

    def _pieces(
        self, prompt: str, num_images: int, options: PromptOptions, num_videos: int
    ) -> tuple[Piece, ...]:
        if options.raw:
            return raw_pieces(prompt, images=num_images, videos=num_videos)
        prompt_format = self._manifest.prompt
        if prompt_format is None:
            raise PromptError(
                "this artifact has no chat template; give a finished prompt with raw=True (--raw)"
            )
        message = user_message(prompt, images=num_images, videos=num_videos)
        return compose(prompt_format, (message,), image_marks=options.image_marks)

    def _processing(self, grid: str | None) -> ImageProcessing:
        processing = self._manifest.image_processing
        if grid is None:
            return processing
        lowered = lower_pinpoints(processing.image_grid_pinpoints, grid, processing.tile_size)
        return replace(processing, image_grid_pinpoints=lowered)
