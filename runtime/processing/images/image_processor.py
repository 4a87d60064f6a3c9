"""ImageProcessor: an image becomes normalised tiles, bit-equal to the reference.

Source: transformers 5.23.0 ``LlavaNextImageProcessorPil``, and ``CLIPImageProcessorPil`` where only
the middle of an image is seen. Their steps for each tile (resize, centre
crop, rescale in float64, round to float32, subtract mean, divide by std) map each 8-bit value of a
channel to one float32, whatever the pixel; so they are done once for the 256 values and looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llava_edge.profiles.errors import ImageError
from llava_edge.profiles.models.anyres import AnyRes, TileLayout
from llava_edge.runtime.artifact.manifest import ImageProcessing
from llava_edge.runtime.processing.images.loading import convert_to_rgb
from llava_edge.runtime.processing.tile_pixels import Pixels, TilePixels
from llava_edge.runtime.util.allocation import allocate

MAX_CROP_RATIO = 100
"""Longest side over shortest of an image of which the middle is cut out: the resized image has as
many tiles' pixels."""


@dataclass(frozen=True)
class ImageTiles:
    """Tiles of one image.

    Attributes:
        pixel_values: float32, (num_tiles, 3, tile_size, tile_size), normalised when it is read;
            the thumbnail first, then the tiles row by row.
        layout: where they lie and which of their features are kept.
    """

    pixel_values: Pixels
    layout: TileLayout


class ImageProcessor:
    """Cuts images into tiles by the values of one artifact; holds no state between calls.

    Raises:
        RequestError: tile size, patch size and candidates do not go together.
    """

    def __init__(self, processing: ImageProcessing) -> None:
        self.anyres = AnyRes(
            processing.tile_size,
            processing.patch_size,
            processing.image_grid_pinpoints,
            processing.reference,
            has_newline=processing.view == "tiles",
        )
        self._crops = processing.view == "crop"
        values = np.arange(256, dtype=np.float64) * processing.rescale_factor
        mean = np.array(processing.image_mean, dtype=np.float32)[:, None]
        std = np.array(processing.image_std, dtype=np.float32)[:, None]
        self._normalized = (values.astype(np.float32) - mean) / std

    def preprocess(self, image: Image.Image) -> ImageTiles:
        """Resize, pad and cut.

        Args:
            image: as ``open_image`` returns it; other modes are converted as the reference does.

        Returns:
            Tiles and their layout.

        Raises:
            ImageError: so little of a long image would be seen that it is not worth resizing.
        """
        image = convert_to_rgb(image)
        layout = self.anyres.layout(image.height, image.width)
        tile = self.anyres.tile_size
        pixels = allocate((layout.num_tiles, tile, tile, 3), np.uint8, "an image's tiles")
        tiles = ImageTiles(TilePixels(pixels, self._normalize), layout)
        if self._crops:
            pixels[0] = _center(image, tile)
            return tiles
        # The thumbnail does not keep the aspect ratio.
        pixels[0] = _resized(image, tile, tile)
        if layout.rows:
            canvas = allocate(
                (layout.rows * tile, layout.columns * tile, 3), np.uint8, "an image on its grid"
            )
            canvas.fill(0)
            top, left = layout.pad_top, layout.pad_left
            height, width = layout.resized_height, layout.resized_width
            canvas[top : top + height, left : left + width] = _resized(image, height, width)
            for index in range(layout.rows * layout.columns):
                row, column = divmod(index, layout.columns)
                part = canvas[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
                pixels[index + 1] = part
        return tiles

    def middle(self, image: Image.Image) -> Image.Image | None:
        """The square (T, T) that is seen where only the middle of an image is; else None.

        Raises:
            ImageError: as ``preprocess``.
        """
        if not self._crops:
            return None
        return Image.fromarray(_center(convert_to_rgb(image), self.anyres.tile_size))

    def _normalize(self, tile: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        for channel in range(3):
            # "clip" writes straight into out; no 8-bit value is outside the table.
            np.take(self._normalized[channel], tile[..., channel], out=out[channel], mode="clip")


def shorter_side_to(tile: int, height: int, width: int) -> tuple[int, int]:
    """Height and width once the shorter side is ``tile`` pixels.

    Source: transformers 5.23.0 ``get_resize_output_image_size``; its ``int(size * long / short)``
    is this whole division.

    Raises:
        ImageError: one side is more than ``MAX_CROP_RATIO`` times the other.
    """
    short, long = sorted((height, width))
    if long > MAX_CROP_RATIO * short:
        raise ImageError(
            f"image is {height}x{width} (height x width) and only its middle would be seen, less "
            f"than one part in {MAX_CROP_RATIO}. Crop it to what matters."
        )
    longer = tile * long // short
    return (tile, longer) if height <= width else (longer, tile)


def _center(image: Image.Image, tile: int) -> NDArray[np.uint8]:
    height, width = shorter_side_to(tile, image.height, image.width)
    top, left = (height - tile) // 2, (width - tile) // 2
    return _resized(image, height, width)[top : top + tile, left : left + tile]


def _resized(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
