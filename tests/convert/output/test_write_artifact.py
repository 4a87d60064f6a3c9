"""An artifact appears whole or not at all; an interrupted conversion goes on where it stopped."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from llava_edge.convert.onnx.embeddings import write_embeddings
from llava_edge.convert.output import artifact_writer as write_artifact
from llava_edge.convert.output.artifact_writer import ArtifactWriter, write_certificate
from llava_edge.convert.util import files as disk
from llava_edge.convert.util.files import check_free_space, full_disk_reason
from llava_edge.profiles.errors import (
    ArtifactError,
    CheckpointError,
    ExportError,
    OutputExistsError,
    RequestError,
)
from llava_edge.profiles.models.model_dims import ModelDims, TextDims, VisionDims
from llava_edge.runtime.artifact.certificate import Certificate
from llava_edge.runtime.artifact.manifest import (
    SCHEMA_VERSION,
    GraphSpec,
    ImageProcessing,
    Manifest,
    Precision,
    Source,
    TensorSpec,
    TokenIds,
)
from llava_edge.runtime.artifact.manifest_validation import CONVERSION
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.atomic_write import write_atomic
from llava_edge.runtime.util.json_codec import to_json

KEY = {"checkpoint": "abc", "precision": "int4", "grid": [1, 2]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "artifacts" / "toy"


@pytest.fixture
def partial(out: Path) -> Path:
    return out.with_name("toy.partial")


@pytest.fixture
def manifest() -> Manifest:
    vision = VisionDims(4, 8, 2, 2, 28, 14, 1e-5, "quick_gelu", (1,), "gelu", True)
    text = TextDims(
        "llama", 7, 4, 8, 1, 2, 2, 2, 1e-6, 1e4, 1.0, 64, "silu", False, False, False, (0,), False
    )
    x, y = TensorSpec("x", "float32", ("n",)), TensorSpec("y", "float32", ("n",))
    third = (1 / 3, 1 / 3, 1 / 3)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        variant="toy",
        target="cpu",
        precision=Precision("fp32", "fp32", "fp32", "fp16", "float32"),
        plan={},
        model=ModelDims("llava_next", vision, text, (), 6, None),
        image_processing=ImageProcessing(28, 14, (), third, third, 1 / 255),
        tokens=TokenIds(image=6, video=None, bos=1, stop=(2,), num_text_tokens=7),
        prompt=None,
        vision=GraphSpec("vision/model.onnx", (x,), (y,)),
        decoder=GraphSpec("decoder/model.onnx", (x,), (y,)),
        embeddings="embeddings.safetensors",
        tokenizer="tokenizer.json",
        context_tokens=64,
        source=Source("toy", None, "0" * 64, "hf"),
        reference="none",
        tools={"llava-edge": "0.1.0"},
        conversion={},
        files={},
    )


def build_graph(part: str, op: str = "Neg") -> Callable[[Path], dict[str, Any]]:
    def build(folder: Path) -> dict[str, Any]:
        ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy"]
        graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", ports[:1], ports[1:])
        imports = [helper.make_opsetid("", 21)]
        model = helper.make_model(graph, ir_version=10, opset_imports=imports)
        (folder / part).mkdir()
        (folder / part / "model.onnx").write_bytes(model.SerializeToString())
        return {"shape": (1, 2), "op": op}

    return build


def build_texts(folder: Path) -> None:
    write_embeddings(folder / "embeddings.safetensors", [np.ones((7, 4))], np.ones(4))
    (folder / "tokenizer.json").write_text("{}")


def write_all(writer: ArtifactWriter, manifest: Manifest) -> Path:
    writer.part("vision", build_graph("vision"))
    writer.part("decoder", build_graph("decoder"))
    writer.part("texts", build_texts)
    return writer.finish(manifest, "# toy\n")


def never(folder: Path) -> None:
    raise AssertionError("a finished part was built again")


def contents(folder: Path) -> dict[str, bytes]:
    """All but the record of the conversion, which says when it was."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != CONVERSION
    }


def test_a_finished_artifact_opens_and_leaves_nothing_beside_it(
    out: Path, manifest: Manifest
) -> None:
    with ArtifactWriter(out, KEY) as writer:
        assert write_all(writer, manifest) == out
    assert os.listdir(out.parent) == ["toy"]
    artifact = open_artifact(out)
    assert set(artifact.manifest.files) == {
        "vision/model.onnx",
        "decoder/model.onnx",
        "embeddings.safetensors",
        "tokenizer.json",
    }
    assert (out / "README.md").read_text() == "# toy\n"


def test_the_same_request_gives_the_same_bytes(tmp_path: Path, manifest: Manifest) -> None:
    for name in ("a", "b"):
        with ArtifactWriter(tmp_path / name, KEY) as writer:
            write_all(writer, manifest)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_nothing_is_at_the_output_before_the_end(
    out: Path, manifest: Manifest, make_certificate: Callable[..., Certificate]
) -> None:
    with ArtifactWriter(out, KEY) as writer:
        writer.part("vision", build_graph("vision"))
        writer.part("decoder", build_graph("decoder"))
        writer.part("texts", build_texts)
        assert not out.exists()
        folder = writer.prepare(manifest, "card")
        assert not out.exists()
        write_certificate(folder, to_json(make_certificate()))
        writer.publish()
    assert open_artifact(out, require_verified=True).verified


def test_finished_parts_and_their_values_are_taken_over(out: Path, manifest: Manifest) -> None:
    with ArtifactWriter(out, KEY) as writer:
        first = writer.part("vision", build_graph("vision"))
        size = (writer.folder / "vision" / "model.onnx").stat().st_size
        assert writer.finished_bytes == size
    with ArtifactWriter(out, {"grid": (1, 2), **KEY}) as writer:
        assert writer.part("vision", never) == first == {"shape": [1, 2], "op": "Neg"}
        write_all(writer, manifest)
    open_artifact(out)


@pytest.mark.parametrize("damage", [b"changed", b""], ids=["changed", "emptied"])
def test_a_part_whose_files_changed_is_built_again(
    out: Path, partial: Path, manifest: Manifest, damage: bytes
) -> None:
    with ArtifactWriter(out, KEY) as writer:
        writer.part("texts", build_texts)
    (partial / "artifact" / "tokenizer.json").write_bytes(damage)
    with ArtifactWriter(out, KEY) as writer:
        write_all(writer, manifest)
    assert (out / "tokenizer.json").read_text() == "{}"
    open_artifact(out)


def test_a_part_whose_file_is_gone_is_built_again(
    out: Path, partial: Path, manifest: Manifest
) -> None:
    with ArtifactWriter(out, KEY) as writer:
        writer.part("texts", build_texts)
    (partial / "artifact" / "tokenizer.json").unlink()
    with ArtifactWriter(out, KEY) as writer:
        write_all(writer, manifest)
    open_artifact(out)


def test_a_part_that_is_no_longer_asked_for_is_dropped(out: Path, manifest: Manifest) -> None:
    def build_extra(folder: Path) -> None:
        (folder / "golden.safetensors").write_bytes(b"x")

    with ArtifactWriter(out, KEY) as writer:
        writer.part("golden", build_extra)
    with ArtifactWriter(out, KEY) as writer:
        write_all(writer, manifest)
    assert not (out / "golden.safetensors").exists()
    open_artifact(out)


def test_another_request_does_not_take_over_and_names_what_differs(out: Path) -> None:
    with ArtifactWriter(out, KEY) as writer:
        writer.part("texts", build_texts)
    with pytest.raises(RequestError, match=r'precision was "int4" and is now "int8".*--force'):
        ArtifactWriter(out, {**KEY, "precision": "int8"})
    with ArtifactWriter(out, {**KEY, "precision": "int8"}, force=True) as writer:
        assert not list(writer.folder.iterdir())


@pytest.mark.parametrize(
    "journal",
    [
        b"",
        b"{}",
        b'{"request": {}, "parts": {"a": {"files": {}, "value": 1, "more": 2}}}',
        b'{"request": 1, "parts": {}}',
    ],
)
def test_a_damaged_journal_is_not_guessed_at(out: Path, partial: Path, journal: bytes) -> None:
    with ArtifactWriter(out, KEY) as writer:
        writer.part("texts", build_texts)
    (partial / "journal.json").write_bytes(journal)
    with pytest.raises(RequestError, match=r"journal cannot be read.*--force"):
        ArtifactWriter(out, KEY)


def test_a_journal_that_points_outside_removes_nothing(out: Path, partial: Path) -> None:
    entry = {"bytes": 1, "sha256": "0" * 64}
    document = {"request": KEY, "parts": {"a": {"files": {"../../x": entry}, "value": None}}}
    partial.mkdir(parents=True)
    (partial / "journal.json").write_text(json.dumps(document))
    with pytest.raises(RequestError, match="outside the artifact"):
        ArtifactWriter(out, KEY)


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), CheckpointError("x"), KeyboardInterrupt(), SystemExit(1)],
    ids=repr,
)
def test_any_failure_of_a_part_removes_its_files_and_keeps_earlier_parts(
    out: Path, partial: Path, error: BaseException
) -> None:
    def fail(folder: Path) -> None:
        (folder / "vision" / "deep").mkdir(parents=True)
        (folder / "vision" / "deep" / "half").write_bytes(b"half")
        raise error

    with ArtifactWriter(out, KEY) as writer:
        writer.part("texts", build_texts)
        with pytest.raises(type(error)):
            writer.part("vision", fail)
    assert not out.exists()
    assert sorted(contents(partial / "artifact")) == ["embeddings.safetensors", "tokenizer.json"]
    assert not (partial / "artifact" / "vision").exists()


def test_a_failure_before_the_first_part_leaves_nothing(out: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise ValueError

    with ArtifactWriter(out, KEY) as writer, pytest.raises(ValueError, match=r"^$"):
        writer.part("vision", fail)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_full_disk_is_an_export_error_with_numbers_and_the_next_step(
    out: Path, manifest: Manifest, code: int
) -> None:
    def fail(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(bytes(1000))
        raise OSError(code, os.strerror(code))

    with ArtifactWriter(out, KEY, needed_bytes=5000) as writer:
        writer.part("texts", build_texts)
        with pytest.raises(ExportError) as caught:
            writer.part("decoder", fail)
    message = str(caught.value)
    assert "part 'decoder'" in message
    assert "(texts) are kept" in message
    assert "the same command goes on" in message
    assert (" KiB are still needed" in message) == (code != errno.EIO)
    assert isinstance(caught.value.__cause__, OSError)
    assert not out.exists()
    with ArtifactWriter(out, KEY) as writer:
        writer.part("texts", never)
        write_all(writer, manifest)
    open_artifact(out)


def test_a_full_disk_is_recognised_behind_other_errors() -> None:
    def chained() -> BaseException:
        try:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise RuntimeError("saving failed") from error
        except RuntimeError as outer:
            return outer

    assert full_disk_reason(chained()) == "the disk is full"
    foreign = RuntimeError('IoError(Os { "No space left on device (os error 28)" })')
    assert full_disk_reason(foreign) == "the disk is full"
    assert full_disk_reason(RuntimeError("os error 2")) is None
    assert full_disk_reason(OSError(errno.EIO, "os error 28")) is None


def test_a_disk_full_at_the_manifest_leaves_all_parts(
    out: Path, partial: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ArtifactWriter(out, KEY) as writer:
        writer.part("vision", build_graph("vision"))
        writer.part("decoder", build_graph("decoder"))
        writer.part("texts", build_texts)
        with monkeypatch.context() as patch:
            patch.setattr(write_artifact, "write_atomic", fail)
            with pytest.raises(ExportError, match="the disk is full"):
                writer.finish(manifest, "card")
        assert not out.exists()
        assert len(contents(partial / "artifact")) == 4
        write_all(writer, manifest)
    open_artifact(out)


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from llava_edge.convert.output.artifact_writer import ArtifactWriter
from llava_edge.profiles.errors import ExportError

def small(folder):
    (folder / "small.bin").write_bytes(b"s" * 1000)

def large(folder):
    with open(folder / "large.bin", "wb") as file:
        for block in range(64):
            file.write(bytes([block]) * 65536)
            file.flush()
            if sys.argv[2] == "kill" and block == 20:
                os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
with ArtifactWriter(sys.argv[1], {"key": 1}) as writer:
    writer.part("small", small)
    try:
        writer.part("large", large)
    except ExportError as error:
        print(error)
        sys.exit(error.exit_code)
    print(sorted(os.listdir(writer.folder)))
"""


def run_child(out: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out), mode], stdout=subprocess.PIPE, text=True
    )


def test_a_file_size_limit_of_the_system_ends_in_one_message(out: Path, partial: Path) -> None:
    with run_child(out, "limit") as child:
        text, _ = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "a file grew beyond the size that is allowed here" in text
    assert "more than 1.0 MiB are needed" in text
    assert contents(partial / "artifact") == {"small.bin": b"s" * 1000}


def test_after_being_killed_in_a_part_the_same_command_ends_with_the_same_bytes(
    out: Path, partial: Path, tmp_path: Path
) -> None:
    with run_child(out, "kill") as child:
        child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert (partial / "artifact" / "large.bin").stat().st_size == 21 * 65536
    stamp = (partial / "artifact" / "small.bin").stat().st_mtime_ns
    with run_child(out, "") as child:
        text, _ = child.communicate(timeout=60)
    assert child.returncode == 0, text
    with run_child(tmp_path / "undisturbed", "") as child:
        child.communicate(timeout=60)
    assert contents(partial / "artifact") == contents(tmp_path / "undisturbed.partial/artifact")
    assert (partial / "artifact" / "small.bin").stat().st_mtime_ns == stamp


def test_a_second_conversion_into_the_same_output_is_refused_and_later_goes_on(
    out: Path, manifest: Manifest
) -> None:
    with ArtifactWriter(out, KEY) as first:
        first.part("texts", build_texts)
        for force in (False, True):
            with pytest.raises(RequestError, match="another conversion is writing"):
                ArtifactWriter(out, KEY, force=force)
    with ArtifactWriter(out, KEY) as second:
        second.part("texts", never)


def test_a_lock_on_a_folder_that_was_just_removed_is_taken_anew(
    out: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    calls: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        if ".llava-edge-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            return  # A file that is written, the journal.
        calls.append(descriptor)
        if len(calls) == 1:
            # The conversion that held the lock ends between open and lock of this one.
            shutil.rmtree(partial)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        writer = ArtifactWriter(out, KEY)
    with writer:
        assert len(calls) == 2
        with pytest.raises(RequestError, match="another conversion"):
            ArtifactWriter(out, KEY)


def test_of_many_processes_one_writes_and_the_others_are_refused(out: Path) -> None:
    children = [run_child(out, "") for _ in range(3)]
    try:
        codes = [child.wait(timeout=60) for child in children]
    finally:
        for child in children:
            child.kill()
            assert child.stdout is not None
            child.stdout.close()
    # One after the other is fine as well: then the later ones find everything finished.
    assert 0 in codes
    assert set(codes) <= {0, 1}


def test_an_existing_output_is_refused_before_anything_is_written(
    out: Path, manifest: Manifest
) -> None:
    with ArtifactWriter(out, KEY) as writer:
        write_all(writer, manifest)
    before = contents(out)
    with pytest.raises(OutputExistsError, match="--force"):
        ArtifactWriter(out, KEY)
    assert os.listdir(out.parent) == ["toy"]
    assert contents(out) == before


def test_an_output_that_appears_meanwhile_is_not_overwritten(
    out: Path, partial: Path, manifest: Manifest
) -> None:
    with ArtifactWriter(out, KEY) as writer:
        writer.part("vision", build_graph("vision"))
        out.mkdir()
        with pytest.raises(OutputExistsError):
            writer.publish()
    assert not list(out.iterdir())
    assert (partial / "artifact" / "vision" / "model.onnx").exists()


def test_force_replaces_an_artifact_only_when_the_new_one_is_complete(
    out: Path, manifest: Manifest
) -> None:
    with ArtifactWriter(out, KEY) as writer:
        write_all(writer, manifest)
    before = contents(out)
    with ArtifactWriter(out, KEY, force=True) as writer:
        writer.part("vision", build_graph("vision", "Abs"))
        assert contents(out) == before
        writer.part("decoder", build_graph("decoder", "Abs"))
        writer.part("texts", build_texts)
        assert contents(out) == before
        writer.finish(manifest, "# new\n")
    assert (out / "README.md").read_text() == "# new\n"
    assert os.listdir(out.parent) == ["toy"]
    open_artifact(out)


def test_a_failed_exchange_puts_the_old_artifact_back(
    out: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ArtifactWriter(out, KEY) as writer:
        write_all(writer, manifest)
    before = contents(out)
    real = os.rename

    def fail(source: Path, target: Path) -> None:
        if target == out and source.name == "artifact":
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    with ArtifactWriter(out, KEY, force=True) as writer, monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(ExportError, match="moving the artifact"):
            write_all(writer, manifest)
    assert contents(out) == before


@pytest.mark.parametrize("force", [False, True])
def test_an_exchange_that_was_killed_half_way_is_undone_first(
    out: Path, partial: Path, manifest: Manifest, force: bool
) -> None:
    with ArtifactWriter(out, KEY) as writer:
        write_all(writer, manifest)
    before = contents(out)
    partial.mkdir()
    out.rename(partial / "replaced")
    if force:
        ArtifactWriter(out, KEY, force=True).close()
    else:
        with pytest.raises(OutputExistsError):
            ArtifactWriter(out, KEY)
    assert contents(out) == before


def test_force_does_not_replace_what_is_no_artifact(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("my only copy")
    with pytest.raises(RequestError, match="is no artifact"):
        ArtifactWriter(out, KEY, force=True)
    assert (out / "thesis.txt").exists()


def test_a_foreign_partial_folder_is_not_touched(out: Path, partial: Path) -> None:
    partial.mkdir(parents=True)
    (partial / "thesis.txt").write_text("my only copy")
    with pytest.raises(RequestError, match=r"did not write \(thesis\.txt\)"):
        ArtifactWriter(out, KEY, force=True)
    assert [entry.name for entry in partial.iterdir()] == ["thesis.txt"]


def test_a_linked_partial_folder_is_not_followed(out: Path, partial: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    partial.parent.mkdir()
    partial.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="is no folder"):
        ArtifactWriter(out, KEY)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["manifest.json", "README.md", "a b", "ü.bin", "a/b/c/d/e"])
def test_a_part_that_leaves_a_file_no_artifact_can_hold_fails(out: Path, name: str) -> None:
    def build(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")

    with (
        ArtifactWriter(out, KEY) as writer,
        pytest.raises(ExportError, match="an artifact cannot hold"),
    ):
        writer.part("odd", build)


def test_a_part_that_leaves_a_link_fails(out: Path, tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "link").symlink_to(tmp_path / "weights.bin")

    with ArtifactWriter(out, KEY) as writer, pytest.raises(ExportError, match="link"):
        writer.part("odd", build)


def test_a_part_that_changes_another_parts_files_fails(out: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{ }")

    with ArtifactWriter(out, KEY) as writer:
        writer.part("texts", build_texts)
        with pytest.raises(ExportError, match=r"files of another part: tokenizer\.json"):
            writer.part("odd", build)


def test_what_the_runtime_would_refuse_is_not_published(out: Path, manifest: Manifest) -> None:
    with ArtifactWriter(out, KEY) as writer:
        writer.part("vision", build_graph("vision", "NonZero"))
        with pytest.raises(ExportError, match=r"would be refused(.|\n)*NonZero"):
            write_all(writer, manifest)
    assert not out.exists()


def test_a_failed_conversion_is_kept_with_its_report(out: Path, manifest: Manifest) -> None:
    for loss in (1.0, float("nan")):
        with ArtifactWriter(out, KEY) as writer:
            writer.part("texts", build_texts)
            failed = writer.keep_failed({"stage": "decoder", "loss": loss, "path": Path("x")})
        assert failed == out.with_name("toy.failed")
        assert os.listdir(out.parent) == ["toy.failed"]
    assert json.loads((failed / "failure.json").read_text()) == {
        "stage": "decoder",
        "loss": "nan",
        "path": "x",
    }
    assert (failed / "tokenizer.json").exists()


def test_a_foreign_failed_folder_is_not_replaced(out: Path) -> None:
    out.with_name("toy.failed").mkdir(parents=True)
    with (
        ArtifactWriter(out, KEY) as writer,
        pytest.raises(RequestError, match=r"toy\.failed exists"),
    ):
        writer.keep_failed({})


def test_a_certificate_carries_the_digest_of_the_manifest_file(
    out: Path, manifest: Manifest, make_certificate: Callable[..., Certificate]
) -> None:
    with ArtifactWriter(out, KEY) as writer:
        write_all(writer, manifest)
    ignored = make_certificate(manifest_sha256="ignored", self_sha256="ignored")
    path = write_certificate(out, to_json(ignored))
    document = json.loads(path.read_text())
    digest = hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()
    assert document["manifest_sha256"] == digest
    assert open_artifact(out, require_verified=True).verified
    with pytest.raises(ArtifactError):
        write_certificate(out.parent, {"passed": True})


def test_free_space_is_asked_where_the_folder_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_free_space(tmp_path / "not" / "there" / "yet", 1)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1 << 30)
    check_free_space(tmp_path, 1 << 30)
    with pytest.raises(RequestError, match=r"needs 3\.0 GiB; .* Free 2\.0 GiB"):
        check_free_space(tmp_path, 3 << 30)


def test_an_atomic_write_that_fails_keeps_the_old_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_atomic(path, b"new")
    assert contents(tmp_path) == {"file": b"old"}


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", b"")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
