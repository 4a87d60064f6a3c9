"""Request: a question made ready for the model, all of it checked before any work starts.

Prompt and images go in; token ids with every image expanded to its exact cost, and its tiles, come
out. Knows no session.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL.Image import Image

from llava_edge.profiles.anyres import TileLayout, lower_pinpoints
from llava_edge.profiles.errors import PromptError
from llava_edge.runtime.image_processor import ImageProcessor
from llava_edge.runtime.images import ImageSource, open_image
from llava_edge.runtime.limits import Limits
from llava_edge.runtime.manifest import Manifest, PromptFormat
from llava_edge.runtime.prepared_image import PreparedImage, digest_tiles
from llava_edge.runtime.prompt import Piece, compose, raw_pieces, user_message
from llava_edge.runtime.session import Array
from llava_edge.runtime.tile_picture import draw_tiles, stacked
from llava_edge.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptOptions:
    """How prompt and images are read; see ``LlavaEdge.stream``."""

    raw: bool = False
    image_marks: bool = True
    grid: str | None = None


@dataclass(frozen=True)
class PlacedImage:
    """An image of a prompt by content: equal ones have equal features at equal positions.

    Attributes:
        start: position of its first token.
        stop: position behind its last one.
        layout: geometry.
        tile_digests: of its tiles.
    """

    start: int
    stop: int
    layout: TileLayout
    tile_digests: tuple[bytes, ...]


@dataclass(frozen=True)
class Request:
    """A question made ready.

    Attributes:
        ids: int64 (num_tokens,), each image as many ids as it costs.
        layouts: geometry of each image, in order of appearance.
        pixel_values: tiles of each image, float32 (num_tiles, 3, T, T); empty when only counted.
        preprocess_seconds: what making it took.
        tile_digests: of each image's tiles.
        image_starts: position of each image's first token.
    """

    ids: Array
    layouts: tuple[TileLayout, ...]
    pixel_values: tuple[Array, ...]
    preprocess_seconds: float
    tile_digests: tuple[tuple[bytes, ...], ...] = ()
    image_starts: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return int(self.ids.size)

    @property
    def image_tokens(self) -> int:
        """Tokens that stand for images."""
        return sum(layout.num_image_tokens for layout in self.layouts)

    def placed_images(self) -> tuple[PlacedImage, ...]:
        """What each image is and where it stands; none where only tokens were counted."""
        return tuple(
            PlacedImage(start, start + layout.num_image_tokens, layout, digests)
            for start, layout, digests in zip(
                self.image_starts, self.layouts, self.tile_digests, strict=False
            )
        )

    def behind(self, position: int) -> Request:
        """The request from a position on, which lies in no image."""
        if not position:
            return self
        first = sum(start < position for start in self.image_starts)
        return Request(
            self.ids[position:],
            self.layouts[first:],
            self.pixel_values[first:],
            self.preprocess_seconds,
            self.tile_digests[first:],
            tuple(start - position for start in self.image_starts[first:]),
        )


class RequestBuilder:
    """Makes requests for one artifact."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, limits: Limits) -> None:
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._limits = limits

    @property
    def max_tiles(self) -> int:
        """Most tiles of one image on the artifact's own grid, thumbnail included."""
        return self.processor().anyres.max_tiles

    def build(
        self,
        prompt: str,
        images: Sequence[ImageSource],
        options: PromptOptions,
        *,
        with_pixels: bool = True,
    ) -> Request:
        """Check and prepare.

        Args:
            prompt: text of the user, or a finished prompt with ``options.raw``.
            images: one for each mark.
            options: how to read them.
            with_pixels: cut the tiles as well; without, only tokens are counted.

        Raises:
            ImageError: an image is refused.
            PromptError: the prompt is empty or too large, or marks and images do not match.
            RequestError: the grid is unknown or larger than the artifact's.
        """
        start = time.perf_counter()
        self.check_text(prompt)
        self.check_images(images)
        pieces = self._pieces(prompt, len(images), options)
        processor = self.processor(options.grid)
        if with_pixels:
            prepared = [self.prepare(source, processor) for source in images]
            return replace(
                self.assemble(pieces, prepared), preprocess_seconds=time.perf_counter() - start
            )
        opened = (open_image(source, self._limits) for source in images)
        layouts = tuple(processor.anyres.layout(image.height, image.width) for image in opened)
        ids = self._expand(pieces, layouts)
        return Request(ids, layouts, (), time.perf_counter() - start)

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

    def prepare(self, source: ImageSource, processor: ImageProcessor) -> PreparedImage:
        """Open an image and cut its tiles.

        Raises:
            ImageError: it is refused.
        """
        tiles = processor.preprocess(open_image(source, self._limits))
        return PreparedImage(tiles.layout, tiles.pixel_values, digest_tiles(tiles.pixel_values))

    def draw_tiles(self, images: Sequence[ImageSource], grid: str | None = None) -> Image:
        """See ``LlavaEdge.draw_tiles``."""
        self.check_images(images)
        if not images:
            raise PromptError("tiles were to be drawn, and there is no image; give at least one")
        anyres = self.processor(grid).anyres
        drawn = []
        for number, source in enumerate(images, start=1):
            image = open_image(source, self._limits)
            name = Path(source).name if isinstance(source, (str, os.PathLike)) else "image"
            title = f"{name:.80}" + (f"  ({number} of {len(images)})" if len(images) > 1 else "")
            layout = anyres.layout(image.height, image.width)
            drawn.append(draw_tiles(image, layout, anyres.tile_size // anyres.patch_size, title))
        return stacked(drawn)

    def assemble(self, pieces: Sequence[Piece], images: Sequence[PreparedImage]) -> Request:
        """A request of a composed prompt and its images, one for each of its marks, in order."""
        layouts = tuple(image.layout for image in images)
        ids = self._expand(pieces, layouts)
        places = np.flatnonzero(ids == self._tokenizer.image_id)
        behind = np.cumsum([layout.num_image_tokens for layout in layouts], dtype=np.int64)
        firsts = (0, *behind.tolist())[: len(layouts)]
        return Request(
            ids=ids,
            layouts=layouts,
            pixel_values=tuple(image.pixel_values for image in images),
            preprocess_seconds=0.0,
            tile_digests=tuple(image.tile_digests for image in images),
            image_starts=tuple(int(places[first]) for first in firsts),
        )

    def _expand(self, pieces: Sequence[Piece], layouts: Sequence[TileLayout]) -> Array:
        counts = [layout.num_image_tokens for layout in layouts]
        ids = self._tokenizer.expand_media(self._tokenizer.encode_pieces(pieces), counts)
        return np.asarray(ids, np.int64)

    def check_text(self, prompt: str) -> None:
        """Refuse what is no text, or too much of it.

        Raises:
            PromptError: says which.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"the prompt is a {type(prompt).__name__}; it must be a str")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise PromptError(
                "the prompt holds bytes that are no text (lone surrogates); give it as UTF-8"
            )
        if len(prompt) > self._limits.max_prompt_characters:
            raise PromptError(
                f"the prompt has {len(prompt)} characters; at most "
                f"{self._limits.max_prompt_characters} are accepted"
            )

    def check_images(self, images: Sequence[object], num_before: int = 0) -> None:
        """Refuse what is no list of images, or too many of them.

        Raises:
            PromptError: says which.
        """
        if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
            # An array is iterable as well, and its rows would pass for pictures.
            raise PromptError(
                f"images is a {type(images).__name__}; it must be a list of images. Wrap the one "
                "you have: [image]"
            )
        total, most = num_before + len(images), self._limits.max_images
        if total > most:
            earlier = f" behind {num_before} earlier ones" if num_before else ""
            raise PromptError(
                f"{len(images)} images were given{earlier}; at most {most} are accepted"
            )

    def _pieces(self, prompt: str, num_images: int, options: PromptOptions) -> tuple[Piece, ...]:
        if options.raw:
            return raw_pieces(prompt, images=num_images)
        message = user_message(prompt, images=num_images)
        return compose(self.prompt_format(), (message,), image_marks=options.image_marks)

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
