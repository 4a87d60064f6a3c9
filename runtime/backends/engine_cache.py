"""Engines on disk: a plan that TensorRT serialised, and beside it what it is bound to.

An engine runs on one compute capability with one version of one library, and speaks for one graph.
Whatever differs is a reason, in one sentence, not to use it. Shipped engines lie in ``engines/`` of
the artifact, engines built on a device in the user's cache folder; both look the same:

    vision-tensorrt-rtx-sm89.engine    what TensorRT reads
    vision-tensorrt-rtx-sm89.json      EngineFacts
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from llava_edge.profiles.boards.engines import LibraryName
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.hashing import DigestCache
from llava_edge.runtime.artifact.manifest import FileEntry, Manifest
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.util.cache_dir import cache_folder
from llava_edge.runtime.util.checksummed_json import parse_strict
from llava_edge.runtime.util.json_codec import from_json, to_json
from llava_edge.runtime.util.opened_file import OpenedFile

ENGINES = "engines"
SCHEMA_VERSION = 1
_FACTS_LIMIT = 1 << 20


@dataclass(frozen=True)
class EngineFacts:
    """What an engine is bound to.

    Attributes:
        schema_version: of this record.
        library: which of the two built it.
        library_version: exactly this version reads it.
        compute_capability: of the GPUs that run it, such as ``8.9``.
        device: the GPU model that it was tuned on and is bound to; None where every GPU of the
            compute capability runs it (TensorRT-RTX).
        graph: SHA-256 of the vision graph and its weights, by name in the artifact.
        max_tiles: tiles that one run takes at most.
        unproven: the compute capability stands outside NVIDIA's support matrix.
        file: size and SHA-256 of the engine itself.
    """

    schema_version: int
    library: LibraryName
    library_version: str
    compute_capability: str
    device: str | None
    graph: dict[str, str]
    max_tiles: int
    unproven: bool
    file: FileEntry


@dataclass(frozen=True)
class Surroundings:
    """Where an engine shall run: a library's version, and the GPU."""

    library: LibraryName
    library_version: str
    compute_capability: str
    device: str


@dataclass(frozen=True)
class StoredEngine:
    """An engine's file and what it says of itself."""

    path: Path
    facts: EngineFacts


def engine_stem(library: LibraryName, compute_capability: str) -> str:
    """Name of an engine's two files without their ending."""
    return f"vision-{library}-sm{compute_capability.replace('.', '')}"


def graph_digests(files: Mapping[str, FileEntry], graph_file: str) -> dict[str, str]:
    """SHA-256 of a graph and everything beside it, by name.

    Args:
        files: of the artifact, as the manifest lists them.
        graph_file: name of the graph among them.
    """
    folder = graph_file.rpartition("/")[0]
    return {
        name: entry.sha256
        for name, entry in sorted(files.items())
        if name.rpartition("/")[0] == folder
    }


def facts_bytes(facts: EngineFacts) -> bytes:
    """The record as it is written."""
    return (json.dumps(to_json(facts), indent=2, sort_keys=True) + "\n").encode()


def read_facts(opened: OpenedFile) -> EngineFacts:
    """Read a record.

    Raises:
        ArtifactError: it is damaged, or of another schema version.
    """
    path = opened.path
    facts = from_json(EngineFacts, parse_strict(opened.read(_FACTS_LIMIT), str(path)))
    if facts.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema_version {facts.schema_version}; this version reads "
            f"{SCHEMA_VERSION}. Build the engine again: llava-edge build-engine."
        )
    return facts


def mismatch(facts: EngineFacts, graph: Mapping[str, str], here: Surroundings) -> str | None:
    """Why an engine cannot be used here, as the end of a sentence; None where it can."""
    if facts.library != here.library:
        return f"it was built by {facts.library}, not by {here.library}"
    if facts.compute_capability != here.compute_capability:
        return (
            f"it was built for compute capability {facts.compute_capability}, and this GPU "
            f"({here.device}) has {here.compute_capability}"
        )
    if facts.library_version != here.library_version:
        return (
            f"{facts.library} {facts.library_version} built it, and {here.library_version} is "
            "installed, which reads its own engines only"
        )
    if facts.device is not None and facts.device != here.device:
        return f"it was tuned on {facts.device} and is bound to it; this is {here.device}"
    if facts.graph != dict(graph):
        return "it was built from another vision graph than the artifact's"
    return None


def shipped_engines(artifact: Artifact) -> list[StoredEngine]:
    """Engines that lie in an artifact, by their records; nothing of them is opened yet.

    Raises:
        ArtifactError: a record is damaged, or names an engine that the manifest does not list.
    """
    found = []
    for name in sorted(artifact.manifest.files):
        if not (name.startswith(f"{ENGINES}/") and name.endswith(".json")):
            continue
        opened = artifact.files[name]
        _require_listed(artifact, opened)
        facts = read_facts(opened)
        engine = f"{name.removesuffix('.json')}.engine"
        if artifact.manifest.files.get(engine) != facts.file:
            raise ArtifactError(
                f"{artifact.folder / name} is for another engine than {engine} in the manifest. "
                "Copy the artifact again, or convert again."
            )
        found.append(StoredEngine(artifact.path(engine), facts))
    return found


def _require_listed(artifact: Artifact, opened: OpenedFile) -> None:
    """Compare a file with the manifest's digest; opening an artifact leaves engines out."""
    digest = DigestCache(artifact.folder).hash_files([opened])[opened.name]
    if digest != artifact.manifest.files[opened.name].sha256:
        raise ArtifactError(
            f"{opened.path} is damaged: its SHA-256 is not the one of the manifest. "
            "Copy the artifact again, or convert again."
        )


@contextmanager
def opened_engine(stored: StoredEngine) -> Iterator[mmap]:
    """The bytes of an engine, mapped from the file that was hashed.

    Raises:
        ArtifactError: it cannot be opened, or is not the one of its record.
    """
    with OpenedFile(stored.path) as opened:
        _require_recorded(opened, stored.facts)
        with opened.mapped() as plan:
            yield plan


def _require_recorded(opened: OpenedFile, facts: EngineFacts) -> None:
    path = opened.path
    if DigestCache(path.parent).hash_files([opened])[path.name] != facts.file.sha256:
        raise ArtifactError(
            f"{path} is damaged: its SHA-256 is not the one of its record. Copy the artifact "
            "again, or build the engine again: llava-edge build-engine --force."
        )


def built_engine_path(manifest: Manifest, here: Surroundings) -> Path:
    """Where this machine keeps the engine that it built itself; it need not exist."""
    key = json.dumps(
        [graph_digests(manifest.files, manifest.vision.file), to_json(here)], sort_keys=True
    )
    folder = hashlib.sha256(key.encode()).hexdigest()[:32]
    stem = engine_stem(here.library, here.compute_capability)
    return cache_folder() / ENGINES / folder / f"{stem}.engine"


def built_engine(manifest: Manifest, here: Surroundings) -> StoredEngine | None:
    """The engine that this machine built for an artifact, None where there is none.

    Raises:
        ArtifactError: it is damaged.
    """
    path = built_engine_path(manifest, here)
    record = path.with_suffix(".json")
    if not (path.is_file() and record.is_file()):
        return None
    with OpenedFile(record) as opened:
        facts = read_facts(opened)
    with OpenedFile(path) as opened:
        _require_recorded(opened, facts)
    return StoredEngine(path, facts)
