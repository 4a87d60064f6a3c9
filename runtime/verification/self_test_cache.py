"""DeviceResult: what the golden prompts came to on one machine, kept in the user's cache folder.

Never in the artifact: it is of this machine, and the artifact goes to others. A result counts for
one manifest, host, engine and tool. Damage or absence of the file costs one more run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.certificate import Host, StageResult, Verdict, overall
from llava_edge.runtime.util.cache_dir import cache_folder, keep_in_cache
from llava_edge.runtime.util.checksummed_json import parse_strict
from llava_edge.runtime.util.json_codec import from_json, to_json
from llava_edge.runtime.util.safe_open import read_bounded
from llava_edge.runtime.util.versions import own_version

_LIMIT = 1 << 20


@dataclass(frozen=True)
class DeviceResult:
    """Outcome of one run of the golden prompts; ``issued`` is UTC, ISO 8601."""

    manifest_sha256: str
    host: Host
    tool: str
    verdict: Verdict
    stages: tuple[StageResult, ...]
    issued: str


def read_result(manifest_sha256: str, host: Host) -> DeviceResult | None:
    """What is remembered of an artifact on this machine with this version of the tool."""
    path = _path(manifest_sha256, host)
    try:
        document = parse_strict(read_bounded(path, _LIMIT), str(path))
        result = from_json(DeviceResult, document, str(path))
    except ArtifactError:
        return None
    # The file's name is a digest of the key, but anyone who copies files need not know that.
    if (result.manifest_sha256, result.host, result.tool) != (manifest_sha256, host, own_version()):
        return None
    return result if result.verdict == overall(result.stages) else None


def keep_result(
    manifest_sha256: str, host: Host, stages: tuple[StageResult, ...]
) -> tuple[DeviceResult, Path]:
    """Remember a run; returns it and where it lies."""
    result = DeviceResult(
        manifest_sha256=manifest_sha256,
        host=host,
        tool=own_version(),
        verdict=overall(stages),
        stages=stages,
        issued=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    path = _path(manifest_sha256, host)
    keep_in_cache(path, json.dumps(to_json(result), indent=2, allow_nan=False) + "\n")
    return result, path


def _path(manifest_sha256: str, host: Host) -> Path:
    key = json.dumps([manifest_sha256, to_json(host), own_version()], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return cache_folder() / "on-device" / f"{name}.json"
