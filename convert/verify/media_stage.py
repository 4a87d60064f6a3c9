"""Rows about picture and video files: what the artifact reads of them is what the reference reads.

Three things are compared: pixels of every file alone, and of conversations with several; ids of the
conversations; and what the decoder reads where the last tile of each picture is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from llava_edge.convert.verify.clip_files import can_decode
from llava_edge.convert.verify.gaps import GAP, whole_gap
from llava_edge.convert.verify.media_reference import MediaReference, tile_numbers
from llava_edge.convert.verify.subject import Subject
from llava_edge.runtime.bounds import Bounds
from llava_edge.runtime.certificate import StageResult, bounded, exact
from llava_edge.runtime.golden_media import GoldenChat, GoldenMedia
from llava_edge.runtime.media_check import MediaReader, SeenChat
from llava_edge.runtime.prompt_embedder import PromptEmbedder
from llava_edge.runtime.request import Request
from llava_edge.runtime.session import Array

MEDIA_GAP = "files_max_gap_of_range"
"""Of what the decoder reads of pictures from files; held to the bound of ``GAP``."""


def media_stage(subject: Subject, media: MediaReference, bounds: Bounds) -> list[StageResult]:
    """Read every file and conversation as a user's, and compare."""
    context = subject.artifact.manifest.context_tokens
    with MediaReader(subject.artifact.manifest, subject.tokenizer) as reader:
        faults = reader.faults(media.files)
        seen = [reader.look(c, lambda *asked: _rows(subject, *asked), context) for c in media.chats]
    faults += [each.pixels for each in seen if each.pixels]
    looked = f"{len(media.files)} files alone and {len(seen)} conversations, equal in every bit"
    if subject.dims.takes_video and not can_decode():
        looked += "; no video file, since PyAV is not installed"
    ids = [each.ids for each in seen if each.ids]
    misplaced = [
        f"{chat.name}: {fault}"
        for chat, each in zip(media.chats, seen, strict=True)
        if each.request is not None and (fault := _misplaced(subject, each.request, chat, media))
    ]
    return [
        exact("preprocessing", "differing_files", faults, looked),
        exact("prompt", "differing_files", ids, f"{len(seen)} conversations with files"),
        exact("packing", "differing_files", misplaced, f"{len(seen)} conversations with files"),
        *_gap_rows(media.chats, seen, bounds),
    ]


def _rows(subject: Subject, request: Request, positions: Array) -> Array:
    return subject.embed(request).at(positions, subject.dtype)


class _Numbering:
    """Stands for tower and projector: features say which tile and row they are."""

    def encode(self, pixel_values: Array, out: Array) -> None:
        out[...] = tile_numbers(pixel_values, out.shape[1])


class _Newline:
    """Stands for the embedding table of such features."""

    image_newline = np.array([-7.0, -7.0])

    def rows(self, ids: Array, *, out: Array) -> Array:
        out[...] = 0
        return out


def _misplaced(
    subject: Subject, request: Request, chat: GoldenChat, media: MediaReference
) -> str | None:
    """Which positions show another row of another tile: exact, whatever the tower computes."""
    tokens, dims = subject.artifact.manifest.tokens, subject.dims
    embedder = PromptEmbedder(
        replace(dims, text=replace(dims.text, hidden_size=2)),
        tokens.image,
        cast(Any, _Newline()),
        _Numbering(),
        np.float32,
        batch_tiles=2,
        video_token_id=tokens.video,
    )
    places = np.flatnonzero(np.isin(chat.ids, [tokens.image, tokens.video or tokens.image]))
    found = np.empty((len(chat.ids), 2), np.float32)
    embedder.embed(request).fill(0, len(found), found)
    wanted = media.numbered(chat, _Newline.image_newline).astype(np.float32)
    if len(wanted) != len(places):
        return f"{len(places)} positions of pictures for {len(wanted)}"
    wrong = np.flatnonzero((found[places] != wanted).any(axis=1))
    return f"{len(wrong)} of {len(places)} positions hold another row" if len(wrong) else None


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
        elif (chat.pixel_sha256, _texts(chat)) != (other.pixel_sha256, _texts(other)):
            yield f"{chat.name}: texts or pixels differ"
        elif not np.array_equal(chat.ids, other.ids):
            yield f"{chat.name}: ids differ"
        elif not np.array_equal(chat.positions, other.positions):
            yield f"{chat.name}: positions differ"
        elif not whole_gap(chat.rows, other.rows) <= bounds.value("tile_features", GAP):
            yield f"{chat.name}: features differ"


def _texts(chat: GoldenChat) -> list[tuple[str, str, int]]:
    return [(turn.text, turn.answer, len(turn.images)) for turn in chat.turns]
