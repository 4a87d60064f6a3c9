"""Digests are those of the files as they are now, whatever the cache believes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact import hashing as digests
from llava_edge.runtime.artifact.hashing import DigestCache, hash_file, hash_files
from llava_edge.runtime.util.cache_dir import cache_folder
from llava_edge.runtime.util.opened_file import OpenedFile


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llava-edge" / "digests"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a").write_bytes(b"first")
    (tmp_path / "files" / "b").write_bytes(b"second")
    return tmp_path / "files"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_cached(folder: Path, names: list[str], settle_seconds: float = 2.0) -> dict[str, str]:
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(OpenedFile(folder / name)) for name in names]
        return DigestCache(folder, settle_seconds=settle_seconds).hash_files(files)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are really read."""
    names: list[str] = []
    real = digests._hash

    def spy(opened: OpenedFile, *rest: object) -> str:
        names.append(opened.name)
        return real(opened, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(digests, "_hash", spy)
    return names


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_digests_are_right_at_the_edges_of_a_chunk(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "x").write_bytes(data)
    assert hash_file(tmp_path / "x") == sha256(data)


def test_many_files_on_two_threads_keep_their_own_digests(tmp_path: Path) -> None:
    paths = [tmp_path / str(k) for k in range(20)]
    for k, path in enumerate(paths):
        path.write_bytes(bytes([k]) * k * 1000)
    found = hash_files(paths)
    assert found == {p: sha256(bytes([k]) * k * 1000) for k, p in enumerate(paths)}


def test_a_missing_file_is_an_artifact_error(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be opened"):
        hash_files([folder / "a", folder / "missing"])


def test_untouched_files_are_read_once(folder: Path, hashed: list[str]) -> None:
    expected = {"a": sha256(b"first"), "b": sha256(b"second")}
    for _ in range(3):
        assert hash_cached(folder, ["a", "b"], settle_seconds=0) == expected
    assert sorted(hashed) == ["a", "b"]


def test_a_changed_file_is_read_again_even_if_size_and_mtime_are_restored(
    folder: Path, hashed: list[str]
) -> None:
    hash_cached(folder, ["a", "b"], settle_seconds=0)
    before = (folder / "a").stat()
    time.sleep(0.05)  # one tick of the file system's clock is a few milliseconds
    (folder / "a").write_bytes(b"FIRST")
    os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    hashed.clear()
    found = hash_cached(folder, ["a", "b"], settle_seconds=0)
    assert found == {"a": sha256(b"FIRST"), "b": sha256(b"second")}
    assert hashed == ["a"]


def test_a_replaced_file_is_read_again(folder: Path) -> None:
    hash_cached(folder, ["a"], settle_seconds=0)
    before = (folder / "a").stat()
    (folder / "new").write_bytes(b"FIRST")
    os.utime(folder / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(folder / "new", folder / "a")
    assert hash_cached(folder, ["a"]) == {"a": sha256(b"FIRST")}


def test_a_file_touched_a_moment_ago_is_not_remembered(folder: Path, hashed: list[str]) -> None:
    hash_cached(folder, ["a"], settle_seconds=60)
    hash_cached(folder, ["a"], settle_seconds=60)
    assert hashed == ["a", "a"]


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"a": 1}', b'{"a": [[1], 2]}', b'{"a": [["x"], "y"]}', b"\xff" * 10],
)
def test_a_damaged_cache_costs_only_time(folder: Path, own_cache: Path, damage: bytes) -> None:
    hash_cached(folder, ["a"], settle_seconds=0)
    (file,) = own_cache.iterdir()
    file.write_bytes(damage)
    assert hash_cached(folder, ["a"]) == {"a": sha256(b"first")}


def test_entries_of_the_cache_name_all_that_identifies_a_file(
    folder: Path, own_cache: Path
) -> None:
    hash_cached(folder, ["a"], settle_seconds=0)
    (file,) = own_cache.iterdir()
    status = (folder / "a").stat()
    numbers = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
    assert json.loads(file.read_text()) == {"a": [numbers, sha256(b"first")]}


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert hash_cached(folder, ["a"], settle_seconds=0) == {"a": sha256(b"first")}


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/llava-edge")
