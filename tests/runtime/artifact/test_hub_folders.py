"""Artifacts as they come from a model hub answer as plain copies do."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava_edge.runtime import LlavaEdge


@pytest.fixture(scope="module")
def plain(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


def from_cache(plain: Path, place: Path) -> Path:
    """``snapshot_download``: every file is a link into ``blobs``."""
    snapshot, blobs = place / "snapshots/abc", place / "blobs"
    blobs.mkdir(parents=True)
    for file in [path for path in plain.rglob("*") if path.is_file()]:
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def from_local_dir(plain: Path, place: Path) -> Path:
    """``hf download --local-dir``: plain files, and what the tool notes for itself."""
    shutil.copytree(plain, place)
    (place / ".gitattributes").write_text("*.bin filter=lfs\n")
    notes = place / ".cache/huggingface/download/decoder"
    notes.mkdir(parents=True)
    (notes / "weights.bin.metadata").write_text("abc\n")
    (place / ".cache/huggingface/.gitignore").write_text("*")
    return place


def from_git(plain: Path, place: Path) -> Path:
    """``git clone``."""
    shutil.copytree(plain, place)
    (place / ".git/objects/ab").mkdir(parents=True)
    (place / ".git/objects/ab/cd").write_bytes(b"x")
    return place


def from_config_map(plain: Path, place: Path) -> Path:
    """A mounted volume: files are links through a link to a dated folder."""
    shutil.copytree(plain, place / "..2026_11_30")
    (place / "..data").symlink_to("..2026_11_30")
    for file in [path for path in plain.rglob("*") if path.is_file()]:
        link = place / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(place / "..data" / file.relative_to(plain))
    return place


@pytest.mark.parametrize("download", [from_cache, from_local_dir, from_git, from_config_map])
def test_a_downloaded_artifact_answers_as_a_plain_copy_does(
    plain: Path, tmp_path: Path, picture: Image.Image, download: Callable[[Path, Path], Path]
) -> None:
    answers = []
    for folder in (plain, download(plain, tmp_path / "download")):
        with LlavaEdge.load(folder, threads=1) as model:
            answers.append(model.generate("What?", images=[picture], max_new_tokens=6).token_ids)
    assert answers[0] == answers[1]
