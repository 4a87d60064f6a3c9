"""Stage ``packing``: image tokens come in the reference's order, newlines and unpadding included.

Every feature row carries its own number and the newline a number of its own, so order, gaps and
repetitions show exactly; no weight takes part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llava_edge.convert.verification.reference.streamed_model import StreamedModel
from llava_edge.convert.verification.stages.preprocessing import image_sizes
from llava_edge.profiles.memory.buffers import video_tokens_per_frame
from llava_edge.profiles.models.anyres import AnyRes, TileLayout
from llava_edge.profiles.models.model_dims import VisionDims
from llava_edge.runtime.artifact.certificate import StageResult, exact
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.generation.inputs.input_embeds import PromptEmbeddings
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.pooling import pooling_index

_TEXT_VALUE = -1.0
_FRAMES = 3


class _TaggedTable:
    """Text rows that say of themselves that they are text."""

    def rows(self, ids: Array, *, out: Array) -> Array:
        out[...] = _TEXT_VALUE
        return out


def packing_stage(artifact: Artifact, reference: StreamedModel) -> StageResult:
    """Compare one image of each size between text, and all of them in one prompt."""
    anyres = ImageProcessor(artifact.manifest.image_processing).anyres
    sizes = list(image_sizes(anyres))
    faults: list[str] = []
    for prompt in (*([size] for size in sizes), sizes):
        what = f"{prompt[0][0]}x{prompt[0][1]}" if len(prompt) == 1 else f"{len(prompt)} images"
        fault = _difference(anyres, prompt, reference)
        if fault:
            faults.append(f"{what}: {fault}")
    looked = f"{len(sizes)} images alone and together"
    dims = artifact.manifest.model
    if dims.takes_video:
        for beside in ([], sizes[:1]):
            fault = _video_difference(anyres, beside, dims.vision, reference)
            if fault:
                faults.append(f"a video beside {len(beside)} images: {fault}")
        looked += ", a video alone and beside one"
    return exact("packing", "differing_prompts", faults, f"{looked}, exact")


def _video_difference(
    anyres: AnyRes,
    sizes: Sequence[tuple[int, int]],
    vision: VisionDims,
    reference: StreamedModel,
) -> str | None:
    """Means of numbered patches, and their places between text and an image's tokens."""
    side = anyres.patches_per_side
    layouts = [anyres.layout(*size) for size in sizes]
    tiles = sum(layout.num_tiles for layout in layouts) * side * side
    numbers = np.arange(tiles, tiles + _FRAMES * side * side, dtype=np.float64)
    frames = numbers.reshape(_FRAMES, side * side, 1)
    pooled = reference.pool(torch.from_numpy(frames)).numpy()
    index = pooling_index(vision, video_tokens_per_frame(vision))
    ours = frames[:, index].mean(axis=2)
    if ours.shape != pooled.shape or not np.array_equal(ours, pooled):
        return "its tokens are means of other patches"
    image_id, video_id = 1, 2
    counts = [layout.num_image_tokens for layout in layouts]
    ids = [0, *([image_id] * sum(counts)), 0, *([video_id] * pooled.shape[0] * pooled.shape[1]), 0]
    newline = float(frames.max()) + 1
    features = np.concatenate([np.arange(tiles, dtype=np.float64), ours.ravel(), [newline]])
    packed = PromptEmbeddings(
        np.array(ids, np.int64),
        image_id,
        layouts,
        side,
        features[:, None],
        _TaggedTable(),
        video_id,
    )
    out = np.empty((len(ids), 1), np.float64)
    packed.fill(0, len(ids), out)
    tagged = [
        torch.arange(layout.num_tiles * side * side, dtype=torch.float64).reshape(
            layout.num_tiles, side * side, 1
        )
        for layout in layouts
    ]
    last = torch.tensor([newline], dtype=torch.float64)
    theirs = reference.pack(tagged, sizes, last) if tagged else []
    text = np.array([_TEXT_VALUE])
    images = [each[:, 0].numpy() for each in theirs]
    wanted = np.concatenate([text, *images, text, pooled.ravel(), text])
    wrong = np.flatnonzero(out[:, 0] != wanted)
    if not len(wrong):
        return None
    return f"{len(wrong)} of {len(wanted)} positions hold another row, the first {wrong[0]}"


def _difference(
    anyres: AnyRes, sizes: Sequence[tuple[int, int]], reference: StreamedModel
) -> str | None:
    side = anyres.patches_per_side
    layouts = [anyres.layout(*size) for size in sizes]
    theirs = _theirs(layouts, side, sizes, reference)
    counts = [layout.num_image_tokens for layout in layouts]
    if [len(each) for each in theirs] != counts:
        return f"takes {counts} tokens, the reference {[len(each) for each in theirs]}"
    ours = _ours(layouts, side, counts)
    text = np.array([_TEXT_VALUE])
    wanted = np.concatenate([part for each in theirs for part in (text, each)] + [text])
    wrong = np.flatnonzero(ours != wanted)
    if not len(wrong):
        return None
    place = int(wrong[0])
    return (
        f"{len(wrong)} of {len(wanted)} positions hold another row, the first {place}: row "
        f"{ours[place]:.0f} for {wanted[place]:.0f}"
    )


def _theirs(
    layouts: Sequence[TileLayout],
    side: int,
    sizes: Sequence[tuple[int, int]],
    reference: StreamedModel,
) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    tagged: list[torch.Tensor] = []
    first = 0
    for layout in layouts:
        count = layout.num_tiles * side * side
        rows = torch.arange(first, first + count, dtype=torch.float64)
        tagged.append(rows.reshape(layout.num_tiles, side * side, 1))
        first += count
    newline = torch.tensor([float(first)], dtype=torch.float64)
    packed = reference.pack(tagged, sizes, newline)
    return [each[:, 0].numpy() for each in packed]


def _ours(layouts: Sequence[TileLayout], side: int, counts: Sequence[int]) -> Array:
    """Through the class that fills the decoder's input, text before, between and behind images."""
    image_id = 1
    ids = np.concatenate([np.array([0] + [image_id] * count) for count in counts] + [[0]])
    total = sum(layout.num_tiles for layout in layouts) * side * side
    features = np.arange(total + 1, dtype=np.float64)[:, None]
    packed = PromptEmbeddings(
        ids.astype(np.int64), image_id, layouts, side, features, _TaggedTable()
    )
    out = np.empty((len(ids), 1), np.float64)
    # In pieces, as prefill asks for it.
    step = max(1, len(ids) // 3)
    for start in range(0, len(ids), step):
        stop = min(start + step, len(ids))
        packed.fill(start, stop, out[start:stop])
    return out[:, 0]
