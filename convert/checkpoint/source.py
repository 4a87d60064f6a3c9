"""CheckpointSource: what a user meant by a checkpoint, a folder or a repository of the hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from llava_edge.profiles.errors import CheckpointError

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


@dataclass(frozen=True)
class CheckpointSource:
    """What a user meant: a folder, or a repository with the revision if one was given."""

    folder: Path | None
    repo_id: str | None
    revision: str | None


def resolve_source(text: str) -> CheckpointSource:
    """Tell a folder from a hub id; an existing folder always wins.

    Args:
        text: a path, ``owner/name``, or ``owner/name@revision``.

    Raises:
        CheckpointError: it is neither.
    """
    # os.path answers no where pathlib raises: no permission, names too long, no such user.
    path = os.path.expanduser(text)
    if text and os.path.isdir(path):
        return CheckpointSource(Path(path), None, None)
    repo_id, _, revision = text.partition("@")
    is_id = _REPO_ID.fullmatch(repo_id) and ".." not in text and not os.path.lexists(path)
    if not is_id or ("@" in text and not _REVISION.fullmatch(revision)):
        raise CheckpointError(
            f"{text[:200]!r} is neither an existing folder nor a hub id. Give a folder with "
            "config.json and safetensors files, or an id such as "
            "llava-hf/llava-v1.6-mistral-7b-hf, with @revision behind it if wanted."
        )
    return CheckpointSource(None, repo_id, revision or None)
