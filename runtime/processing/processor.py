"""RequestBuilder: makes requests, all of them checked before any work starts.

Prompt, images and videos go in; token ids with every image and frame expanded to its exact cost,
and their pixels, come out. Knows no session.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import IOBase
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL.Image import Image

from llava_edge.profiles.errors import PromptError, RequestError, VideoError
from llava_edge.profiles.memory.buffers import video_tokens_per_frame
from llava_edge.profiles.models.anyres import GRID_NAMES, TileLayout, lower_pinpoints
from llava_edge.runtime.artifact.manifest import Manifest, PromptFormat, VideoProcessing
from llava_edge.runtime.processing.degradation import Fallback
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.processing.images.loading import (
    ImageSource,
    OpenedImage,
    load_image,
    open_image,
)
from llava_edge.runtime.processing.media import PreparedImage
from llava_edge.runtime.processing.prepared_video import PreparedVideo
from llava_edge.runtime.processing.request import (
    Medium,
    PromptOptions,
    Request,
    VideoInput,
    place_media,
)
from llava_edge.runtime.processing.text.chat_prompt import Piece, compose, raw_pieces, user_message
from llava_edge.runtime.processing.text.finished_prompt import warn_if_finished
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from llava_edge.runtime.processing.tile_pixels import digests_of
from llava_edge.runtime.processing.tile_preview import draw_tiles, stacked
from llava_edge.runtime.processing.video.frame_sampling import choose_frames
from llava_edge.runtime.processing.video.video_processor import VideoProcessor
from llava_edge.runtime.processing.video.video_reader import Video, open_video
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.limits import Limits
from llava_edge.runtime.util.validation import require_count

_LONG_CHARACTERS = 32_768
_ONE_IMAGE = (str, bytes, bytearray, memoryview)


class RequestBuilder:
    """Makes requests for one artifact.

    Raises:
        RequestError: the limits are none.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, limits: Limits) -> None:
        if not isinstance(limits, Limits):
            raise RequestError(f"limits is {limits!r:.60}; it must be a Limits object")
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._limits = limits

    @property
    def limits(self) -> Limits:
        """Bounds on what is accepted."""
        return self._limits

    @property
    def max_tiles(self) -> int:
        """Most tiles of one image on the artifact's own grid, thumbnail included."""
        return self.processor().anyres.max_tiles

    def build(
        self,
        prompt: str,
        images: Iterable[ImageSource | OpenedImage] | None,
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
            with_pixels: cut tiles and frames as well; without, only tokens are counted.

        Raises:
            ImageError: an image is refused.
            VideoError: the video is refused.
            DependencyError: a video is to be decoded and PyAV is not installed.
            PromptError: the prompt is empty or too large, or marks and images do not match.
            RequestError: the grid is unknown or larger than the artifact's.
        """
        listed = self.check(prompt, images, options, video)
        if not options.raw and self._manifest.prompt is not None:
            warn_if_finished(self._manifest.prompt, prompt)
        return self._build(prompt, listed, options, video=video, with_pixels=with_pixels)

    def _build(
        self,
        prompt: str,
        images: Sequence[ImageSource | OpenedImage],
        options: PromptOptions,
        *,
        video: VideoInput | None = None,
        with_pixels: bool = True,
    ) -> Request:
        pieces = self._pieces(prompt, len(images), options, num_videos=int(video is not None))
        processor = self.processor(options.grid)
        if with_pixels:
            prepared = [self.prepare(source, processor) for source in images]
            videos = [] if video is None else [self.prepare_video(video)]
            return self.assemble(pieces, prepared, videos)
        opened = (open_image(source, self._limits) for source in images)
        layouts = [processor.anyres.layout(image.height, image.width) for image in opened]
        counts: tuple[int, ...] = ()
        if video is not None:
            with self._opened(video) as opened_video:
                counts = (self._video_tokens(self._num_frames(video, opened_video)),)
        ids = self._expand(pieces, [layout.num_image_tokens for layout in layouts], counts)
        return Request(ids, self._placed(ids, layouts, counts))

    def check(
        self,
        prompt: str,
        images: Iterable[ImageSource | OpenedImage] | None,
        options: PromptOptions,
        video: VideoInput | None = None,
    ) -> Sequence[ImageSource | OpenedImage]:
        """Check all that needs no picture to be opened; takes the arguments of ``build``.

        Returns:
            The images as a list.

        Raises:
            PromptError: as ``build``.
            RequestError: as ``build``.
            VideoError: the artifact is for no video, or for fewer frames.
        """
        self.check_text(prompt)
        listed = self.check_images(images)
        self.processor(options.grid)
        if video is not None:
            self._check_frames(video)
        self._pieces(prompt, len(listed), options, num_videos=int(video is not None))
        return listed

    def steps(
        self,
        prompt: str,
        images: Sequence[ImageSource | OpenedImage],
        options: PromptOptions,
        video: VideoInput | None,
    ) -> list[Fallback]:
        """Ways to ask the same with fewer tiles, then with fewer frames, each less than the last.

        Takes the arguments of ``build``.
        """
        steps: list[Fallback] = []

        def add(what: str, tiles: int, frames: int) -> None:
            less = partial(self._build, prompt, images, options, video=video)
            steps.append(Fallback(what, tiles, frames, less))

        frames = 0 if video is None else self._most_frames(video)
        lowered = ""
        for grid, processor in self.lower_grids(options.grid) if images else ():
            options = replace(options, grid=grid)
            lowered = f"grid lowered to {grid}"
            add(lowered, processor.anyres.max_tiles, frames)
        tiles = 1 if images else 0
        while video is not None and frames > 1:
            frames //= 2
            video = replace(video, num_frames=frames)
            what = f"{lowered} and frames" if lowered else "frames lowered"
            add(f"{what} to {frames}", tiles, frames)
        return steps

    def lower_grids(self, grid: str | None) -> list[tuple[str, ImageProcessor]]:
        """Grids below one, largest first, with what cuts images on them."""
        lower: list[tuple[str, ImageProcessor]] = []
        most = self.processor(grid).anyres.max_tiles
        for name in reversed(GRID_NAMES):
            try:
                processor = self.processor(name)
            except RequestError:
                # Larger than the artifact's, or it shares no candidate with the artifact's.
                continue
            if processor.anyres.max_tiles < most:
                most = processor.anyres.max_tiles
                lower.append((name, processor))
        return lower

    @overload
    def capped(
        self, images: Sequence[ImageSource], grid: str | None, max_image_tokens: int
    ) -> tuple[list[OpenedImage], str | None, str]: ...

    @overload
    def capped(
        self,
        images: Sequence[ImageSource | PreparedImage],
        grid: str | None,
        max_image_tokens: int,
    ) -> tuple[list[OpenedImage | PreparedImage], str | None, str]: ...

    def capped(
        self,
        images: Sequence[ImageSource | PreparedImage],
        grid: str | None,
        max_image_tokens: int,
    ) -> tuple[list[Any], str | None, str]:
        """The largest grid on which images take no more tokens than a bound.

        Args:
            images: as in ``build``, or cut already: those stay as they are, or become thumbnails
                where the others being thumbnails does not suffice.
            grid: not above this one.
            max_image_tokens: of all images together.

        Returns:
            The images, opened; the grid; what was lowered and why, empty if nothing.

        Raises:
            ImageError: an image is refused.
            PromptError: what is given is no list of images.
            RequestError: the grid is unknown, or not even thumbnails are within the bound.
        """
        max_image_tokens = require_count("max_image_tokens", max_image_tokens, 1)
        opened = [
            source if isinstance(source, PreparedImage) else load_image(source, self._limits)
            for source in images
        ]
        least, why = 0, f"max_image_tokens is {max_image_tokens}"
        for name, processor in [(grid, self.processor(grid)), *self.lower_grids(grid)]:
            least = sum(_image_tokens(image, processor) for image in opened)
            if least <= max_image_tokens:
                return opened, name, "" if name == grid else f"grid lowered to {name}: {why}"
        if any(isinstance(image, PreparedImage) for image in opened):
            lowest = self.processor("base")
            opened = [
                image.thumbnail(lowest.anyres) if isinstance(image, PreparedImage) else image
                for image in opened
            ]
            least = sum(_image_tokens(image, lowest) for image in opened)
            if least <= max_image_tokens:
                return opened, "base", f"images lowered to their thumbnails: {why}"
        raise RequestError(
            f"at most {max_image_tokens} tokens for images were asked (max_image_tokens); "
            f"{len(opened)} images take {least} on the lowest grid. Raise the bound or give fewer "
            "images."
        )

    def prompt_format(self) -> PromptFormat:
        """Segments of the model's chat template.

        Raises:
            PromptError: the artifact has none.
        """
        found = self._manifest.prompt
        if found is None:
            raise PromptError(
                "this artifact has no chat template; give a finished prompt with raw=True (--raw)"
            )
        return found

    def prepare(
        self, source: ImageSource | OpenedImage, processor: ImageProcessor
    ) -> PreparedImage:
        """Open an image and cut its tiles.

        Raises:
            ImageError: it is refused.
        """
        opened = load_image(source, self._limits)
        tiles = processor.preprocess(opened.image)
        digests = digests_of(tiles.pixel_values)
        return PreparedImage(tiles.layout, tiles.pixel_values, digests, opened.notes)

    def prepare_video(self, video: VideoInput) -> PreparedVideo:
        """Open a video, choose frames and cut them.

        Raises:
            VideoError: it is refused, or the artifact takes none.
            DependencyError: it is to be decoded and PyAV is not installed.
            RequestError: the number of frames or their choice is out of range.
        """
        processor = VideoProcessor(self._video_processing())
        with self._opened(video) as opened:
            most = self._most_frames(video)
            # A file is decoded once where every packet gives a frame, as in nearly all.
            total = opened.expected if most <= opened.expected else opened.total
            while True:
                wanted = min(most, total) if video.num_frames is None else most
                numbers = choose_frames(total, wanted, video.frame_choice)
                pixels = processor.preprocess(opened.frames(numbers), len(numbers))
                if opened.total == total:
                    break
                total = opened.total
            notes = opened.notes
        return PreparedVideo(pixels, digests_of(pixels), self._video_tokens(len(numbers)), notes)

    @contextmanager
    def _opened(self, video: VideoInput) -> Iterator[Video]:
        self._check_frames(video)
        with open_video(video.source, self._limits) as opened:
            yield opened

    def _num_frames(self, video: VideoInput, opened: Video) -> int:
        """Frames to look at."""
        most = self._most_frames(video)
        found = opened.count(most)
        return found if video.num_frames is None else len(choose_frames(found, most))

    def _check_frames(self, video: VideoInput) -> int:
        """Most frames of a video."""
        most = self._video_processing().max_frames
        if video.num_frames is not None and video.num_frames > most:
            raise VideoError(
                f"{video.num_frames} frames were asked for; the artifact was planned for at most "
                f"{most}. Ask for fewer, or convert again with --video {video.num_frames}."
            )
        return most

    def _most_frames(self, video: VideoInput) -> int:
        most = self._video_processing().max_frames
        return most if video.num_frames is None else min(most, video.num_frames)

    def _video_processing(self) -> VideoProcessing:
        processing = self._manifest.video_processing
        if processing is None:
            raise VideoError(
                f"a video was given; {self._manifest.variant} is no video model. Give pictures, or "
                "convert a LLaVA-NeXT-Video checkpoint."
            )
        return processing

    def _video_tokens(self, num_frames: int) -> int:
        return num_frames * video_tokens_per_frame(self._manifest.model.vision)

    def draw_tiles(self, images: Sequence[ImageSource], grid: str | None = None) -> Image:
        """See ``LlavaEdge.draw_tiles``."""
        images = self.check_images(images)
        if not images:
            raise PromptError("tiles were to be drawn, and there is no image; give at least one")
        processor = self.processor(grid)
        anyres = processor.anyres
        drawn = []
        for number, source in enumerate(images, start=1):
            image = open_image(source, self._limits)
            name = Path(source).name if isinstance(source, (str, os.PathLike)) else "image"
            title = f"{name:.80}" + (f"  ({number} of {len(images)})" if len(images) > 1 else "")
            layout = anyres.layout(image.height, image.width)
            middle = processor.middle(image)
            drawn.append(draw_tiles(image, layout, anyres.patches_per_side, title, middle))
        return stacked(drawn)

    def assemble(
        self,
        pieces: Sequence[Piece],
        images: Sequence[PreparedImage],
        videos: Sequence[PreparedVideo] = (),
    ) -> Request:
        """A request of a composed prompt and its media, one for each of its marks, in order."""
        layouts = [image.layout for image in images]
        counts = [video.num_tokens for video in videos]
        ids = self._expand(pieces, [layout.num_image_tokens for layout in layouts], counts)
        shown = iter(images), iter(videos)
        media = []
        for medium in self._placed(ids, layouts, counts):
            if medium.layout is None:
                video = next(shown[1])
                digests, pixels = video.frame_digests, video.frame_pixels
            else:
                image = next(shown[0])
                digests, pixels = image.tile_digests, image.pixel_values
            media.append(replace(medium, digests=digests, pixels=pixels))
        return Request(
            ids,
            tuple(media),
            notes=tuple(
                note
                for notes in (*(i.notes for i in images), *(v.notes for v in videos))
                for note in notes
            ),
        )

    def _placed(
        self, ids: Array, layouts: Sequence[TileLayout], video_counts: Sequence[int]
    ) -> tuple[Medium, ...]:
        """Where images and videos stand, in order of appearance."""
        counts = [layout.num_image_tokens for layout in layouts]
        images = place_media(ids, self._tokenizer.image_id, counts)
        videos = place_media(ids, self._tokenizer.video_id, video_counts)
        media = [Medium(*place, layout) for place, layout in zip(images, layouts, strict=True)]
        media += [Medium(*place) for place in videos]
        return tuple(sorted(media, key=lambda medium: medium.start))

    def _expand(
        self, pieces: Sequence[Piece], image_counts: Sequence[int], video_counts: Sequence[int]
    ) -> Array:
        encoded = self._tokenizer.encode_pieces(pieces)
        ids = self._tokenizer.expand_media(encoded, image_counts, video_counts)
        return np.asarray(ids, np.int64)

    def check_text(self, prompt: str, what: str = "the prompt") -> None:
        """Refuse what is no text, or too much of it.

        Args:
            prompt: text of a user, or of the system turn.
            what: it is, for messages.

        Raises:
            PromptError: says which.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"{what} is a {type(prompt).__name__}; it must be a str")
        if len(prompt) > self._limits.max_prompt_characters:
            raise PromptError(
                f"{what} has {len(prompt)} characters; at most "
                f"{self._limits.max_prompt_characters} are accepted"
            )
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise PromptError(
                f"{what} holds bytes that are no text (lone surrogates); give it as UTF-8"
            )
        most = self._manifest.context_tokens
        # Shorter ones are encoded whole, and refused with exact numbers.
        if len(prompt) <= _LONG_CHARACTERS:
            return
        if (least := self._tokenizer.least_tokens(prompt, most)) > most:
            raise PromptError(
                f"{what} has {len(prompt)} characters, which take {least} tokens or more; the "
                f"context holds at most {most}. Shorten the text, or convert with a larger context."
            )

    def check_images(self, images: Iterable[Any] | None, num_before: int = 0) -> Sequence[Any]:
        """A list of what is one, of an iterator, or of None, which is no image.

        Raises:
            PromptError: it is none of these, or there are too many.
        """
        if images is None:
            return ()
        if isinstance(images, Iterator) and not isinstance(images, IOBase):
            # One more than are accepted, so that an endless one is refused as well.
            images = list(islice(images, self._limits.max_images + 1))
        if not isinstance(images, Sequence) or isinstance(images, _ONE_IMAGE):
            # An array is iterable as well, and its rows would pass for pictures.
            several = isinstance(images, np.ndarray) and images.ndim == 4
            way = "Give list(images)" if several else "Wrap the one you have: [image]"
            raise PromptError(
                f"images is a {type(images).__name__}; it must be a list of images. {way}"
            )
        total, most = num_before + len(images), self._limits.max_images
        if total > most:
            earlier = f" behind {num_before} earlier ones" if num_before else ""
            raise PromptError(
                f"{len(images)} images were given{earlier}; at most {most} are accepted"
            )
        # A copy: steps that lower the grid open them later, and the caller may edit the list.
        return list(images)

    def _pieces(
        self, prompt: str, num_images: int, options: PromptOptions, num_videos: int
    ) -> tuple[Piece, ...]:
        if options.raw:
            return raw_pieces(prompt, images=num_images, videos=num_videos)
        message = user_message(prompt, images=num_images, videos=num_videos)
        return compose(
            self.prompt_format(), (message,), image_marks=options.image_marks, now=options.now
        )

    def processor(self, grid: str | None = None) -> ImageProcessor:
        """What cuts images, on the artifact's own grid or a lower one.

        Raises:
            RequestError: the grid is unknown or larger than the artifact's.
        """
        processing = self._manifest.image_processing
        if grid is not None:
            lowered = lower_pinpoints(processing.image_grid_pinpoints, grid, processing.tile_size)
            processing = replace(processing, image_grid_pinpoints=lowered)
        return ImageProcessor(processing)


def _image_tokens(image: OpenedImage | PreparedImage, processor: ImageProcessor) -> int:
    if isinstance(image, PreparedImage):
        return image.layout.num_image_tokens
    size = image.image.height, image.image.width
    return processor.anyres.layout(*size).num_image_tokens
