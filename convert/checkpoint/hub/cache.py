"""Hub cache: what of a repository lies on this disk already, whole or in part."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from llava_edge.convert.checkpoint.hub.files import RemoteFile
from llava_edge.convert.checkpoint.open import CONFIG_FILE
from llava_edge.convert.util.text_files import read_bytes
from llava_edge.profiles.errors import CheckpointError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_REF_BYTES = 1024


def storage_folder(cache: Path, repo_id: str) -> Path:
    """Where the hub's client keeps a model repository."""
    return cache / f"models--{repo_id.replace('/', '--')}"


def is_cached(storage: Path, commit: str, file: RemoteFile) -> bool:
    """Whether a file is there whole; parts of one cannot be taken up by another process."""
    if (storage / "snapshots" / commit / file.name).exists():
        return True
    return file.etag is not None and (storage / "blobs" / file.etag).exists()


def bytes_on_disk(storage: Path, commit: str, file: RemoteFile) -> int:
    """Size of what has arrived, whole or in part."""
    if is_cached(storage, commit, file):
        return file.size
    if file.etag is None:
        return 0
    try:
        parts = (storage / "blobs").glob(f"{glob.escape(file.etag)}*.incomplete")
        # A killed run leaves its part behind; the one that grows is the latest.
        latest = max((part.stat() for part in parts), key=lambda stat: stat.st_mtime, default=None)
    except OSError:
        return 0
    return min(latest.st_size, file.size) if latest is not None else 0


def cached_commit(storage: Path, revision: str | None) -> str | None:
    """Commit of a cached snapshot: named itself, by a ref, or the only one there is."""
    snapshots = storage / "snapshots"
    if revision is not None and _COMMIT.fullmatch(revision):
        named: str | None = revision
    else:
        try:
            ref = read_bytes(storage / "refs" / (revision or "main"), _MAX_REF_BYTES)
            named = ref.decode("utf-8").strip()
        except (CheckpointError, ValueError):
            present = [s.name for s in snapshots.iterdir()] if snapshots.is_dir() else []
            named = present[0] if revision is None and len(present) == 1 else None
    if named is None or not _COMMIT.fullmatch(named):
        return None
    return named if (snapshots / named / CONFIG_FILE).is_file() else None
