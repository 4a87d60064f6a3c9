"""ConversionCache: artifacts that tests share, converted once by whichever process is first.

An artifact is kept on disk by a digest of what makes it: the sources of the packages, the versions
of the libraries, the processor, the checkpoint's files and the request. Processes of one run share
it, and so does the next run. Entries of former sources are removed.

Artifacts are read-only to tests: one that is going to be changed is copied first. ``changed`` tells
which were changed all the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("profiles", "runtime", "convert")
LIBRARIES = (
    "jinja2",
    "ml_dtypes",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "pillow",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
    "transformers",
)
KEPT = 2
"""Sources whose artifacts are kept, the current ones included: about 100 MB each."""

Listing = dict[str, tuple[int, int]]
"""Bytes and time of the last change of every file, by its name below the entry."""


class ConversionCache:
    """Artifacts below a folder, by digest.

    Args:
        folder: created where it is missing; one run or several use it at a time.
        sources: digest of everything that all conversions depend on; None for that of this tree
            and this machine.
        kept: how many sources' artifacts stay.
    """

    def __init__(self, folder: Path, sources: str | None = None, kept: int = KEPT) -> None:
        self.folder = folder / (digest_sources() if sources is None else sources)
        self._used: dict[Path, Listing] = {}
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            self.folder.mkdir(exist_ok=True)
            # Held until the process ends: entries in use are never removed.
            self._in_use = _open_lock(self.folder.with_suffix(".lock"))
            fcntl.flock(self._in_use, fcntl.LOCK_SH)
            os.utime(self.folder)
            self._remove_former(kept)

    def convert(self, request: Any) -> Path:
        """The artifact of a ``ConvertRequest``; its ``out`` does not matter.

        Raises:
            ValueError: the request names files besides the checkpoint, which no digest covers.
        """
        from llava_edge.convert.pipeline import convert_checkpoint
        from llava_edge.runtime.util.progress import no_progress

        def build(entry: Path) -> None:
            out = entry / "artifact"
            convert_checkpoint(replace(request, out=out), no_progress, lambda _: None)

        return self.get(describe(request), build) / "artifact"

    def get(self, description: str, build: Callable[[Path], object]) -> Path:
        """The folder that ``build`` fills; built here or by another process, once.

        Args:
            description: of everything that ``build`` depends on, but the sources.
            build: given an empty folder. What it raises is raised, and nothing is kept.
        """
        entry = self.folder / hashlib.sha256(description.encode()).hexdigest()[:24]
        if entry in self._used:
            return entry
        whole = entry.with_suffix(".json")
        with _locked(entry.with_suffix(".lock")):
            listing = _read(whole)
            if listing is None or listing != list_files(entry):
                # Never finished, or changed by a run that has ended.
                whole.unlink(missing_ok=True)
                shutil.rmtree(entry, ignore_errors=True)
                entry.mkdir()
                try:
                    build(entry)
                except BaseException:
                    shutil.rmtree(entry, ignore_errors=True)
                    raise
                listing = list_files(entry)
                unfinished = whole.with_suffix(".json.unfinished")
                unfinished.write_text(json.dumps(listing), "utf-8")
                unfinished.replace(whole)
        self._used[entry] = listing
        return entry

    def changed(self) -> list[str]:
        """Files of entries used here that are no longer what was built; each is told once.

        The next run builds such an entry anew.
        """
        found = []
        for entry, listing in list(self._used.items()):
            now = list_files(entry)
            if now != listing:
                names = sorted(name for name, _ in set(now.items()) ^ set(listing.items()))
                found += [str(entry / name) for name in dict.fromkeys(names)]
                self._used[entry] = now
                entry.with_suffix(".json").unlink(missing_ok=True)
        return found

    def _remove_former(self, kept: int) -> None:
        others = [path for path in self.folder.parent.iterdir() if path.is_dir()]
        others.remove(self.folder)
        others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in others[kept - 1 :]:
            lock = path.with_suffix(".lock")
            with open(_open_lock(lock), "rb") as opened:
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                shutil.rmtree(path, ignore_errors=True)
                lock.unlink(missing_ok=True)


def _read(path: Path) -> Listing | None:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return {name: (size, changed) for name, (size, changed) in document.items()}


def list_files(folder: Path) -> Listing:
    """Every file below a folder."""
    found: Listing = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            found[os.path.relpath(path, folder)] = (status.st_size, status.st_mtime_ns)
    return found


def describe(request: Any) -> str:
    """A ``ConvertRequest`` by its values and the content of its checkpoint.

    Raises:
        ValueError: the request names further files.
    """
    bare = replace(request, checkpoint=None, out=None)
    if named := list(_paths(bare)):
        raise ValueError(f"no digest covers the content of {named[0]}: convert it without cache")
    checkpoint = Path(request.checkpoint)
    return f"{checkpoint.resolve().name} {_digest([checkpoint])} {bare!r}"


def _paths(value: object) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _paths(getattr(value, field.name))


@cache
def digest_sources() -> str:
    """Of the packages' files, the libraries' versions, this interpreter and this processor."""
    return hashlib.sha256(
        repr(
            (
                _digest([ROOT / package for package in PACKAGES]),
                sorted((name, _version(name)) for name in LIBRARIES),
                sys.version,
                platform.machine(),
                _processor(),
                os.environ.get("OMP_NUM_THREADS"),
                os.cpu_count(),
            )
        ).encode()
    ).hexdigest()[:16]


def _digest(folders: list[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _processor() -> list[str]:
    """Model and instruction sets: sums of floats come out in the order of vectors."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return [platform.processor()]
    keys = ("model name", "flags", "Features", "CPU part")
    return sorted({line for line in text.splitlines() if line.startswith(keys)})


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(_open_lock(path), "rb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
