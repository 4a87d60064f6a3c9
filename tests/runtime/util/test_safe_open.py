"""Only plain files are opened, and no more of them is read than allowed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.util.safe_open import open_regular, read_at, read_bounded


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"0123456789")
    return tmp_path / "file"


def test_a_file_of_exactly_the_limit_is_read(file: Path) -> None:
    assert read_bounded(file, 10) == b"0123456789"
    with pytest.raises(ArtifactError, match="has 10 B; at most 9 B are read"):
        read_bounded(file, 9)


def test_reading_by_position_ends_with_the_file(file: Path) -> None:
    with open_regular(file) as descriptor:
        assert read_at(descriptor, 3, 4, file) == b"3456"
        assert read_at(descriptor, 8, 100, file) == b"89"
        assert read_at(descriptor, 100, 1, file) == b""


def test_a_link_is_refused_also_to_a_plain_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(ArtifactError, match="it is a symbolic link"):
        read_bounded(tmp_path / "link", 10)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "nul\x00byte"])
def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match=r"cannot be opened|not a regular file"):
        read_bounded(tmp_path / kind, 10)


def test_descriptors_are_given_back(file: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    read_bounded(file, 10)
    with pytest.raises(ArtifactError):
        read_bounded(tmp_path, 10)
    assert len(os.listdir("/proc/self/fd")) == before
