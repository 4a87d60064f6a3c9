"""MediaReference: what the reference makes of picture and video files, computed once.

A picture is opened by ``transformers.image_utils.load_image`` and made RGB by the function that the
library's processors call; a video is decoded by ``transformers.video_utils``, and rotated here,
since the library leaves frames as they are stored. Nothing here calls the runtime's own reading.

A conversation's ids and tiles are those of ``Reference.prepare``. Of its features few tiles are
computed, the last one of each picture among them: the tower sees each tile by itself.
"""

from __future__ import annotations

import base64
import importlib
import io
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import image_utils, video_utils
from transformers.image_transforms import convert_to_rgb

from llava_edge.convert.verification.media.image_files import picture_files
from llava_edge.convert.verification.media.probes import MediaProbe, MediaTurn, media_probes
from llava_edge.convert.verification.media.video_files import ClipFile, clip_files
from llava_edge.convert.verification.reference.processor import ReferenceProcessor
from llava_edge.convert.verification.reference.streamed_model import (
    LinearSupply,
    ReferenceInputs,
    StreamedModel,
)
from llava_edge.profiles.memory.buffers import video_tokens_per_frame
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.processing.text.chat_prompt import Message, Text, user_message
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.golden.media import (
    GoldenChat,
    GoldenClip,
    GoldenFile,
    GoldenMedia,
    GoldenTurn,
)
from llava_edge.runtime.verification.media_reader import picture_digest, pixel_digest, raw_text
from llava_edge.runtime.verification.numbered_rows import NEWLINE_NUMBERS, tile_numbers

_FEATURE_NUMBERS = 32768
"""Features kept of a conversation; 128 KiB."""
_TURNED = frozenset(f"JPEG, EXIF orientation {number}" for number in (5, 6, 7, 8))
_ANY_TILE = 4
"""A tile that is looked at whichever picture it belongs to: the fifth."""


class PreparesPrompts(Protocol):
    """What ``MediaReference`` uses of ``Reference``, which holds one."""

    processor: ReferenceProcessor
    model: StreamedModel
    supply: LinearSupply | None

    def rendered(self, messages: Sequence[Message]) -> str:
        """A conversation by the chat template."""

    def prepare(
        self,
        text: str,
        tiles: Sequence[torch.Tensor],
        sizes: Sequence[tuple[int, int]],
        frames: torch.Tensor | None,
    ) -> ReferenceInputs:
        """Ids and pixels of a finished prompt."""


class MediaReference:
    """Files and conversations for one artifact.

    Args:
        manifest: of the artifact.
        anyres: of the artifact.
        reference: of the artifact.
    """

    def __init__(self, manifest: Manifest, anyres: AnyRes, reference: PreparesPrompts) -> None:
        self._manifest = manifest
        self._reference = reference
        video = manifest.video_processing
        self._clips = clip_files(0 if video is None else video.max_frames)
        self._probes = media_probes(manifest, anyres)
        self._pictures: dict[bytes, tuple[torch.Tensor, tuple[int, int]]] = {}

    @cached_property
    def files(self) -> tuple[GoldenFile, ...]:
        """Every file with the reference's pixels."""
        found = []
        for file in picture_files():
            plain = file.data if file.scaled is None else file.scaled
            found.append(GoldenFile(file.name, file.data, picture_digest(read_picture(plain))))
            if file.scaled is not None:
                digest = picture_digest(read_picture(file.data))
                found.append(GoldenFile(f"{file.name}, clipped", file.data, digest, clips=True))
        for clip in self._clips:
            stored = golden_clip(clip)
            found.append(GoldenFile(clip.name, stored, self._frames_digest(stored, clip)))
        return tuple(found)

    @cached_property
    def listed(self) -> tuple[tuple[bytes, ...], int, str]:
        """A video as a list of picture files: content, frames to look at, digest; for none empty.

        All of them stand upright after a quarter turn, and have one size then.
        """
        video = self._manifest.video_processing
        if video is None:
            return (), 0, ""
        files = tuple(f.data for f in picture_files() if f.name in _TURNED)
        count = min(video.max_frames, len(files) - 1)
        chosen = [files[i * len(files) // count] for i in range(count)]
        pictures = [Image.fromarray(read_picture(data)) for data in chosen]
        return files, count, pixel_digest([self._reference.processor.frames(pictures).numpy()])

    def digest(self, file: GoldenFile) -> str:
        """What the reference makes of the content of a file of one of these names."""
        if isinstance(file.source, GoldenClip):
            clip = next(clip for clip in self._clips if clip.name == file.name)
            return self._frames_digest(file.source, clip)
        named = {each.name: each for each in picture_files()}
        made = named.get(file.name)
        if made is not None and made.scaled is not None:
            # The reference has no rule for these; what they hold is known by the clipped ones.
            return file.pixel_sha256
        return picture_digest(read_picture(file.source))

    def _frames_digest(self, stored: GoldenClip, clip: ClipFile) -> str:
        frames = self._reference.processor.frames(read_clip(stored, clip))
        return pixel_digest([frames.numpy()])

    @cached_property
    def conversations(self) -> dict[str, list[Message]]:
        """Messages of every conversation, by name."""
        return {probe.name: list(_messages(probe.turns)) for probe in self._probes}

    @cached_property
    def inputs(self) -> dict[str, ReferenceInputs]:
        """Ids and pixels of every conversation, by name."""
        return {probe.name: self._inputs(probe) for probe in self._probes}

    @cached_property
    def chats(self) -> tuple[GoldenChat, ...]:
        """Every conversation, with what the reference reads."""
        return tuple(map(self._chat, self._probes))

    @property
    def golden(self) -> GoldenMedia:
        """What travels in the artifact: files that every machine decodes alike."""
        portable = {file.name for file in picture_files() if file.portable}
        portable |= {clip.name for clip in self._clips if clip.portable}
        kept = (file for file in self.files if file.name.removesuffix(", clipped") in portable)
        return GoldenMedia(tuple(kept), self.chats)

    @property
    def num_tiles(self) -> tuple[int, int]:
        """Tiles that the reference's tower runs on for ``chats``, and those of the artifact's."""
        asked = [self.inputs[probe.name] for probe in self._probes if probe.features]
        ours = (
            sum(map(len, inputs.pixel_values))
            if self._fits(inputs)
            else len(inputs.pixel_values[-1])
            for inputs in asked
        )
        return sum(len(self._chosen(inputs)) for inputs in asked), sum(ours)

    def _fits(self, inputs: ReferenceInputs) -> bool:
        return len(inputs.ids) <= self._manifest.context_tokens

    def _chosen(self, inputs: ReferenceInputs) -> list[int]:
        """Tiles of a conversation that are looked at, counted over all of its pictures."""
        last = (np.cumsum([len(each) for each in inputs.pixel_values]) - 1).tolist()
        # Where the context holds not all of it, the last picture is embedded alone.
        return sorted({*last, min(_ANY_TILE, last[-1])}) if self._fits(inputs) else last[-1:]

    def _inputs(self, probe: MediaProbe) -> ReferenceInputs:
        pictures = [self._picture(data) for turn in probe.turns for data in turn.pictures]
        frames = [
            self._reference.processor.frames(read_clip(golden_clip(turn.clip), turn.clip))
            for turn in probe.turns
            if turn.clip is not None
        ]
        if self._manifest.prompt is None:
            text = raw_text(tuple(map(_golden_turn, probe.turns)))
        else:
            text = self._reference.rendered(self.conversations[probe.name])
        tiles, sizes = [each for each, _ in pictures], [size for _, size in pictures]
        return self._reference.prepare(text, tiles, sizes, frames[0] if frames else None)

    def _picture(self, data: bytes) -> tuple[torch.Tensor, tuple[int, int]]:
        """Tiles of a picture file, its height and width; each is cut once."""
        if data not in self._pictures:
            image = Image.fromarray(read_picture(data))
            size = image.height, image.width
            self._pictures[data] = self._reference.processor.pixels(image), size
        return self._pictures[data]

    def _chat(self, probe: MediaProbe) -> GoldenChat:
        inputs = self.inputs[probe.name]
        frames = () if inputs.frame_pixels is None else (inputs.frame_pixels,)
        digest = pixel_digest(pixels.numpy() for pixels in (*inputs.pixel_values, *frames))
        kept = self._features(inputs) if probe.features else ()
        turns = tuple(map(_golden_turn, probe.turns))
        packing = pixel_digest([self._numbered(inputs)])
        return GoldenChat(probe.name, turns, inputs.ids.numpy(), digest, packing, *kept)

    def _numbered(self, inputs: ReferenceInputs) -> Array:
        """What the reference puts at each position where ``tile_numbers`` are the features."""
        tokens, vision = self._manifest.tokens, self._manifest.model.vision
        ids = inputs.ids.numpy()
        rows = np.zeros((len(ids), 2), np.float32)
        if inputs.pixel_values:
            numbers = [
                torch.from_numpy(tile_numbers(pixels.numpy(), vision.num_patches))
                for pixels in inputs.pixel_values
            ]
            newline = torch.from_numpy(NEWLINE_NUMBERS)
            packed = self._reference.model.pack(numbers, inputs.image_sizes, newline)
            rows[ids == tokens.image] = torch.cat(packed).numpy()
        if inputs.frame_pixels is not None:
            frames = inputs.frame_pixels.numpy()
            count = video_tokens_per_frame(vision)
            rows[ids == tokens.video] = tile_numbers(frames, count).reshape(-1, 2)
        return rows

    def _features(self, inputs: ReferenceInputs) -> tuple[Array, Array]:
        """Positions of the prompt, and what stands there of some tiles."""
        model, patches = self._reference.model, self._manifest.model.vision.num_patches
        model.use(self._reference.supply)
        pixels = torch.cat(inputs.pixel_values)
        counts = [len(each) for each in inputs.pixel_values]
        chosen = self._chosen(inputs)
        features = model.tile_features(pixels[chosen]).numpy()
        # Packed in place of features: their numbers, which say what stands where.
        numbers = torch.arange(len(pixels) * patches, dtype=torch.float64)
        tiles = torch.split(numbers.reshape(len(pixels), patches, 1), counts)
        packed = torch.cat(model.pack(tiles, inputs.image_sizes, torch.tensor([-1.0])))[:, 0]
        found = np.flatnonzero(inputs.ids.numpy() == self._manifest.tokens.image)
        tile, patch = np.divmod(packed.numpy().astype(np.int64), patches)
        known = np.flatnonzero(np.isin(tile, chosen))
        count = max(1, min(len(known), _FEATURE_NUMBERS // features.shape[-1]))
        kept = known[np.unique(np.linspace(0, len(known) - 1, count).astype(np.int64))]
        rows = features[np.searchsorted(chosen, tile[kept]), patch[kept]]
        return found[kept], rows.astype(np.float32)


def read_picture(data: bytes) -> Array:
    """A picture file as the reference opens it: RGB, upright, uint8 (height, width, 3)."""
    with warnings.catch_warnings():
        # Pillow warns of a palette whose transparency is forgotten.
        warnings.simplefilter("ignore")
        text = base64.b64encode(data).decode("ascii")
        image = image_utils.load_image(f"data:image/any;base64,{text}")
        pixels: Array = np.asarray(convert_to_rgb(image, return_numpy=True))
    return pixels


def read_clip(stored: GoldenClip, clip: ClipFile) -> list[Image.Image]:
    """Frames of a video file as the reference chooses and decodes them, and upright.

    Args:
        stored: the file.
        clip: says how its frames stand, how many there are and how many are looked at.
    """

    def choose(metadata: Any, **_: Any) -> Array:
        if stored.frame_choice == "original":
            return np.linspace(0, clip.total - 1, clip.num_frames, dtype=int)
        chosen: Array = video_utils.default_sample_indices_fn(metadata, clip.num_frames)
        return chosen

    # As good as a path to the library, which hands it on to PyAV.
    file: Any = io.BytesIO(stored.data)
    if clip.is_counted:
        frames = np.asarray(video_utils.read_video_pyav(file, choose)[0])
    else:
        # The library chooses by the number that a container tells, and these tell none.
        av: Any = importlib.import_module("av")
        with av.open(file) as container:
            every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        frames = np.stack(every)[choose(video_utils.VideoMetadata(total_num_frames=len(every)))]
    return [Image.fromarray(frame) for frame in clip.upright(frames)]


def golden_clip(clip: ClipFile) -> GoldenClip:
    """A clip in the form that it travels in."""
    return GoldenClip(clip.data, clip.asked_frames, clip.frame_choice)


def _golden_turn(turn: MediaTurn) -> GoldenTurn:
    clip = None if turn.clip is None else golden_clip(turn.clip)
    return GoldenTurn(turn.text, turn.pictures, clip, turn.answer)


def _messages(turns: Sequence[MediaTurn]) -> list[Message]:
    found = []
    for turn in turns:
        found.append(user_message(turn.text, len(turn.pictures), int(turn.clip is not None)))
        if turn.answer:
            found.append(Message("assistant", (Text(turn.answer),)))
    return found
