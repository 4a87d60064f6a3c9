"""OpenedFiles: the files of one folder, each opened once, and whether they changed since.

Weights are mapped and embeddings read from the files for as long as a model is loaded, so a file
that somebody writes to changes the running model. That is seen by size, times and inode, before and
after each request.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from llava_edge.profiles.errors import ArtifactError, LlavaEdgeError, shorten
from llava_edge.runtime.artifact.hashing import hash_opened
from llava_edge.runtime.artifact.manifest import FileEntry
from llava_edge.runtime.util.opened_file import Fingerprint, OpenedFile, fingerprint


class OpenedFiles:
    """Files by their name below a folder. Close it, or use it as a context manager.

    Args:
        root: the folder.
        entries: what the manifest lists; every file of the folder may be opened if left out.
    """

    def __init__(self, root: Path, entries: Mapping[str, FileEntry] | None = None) -> None:
        self.root = root
        self._entries = entries
        self._root = -1
        self._files: dict[str, OpenedFile] = {}
        # What a file was when its contents were last known to be those of the manifest, or known
        # to be others.
        self._sound: dict[str, Fingerprint] = {}
        self._foreign: dict[str, Fingerprint] = {}
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> OpenedFile:
        """The file of that name, opened when it is first asked for.

        Raises:
            ArtifactError: the manifest does not list it, it is of another size than listed, or it
                cannot be opened.
        """
        with self._lock:
            found = self._files.get(name)
            if found is None:
                found = self._open(name)
                self._files[name] = found
                self._sound[name] = found.fingerprint
            return found

    def _open(self, name: str) -> OpenedFile:
        if self._entries is not None and name not in self._entries:
            raise ArtifactError(
                f"{self.root} lists no file {name!r:.120} in its manifest. "
                "Copy the artifact again, or convert again."
            )
        if self._root < 0:
            self._root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened = OpenedFile(self.root / name, name)
        if self._entries is not None and opened.size != self._entries[name].bytes:
            opened.close()
            raise ArtifactError(
                f"{self.root / name} has {opened.size} bytes; the manifest says "
                f"{self._entries[name].bytes}. Copy the artifact again, or convert again."
            )
        return opened

    @contextmanager
    def unchanged(self, on_change: Callable[[], None] = lambda: None) -> Iterator[None]:
        """See to it that no open file changes in between.

        Args:
            on_change: called before the error of a change in between.

        Raises:
            ArtifactError: a file has other contents than when it was opened, its name stands for
                another file, or it was written to in between.
        """
        before = self.require_unchanged()
        try:
            yield
        except LlavaEdgeError as error:
            # Whatever went wrong, this is the reason.
            self._require_same(before, on_change, error)
            raise
        self._require_same(before, on_change)

    def require_unchanged(self) -> dict[str, Fingerprint]:
        """What all open files are now, if their contents are still those of the manifest.

        A file whose times alone differ (a hard link, a backup, ``chmod``, ``touch``) is hashed once
        more. One that was deleted, or whose whole folder got another name, is still the same file.

        Raises:
            ArtifactError: a file has other contents, or its name stands for another file.
        """
        # Nobody closes a file that is being hashed.
        with self._lock:
            now = {name: self._look(opened) for name, opened in self._files.items()}
            changed = [name for name, prints in now.items() if not self._is_sound(name, prints)]
        if changed:
            raise self._changed(changed, "")
        return {name: prints for name, prints in now.items() if prints is not None}

    def _require_same(
        self,
        before: Mapping[str, Fingerprint],
        on_change: Callable[[], None],
        cause: BaseException | None = None,
    ) -> None:
        with self._lock:
            now = {name: self._look(opened) for name, opened in self._files.items()}
        changed = [name for name, prints in before.items() if now.get(name) != prints]
        if changed:
            on_change()
            raise self._changed(changed, " while it was in use") from cause

    def _look(self, opened: OpenedFile) -> Fingerprint | None:
        """What an open file is now; None where its name stands for another one."""
        # By the folder's descriptor: a folder that was renamed as a whole is still this artifact.
        try:
            found = fingerprint(os.stat(opened.name, dir_fd=self._root))
        except OSError:
            # Nobody opens it by a name that is gone, and deleting it set its ctime.
            size, mtime, _, *rest = opened.current_fingerprint()
            return (size, mtime, self._sound[opened.name][2], *rest)
        return found if found[3:] == opened.fingerprint[3:] else None

    def _is_sound(self, name: str, prints: Fingerprint | None) -> bool:
        if prints is None or prints == self._sound[name]:
            return prints is not None
        opened = self._files[name]
        entry = None if self._entries is None else self._entries.get(name)
        if entry is None or prints[0] != entry.bytes or self._foreign.get(name) == prints:
            return False
        try:
            same = hash_opened([opened])[name] == entry.sha256
        except ArtifactError:
            return False
        (self._sound if same else self._foreign)[name] = prints
        return same and self._look(opened) == prints

    def _changed(self, names: list[str], when: str) -> ArtifactError:
        return ArtifactError(
            f"the artifact {self.root} changed on disk{when}: {shorten(sorted(names))}. Load it "
            "again. To update an artifact that is in use, write the new one into a folder of its "
            "own and rename that."
        )

    def close(self) -> None:
        """Close all of them; idempotent. Those asked for later are opened anew."""
        with self._lock:
            for opened in self._files.values():
                opened.close()
            self._files.clear()
            if self._root >= 0:
                os.close(self._root)
                self._root = -1

    def __enter__(self) -> OpenedFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_root", -1) >= 0:
            self.close()
