"""GoldenMedia: picture and video files that travel in an artifact, and what the reference reads.

A file is encoded, as a user's is, so that a device shows whether it decodes, rotates and converts
as the reference does. A conversation shows several files at once: what stands in the prompt, and
what the decoder reads where the last tile of each picture is. The values lie beside the probes of
``golden/probes.py``, tensors named ``media.…`` and one text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.processing.video.frame_sampling import FrameChoice
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.limits import Limits

Take = Callable[[str, str, int], Array]
"""``take(name, type, axes)``: a tensor of the file, checked."""

MEDIA_LIMIT = 64 << 10
"""Largest text in bytes of what is kept about files."""
MEDIA_LIMITS = Limits(max_image_pixels=1 << 24, max_video_frames=64, max_video_pixels=1 << 20)
"""For files that travel in an artifact; others than what they are made with gain nothing."""
_MOST_FILES = 96
_MOST_CHATS = 8
_MOST_TURNS = 4
_MOST_TEXT = 1000
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class GoldenClip:
    """A video file, and which of its frames are looked at.

    Attributes:
        data: the whole file.
        num_frames: how many; None for as many as the artifact was planned for, or as there are.
        frame_choice: by which rule.
    """

    data: bytes
    num_frames: int | None
    frame_choice: FrameChoice = "reference"


@dataclass(frozen=True)
class GoldenFile:
    """One file by itself.

    Attributes:
        name: what reports call it.
        source: content of a picture file, or a video.
        pixel_sha256: of a picture as it is opened (``media_check.picture_digest``); of a video's
            frames as the model reads them, float32 little-endian bytes.
        clips: whether values of more than 8 bits are cut off at 255, not scaled.
    """

    name: str
    source: bytes | GoldenClip
    pixel_sha256: str
    clips: bool = False


@dataclass(frozen=True)
class GoldenTurn:
    """What is asked with which files, and what is taken for the answer.

    Attributes:
        text: of the user.
        images: content of picture files.
        video: shown as well.
        answer: of the assistant; the last turn has none.
    """

    text: str
    images: tuple[bytes, ...] = ()
    video: GoldenClip | None = None
    answer: str = ""


@dataclass(frozen=True, eq=False)
class GoldenChat:
    """A conversation with files.

    Attributes:
        name: what reports call it.
        turns: oldest first.
        ids: int64 (num_tokens,), the prompt of the last turn.
        pixel_sha256: of the float32 little-endian bytes of all tiles, in order, then all frames.
        packing_sha256: of what stands at each position where features are their own numbers
            (``numbered_rows``), float32 little-endian bytes.
        positions: int64 (n,), places of the prompt at which features are kept.
        rows: float32 (n, hidden), what the decoder reads there.
    """

    name: str
    turns: tuple[GoldenTurn, ...]
    ids: Array
    pixel_sha256: str
    packing_sha256: str
    positions: Array = field(default_factory=lambda: np.empty(0, np.int64))
    rows: Array = field(default_factory=lambda: np.empty((0, 0), np.float32))

    @property
    def sources(self) -> Iterator[bytes | GoldenClip]:
        """Every file that it shows."""
        for turn in self.turns:
            yield from turn.images
            if turn.video is not None:
                yield turn.video


@dataclass(frozen=True)
class GoldenMedia:
    """All files of an artifact."""

    files: tuple[GoldenFile, ...] = ()
    chats: tuple[GoldenChat, ...] = ()


def media_tensors(media: GoldenMedia) -> dict[str, Array]:
    """Tensors by name, as they are stored."""
    found: dict[str, Array] = {}
    for place, file in enumerate(media.files):
        source = file.source
        data = source.data if isinstance(source, GoldenClip) else source
        found[f"media.{place}"] = _bytes(data)
    for place, chat in enumerate(media.chats):
        name = f"media.chat.{place}"
        found[f"{name}.ids"] = np.asarray(chat.ids, np.int64)
        found[f"{name}.positions"] = np.asarray(chat.positions, np.int64)
        found[f"{name}.rows"] = np.asarray(chat.rows, np.float32)
        for number, turn in enumerate(chat.turns):
            for index, image in enumerate(turn.images):
                found[f"{name}.{number}.{index}"] = _bytes(image)
            if turn.video is not None:
                found[f"{name}.{number}.video"] = _bytes(turn.video.data)
    return found


def media_text(media: GoldenMedia) -> dict[str, Any]:
    """What stands beside the tensors, a JSON value."""
    return {
        "files": [
            {
                "name": file.name,
                "pixel_sha256": file.pixel_sha256,
                "clips": file.clips,
                **_frames_text(file.source if isinstance(file.source, GoldenClip) else None),
            }
            for file in media.files
        ],
        "chats": [
            {
                "name": chat.name,
                "pixel_sha256": chat.pixel_sha256,
                "packing_sha256": chat.packing_sha256,
                "turns": [
                    {
                        "text": turn.text,
                        "images": len(turn.images),
                        "answer": turn.answer,
                        **_frames_text(turn.video),
                    }
                    for turn in chat.turns
                ],
            }
            for chat in media.chats
        ],
    }


def media_of(value: Any, take: Take, manifest: Manifest) -> GoldenMedia:
    """What was stored.

    Args:
        value: as ``media_text`` made it.
        take: gives tensors.
        manifest: of the artifact.

    Raises:
        ArtifactError: it is malformed, or does not fit the model; says what.
    """
    match value:
        case {"files": [*files], "chats": [*chats], **rest} if (
            not rest and len(files) <= _MOST_FILES and len(chats) <= _MOST_CHATS
        ):
            video = manifest.video_processing
            most = 0 if video is None else video.max_frames
            return GoldenMedia(
                tuple(_file(place, each, take, most) for place, each in enumerate(files)),
                tuple(_chat(place, each, take, manifest, most) for place, each in enumerate(chats)),
            )
    raise ArtifactError(f"its part about files is {value!r:.160}")


def _file(place: int, value: Any, take: Take, most_frames: int) -> GoldenFile:
    match value:
        case {"name": str(name), "pixel_sha256": str(digest), "clips": bool(clips), **rest}:
            _check_named(name, digest)
            data = take(f"media.{place}", "U8", 1).tobytes()
            clip = _clip(rest, lambda: data, most_frames)
            return GoldenFile(name, data if clip is None else clip, digest, clips)
    raise ArtifactError(f"file {place} is {value!r:.160}")


def _chat(place: int, value: Any, take: Take, manifest: Manifest, most_frames: int) -> GoldenChat:
    prefix = f"media.chat.{place}"
    match value:
        case {
            "name": str(name),
            "pixel_sha256": str(digest),
            "packing_sha256": str(packing),
            "turns": [*turns],
            **rest,
        } if not rest and 1 <= len(turns) <= _MOST_TURNS:
            _check_named(name, digest)
            _check_named(name, packing)
            made = tuple(
                _turn(f"{prefix}.{number}", turn, take, most_frames)
                for number, turn in enumerate(turns)
            )
            chat = GoldenChat(
                name,
                made,
                take(f"{prefix}.ids", "I64", 1),
                digest,
                packing,
                take(f"{prefix}.positions", "I64", 1),
                take(f"{prefix}.rows", "F32", 2),
            )
            _check_fits(chat, manifest)
            return chat
    raise ArtifactError(f"conversation {place} is {value!r:.160}")


def _turn(prefix: str, value: Any, take: Take, most_frames: int) -> GoldenTurn:
    match value:
        case {"text": str(text), "images": int(count), "answer": str(answer), **rest} if (
            0 <= count <= MEDIA_LIMITS.max_images and max(len(text), len(answer)) <= _MOST_TEXT
        ):
            images = tuple(take(f"{prefix}.{index}", "U8", 1).tobytes() for index in range(count))
            video = _clip(rest, lambda: take(f"{prefix}.video", "U8", 1).tobytes(), most_frames)
            return GoldenTurn(text, images, video, answer)
    raise ArtifactError(f"a turn is {value!r:.160}")


def _clip(value: Mapping[Any, Any], data: Callable[[], bytes], most: int) -> GoldenClip | None:
    match value:
        case {
            "num_frames": int() | None as count,
            "frame_choice": "reference" | "original" as rule,
        } if len(value) == 2 and most and (count is None or 0 < count <= most):
            return GoldenClip(data(), count, rule)
    if value:
        raise ArtifactError(f"a video of at most {most} frames is {dict(value)!r:.160}")
    return None


def _frames_text(clip: GoldenClip | None) -> dict[str, Any]:
    if clip is None:
        return {}
    return {"num_frames": clip.num_frames, "frame_choice": clip.frame_choice}


def _bytes(data: bytes) -> Array:
    return np.frombuffer(data, np.uint8)


def _check_named(name: str, digest: str) -> None:
    if not (name.isprintable() and 0 < len(name) <= 80) or not _DIGEST.fullmatch(digest):
        raise ArtifactError(
            f"a file or conversation has an impossible name or digest: {name!r:.90}"
        )


def _check_fits(chat: GoldenChat, manifest: Manifest) -> None:
    text = manifest.model.text
    marks = {manifest.tokens.image, manifest.tokens.video} - {None}
    known = np.array([id for id in chat.ids.tolist() if id not in marks], np.int64)
    if ((known < 0) | (known >= text.vocab_size)).any() or not len(chat.ids):
        raise ArtifactError(f"the ids of {chat.name} hold a token that has no embedding")
    if ((chat.positions < 0) | (chat.positions >= len(chat.ids))).any():
        raise ArtifactError(f"{chat.name} keeps rows outside its {len(chat.ids)} tokens")
    width = text.hidden_size if len(chat.positions) else chat.rows.shape[1]
    if chat.rows.shape != (len(chat.positions), width):
        raise ArtifactError(
            f"the rows of {chat.name} are {list(chat.rows.shape)}, not "
            f"{[len(chat.positions), text.hidden_size]}"
        )
