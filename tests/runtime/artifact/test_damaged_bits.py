"""One flipped bit in any file of an artifact is refused at load, and untouched files cost nothing.

On a whole artifact with certificate and golden prompts, by the call that applications make.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.convert.output.artifact_writer import write_certificate
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact import hashing as digests
from llava_edge.runtime.artifact import open as artifact_module
from llava_edge.runtime.artifact.certificate import Certificate
from llava_edge.runtime.artifact.hashing import DigestCache
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.json_codec import to_json

SOURCE = Path(__file__).parents[2] / "data" / "schema_1"
FILES = sorted(p.relative_to(SOURCE).as_posix() for p in SOURCE.rglob("*") if p.is_file())
CHECKED = sorted({*FILES, "certificate.json"} - {"README.md"})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Files that were copied a moment ago are remembered as well, so that the cache is in play.
    eager = functools.partial(DigestCache, settle_seconds=0)
    monkeypatch.setattr(artifact_module, "DigestCache", eager)


@pytest.fixture
def whole(tmp_path: Path, make_certificate: Callable[..., Certificate]) -> Path:
    folder = tmp_path / "artifact"
    shutil.copytree(SOURCE, folder)
    write_certificate(folder, to_json(make_certificate()))
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that were read to be hashed."""
    counts: list[int] = []
    real = os.preadv

    def spy(*arguments: Any) -> int:
        counts.append(real(*arguments))
        return counts[-1]

    monkeypatch.setattr(digests.os, "preadv", spy)
    return counts


def test_what_is_checked_is_all_that_the_folder_holds() -> None:
    assert {
        "manifest.json",
        "golden.safetensors",
        "embeddings.safetensors",
        "tokenizer.json",
        "vision/model.onnx",
        "vision/weights.bin",
        "decoder/model.onnx",
        "decoder/weights.bin",
    } <= set(CHECKED)


@pytest.mark.parametrize("name", CHECKED)
def test_one_flipped_bit_is_refused_at_load_with_the_files_name(whole: Path, name: str) -> None:
    LlavaEdge.load(whole, threads=1, require_verified=True).close()
    path = whole / name
    sound = path.read_bytes()
    times = path.stat()
    random = np.random.default_rng(len(sound))
    for position in {0, len(sound) - 1, *random.integers(0, len(sound), 6).tolist()}:
        data = bytearray(sound)
        data[position] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        # Programs may set these at will; the digests that were remembered must not count for it.
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(ArtifactError, match=re.escape(name)):
            LlavaEdge.load(whole, threads=1)
    time.sleep(0.05)  # one tick of the file system's clock is a few milliseconds
    path.write_bytes(sound)
    LlavaEdge.load(whole, threads=1, require_verified=True).close()


def test_the_card_is_for_people_and_is_not_opened(whole: Path) -> None:
    data = bytearray((whole / "README.md").read_bytes())
    data[0] ^= 1
    (whole / "README.md").write_bytes(data)

    assert open_artifact(whole, require_verified=True).verified


def test_every_file_is_hashed_once_and_then_never_while_it_is_untouched(
    whole: Path, hashed: list[int]
) -> None:
    sizes = {name: entry.bytes for name, entry in open_artifact(whole).manifest.files.items()}
    # Graphs are read whole and hashed each time, as the bytes that are judged and opened.
    others = sum(size for name, size in sizes.items() if not name.endswith(".onnx"))
    assert sum(hashed) == others + (whole / "manifest.json").stat().st_size
    hashed.clear()

    for _ in range(3):
        LlavaEdge.load(whole, threads=1).close()
    assert sum(hashed) == 0

    (whole / "tokenizer.json").touch()
    open_artifact(whole)
    assert sum(hashed) == sizes["tokenizer.json"]
