"""CalibrationTiles: the tiles that decide how the tower is stored and computed.

One tile of each image, in turn the thumbnail and the tiles behind it, so that a few tiles see many
pictures. The images are those that the language model is calibrated with.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.quantization.calibration.conversations import Conversation
from llava_edge.profiles.errors import ImageError, RequestError
from llava_edge.runtime.artifact.manifest import ImageProcessing
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.processing.images.loading import open_image

_LOG = logging.getLogger(__name__)

NUM_TILES = 8
"""Of a full-size tower a tile takes about a second on two cores, and is looked at twice."""


@dataclass(frozen=True)
class CalibrationTiles:
    """Tiles, and what there is to say of them.

    Attributes:
        pixel_values: float32 [tiles, 3, T, T], normalised.
        report: source, count and SHA-256 of the values, as plain JSON.
    """

    pixel_values: NDArray[np.float32]
    report: dict[str, Any]


def cut_tiles(
    conversations: Sequence[Conversation],
    source: dict[str, Any],
    processing: ImageProcessing,
    count: int = NUM_TILES,
) -> CalibrationTiles:
    """Take ``count`` tiles of the first images that can be read.

    Args:
        conversations: in order; those without an image are passed over.
        source: where they come from, for the report.
        processing: values of the image processor, with the artifact's candidates.
        count: most tiles.

    Raises:
        RequestError: no image can be read.
    """
    processor = ImageProcessor(processing)
    tiles: list[NDArray[np.float32]] = []
    images = ((talk, image) for talk in conversations for image in talk.images)
    for talk, image in images:
        if len(tiles) == count:
            break
        try:
            cut = processor.preprocess(open_image(image(), talk.limits)).pixel_values
        except ImageError as error:
            _LOG.warning("the image of %s is left out: %s", talk.name, error)
            continue
        tiles.append(cut[len(tiles) % len(cut)])
    if not tiles:
        raise RequestError(
            f"the tower is looked at on calibration images; none of {len(conversations)} "
            "conversations has one that can be read. Name a --calibration folder with images, or "
            "leave it out."
        )
    pixel_values = np.stack(tiles)
    report = {
        "source": source["source"],
        "num_tiles": len(tiles),
        "sha256": hashlib.sha256(pixel_values.tobytes()).hexdigest(),
    }
    return CalibrationTiles(pixel_values, report)
