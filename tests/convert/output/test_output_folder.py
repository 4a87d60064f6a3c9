"""Outputs that exist and are empty, volumes among them; and outputs that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_edge.convert.output import volume_output
from llava_edge.convert.output.artifact_writer import ArtifactWriter, refuse_existing
from llava_edge.convert.util.files import is_mount_point, refusal
from llava_edge.profiles.errors import ExportError, OutputExistsError
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.cli.main import main
from tests.convert.output.test_write_artifact import (
    KEY,
    build_texts,
    contents,
    manifest,
    never,
    out,
    own_cache,
    write_all,
)

__all__ = ["manifest", "out", "own_cache"]


@pytest.fixture
def volume(out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty mount point: nothing is renamed to it, from it, or across its border."""
    out.mkdir(parents=True)
    rename = os.rename

    def as_mounted(source: Any, target: Any) -> None:
        source, target = Path(source), Path(target)
        if out in (source, target):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(out))
        if (out in source.parents) != (out in target.parents):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", as_mounted)
    monkeypatch.setattr(volume_output, "is_mount_point", lambda folder: folder == out)
    return out


def test_an_empty_folder_is_used(out: Path, manifest: Manifest) -> None:
    out.mkdir(parents=True)

    with ArtifactWriter(out, KEY) as writer:
        assert writer.folder.is_relative_to(out.with_name("toy.partial"))
        write_all(writer, manifest)

    open_artifact(out)
    assert [path.name for path in out.parent.iterdir()] == ["toy"]


def test_a_link_to_an_empty_folder_stands_for_it(out: Path, manifest: Manifest) -> None:
    real = out.parent / "real"
    real.mkdir(parents=True)
    out.symlink_to(real)

    refuse_existing(out, force=False)
    with ArtifactWriter(out, KEY) as writer:
        write_all(writer, manifest)

    open_artifact(out)
    assert out.readlink() == real
    assert sorted(path.name for path in out.parent.iterdir()) == ["real", "toy"]


def test_a_folder_with_anything_in_it_is_refused(out: Path) -> None:
    out.mkdir(parents=True)
    (out / ".hidden").write_text("mine")

    with pytest.raises(OutputExistsError, match="exists"):
        ArtifactWriter(out, KEY)


def test_an_interrupted_conversion_into_an_empty_folder_goes_on(
    out: Path, manifest: Manifest
) -> None:
    out.mkdir(parents=True)
    with ArtifactWriter(out, KEY) as writer:
        writer.part("texts", build_texts)
    assert not list(out.iterdir())
    with ArtifactWriter(out, KEY) as writer:
        writer.part("texts", never)
        write_all(writer, manifest)
    open_artifact(out)


def test_a_volume_is_written_from_inside(volume: Path, manifest: Manifest) -> None:
    (volume / "lost+found").mkdir()
    with ArtifactWriter(volume, KEY) as writer:
        writer.part("texts", build_texts)
    assert [path.name for path in volume.parent.iterdir()] == ["toy"]
    with ArtifactWriter(volume, KEY) as writer:
        writer.part("texts", never)
        write_all(writer, manifest)

    # What a check of the file system left there belongs to no artifact.
    (volume / "lost+found" / "#12").write_text("recovered")
    open_artifact(volume)


def test_a_conversion_into_the_current_folder_goes_on_after_an_interruption(
    volume: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ArtifactWriter(volume, KEY) as writer:
        writer.part("texts", build_texts)
    monkeypatch.chdir(volume)
    refuse_existing(Path("."), force=False)
    with ArtifactWriter(".", KEY) as writer:
        writer.part("texts", never)
        write_all(writer, manifest)
    open_artifact(volume)


def test_the_current_folder_stays_the_one_that_a_shell_is_in(
    out: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.mkdir(parents=True)
    monkeypatch.chdir(out)
    for force in (False, True):
        with ArtifactWriter(".", KEY, force=force) as writer:
            write_all(writer, manifest)
        assert "manifest.json" in os.listdir()
        open_artifact(out)


def test_work_beside_an_output_goes_on_there_from_inside_the_output(
    out: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.mkdir(parents=True)
    with ArtifactWriter(out, KEY) as writer:
        writer.part("texts", build_texts)
    monkeypatch.chdir(out)
    with ArtifactWriter(".", KEY) as writer:
        writer.part("texts", never)


def test_work_inside_an_output_goes_on_there_once_it_is_no_volume_any_more(
    out: Path, volume: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ArtifactWriter(volume, KEY) as writer:
        writer.part("texts", build_texts)
    monkeypatch.setattr(volume_output, "is_mount_point", lambda folder: False)

    with ArtifactWriter(out, KEY) as writer:
        writer.part("texts", never)
        write_all(writer, manifest)
    open_artifact(out)
    assert [path.name for path in out.parent.iterdir()] == ["toy"]


@pytest.mark.parametrize("after", range(1, 6))
def test_a_move_on_a_volume_that_was_killed_is_undone_or_ended_by_the_next_run(
    volume: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    rename, left = os.rename, after

    def dying(source: Any, target: Any) -> None:
        nonlocal left
        rename(source, target)
        if Path(target).parent == volume:
            left -= 1
            if not left:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying)
        with pytest.raises(KeyboardInterrupt), ArtifactWriter(volume, KEY) as writer:
            write_all(writer, manifest)
    whole = (volume / "manifest.json").is_file()
    if whole:
        with pytest.raises(OutputExistsError):
            ArtifactWriter(volume, KEY)
    else:
        with ArtifactWriter(volume, KEY) as writer:
            assert not [path for path in volume.iterdir() if path.name != "toy.partial"]
            writer.part("texts", never)
            write_all(writer, manifest)
    open_artifact(volume)
    assert not (volume / "toy.partial").exists()


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_force_on_a_volume_replaces_the_old_artifact_or_leaves_it(
    volume: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    with ArtifactWriter(volume, KEY) as writer:
        write_all(writer, manifest)
    before = contents(volume)
    rename, left = os.rename, after

    def dying(source: Any, target: Any) -> None:
        nonlocal left
        rename(source, target)
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        writer = ArtifactWriter(volume, {**KEY, "precision": "int8"}, force=True)
        writer.part("texts", build_texts)
        if after:
            patch.setattr(os, "rename", dying)
            with pytest.raises(KeyboardInterrupt):
                write_all(writer, manifest)
        else:
            write_all(writer, manifest)
        writer.close()

    if after:
        with ArtifactWriter(volume, {**KEY, "precision": "int8"}, force=True):
            assert {n: b for n, b in contents(volume).items() if "partial" not in n} == before
    open_artifact(volume)


def test_a_failed_conversion_on_a_volume_is_kept_inside_and_the_next_one_passes(
    volume: Path, manifest: Manifest
) -> None:
    with ArtifactWriter(volume, KEY) as writer:
        writer.part("texts", build_texts)
        failed = writer.keep_failed({"verdict": "fail"})
    assert failed == volume / "toy.failed"
    with ArtifactWriter(volume, KEY) as writer:
        write_all(writer, manifest)

    assert not failed.exists()
    open_artifact(volume)


def test_mount_points_are_found_in_the_systems_list(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    listed = tmp_path / "mountinfo"
    place = str(folder).replace(" ", "\\040")
    listed.write_text(f"36 35 98:0 /src {place} rw,noatime master:1 - ext4 /dev/sda rw\n")

    assert is_mount_point(folder, listed)
    assert not is_mount_point(tmp_path, listed)
    assert not is_mount_point(folder, tmp_path / "absent")
    assert is_mount_point(Path("/proc"))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "may not write"),
        (errno.EBUSY, "mount point"),
        (errno.EXDEV, "another file system"),
        (errno.ENAMETOOLONG, "longer than"),
        (errno.ENOTDIR, "is a file"),
        (errno.EIO, "input/output"),
    ],
)
def test_refusals_of_the_system_are_said_with_the_file_and_the_next_step(
    out: Path, code: int, words: str
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(code, os.strerror(code), str(folder / "weights.bin"))

    with ArtifactWriter(out, KEY) as writer, pytest.raises(ExportError) as caught:
        writer.part("decoder", fail)

    message = str(caught.value)
    assert words in message
    assert "weights.bin" in message
    assert "Errno" not in message
    assert "Errno" not in refusal(OSError(code, os.strerror(code)))


@pytest.mark.parametrize("name", ["x" * 250, "file/below"])
def test_an_output_that_no_file_system_takes_is_refused_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ExportError) as caught:
        ArtifactWriter(tmp_path / name, KEY)

    assert "Errno" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name != "file"]


def test_an_output_is_refused_in_words_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="longer than the file system allows"):
        refuse_existing(tmp_path / ("x" * 300), force=False)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OutputExistsError, match="link is no folder, and an artifact is one"):
        refuse_existing(tmp_path / "link", force=True)


def test_no_source_lies_in_the_output_nor_the_output_in_a_source(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models" / "checkpoint"
    shutil.copytree(make_checkpoint("odd", backbone="mistral", layers=2), folder)
    samples = tmp_path / "models" / "samples"
    samples.mkdir()
    (samples / "a.jsonl").write_text(json.dumps({"question": "?", "answer": "!"}))

    def said(out: Path, *more: str) -> str:
        given = ["convert", str(folder), "--out", str(out), "--precision", "int4", *more]
        assert main([*given, "--profile", "cpu-16gb", "--force"]) == 2
        return capsys.readouterr().err

    assert "lies inside the checkpoint" in said(folder / "artifact")
    assert "holds the checkpoint" in said(tmp_path / "models")
    calibration = ("--calibration", str(samples))
    assert "lies inside the calibration set" in said(samples / "artifact", *calibration)
    assert "is no folder" in said(samples / "a.jsonl")
