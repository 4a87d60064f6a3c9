"""Rows about picture and video files: what the artifact reads of them is what the reference reads.

Three things are compared: pixels of every file alone, and of conversations with several; ids of the
conversations; and what the decoder reads where the last tile of each picture is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llava_edge.convert.verification.media.video_files import can_decode
from llava_edge.convert.verification.reference.media import MediaReference
from llava_edge.convert.verification.runner.artifact_runner import ArtifactRunner
from llava_edge.convert.verification.runner.metrics import GAP, whole_gap
from llava_edge.runtime.artifact.certificate import StageResult, bounded, exact
from llava_edge.runtime.processing.request import Request
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.golden.media import GoldenChat, GoldenMedia
from llava_edge.runtime.verification.media_reader import MediaReader, SeenChat
from llava_edge.runtime.verification.tolerances import Bounds

MEDIA_GAP = "files_max_gap_of_range"
"""Of what the decoder reads of pictures from files; held to the bound of ``GAP``."""


def media_stage(
    subject: ArtifactRunner, media: MediaReference, bounds: Bounds
) -> list[StageResult]:
    """Read every file and conversation as a user's, and compare."""
    context = subject.artifact.manifest.context_tokens
    with MediaReader(subject.artifact.manifest, subject.tokenizer) as reader:
        faults = reader.faults(media.files)
        if subject.dims.takes_video:
            faults += reader.frames_fault(*media.listed)
        seen = [reader.look(c, lambda *asked: _rows(subject, *asked), context) for c in media.chats]
    faults += [each.pixels for each in seen if each.pixels]
    looked = f"{len(media.files)} files alone and {len(seen)} conversations, equal in every bit"
    if subject.dims.takes_video and not can_decode():
        looked += "; no video file, since PyAV is not installed"
    conversations = f"{len(seen)} conversations with files"
    differing = [[getattr(each, what) for each in seen] for what in ("ids", "packing")]
    return [
        exact("preprocessing", "differing_files", faults, looked),
        *(
            exact(stage, "differing_files", list(filter(None, found)), conversations)
            for stage, found in zip(("prompt", "packing"), differing, strict=True)
        ),
        *_gap_rows(media.chats, seen, bounds),
    ]


def _rows(subject: ArtifactRunner, request: Request, positions: Array) -> Array:
    return subject.embed(request).at(positions, subject.dtype)


def _gap_rows(
    chats: Sequence[GoldenChat], seen: Sequence[SeenChat], bounds: Bounds
) -> Iterator[StageResult]:
    found = [(s.gap, chat.name) for s, chat in zip(seen, chats, strict=True) if s.gap is not None]
    if found:
        # Not a number is the worst, wherever it stands.
        gap, name = max(found, key=lambda each: (each[0] != each[0], each[0]))
        bound = bounds.value("tile_features", GAP)
        yield bounded("tile_features", MEDIA_GAP, gap, bound, detail=f"last tiles of {name}")


def golden_media_faults(
    stored: GoldenMedia, media: MediaReference, bounds: Bounds
) -> Iterator[str]:
    """How files that travel in an artifact differ from what the reference makes of this tool's own.

    Files need not be equal: another library packs the same pixels otherwise.
    """
    known = {file.name: file for file in media.files}
    for file in stored.files:
        if file.name not in known:
            yield f"{file.name}: this tool asks about no such file"
        elif media.digest(file) != file.pixel_sha256:
            yield f"{file.name}: its pixels differ"
        elif known[file.name].pixel_sha256 != file.pixel_sha256:
            yield f"{file.name}: it shows something else"
    conversations = {chat.name: chat for chat in media.chats}
    for chat in stored.chats:
        other = conversations.get(chat.name)
        if other is None:
            yield f"{chat.name}: this tool asks no such conversation"
        elif _described(chat) != _described(other):
            yield f"{chat.name}: texts, pixels or their places differ"
        elif not np.array_equal(chat.ids, other.ids):
            yield f"{chat.name}: ids differ"
        elif not np.array_equal(chat.positions, other.positions):
            yield f"{chat.name}: positions differ"
        elif not whole_gap(chat.rows, other.rows) <= bounds.value("tile_features", GAP):
            yield f"{chat.name}: features differ"


def _described(chat: GoldenChat) -> tuple[object, ...]:
    turns = [(turn.text, turn.answer, len(turn.images)) for turn in chat.turns]
    return turns, chat.pixel_sha256, chat.packing_sha256
