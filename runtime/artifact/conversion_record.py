"""ConversionRecord: when, where and how fast an artifact was made. ``conversion.json``.

Everything here may differ between two runs of the same conversion, so it lies beside the manifest
and is not listed in it. It is for people and for the bench. Opening and verifying an artifact never
read it: one that is missing or damaged changes nothing, and one that is too large is no record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.certificate import Host
from llava_edge.runtime.artifact.manifest_validation import CONVERSION
from llava_edge.runtime.util.checksummed_json import parse_strict
from llava_edge.runtime.util.json_codec import from_json
from llava_edge.runtime.util.safe_open import read_bounded

CONVERSION_VERSION = 1
CONVERSION_LIMIT = 1 << 20
"""Most bytes of the file; a model of 80 layers needs some 10,000."""


@dataclass(frozen=True)
class PartRecord:
    """What building one part took: seconds, and the process's largest resident set by its end."""

    seconds: float = 0.0
    peak_host_bytes: int = 0


@dataclass(frozen=True)
class ConversionRecord:
    """Contents of ``conversion.json``.

    Attributes:
        schema_version: of this file.
        manifest_sha256: SHA-256 of the manifest that was written with it.
        began: when the first run began, UTC, ISO 8601.
        finished: when the manifest was written; verification follows.
        runs: one more than the conversion was interrupted.
        threads: that torch computed with; a resumed conversion keeps those of its first run.
        host: where the last run took place.
        parts: by name.
        quantization: ``seconds_by_layer`` and ``peak_host_bytes`` of GPTQ; empty without it.
        board: what the plan saw of the board: ``budget_bytes``, ``host_budget_bytes`` where the
            host has memory of its own, and ``rejected`` candidates with reasons.
    """

    schema_version: int
    manifest_sha256: str
    began: str
    finished: str
    runs: int
    threads: int
    host: Host
    parts: dict[str, PartRecord]
    quantization: dict[str, Any] = field(default_factory=dict)
    board: dict[str, Any] = field(default_factory=dict)


def read_conversion(folder: Path) -> ConversionRecord:
    """The record in an artifact.

    Raises:
        ArtifactError: there is none, it is larger than ``CONVERSION_LIMIT``, no regular file, or
            not what this version writes.
    """
    path = folder / CONVERSION
    document = parse_strict(read_bounded(path, CONVERSION_LIMIT, follow_link=True), str(path))
    stated = document.get("schema_version") if isinstance(document, dict) else None
    if stated != CONVERSION_VERSION:
        raise ArtifactError(
            f"{path} has schema_version {stated!r:.40}; {CONVERSION_VERSION} is read. The artifact "
            "can be used without it."
        )
    return from_json(ConversionRecord, document, CONVERSION)
