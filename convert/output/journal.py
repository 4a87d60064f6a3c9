"""The journal of an unfinished conversion: the request, and the parts that are finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_edge.profiles.errors import ArtifactError, RequestError, shorten
from llava_edge.runtime.artifact.certificate import utc_now
from llava_edge.runtime.artifact.conversion_record import PartRecord
from llava_edge.runtime.artifact.manifest import FileEntry
from llava_edge.runtime.artifact.manifest_validation import is_safe_name
from llava_edge.runtime.util.checksummed_json import parse_strict
from llava_edge.runtime.util.json_codec import from_json
from llava_edge.runtime.util.safe_open import read_bounded

_LIMIT = 64 << 20
_DISCARD = "Add --force to discard it, or name another output."


@dataclass
class Part:
    """A finished part: its files, the JSON value that its builder returned, and what it took."""

    files: dict[str, FileEntry]
    value: Any = None
    took: PartRecord = field(default_factory=PartRecord)


@dataclass
class Journal:
    """What an unfinished conversion has done.

    Attributes:
        request: what was asked, as JSON values.
        inputs: what else the result depends on, a digest or version each.
        parts: by name.
        threads: that every part is computed with.
        began: time of the first run, UTC.
        runs: how many there were, this one included.
    """

    request: dict[str, Any]
    inputs: dict[str, str]
    parts: dict[str, Part] = field(default_factory=dict)
    threads: int = 1
    began: str = field(default_factory=utc_now)
    runs: int = 1

    @property
    def files(self) -> dict[str, FileEntry]:
        """Files of all finished parts, by name."""
        return {name: entry for part in self.parts.values() for name, entry in part.files.items()}


def read_document(path: Path) -> Any:
    """The JSON of a journal, whatever version wrote it.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    return parse_strict(read_bounded(path, _LIMIT), str(path))


def read_journal(path: Path, request: Mapping[str, Any], threads: int) -> Journal:
    """The journal that an earlier run of the same request left.

    Args:
        path: of the journal.
        request: what is asked now, as JSON values.
        threads: for journals that note none.

    Raises:
        RequestError: it cannot be read, belongs to another request, or names files outside the
            artifact.
    """
    place = path.parent
    try:
        document = read_document(path)
        if not isinstance(document, dict) or not {"request", "parts"} <= set(document):
            raise ArtifactError(f"{path} is no journal of this version")
        # Journals that note no inputs differ in all of them, so their parts are made again.
        found = from_json(Journal, {"inputs": {}, "threads": threads, **document}, "journal")
    except ArtifactError as error:
        raise RequestError(
            f"{place} holds an unfinished conversion whose journal cannot be read "
            f"({error}). {_DISCARD}"
        ) from error
    there = found.request
    if there != request:
        differing = [
            f"{key} was {_brief(there.get(key))} and is now {_brief(request.get(key))}"
            for key in sorted(set(there) | set(request))
            if there.get(key) != request.get(key)
        ]
        raise RequestError(
            f"{place} holds an unfinished conversion of another request: "
            f"{shorten(differing)}. {_DISCARD}"
        )
    if not all(is_safe_name(name) for part in found.parts.values() for name in part.files):
        raise RequestError(f"{path} names files outside the artifact. {_DISCARD}")
    return found


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
