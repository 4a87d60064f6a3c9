"""An artifact that changes on disk while it is loaded: noticed before and after every request."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import open_artifact

Change = Callable[[Path], object]

USED = (
    "manifest.json",
    "tokenizer.json",
    "embeddings.safetensors",
    "vision/model.onnx",
    "vision/weights.bin",
    "decoder/model.onnx",
    "decoder/weights.bin",
)
QUESTION = "Tell me everything"
MOMENT = 0.02
"""Longer than a tick of the file system's clock."""


@pytest.fixture(scope="module")
def made(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "artifact")
    time.sleep(MOMENT)
    return tmp_path / "artifact"


@pytest.fixture
def model(folder: Path) -> Iterator[LlavaEdge]:
    with LlavaEdge.load(folder, threads=1) as loaded:
        yield loaded


def tokens(model: LlavaEdge, picture: Image.Image | None = None) -> tuple[int, ...]:
    images = [] if picture is None else [picture]
    return model.generate(QUESTION, images=images, max_new_tokens=8).token_ids


def flip_in_place(path: Path) -> None:
    """Other bytes in the same file, of the same size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with open(path, "r+b") as file:
        file.write(data)


def flip_and_restore_time(path: Path) -> None:
    """As copying tools do that keep times."""
    status = path.stat()
    flip_in_place(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def replace_by_rename(path: Path) -> None:
    """Another file of that name, with the very contents: the next load may find others."""
    shutil.copy2(path, path.with_name("new"))
    path.with_name("new").replace(path)


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize(
    "change", [flip_in_place, flip_and_restore_time, shorten, lengthen, replace_by_rename]
)
def test_a_changed_file_is_noticed_before_a_request(
    model: LlavaEdge, folder: Path, name: str, change: Change
) -> None:
    tokens(model)
    change(folder / name)

    chat = model.chat()
    for ask in (
        lambda: tokens(model),
        lambda: model.count_tokens("Hello"),
        lambda: model.teacher_forced_logits("Hello", token_ids=[5]),
        lambda: chat.send("Hello"),
        lambda: tokens(model),
    ):
        with pytest.raises(ArtifactError, match=rf"changed on disk: {name}\. Load it again") as no:
            ask()
        assert no.value.exit_code == 1
    assert chat.messages == []


def test_all_that_changed_is_named_and_the_safe_way_as_well(model: LlavaEdge, folder: Path) -> None:
    for name in ("decoder/weights.bin", "embeddings.safetensors"):
        flip_in_place(folder / name)
    with pytest.raises(
        ArtifactError,
        match=r"decoder/weights\.bin, embeddings\.safetensors\. .* folder of its own and rename",
    ):
        tokens(model)


def test_a_folder_inside_that_is_replaced_is_noticed(model: LlavaEdge, folder: Path) -> None:
    (folder / "decoder").rename(folder.parent / "decoder")
    shutil.copytree(folder.parent / "decoder", folder / "decoder")
    with pytest.raises(ArtifactError, match=r"decoder/model\.onnx, decoder/weights\.bin"):
        tokens(model)


def test_a_link_that_leads_elsewhere_by_now_is_noticed(folder: Path) -> None:
    weights = folder / "decoder/weights.bin"
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    weights.rename(blobs / "one")
    shutil.copy2(blobs / "one", blobs / "two")
    weights.symlink_to(blobs / "one")
    with LlavaEdge.load(folder, threads=1) as model:
        before = tokens(model)
        assert tokens(model) == before
        weights.unlink()
        weights.symlink_to(blobs / "two")
        with pytest.raises(ArtifactError, match=r"changed on disk: decoder/weights\.bin"):
            tokens(model)


def hard_link(folder: Path) -> None:
    """As backups by hard links do: the times of change are new, the contents are not."""
    shutil.copytree(folder, folder.parent / "backup", copy_function=os.link)


def touch(folder: Path) -> None:
    for path in folder.rglob("*"):
        path.touch()


def protect(folder: Path) -> None:
    for path in folder.rglob("*.bin"):
        path.chmod(0o400)


def copy_over_itself(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "same")
    shutil.copytree(folder.parent / "same", folder, dirs_exist_ok=True)


def swap(folder: Path) -> None:
    """The safe way to update: another folder takes the name."""
    shutil.copytree(folder, folder.parent / "new")
    flip_in_place(folder.parent / "new/decoder/weights.bin")
    folder.rename(folder.parent / "old")
    (folder.parent / "new").rename(folder)


def swap_and_delete(folder: Path) -> None:
    swap(folder)
    shutil.rmtree(folder.parent / "old")


def rewrite_what_is_not_opened(folder: Path) -> None:
    (folder / "certificate.json").write_text("{}")
    (folder / "README.md").write_text("my own words")
    (folder / ".DS_Store").write_bytes(b"1")


@pytest.mark.parametrize(
    "change",
    [
        hard_link,
        touch,
        protect,
        copy_over_itself,
        swap,
        swap_and_delete,
        shutil.rmtree,
        rewrite_what_is_not_opened,
    ],
)
def test_what_leaves_the_opened_files_as_they_are_stops_nobody(
    model: LlavaEdge, folder: Path, picture: Image.Image, change: Change
) -> None:
    before = tokens(model, picture)
    change(folder)
    for _ in range(2):
        assert tokens(model, picture) == before
    assert model.count_tokens(QUESTION) > 0


def test_a_file_whose_times_alone_changed_is_hashed_once(
    model: LlavaEdge, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_edge.runtime.artifact import hashing as digests

    hashed: list[str] = []
    real = digests._hash

    def spy(opened, stop):  # type: ignore[no-untyped-def]
        hashed.append(opened.name)
        return real(opened, stop)

    monkeypatch.setattr(digests, "_hash", spy)
    (folder / "decoder/weights.bin").touch()
    for _ in range(3):
        tokens(model)
    assert hashed == ["decoder/weights.bin"]

    flip_in_place(folder / "decoder/weights.bin")
    for _ in range(3):
        with pytest.raises(ArtifactError):
            tokens(model)
    assert hashed == ["decoder/weights.bin"] * 2


def while_it_streams(model: LlavaEdge, picture: Image.Image, change: Callable[[], object]) -> None:
    stream = model.stream(QUESTION, images=[picture], max_new_tokens=12)
    assert next(stream)
    change()
    with pytest.raises(ArtifactError, match="changed on disk while it was in use"):
        list(stream)
    with pytest.raises(Exception, match="no answer: the stream failed"):
        _ = stream.answer


@pytest.mark.parametrize("change", [flip_and_restore_time, replace_by_rename, Path.touch])
def test_an_answer_during_which_a_file_changed_is_not_returned(
    model: LlavaEdge, folder: Path, picture: Image.Image, change: Change
) -> None:
    while_it_streams(model, picture, lambda: change(folder / "vision/weights.bin"))


def test_a_message_during_which_a_file_changed_does_not_enter_the_conversation(
    model: LlavaEdge, folder: Path
) -> None:
    chat = model.chat()
    stream = chat.stream("Hello", max_new_tokens=12)
    next(stream)
    flip_in_place(folder / "embeddings.safetensors")
    with pytest.raises(ArtifactError, match="changed on disk"):
        list(stream)
    assert chat.messages == []


def test_nothing_computed_while_a_file_changed_is_gone_on_with(
    folder: Path, picture: Image.Image
) -> None:
    weights = folder / "embeddings.safetensors"
    whole = weights.read_bytes()
    with LlavaEdge.load(folder, threads=1, vision_cache_bytes=64 << 20) as model:
        before = tokens(model, picture)

        def spoil() -> None:
            with open(weights, "r+b") as file:
                file.seek(len(whole) // 3)
                file.write(os.urandom(len(whole) // 3))

        while_it_streams(model, picture, spoil)
        with open(weights, "r+b") as file:
            file.write(whole)

        answer = model.generate(QUESTION, images=[picture], max_new_tokens=8)
        assert answer.token_ids == before
        assert answer.reused_tokens == 0


def test_an_error_that_a_change_brought_about_is_told_as_the_change(
    model: LlavaEdge, folder: Path
) -> None:
    stream = model.stream(QUESTION, max_new_tokens=12)
    next(stream)
    os.truncate(folder / "embeddings.safetensors", 64)
    with pytest.raises(ArtifactError, match="changed on disk while it was in use") as changed:
        list(stream)
    assert "ends before its last row" in str(changed.value.__cause__)


def test_a_stream_that_is_closed_early_says_nothing_of_a_change(
    model: LlavaEdge, folder: Path
) -> None:
    with model.stream(QUESTION, max_new_tokens=12) as stream:
        next(stream)
        (folder / "tokenizer.json").touch()
    assert tokens(model)


def test_a_change_while_it_loads_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(what: str, done: int, of: int) -> None:
        if done == of:
            flip_and_restore_time(folder / "decoder/weights.bin")

    with pytest.raises(ArtifactError, match=r"changed on disk while it was in use: decoder/wei"):
        LlavaEdge.load(folder, threads=1, progress=change)


def test_files_that_change_their_names_after_the_digests_are_still_those_that_compute(
    folder: Path, picture: Image.Image
) -> None:
    with LlavaEdge.load(folder, threads=1) as model:
        wanted = model.teacher_forced_logits(QUESTION, [picture], [5, 6])
    artifact = open_artifact(folder)
    folder.rename(folder.parent / "moved")
    shutil.copytree(folder.parent / "moved", folder)
    for name in ("decoder/weights.bin", "vision/weights.bin", "embeddings.safetensors"):
        (folder / name).write_bytes(os.urandom(1 << 10))
    with LlavaEdge.over(artifact, threads=1) as model:
        got = model.teacher_forced_logits(QUESTION, [picture], [5, 6])
    np.testing.assert_array_equal(got, wanted)
