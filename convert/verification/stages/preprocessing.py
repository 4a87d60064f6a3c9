"""Stage ``preprocessing``: pixel values of tiles are the reference's, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from llava_edge.convert.verification.media.in_memory_images import memory_faults
from llava_edge.convert.verification.reference.processor import ReferenceProcessor
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.runtime.artifact.certificate import StageResult, exact
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.processing.images.loading import open_image
from llava_edge.runtime.processing.video.video_processor import VideoProcessor

_MODES = ("RGB", "L", "RGBA", "P")


def pixel_stage(artifact: Artifact, reference: ReferenceProcessor) -> StageResult:
    """Compare images of every grid and of awkward sizes."""
    processor = ImageProcessor(artifact.manifest.image_processing)
    faults: list[str] = []
    count = 0
    for index, (height, width) in enumerate(image_sizes(processor.anyres)):
        mode = _MODES[index % len(_MODES)]
        image = textured(height, width, index).convert(mode)
        ours = processor.preprocess(open_image(image))
        theirs = reference.pixels(image).numpy()
        count += 1
        what = f"{mode} {height}x{width}"
        if ours.pixel_values.shape != theirs.shape:
            faults.append(f"{what} has {len(ours.pixel_values)} tiles, {len(theirs)} there")
        elif not np.array_equal(ours.pixel_values, theirs):
            gap = np.abs(np.asarray(ours.pixel_values) - theirs)
            tile = int(gap.reshape(len(gap), -1).max(1).argmax())
            faults.append(f"{what} differs by up to {float(gap.max()):.3g}, most in tile {tile}")
    opened, differing = memory_faults()
    faults += differing
    looked = f"{count} images, {opened} kinds of pictures in memory"
    video = artifact.manifest.video_processing
    if video is not None:
        sizes = list(frame_sizes(video.frame_size))
        faults += _frame_faults(VideoProcessor(video), sizes, reference)
        looked += f" and {len(sizes)} videos"
    return exact("preprocessing", "differing_images", faults, f"{looked}, equal in every bit")


def _frame_faults(
    processor: VideoProcessor, sizes: Sequence[tuple[int, int]], reference: ReferenceProcessor
) -> Iterator[str]:
    for index, (height, width) in enumerate(sizes):
        frames = [textured(height, width, 2 * index + place) for place in range(2)]
        made = processor.preprocess((np.asarray(frame) for frame in frames), len(frames))
        ours, theirs = np.asarray(made), reference.frames(frames).numpy()
        if not np.array_equal(ours, theirs):
            gap = (
                float(np.abs(np.asarray(ours) - theirs).max())
                if ours.shape == theirs.shape
                else np.nan
            )
            yield f"a video of {height}x{width} differs by up to {gap:.3g}"


def frame_sizes(side: int) -> Iterator[tuple[int, int]]:
    """Heights and widths of frames: cut on either side, enlarged and reduced, and as they are."""
    yield from ((side, side), (side, side * 16 // 9), (side * 16 // 9, side + 3))
    yield from ((side // 3, side // 2 + 1), (3 * side + 1, 5 * side))


def image_sizes(anyres: AnyRes) -> Iterator[tuple[int, int]]:
    """Heights and widths that bring every candidate, with padding on either side and without."""
    tile = anyres.tile_size
    for height, width in anyres.candidates or ((tile, tile),):
        yield height, width
        yield max(1, height * 5 // 6), width
        yield height, max(1, width * 7 // 8)
        yield max(1, height // 2 + 1), max(1, width // 2 - 3)
    if anyres.has_newline:
        yield from ((1, tile), (tile + 1, 1))
    else:
        # Only the middle is seen, so slivers are refused.
        yield from ((tile // 20, tile), (tile + 1, tile // 30 + 1))
    yield from ((tile - 1, tile + 1), (2 * tile + 7, tile // 3 + 1))


def textured(height: int, width: int, seed: int) -> Image.Image:
    """An RGB image in which no two regions and no two channels are alike."""
    generator = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:height, 0:width]
    channels = [
        127
        + 90 * np.sin(x / 9 + y / (13 + 4 * place) + place)
        + 30 * (x + 2 * y) / (height + width)
        for place in range(3)
    ]
    noise = generator.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.stack(channels, -1) + noise).clip(0, 255).astype(np.uint8))
