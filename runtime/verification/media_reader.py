"""MediaReader: the files that travel in an artifact, opened the way that a user's files are.

Each picture is opened from memory and from the disk, each video from the disk; conversations go
through ``Chat``. Verification and the check on a device read them by the same functions, and differ
in what they compare them with only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import features
from PIL.Image import Image

from llava_edge.profiles.errors import EngineError, LlavaEdgeError, OutOfMemoryError, PromptError
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.prompt_date import COMPARED_NOW
from llava_edge.runtime.chat import Chat, ChatMessage
from llava_edge.runtime.generation.stream import AnswerStream
from llava_edge.runtime.processing.degradation import Degradation
from llava_edge.runtime.processing.images.image_processor import ImageProcessor, ImageTiles
from llava_edge.runtime.processing.processor import RequestBuilder
from llava_edge.runtime.processing.request import PromptOptions, Request, VideoInput
from llava_edge.runtime.processing.text.chat_prompt import MARKS
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from llava_edge.runtime.processing.tile_pixels import Pixels
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.image_formats import READABLE_FORMATS, recognise
from llava_edge.runtime.verification.golden.media import (
    MEDIA_LIMITS,
    GoldenChat,
    GoldenClip,
    GoldenFile,
    GoldenTurn,
)
from llava_edge.runtime.verification.numbered_rows import numbered_rows

EmbeddedRows = Callable[[Request, Array], Array]
"""``rows(request, positions)``: what the decoder reads there, (len(positions), hidden)."""

_NO_LENGTH = 1 << 31
"""Of the context: conversations are embedded here, not answered."""


@dataclass(frozen=True)
class SeenChat:
    """What a conversation came to, and what of it differs; empty texts for nothing."""

    ids: str = ""
    pixels: str = ""
    packing: str = ""
    gap: float | None = None


class MediaReader:
    """Opens files for one artifact; use as a context manager, which holds a temporary folder.

    Args:
        manifest: of the artifact.
        tokenizer: of the artifact.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer) -> None:
        limits = replace(MEDIA_LIMITS, image_formats=READABLE_FORMATS)
        clipping = replace(limits, high_bit_depth="clip")
        self._manifest = manifest
        self._builders = {
            clips: RequestBuilder(manifest, tokenizer, each)
            for clips, each in ((False, limits), (True, clipping))
        }
        self._folder: Path | None = None

    def __enter__(self) -> MediaReader:
        self._temporary = _folder()
        self._folder = self._temporary.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._temporary.__exit__(*error)

    def faults(self, files: Sequence[GoldenFile]) -> list[str]:
        """Files whose pixels differ from those that are known, or that are refused.

        Every other picture is given as a path, the others as their content.
        """
        found: list[str] = []
        for place, file in enumerate(files):
            with _noted(file.name, found):
                if self._digest(file, by_path=bool(place % 2)) != file.pixel_sha256:
                    found.append(f"{file.name} has other pixels")
        return found

    def frames_fault(self, files: Sequence[bytes], num_frames: int, digest: str) -> list[str]:
        """As ``faults``, of a video that is given as a list of picture files."""
        found: list[str] = []
        name = "a list of frames"
        with _noted(name, found):
            frames = [self._given(data) if i % 2 else data for i, data in enumerate(files)]
            made = self._builders[False].prepare_video(VideoInput(frames, num_frames))
            if pixel_digest([made.frame_pixels]) != digest:
                found.append(f"{name} has other pixels")
        return found

    def request(self, chat: GoldenChat) -> Request:
        """The prompt of a conversation's last turn, with pixels.

        Raises:
            LlavaEdgeError: a file is refused.
        """
        builder = self._builders[False]
        is_raw = self._manifest.prompt is None
        if len(chat.turns) > 1 and not is_raw:
            return self._turns(chat)
        images = [self._given(image) for turn in chat.turns for image in turn.images]
        clips = [turn.video for turn in chat.turns if turn.video is not None]
        text = raw_text(chat.turns) if is_raw else chat.turns[0].text
        options = PromptOptions(raw=is_raw, now=COMPARED_NOW)
        video = self._video(clips[0]) if clips else None
        counted = builder.build(text, images, options, video=video, with_pixels=False)
        request = builder.build(text, images, options, video=video)
        if not np.array_equal(counted.ids, request.ids):
            raise PromptError(f"{len(counted.ids)} tokens are counted, {len(request.ids)} made")
        return request

    def _turns(self, chat: GoldenChat) -> Request:
        """Through the class that keeps conversations, up to where it would answer."""
        made: list[Degradation] = []

        def start(degradation: Degradation, *_: Any) -> AnswerStream:
            made.append(degradation)
            return cast(AnswerStream, None)

        builder = self._builders[False]
        talk = Chat(builder, start, lambda: None, lambda: _NO_LENGTH, now=COMPARED_NOW)
        for turn in chat.turns[:-1]:
            cut = tuple(talk.prepare(self._given(image)) for image in turn.images)
            clip = None if turn.video is None else self._prepared_video(talk, turn.video)
            asked = ChatMessage("user", turn.text, cut, video=clip)
            talk.messages += [asked, ChatMessage("assistant", turn.answer)]
        last = chat.turns[-1]
        video = None if last.video is None else self._prepared_video(talk, last.video)
        talk.stream(last.text, [self._given(image) for image in last.images], video)
        return made[0].request

    def look(self, chat: GoldenChat, rows: EmbeddedRows, context_tokens: int) -> SeenChat:
        """Compare a conversation with what is known of it.

        Args:
            chat: what is known.
            rows: embeds a request; not called where nothing is kept of it.
            context_tokens: where the conversation has more, its last picture alone is embedded, as
                for a turn of which the cache holds what came before.
        """
        faults: list[str] = []
        with _noted(chat.name, faults):
            request = self.request(chat)
        if faults:
            return SeenChat(ids=faults[0])
        if not np.array_equal(request.ids, chat.ids):
            return SeenChat(ids=f"{chat.name}: {first_difference(request.ids, chat.ids)}")
        if pixel_digest((*request.pixel_values, *request.frame_pixels)) != chat.pixel_sha256:
            return SeenChat(pixels=f"{chat.name} shows other pixels")
        packing = ""
        with _noted(chat.name, faults):
            packing = self._packing_fault(chat, request)
        packing = faults[0] if faults else packing
        if faults or not len(chat.positions):
            return SeenChat(packing=packing)
        start = request.media[-1].start if request.num_tokens > context_tokens else 0
        kept = chat.positions >= start
        if not kept.any():
            return SeenChat(packing=packing)
        found = rows(request.without_prefix(start), chat.positions[kept] - start).astype(np.float32)
        spread = float(np.ptp(chat.rows))
        gap = float(np.abs(found - chat.rows[kept]).max())
        share = gap / spread if spread > 0 else float("inf") if gap else 0.0
        return SeenChat(packing=packing, gap=share)

    def _packing_fault(self, chat: GoldenChat, request: Request) -> str:
        """Which positions show another row of another tile: exact, whatever the tower computes."""
        whole = numbered_rows(self._manifest, request)
        if pixel_digest([whole]) != chat.packing_sha256:
            return f"{chat.name}: positions show other rows of its tiles and frames"
        # As in a later turn, where the cache holds all that stands before the last medium.
        start = request.media[-1].start
        wrong = (numbered_rows(self._manifest, request.without_prefix(start)) != whole[start:]).any(
            axis=1
        )
        if wrong.any():
            return f"{chat.name}: behind a cached picture {wrong.sum()} positions show other rows"
        return ""

    def _digest(self, file: GoldenFile, *, by_path: bool) -> str:
        builder = self._builders[file.clips]
        if isinstance(file.source, GoldenClip):
            return pixel_digest([builder.prepare_video(self._video(file.source)).frame_pixels])
        processor = _AsOpened(self._manifest.image_processing)
        source = self._given(file.source) if by_path else file.source
        return picture_digest(np.asarray(builder.prepare(source, processor).pixel_values[0]))

    def _prepared_video(self, talk: Chat, clip: GoldenClip) -> Any:
        return talk.prepare_video(self._given(clip.data), clip.num_frames, clip.frame_choice)

    def _video(self, clip: GoldenClip) -> VideoInput:
        return VideoInput(self._given(clip.data), clip.num_frames, clip.frame_choice)

    def _given(self, data: bytes) -> Path | bytes:
        """A file of this content, where there is a place for it."""
        if self._folder is None:
            return data
        path = self._folder / hashlib.sha256(data).hexdigest()
        try:
            path.write_bytes(data)
        except OSError:
            # The disk is full: no fault of what is looked at.
            self._folder = None
            return data
        return path


class _AsOpened(ImageProcessor):
    """Cuts nothing: what is compared is the picture as it was opened."""

    def preprocess(self, image: Image) -> ImageTiles:
        layout = self.anyres.layout(image.height, image.width)
        return ImageTiles(cast(Pixels, np.asarray(image)[None]), layout)


def raw_text(turns: Sequence[GoldenTurn]) -> str:
    """A conversation as a finished prompt, for artifacts without a template."""
    lines = []
    for turn in turns:
        marks = MARKS["image"] * len(turn.images) + MARKS["video"] * (turn.video is not None)
        lines += [marks, turn.text, turn.answer]
    return "\n".join(line for line in lines if line)


def pixel_digest(pixels: Iterable[Any]) -> str:
    """SHA-256 of the float32 little-endian bytes of tiles and frames, in order."""
    digest = hashlib.sha256()
    for each in pixels:
        digest.update(np.ascontiguousarray(each, "<f4").data)
    return digest.hexdigest()


def picture_digest(pixels: Array) -> str:
    """SHA-256 of size and values of a picture, uint8 (height, width, 3)."""
    digest = hashlib.sha256("x".join(map(str, pixels.shape)).encode("ascii"))
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def first_difference(ours: Array, theirs: Array) -> str:
    """Where two prompts part."""
    common = min(len(ours), len(theirs))
    differs = np.flatnonzero(ours[:common] != theirs[:common])
    if differs.size:
        at = int(differs[0])
        return f"id {int(ours[at])} for {int(theirs[at])} at position {at}"
    return f"{len(ours)} ids for {len(theirs)}"


def missing_here(
    sources: Iterable[bytes | GoldenClip], formats: Sequence[str] = READABLE_FORMATS
) -> str:
    """What this machine lacks to read some files, a user's as well; empty for nothing.

    Args:
        sources: the files.
        formats: of pictures; others are not to be opened.
    """
    for source in sources:
        if isinstance(source, GoldenClip):
            if importlib.util.find_spec("av") is None:
                return "PyAV is not installed"
            continue
        kind = recognise(source)
        name = "" if kind is None or kind.format is None else kind.format
        if name and name not in formats:
            return f"{name} is not among the formats that are read"
        if name in ("WEBP", "AVIF") and not features.check(name.lower()):
            return f"this Pillow does not read {name}"
    return ""


@contextmanager
def _noted(name: str, faults: list[str]) -> Iterator[None]:
    """What is broken enough to raise is a fault of what is read, unless the machine fails."""
    try:
        yield
    except (EngineError, OutOfMemoryError):
        raise
    except LlavaEdgeError as error:
        faults.append(f"{name} is refused: {error}")
    except Exception as error:
        faults.append(f"{name} cannot be read: {type(error).__name__}: {error!s:.200}")


@contextmanager
def _folder() -> Iterator[Path | None]:
    """A folder for files; None where there is no place to write."""
    try:
        made = tempfile.TemporaryDirectory(prefix="llava-edge-")
    except OSError:
        yield None
        return
    with made as name:
        yield Path(name)
