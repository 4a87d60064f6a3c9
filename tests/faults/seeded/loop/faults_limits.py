"""Faults at the bounds of requests: image tokens, frames, length, and reads of many rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llava_edge.runtime.chat import Chat
from llava_edge.runtime.generation.inputs.embedding_table import BLOCK_ROWS, EmbeddingTable
from llava_edge.runtime.model import LlavaEdge
from llava_edge.runtime.processing import processor as request_builder
from llava_edge.runtime.processing.processor import RequestBuilder
from llava_edge.runtime.processing.request import VideoInput
from llava_edge.runtime.util.arrays import Array
from tests.faults.fault import loop_faults

_Patch = pytest.MonkeyPatch


def _stream_without(name: str) -> Callable[[_Patch], None]:
    """An option of ``stream`` that is not looked at."""

    def plant(patch: _Patch) -> None:
        real = LlavaEdge.stream

        def stream(self: LlavaEdge, *arguments: Any, **options: Any) -> Any:
            options.pop(name, None)
            return real(self, *arguments, **options)

        patch.setattr(LlavaEdge, "stream", stream)

    return plant


def _message_without_bound(patch: _Patch) -> None:
    real = Chat.stream

    def stream(self: Chat, *arguments: Any, **options: Any) -> Any:
        options.pop("max_image_tokens", None)
        return real(self, *arguments, **options)

    patch.setattr(Chat, "stream", stream)


def _bound(change: Callable[[int], int]) -> Callable[[_Patch], None]:
    """Another bound than was given."""

    def plant(patch: _Patch) -> None:
        real = RequestBuilder.capped

        def capped(self: RequestBuilder, images: Any, grid: Any, most: int) -> Any:
            return real(self, images, grid, change(most))

        patch.setattr(RequestBuilder, "capped", capped)

    return plant


def _of_each_picture(patch: _Patch) -> None:
    """The bound counts for each picture, not for all together."""
    real = RequestBuilder.capped

    def capped(self: RequestBuilder, images: Any, grid: Any, most: int) -> Any:
        return real(self, images, grid, most * max(1, len(images)))

    patch.setattr(RequestBuilder, "capped", capped)


def _straight_to_thumbnails(patch: _Patch) -> None:
    real = RequestBuilder.lower_grids
    patch.setattr(RequestBuilder, "lower_grids", lambda self, grid: real(self, grid)[-1:])


def _not_refused(patch: _Patch) -> None:
    """Thumbnails that are beyond the bound are taken all the same."""
    real = RequestBuilder.capped

    def capped(self: RequestBuilder, images: Any, grid: Any, most: int) -> Any:
        try:
            return real(self, images, grid, most)
        except request_builder.RequestError:
            return real(self, images, grid, 1 << 20)

    patch.setattr(RequestBuilder, "capped", capped)


def _lowered_in_silence(patch: _Patch) -> None:
    real = RequestBuilder.capped

    def capped(self: RequestBuilder, images: Any, grid: Any, most: int) -> Any:
        return (*real(self, images, grid, most)[:2], "")

    patch.setattr(RequestBuilder, "capped", capped)


def _length_found_late(patch: _Patch) -> None:
    patch.setattr(LlavaEdge, "_check_length", lambda self, request: None)


def _message_found_late(patch: _Patch) -> None:
    patch.setattr(Chat, "_check_length", lambda self, request, before: None)


def _without_room(patch: _Patch) -> None:
    """A prompt that fills the context leaves no room for an answer, and is taken."""
    real = LlavaEdge._check_length

    def check(self: LlavaEdge, request: Any) -> None:
        if request.num_tokens != self.context_tokens:
            real(self, request)

    patch.setattr(LlavaEdge, "_check_length", check)


def _much_room(patch: _Patch) -> None:
    """A prompt that leaves room for a few tokens is refused."""
    real = LlavaEdge.context_tokens.fget
    assert real is not None
    check = LlavaEdge._check_length

    def checked(self: LlavaEdge, request: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(LlavaEdge, "context_tokens", property(lambda own: real(own) - 4))
            check(self, request)

    patch.setattr(LlavaEdge, "_check_length", checked)


def _rows(change: Callable[[Array, Array], None]) -> Callable[[_Patch], None]:
    """``change(ids, rows)`` spoils what a read of several rows gives."""

    def plant(patch: _Patch) -> None:
        real = EmbeddingTable.rows

        def rows(self: EmbeddingTable, ids: Array, **options: Any) -> Array:
            found = real(self, ids, **options)
            change(np.asarray(ids), found)
            return found

        patch.setattr(EmbeddingTable, "rows", rows)

    return plant


def _beyond_256(ids: Array, rows: Array) -> None:
    rows[256:] = np.roll(rows[256:], 1, axis=0)


def _last_of_many(ids: Array, rows: Array) -> None:
    if len(rows) > 300:
        rows[-1] = rows[0]


def _beyond_a_block(ids: Array, rows: Array) -> None:
    rows[BLOCK_ROWS:] = rows[: max(0, len(rows) - BLOCK_ROWS)]


def _sorted_rows(ids: Array, rows: Array) -> None:
    if len(rows) > 128:
        rows[...] = rows[np.argsort(ids, kind="stable")]


def _long_runs_cut(patch: _Patch) -> None:
    """A run of more than 128 neighbours is read again from its beginning."""
    real = EmbeddingTable._run

    def run(self: EmbeddingTable, first: int, count: int) -> Array:
        found = real(self, first, count).copy()
        found[128:] = found[: max(0, count - 128)]
        return found

    patch.setattr(EmbeddingTable, "_run", run)


def _one_frame_choice(patch: _Patch) -> None:
    real = VideoInput.given.__func__  # type: ignore[attr-defined]

    def given(cls: type[VideoInput], source: Any, count: Any = None, *_: Any) -> Any:
        return real(cls, source, count)

    patch.setattr(VideoInput, "given", classmethod(given))


def _frames_cut_in_silence(patch: _Patch) -> None:
    """More frames than were planned for are taken for as many as were."""
    patch.setattr(RequestBuilder, "_check_frames", RequestBuilder._most_frames)


FAULTS = (
    *loop_faults(
        "limits",
        ("bound ignored", "max_image_tokens is ignored", _stream_without("max_image_tokens")),
        ("one more", "max_image_tokens allows one token more", _bound(lambda most: most + 1)),
        ("one less", "max_image_tokens allows one token less", _bound(lambda most: most - 1)),
        ("each picture", "max_image_tokens counts for each picture", _of_each_picture),
        ("thumbnails at once", "max_image_tokens leaves out grids", _straight_to_thumbnails),
        ("not refused", "thumbnails beyond max_image_tokens are taken", _not_refused),
        ("in silence", "nothing says that max_image_tokens lowered the grid", _lowered_in_silence),
        ("found late", "a prompt that is too long is found by the decoder", _length_found_late),
        ("no room", "a prompt that fills the context is taken", _without_room),
        ("much room", "a prompt with room for four tokens is refused", _much_room),
        ("rows beyond 256", "rows beyond the 256th of a read are others", _rows(_beyond_256)),
        ("last of many", "the last of many rows is the first", _rows(_last_of_many)),
        ("beyond a block", "rows beyond a block are those of the first", _rows(_beyond_a_block)),
        ("sorted rows", "many rows come in the order of their ids", _rows(_sorted_rows)),
        ("long runs", "long runs of neighbours begin anew", _long_runs_cut),
    ),
    *loop_faults(
        "limits",
        ("message without bound", "a message ignores its bound", _message_without_bound),
        (
            "message found late",
            "a conversation that is too long is found late",
            _message_found_late,
        ),
        model="qwen2",
    ),
    *loop_faults(
        "limits",
        ("frames ignored", "num_frames is ignored", _stream_without("num_frames")),
        ("choice ignored", "frame_choice is ignored", _one_frame_choice),
        ("frames in silence", "too many frames are cut in silence", _frames_cut_in_silence),
        model="video",
    ),
)
