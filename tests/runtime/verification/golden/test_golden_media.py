"""Files in a golden file come back as they were; what cannot be of the model is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.profiles.errors import ArtifactError, ExportError
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.util.opened_file import OpenedFile
from llava_edge.runtime.verification.golden.media import (
    GoldenChat,
    GoldenClip,
    GoldenFile,
    GoldenMedia,
    GoldenTurn,
)
from llava_edge.runtime.verification.golden.probes import (
    GoldenProbe,
    golden_bytes,
    parse_golden,
    read_golden_media,
)
from tests.runtime.verification.golden.test_golden import (
    HIDDEN,
    IMAGE,
    VOCAB,
    manifest,
    probe,
    rewritten,
    video_manifest,
)

__all__ = ["manifest", "probe"]

DIGEST = "ab" * 32
CLIP = GoldenClip(b"not really a video", 3, "original")


@pytest.fixture
def media() -> GoldenMedia:
    chat = GoldenChat(
        name="two turns",
        turns=(
            GoldenTurn("What is “this”?", (b"\x89PNG", b""), answer="It."),
            GoldenTurn("And this?", (b"GIF",), dataclasses.replace(CLIP, num_frames=None)),
        ),
        ids=np.array([1, IMAGE, IMAGE, 7]),
        pixel_sha256=DIGEST,
        packing_sha256="cd" * 32,
        positions=np.array([1, 2]),
        rows=np.ones((2, HIDDEN), np.float32),
    )
    files = (
        GoldenFile("PNG, clipped", b"\x89PNG", DIGEST, clips=True),
        GoldenFile("MP4", CLIP, DIGEST),
    )
    return GoldenMedia(files, (chat,))


def test_files_and_conversations_come_back_as_they_were(
    probe: GoldenProbe, manifest: Manifest, media: GoldenMedia, tmp_path: Path
) -> None:
    takes = video_manifest(manifest)
    (tmp_path / "golden").write_bytes(golden_bytes([probe], takes, media=media))

    found = read_golden_media(OpenedFile(tmp_path / "golden"), takes)

    assert found.files == media.files
    (ours,), (theirs,) = found.chats, media.chats
    for field in dataclasses.fields(GoldenChat):
        np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))
    *pictures, clip = ours.sources
    assert pictures == [b"\x89PNG", b"", b"GIF"]
    assert clip == GoldenClip(CLIP.data, None, "original")


def test_a_file_without_any_has_none(
    probe: GoldenProbe, manifest: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "golden").write_bytes(golden_bytes([probe], manifest))

    assert read_golden_media(OpenedFile(tmp_path / "golden"), manifest) == GoldenMedia()


Change = Callable[[GoldenChat], dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"ids": c.ids[:0]}, "no embedding"),
        (lambda c: {"ids": np.array([1, VOCAB])}, "no embedding"),
        (lambda c: {"positions": np.array([1, 4])}, "rows outside its 4 tokens"),
        (lambda c: {"positions": np.array([-1, 2])}, "rows outside its 4 tokens"),
        (lambda c: {"rows": c.rows[:1]}, r"are \[1, 4\], not \[2, 4\]"),
        (lambda c: {"rows": c.rows[:, :3]}, r"are \[2, 3\], not \[2, 4\]"),
        (lambda c: {"rows": c.rows * np.nan}, "not finite"),
        (lambda c: {"name": "a\x1b[2J"}, "impossible name or digest"),
        (lambda c: {"pixel_sha256": "ab"}, "impossible name or digest"),
        (lambda c: {"packing_sha256": ""}, "impossible name or digest"),
        (lambda c: {"turns": ()}, "conversation 0 is"),
        (lambda c: {"turns": c.turns * 3}, "conversation 0 is"),
        (lambda c: {"turns": (GoldenTurn("x" * 1001),)}, "a turn is"),
        (lambda c: {"turns": (GoldenTurn("x", (b"",) * 65),)}, "a turn is"),
        (
            lambda c: {"turns": (GoldenTurn("x", video=dataclasses.replace(CLIP, num_frames=5)),)},
            "at most 4 frames",
        ),
    ],
)
def test_a_conversation_that_cannot_be_of_this_model_is_not_written(
    probe: GoldenProbe, manifest: Manifest, media: GoldenMedia, change: Change, message: str
) -> None:
    (chat,) = media.chats
    wrong = GoldenMedia((), (dataclasses.replace(chat, **change(chat)),))

    with pytest.raises(ExportError, match=message):
        golden_bytes([probe], video_manifest(manifest), media=wrong)


def test_a_model_without_videos_has_no_file_of_one(
    probe: GoldenProbe, manifest: Manifest, media: GoldenMedia
) -> None:
    with pytest.raises(ExportError, match="at most 0 frames"):
        golden_bytes([probe], manifest, media=GoldenMedia(media.files))


def test_the_number_of_files_is_bounded(probe: GoldenProbe, manifest: Manifest) -> None:
    many = GoldenMedia((GoldenFile("PNG", b"", DIGEST),) * 97)
    with pytest.raises(ExportError, match="its part about files"):
        golden_bytes([probe], manifest, media=many)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "its part about files is"),
        ('{"files": [], "chats": [], "more": 1}', "its part about files is"),
        ('{"files": [1], "chats": []}', "file 0 is 1"),
        ('{"files": [], "chats": [1]}', "conversation 0 is 1"),
        ('{"files": [], "chats": []}', "tensors of no probe"),
        (" " * 65537, "65537 characters"),
    ],
)
def test_another_text_about_files_is_refused(
    probe: GoldenProbe, manifest: Manifest, media: GoldenMedia, text: str, message: str
) -> None:
    takes = video_manifest(manifest)
    data = golden_bytes([probe], takes, media=media)

    with pytest.raises(ArtifactError, match=message):
        parse_golden(rewritten(data, lambda h: h["__metadata__"].update(media=text)), takes, "here")


def test_whatever_one_byte_becomes_it_is_read_or_refused(
    probe: GoldenProbe, manifest: Manifest, media: GoldenMedia
) -> None:
    takes = video_manifest(manifest)
    whole = golden_bytes([probe], takes, media=media)
    end = 8 + int.from_bytes(whole[:8], "little")
    for position in range(whole.index(b'"media"'), whole.index(b'"0.', 300), 3):
        assert position < end
        for value in (0, 0x22, 0x39, 0x7D, 0xFF):
            data = bytearray(whole)
            data[position] = value
            try:
                parse_golden(bytes(data), takes, "here")
            except ArtifactError as error:
                assert "here" in str(error)  # noqa: PT017
