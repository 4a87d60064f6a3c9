"""Opening an artifact: everything about the folder is checked before anything in it is used.

The order is from cheap to dear, and no step trusts what a later one checks: the manifest's own
digest and contents, the folder's listing, sizes, SHA-256 of the files, then the graphs' operators,
weights files, inputs and outputs. Faults of one step are reported together.

The checks speak of the folder as it was when it was read. Whoever can write to it afterwards can
exchange a file between check and use; keep artifacts where only their owner writes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_edge.profiles.errors import ArtifactError, plain_reason
from llava_edge.runtime.certificate import Certificate
from llava_edge.runtime.certificate_file import read_certificate
from llava_edge.runtime.digests import DigestCache, hash_files
from llava_edge.runtime.graph_check import graph_faults, spec_faults
from llava_edge.runtime.manifest import GraphSpec, Manifest
from llava_edge.runtime.manifest_check import (
    MANIFEST,
    MAX_FILES,
    MAX_NAME_DEPTH,
    NOT_OPENED,
    UNLISTED,
    manifest_faults,
)
from llava_edge.runtime.old_manifest import with_prompt_of_2
from llava_edge.runtime.onnx_header import read_onnx_header
from llava_edge.runtime.records import from_json
from llava_edge.runtime.regular_file import read_bounded
from llava_edge.runtime.sealed_json import check_seal, parse_strict
from llava_edge.runtime.versions import own_version

_LOG = logging.getLogger(__name__)
_MANIFEST_LIMIT = 8 << 20
_AGAIN = "Copy the artifact again, or convert again."

READERS: Mapping[int, Callable[[Any], Manifest]] = {
    1: lambda document: _without(document, "decoder_int8_cache"),
    2: lambda document: _without(document),
    3: lambda document: from_json(Manifest, document, MANIFEST),
}
"""How each schema version ever released becomes today's Manifest."""


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. ``verified`` means that its certificate is for it and says passed.

    ``certificate`` is there whenever one can be read, also where it does not count.
    ``manifest_sha256`` is the SHA-256 of ``manifest.json`` as it lies in the folder, the value that
    a certificate refers to.
    """

    folder: Path
    manifest: Manifest
    manifest_sha256: str
    certificate: Certificate | None
    verified: bool

    def path(self, name: str) -> Path:
        """Where a listed file lies.

        Raises:
            ArtifactError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.folder / MANIFEST} lists no file {name!r:.120}. {_AGAIN}")
        return self.folder / name


def open_artifact(
    folder: str | os.PathLike[str],
    *,
    verify_digests: bool = True,
    require_verified: bool = False,
    hash_everything: bool = False,
    read_certificate_too: bool = True,
) -> Artifact:
    """Check an artifact and return it.

    Args:
        folder: the artifact; the path to it may go through links, nothing inside may.
        verify_digests: hash the files that running opens (all but ``gptq/`` and ``engines/``, which
            is looked at where an engine is chosen), or take the digests from the cache where the
            files are untouched since.
        require_verified: refuse an artifact without a certificate of its own that says passed.
        hash_everything: hash all files anew and do not ask the cache.
        read_certificate_too: whoever is about to write a new one need not be stopped by the old.

    Raises:
        ArtifactError: something is missing, damaged, unsafe, unlisted, of a newer schema, or not
            verified although that is required. The message names the files.
    """
    root = _resolve(Path(folder))
    manifest, manifest_sha256 = read_manifest(root)
    check_listing(root, manifest)
    if verify_digests or hash_everything:
        _check_digests(root, manifest, hash_everything)
    check_graphs(root, manifest)
    if not read_certificate_too:
        return Artifact(root, manifest, manifest_sha256, None, verified=False)
    certificate, reason = read_certificate(root, manifest, manifest_sha256)
    if reason is not None:
        message = f"{root} is not verified: {reason}"
        if require_verified:
            raise ArtifactError(
                f"{message}, and a verified artifact is required. Take one whose certificate "
                "belongs to it, or do without the requirement."
            )
        _LOG.warning("%s", message)
    return Artifact(
        folder=root,
        manifest=manifest,
        manifest_sha256=manifest_sha256,
        certificate=certificate,
        verified=reason is None,
    )


def _resolve(folder: Path) -> Path:
    try:
        root = folder.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"there is no artifact at {folder}: {plain_reason(error)}. Convert a checkpoint into "
            "it first."
        ) from error
    if not root.is_dir():
        raise ArtifactError(f"{root} is not a folder. Give the folder that holds {MANIFEST}.")
    return root


def read_manifest(root: Path) -> tuple[Manifest, str]:
    """The manifest of a folder and the SHA-256 of its bytes.

    Raises:
        ArtifactError: it is missing, damaged, of an unknown schema version or impossible.
    """
    path = root / MANIFEST
    if not os.path.lexists(path):
        raise ArtifactError(
            f"{root} holds no {MANIFEST}, so it is no artifact or an unfinished one. {_AGAIN}"
        )
    data = read_bounded(path, _MANIFEST_LIMIT)
    document = parse_strict(data, str(path))
    # Before the seal and the contents: a newer schema may differ in both.
    reader = _reader(document, path)
    check_seal(data, document, str(path))
    try:
        manifest = reader(document)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}. {_AGAIN}") from error
    _raise(path, manifest_faults(manifest))
    return manifest, hashlib.sha256(data).hexdigest()


def _reader(document: Any, path: Path) -> Callable[[Any], Manifest]:
    stated = document.get("schema_version") if isinstance(document, dict) else None
    if type(stated) is not int:
        raise ArtifactError(f"{path} states no schema_version, so it is no manifest. {_AGAIN}")
    if stated in READERS:
        return READERS[stated]
    known = ", ".join(map(str, sorted(READERS)))
    tools = document.get("tools")
    writer = tools.get("llava-edge") if isinstance(tools, dict) else None
    reads = f"llava-edge {writer!s:.40}" if isinstance(writer, str) else "a newer llava-edge"
    raise ArtifactError(
        f"{path} has schema_version {stated}; this is llava-edge {own_version()}, which reads "
        f"{known}. Install {reads} or later to open it, or convert again with this one."
    )


def _without(document: Any, *later: str) -> Manifest:
    """A manifest up to version 2, before some fields were there: those have today's default."""
    if unknown := sorted(set(document) & set(later)):
        raise ArtifactError(f"{MANIFEST} has fields of a later schema_version: {unknown}")
    return from_json(Manifest, with_prompt_of_2(document), MANIFEST)


def check_listing(root: Path, manifest: Manifest) -> None:
    """Compare the folder's files and their sizes with the manifest's list.

    Raises:
        ArtifactError: a file is missing, of another size, not listed, or no plain file.
    """
    faults: list[str] = []
    found: dict[str, int] = {}
    for name, status in _walk(root, "", faults, MAX_FILES + len(UNLISTED)):
        if not stat.S_ISREG(status.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no regular file"
            faults.append(f"{ascii(name)[1:-1]} is {kind}; an artifact holds plain files only")
        elif name in manifest.files:
            found[name] = status.st_size
        elif name not in UNLISTED:
            faults.append(f"{ascii(name)[1:-1]} is not listed in {MANIFEST}; remove it")
    for name, entry in manifest.files.items():
        if name in found and found[name] != entry.bytes:
            faults.append(f"{name} has {found[name]} bytes; {MANIFEST} says {entry.bytes}")
        elif name not in found and not any(fault.startswith(f"{name} ") for fault in faults):
            faults.append(f"{name} is missing")
    _raise(root, faults)


def _walk(
    root: Path, prefix: str, faults: list[str], limit: int
) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a folder that is no folder, without following links."""
    pending = [prefix]
    seen = 0
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    seen += 1
                    name = prefix + entry.name
                    if seen > limit:
                        faults.append(f"the folder holds more than {limit} files")
                        return
                    if entry.is_dir(follow_symlinks=False):
                        if name.count("/") + 1 >= MAX_NAME_DEPTH:
                            faults.append(f"{ascii(name)[1:201]} is nested too deeply")
                        else:
                            pending.append(f"{name}/")
                    else:
                        yield name, entry.stat(follow_symlinks=False)
        except OSError as error:
            faults.append(
                f"{ascii(prefix)[1:-1] or 'the folder'} cannot be listed: {error.strerror}"
            )


def _check_digests(root: Path, manifest: Manifest, everything: bool) -> None:
    if everything:
        digests = hash_files([root / name for name in manifest.files])
        actual = {name: digests[root / name] for name in manifest.files}
    else:
        opened = [name for name in manifest.files if not name.startswith(NOT_OPENED)]
        actual = DigestCache(root).hash_files(opened)
    _raise(
        root,
        [
            f"{name} is damaged: its SHA-256 is {digest}, {MANIFEST} says "
            f"{manifest.files[name].sha256}"
            for name, digest in actual.items()
            if digest != manifest.files[name].sha256
        ],
    )


def check_graphs(root: Path, manifest: Manifest) -> None:
    """Judge every graph of the artifact, and compare the named ones with their GraphSpec.

    Raises:
        ArtifactError: a graph is malformed, does what graphs may not, or differs from its spec.
    """
    specs: dict[str, list[GraphSpec]] = {}
    for spec in (manifest.vision, *manifest.decoders.values()):
        specs.setdefault(spec.file, []).append(spec)
    for name in manifest.files:
        if not name.endswith(".onnx") or name.startswith(NOT_OPENED):
            continue
        header = read_onnx_header(root / name)
        beside = name.rpartition("/")[0]
        sizes = {
            other.rpartition("/")[2]: entry.bytes
            for other, entry in manifest.files.items()
            if other.rpartition("/")[0] == beside
        }
        faults = graph_faults(header, sizes)
        for spec in specs.get(name, []):
            faults += spec_faults(header, spec)
        _raise(root / name, faults)


def _raise(where: Path, faults: list[str]) -> None:
    if faults:
        listed = "\n  - ".join(faults[:20])
        rest = f"\n  - and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ArtifactError(f"{where} is refused:\n  - {listed}{rest}\n{_AGAIN}")
