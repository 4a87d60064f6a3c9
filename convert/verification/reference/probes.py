"""Probes: the questions that an artifact is verified with.

Drawn by the project, with true answers, so that a loss on the answer's tokens can be measured; no
photographs. Images are small, since those of the golden tensors travel in the artifact; AnyRes
enlarges them all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from llava_edge.convert.quantization.calibration.conversations import Conversation
from llava_edge.convert.quantization.calibration.synthetic import draw_conversations
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.runtime.artifact.certificate import Mode
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.processing.images.loading import open_image
from llava_edge.runtime.processing.text.chat_prompt import MARKS

SEED = 2024
NUM_STEPS = 64
"""Answer tokens that are forced on both sides."""
_ROOM = 256
"""Tokens of question and answer beside the images, at least."""
_SIDE = 96
"""Longest side of a probe's image, where that keeps its grid."""
_FRAMES = 3
"""Frames of a probe's video, where the context holds them."""
VIDEO = "video"
"""Name of the probe that is a video alone."""


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        name: in the certificate.
        question: of the user; images come first.
        answer: what is true of the image.
        images: RGB.
        video: RGB frames of a video, all of which are looked at; images come before it.
    """

    name: str
    question: str
    answer: str
    images: tuple[Image.Image, ...] = ()
    video: tuple[Image.Image, ...] = ()

    @property
    def num_videos(self) -> int:
        """One or none."""
        return int(bool(self.video))

    def prompt(self, *, raw: bool) -> str:
        """What is handed to the runtime: the question, or a finished prompt with its marks."""
        marks = MARKS["image"] * len(self.images) + MARKS["video"] * self.num_videos
        return f"{marks}\n{self.question}" if raw else self.question

    def arrays(self) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], ...]:
        """The images as uint8 (height, width, 3)."""
        return tuple(np.asarray(image.convert("RGB")) for image in self.images)

    def frames(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | None:
        """The video as uint8 (frames, height, width, 3)."""
        if not self.video:
            return None
        return np.stack([np.asarray(frame.convert("RGB")) for frame in self.video])


def probes_for(manifest: Manifest, mode: Mode) -> tuple[Probe, ...]:
    """What an artifact is asked in a mode; see ``draw_probes``."""
    anyres = ImageProcessor(manifest.image_processing).anyres
    video = manifest.video_processing
    return draw_probes(
        anyres, mode, manifest.context_tokens, 0 if video is None else video.max_frames
    )


def asked_again(probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """Those that are asked layer by layer, for whole answers and as golden prompts as well."""
    return (*probes[:2], *(probe for probe in probes[2:] if probe.name == VIDEO))


def rounded_again(main: Sequence[Probe], mode: Mode) -> Sequence[Probe]:
    """Those of ``asked_again`` for which it is computed what rounding to nearest costs.

    A pass of the decoder each: the shortest probe does where time counts.
    """
    return main if mode == "full" else main[:1]


def draw_probes(
    anyres: AnyRes, mode: Mode, context_tokens: int, max_frames: int = 0
) -> tuple[Probe, ...]:
    """What a mode asks: text alone and the cheapest grid; or every grid, and two images at once.

    A video model is asked about a video as well, in ``full`` about one beside an image.

    Args:
        anyres: of the artifact.
        mode: ``quick`` or ``full``.
        context_tokens: two images are asked about only where they fit.
        max_frames: most frames of a video; 0 for a model without.
    """
    num_grids = max(1, len(anyres.candidates))
    # Of four conversations one is text alone; of fewer none.
    conversations, _ = draw_conversations(anyres, max(4, 2 * num_grids), SEED)
    pictured = [each for each in conversations if each.image is not None]
    text_only = next(each for each in conversations if each.image is None)
    by_grid: dict[str, tuple[int, Probe]] = {}
    for conversation in pictured:
        image = _small(anyres, conversation)
        layout = anyres.layout(image.height, image.width)
        grid = f"{layout.rows}x{layout.columns}" if layout.rows else "base"
        probe = Probe(f"grid {grid}", conversation.question, conversation.answer, (image,))
        by_grid.setdefault(grid, (layout.num_image_tokens, probe))
    cheapest = sorted(by_grid.values(), key=lambda found: found[0])
    text = Probe("text", text_only.question, text_only.answer)
    single = cheapest[0][1]
    videos = _videos(anyres, mode, context_tokens, max_frames, pictured, single)
    if mode == "quick":
        return (text, single, *videos)
    probes = [probe for _, probe in cheapest]
    pair = _pair(probes)
    layouts = [anyres.layout(image.height, image.width) for image in pair.images]
    needed = sum(layout.num_image_tokens for layout in layouts) + _ROOM
    pairs = (pair,) if needed <= context_tokens else ()
    return (text, *probes, *pairs, *videos)


def _videos(
    anyres: AnyRes,
    mode: Mode,
    context_tokens: int,
    max_frames: int,
    pictured: Sequence[Conversation],
    single: Probe,
) -> tuple[Probe, ...]:
    """A video; in ``full`` also one beside the image of ``single``, where both fit."""
    frame_tokens = anyres.patches_per_side**2 // 4
    count = min(_FRAMES, max_frames, (context_tokens - _ROOM) // frame_tokens)
    if count < 1:
        return ()
    # Of several pictures, so that frames differ, and no square, so that they are cut.
    frames = tuple(_frame(pictured[place % len(pictured)]) for place in range(count))
    video = Probe(VIDEO, f"{single.question} Watch it.", single.answer, video=frames)
    image = single.images[0]
    needed = anyres.layout(image.height, image.width).num_image_tokens + _ROOM
    if mode == "quick" or needed + count * frame_tokens > context_tokens:
        return (video,)
    return (video, replace(video, name="image and video", images=single.images))


def _frame(conversation: Conversation) -> Image.Image:
    """A picture as a frame, ``_SIDE`` wide and three quarters as high."""
    assert conversation.image is not None
    image = open_image(conversation.image()).convert("RGB")
    return image.resize((_SIDE, _SIDE * 3 // 4), Image.Resampling.BOX)


def _pair(probes: Sequence[Probe]) -> Probe:
    """Two images in one question, the cheaper ones."""
    first, second = probes[0], probes[min(1, len(probes) - 1)]
    images = (*first.images, *second.images)
    return Probe("two images", f"{first.question} {second.question}", first.answer, images)


def _small(anyres: AnyRes, conversation: Conversation) -> Image.Image:
    """The conversation's image, made smaller where AnyRes then still takes the same grid."""
    assert conversation.image is not None
    image = open_image(conversation.image()).convert("RGB")
    wanted = _grid(anyres, image)
    factor = _SIDE / max(image.size)
    if factor < 1:
        size = tuple(max(1, round(side * factor)) for side in image.size)
        smaller = image.resize((size[0], size[1]), Image.Resampling.BOX)
        if _grid(anyres, smaller) == wanted:
            return smaller
    return image


def _grid(anyres: AnyRes, image: Image.Image) -> tuple[int, int]:
    layout = anyres.layout(image.height, image.width)
    return layout.rows, layout.columns
