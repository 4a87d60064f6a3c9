"""``conversion.json`` is for people: nothing is judged by it, and it is bounded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.conversion_record import CONVERSION_LIMIT, read_conversion
from llava_edge.runtime.artifact.open import open_artifact

SHIPPED = Path(__file__).parents[2] / "data" / "schema_4"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    shutil.copytree(SHIPPED, folder)
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("{"),
        lambda path: path.write_text('{"schema_version": 99, "verdict": "fail"}'),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(os.urandom(1000)),
        lambda path: path.write_bytes(b" " * CONVERSION_LIMIT),
    ],
    ids=["missing", "cut off", "of a newer version", "empty", "noise", "full of blanks"],
)
def test_an_artifact_opens_and_stays_verified_whatever_its_record_holds(
    artifact: Path, damage: Callable[[Path], object]
) -> None:
    before = open_artifact(artifact)
    damage(artifact / "conversion.json")

    after = open_artifact(artifact, hash_everything=True, require_verified=True)

    assert after.verified
    assert after.manifest == before.manifest


def test_a_record_that_is_too_large_is_refused_with_its_size(artifact: Path) -> None:
    path = artifact / "conversion.json"
    with path.open("ab") as file:
        file.truncate(CONVERSION_LIMIT + 1)

    with pytest.raises(ArtifactError, match=r"conversion\.json has more than 1\.0 MiB; it may"):
        open_artifact(artifact)
    with pytest.raises(ArtifactError, match=r"more than 1\.0 MiB; at most 1\.0 MiB"):
        read_conversion(artifact)


@pytest.mark.parametrize("kind", ["pipe", "folder link", "device link", "circle"])
def test_a_record_that_is_no_file_is_refused_as_others_are(artifact: Path, kind: str) -> None:
    path = artifact / "conversion.json"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        targets = {"folder link": "vision", "device link": "/dev/zero", "circle": path.name}
        path.symlink_to(targets[kind])

    with pytest.raises(ArtifactError, match=r"conversion\.json"):
        open_artifact(artifact)
    with pytest.raises(ArtifactError, match=r"conversion\.json"):
        read_conversion(artifact)


def test_a_link_of_a_download_cache_to_the_record_is_followed(
    artifact: Path, tmp_path: Path
) -> None:
    path = artifact / "conversion.json"
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")

    assert open_artifact(artifact).verified
    assert read_conversion(artifact).runs == 1


def test_a_manifest_may_not_list_the_record(artifact: Path) -> None:
    from llava_edge.runtime.util.checksummed_json import seal

    path = artifact / "manifest.json"
    document = json.loads(path.read_text())
    document["files"]["conversion.json"] = {"bytes": 1, "sha256": "0" * 64}
    path.write_bytes(seal(document))

    with pytest.raises(ArtifactError, match=r"lists conversion\.json, which is not to be listed"):
        open_artifact(artifact)


def test_the_record_says_what_each_part_took(artifact: Path) -> None:
    record = read_conversion(artifact)

    assert list(record.parts) == sorted(record.parts)
    assert {"vision", "embeddings", "tokenizer", "decoder", "golden"} <= set(record.parts)
    assert all(part.seconds > 0 for part in record.parts.values())
    assert all(part.peak_host_bytes > 1 << 20 for part in record.parts.values())
    assert record.began < record.finished
    assert record.board["budget_bytes"] > 0
    assert record.manifest_sha256 == open_artifact(artifact).manifest_sha256


def test_a_record_of_another_version_says_that_the_artifact_needs_none(artifact: Path) -> None:
    (artifact / "conversion.json").write_text('{"schema_version": 7}')

    with pytest.raises(ArtifactError, match=r"schema_version 7; 1 is read.*used without it"):
        read_conversion(artifact)


def test_a_field_of_version_4_in_an_older_manifest_is_refused(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_edge.runtime.artifact import open as module
    from llava_edge.runtime.util.checksummed_json import seal

    monkeypatch.setattr(module, "SINCE_4", ("prefill_chunk",))
    path = artifact / "manifest.json"
    document = json.loads(path.read_text())
    path.write_bytes(seal({**document, "schema_version": 3}))

    with pytest.raises(ArtifactError, match=r"fields of a later schema_version: \['prefill_ch"):
        open_artifact(artifact)
