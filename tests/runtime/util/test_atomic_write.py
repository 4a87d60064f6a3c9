from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
from llava_edge.convert.testing.random_spec import preset
from llava_edge.runtime.cli.output_file import PngFile
from llava_edge.runtime.util.atomic_write import atomic_file, atomic_folder, write_atomic
from llava_edge.runtime.util.cache_dir import keep_in_cache

HOLD = """
import sys
from pathlib import Path
from llava_edge.runtime.util import atomic_write
with getattr(atomic_write, sys.argv[1])(Path(sys.argv[2])) as partial:
    print(partial, flush=True)
    sys.stdin.read()
"""


class Writer:
    """A process in the middle of an atomic write."""

    def __init__(self, kind: str, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, kind, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.partial = Path(self.process.stdout.readline().strip())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.close()

    def finish(self) -> int:
        self.close()
        return self.process.returncode

    def close(self) -> None:
        self.process.communicate()


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path: Path, kind: str) -> None:
    writer = Writer(kind, tmp_path / "a")
    writer.kill()
    assert [*tmp_path.iterdir()] == [writer.partial]
    write_atomic(tmp_path / "b", b"new")
    assert [*tmp_path.iterdir()] == [tmp_path / "b"]


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_what_a_living_process_writes_stays(tmp_path: Path, kind: str) -> None:
    writer = Writer(kind, tmp_path / "a")
    write_atomic(tmp_path / "b", b"new")
    assert writer.partial.exists()
    assert writer.finish() == 0
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a", tmp_path / "b"]


def _checkpoint(folder: Path) -> None:
    write_random_checkpoint(folder / "model", preset("odd"))


def _picture(folder: Path) -> None:
    PngFile(folder / "a.png").write(Image.new("RGB", (1, 1)))


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda folder: write_atomic(folder / "a", b"x"), id="file"),
        pytest.param(lambda folder: keep_in_cache(folder / "a", "x"), id="cache"),
        pytest.param(_picture, id="picture"),
        pytest.param(_checkpoint, id="checkpoint"),
    ],
)
def test_every_writer_removes_leftovers(tmp_path: Path, write: Callable[[Path], None]) -> None:
    Writer("atomic_folder", tmp_path / "a").kill()
    write(tmp_path)
    assert len([*tmp_path.iterdir()]) == 1


def test_names_of_others_are_left_alone(tmp_path: Path) -> None:
    kept = (".partial", ".llava-edge-0123456789abcdef.partial.txt", ".llava-edge-0.partial")
    for name in kept:
        (tmp_path / name).write_bytes(b"")
    os.symlink("/etc/hostname", tmp_path / ".llava-edge-0123456789abcdef.partial")
    os.mkfifo(tmp_path / ".llava-edge-fedcba9876543210.partial")
    write_atomic(tmp_path / "a", b"x")
    assert {*kept, ".llava-edge-0123456789abcdef.partial"} < {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def file() -> None:
        with atomic_file(tmp_path / "a") as partial:
            partial.write_bytes(b"half")
            raise error

    def folder() -> None:
        with atomic_folder(tmp_path / "b") as partial:
            (partial / "c").write_bytes(b"half")
            raise error

    for write in (file, folder):
        with pytest.raises(error):
            write()
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]
    assert (tmp_path / "a").read_bytes() == b"old"
