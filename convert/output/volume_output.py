"""Outputs that no folder can be renamed to, such as a volume of a container: work lies inside them.

Files move up one by one, the manifest last. Without its manifest a folder is no artifact; the list
of files that were to move lies in ``OUT.partial/publishing.json`` meanwhile, so that an
interruption is undone by the next run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from llava_edge.convert.output.partial_folder import (
    ARTIFACT,
    PUBLISHING,
    REPLACED,
    lock_partial,
    remove,
)
from llava_edge.convert.util.files import is_mount_point
from llava_edge.profiles.errors import RequestError
from llava_edge.runtime.artifact.manifest_validation import LOST_AND_FOUND, MANIFEST, is_safe_name
from llava_edge.runtime.util.atomic_write import sync, write_atomic
from llava_edge.runtime.util.checksummed_json import parse_strict
from llava_edge.runtime.util.json_codec import from_json
from llava_edge.runtime.util.safe_open import read_bounded

_LIST_LIMIT = 64 << 20


def is_empty_folder(out: Path) -> bool:
    """Whether nothing lies in an existing folder but what this tool leaves on a volume."""
    ours = {f"{out.name}.partial", f"{out.name}.failed", LOST_AND_FOUND}
    try:
        return not out.is_symlink() and all(name in ours for name in os.listdir(out))
    except OSError:
        return False


def works_inside(out: Path) -> bool:
    """Whether nothing can or should be renamed to an existing folder, so that work lies in it."""
    return (
        is_mount_point(out)
        or not os.access(out.parent, os.W_OK)
        # What an earlier run left in a volume that is none any more.
        or (is_empty_folder(out) and any(out.iterdir()))
        # A shell that stands in a folder which is replaced sees an empty one.
        or (_is_current(out) and not os.path.lexists(out.with_name(f"{out.name}.partial")))
    )


def _is_current(out: Path) -> bool:
    try:
        return out.samefile(os.curdir)
    except OSError:
        return False


def move_up(out: Path, partial: Path) -> None:
    """Publish on a volume: old files out of the way, new ones in, the manifest last.

    Raises:
        OSError: moving failed; ``settle_move`` undoes it.
    """
    folder, old = partial / ARTIFACT, partial / REPLACED
    stays = {partial.name, f"{out.name}.failed", LOST_AND_FOUND}
    replaced = _manifest_at_the_end(name for name in os.listdir(out) if name not in stays)
    moving = _manifest_at_the_end(os.listdir(folder))
    old.mkdir(exist_ok=True)
    document = json.dumps({"replaced": replaced, "moving": moving})
    write_atomic(partial / PUBLISHING, document.encode())
    # Without its manifest the old artifact is none; the new one is not before it has its own.
    for name in reversed(replaced):
        os.rename(out / name, old / name)
    for name in moving:
        os.rename(folder / name, out / name)
    sync(out)


def settle_move(out: Path) -> None:
    """Where a run was killed while files moved up on a volume: move all back, or end it.

    It is ended where the new manifest has moved, which is last.

    Raises:
        RequestError: the list of files names some outside the artifact.
        OSError: moving failed.
    """
    partial = out / f"{out.name}.partial"
    path = partial / PUBLISHING
    if not path.is_file():
        return
    try:
        descriptor = lock_partial(partial)
    except RequestError:
        # The run is alive.
        return
    try:
        moves = from_json(
            dict[str, tuple[str, ...]],
            parse_strict(read_bounded(path, _LIST_LIMIT), str(path)),
            "moves",
        )
        if not all(is_safe_name(name) for names in moves.values() for name in names):
            raise RequestError(f"{path} names files outside the artifact. Remove {partial}.")
        folder, replaced = partial / ARTIFACT, partial / REPLACED
        # The old artifact's manifest left first: while the new one waits, none is in its place.
        if (out / MANIFEST).is_file() and not (folder / MANIFEST).is_file():
            shutil.rmtree(partial)
            return
        for source, target, names in (
            (out, folder, moves.get("moving", ())),
            (replaced, out, moves.get("replaced", ())),
        ):
            for name in names:
                if os.path.lexists(source / name) and not os.path.lexists(target / name):
                    os.rename(source / name, target / name)
        remove(replaced)
        path.unlink()
    finally:
        os.close(descriptor)


def _manifest_at_the_end(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == MANIFEST, name))
