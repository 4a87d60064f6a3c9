"""Opening an artifact: everything about the folder is checked before anything in it is used.

The order is from cheap to dear, and no step trusts what a later one checks: the manifest's own
digest and contents, the folder's listing, sizes, SHA-256 of the files, then the graphs' operators,
weights files, inputs and outputs. Faults of one step are reported together.

Each file is opened once, and what was hashed is what is used, by the same descriptor; graphs are
kept as the very bytes that were hashed. Files of a download cache may be symbolic links: a link to
a file is followed once, on opening; one to a folder is refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_edge.profiles.errors import ArtifactError, plain_reason
from llava_edge.profiles.sizes import format_above, format_bytes
from llava_edge.runtime.artifact.certificate import Certificate
from llava_edge.runtime.artifact.certificate_file import read_certificate
from llava_edge.runtime.artifact.conversion_record import CONVERSION_LIMIT
from llava_edge.runtime.artifact.graph_validation import graph_faults, spec_faults
from llava_edge.runtime.artifact.hashing import DigestCache, hash_files, hash_opened
from llava_edge.runtime.artifact.manifest import SINCE_4, FileEntry, GraphSpec, Manifest
from llava_edge.runtime.artifact.manifest_validation import (
    CONVERSION,
    LOST_AND_FOUND,
    MANIFEST,
    MAX_FILES,
    MAX_NAME_DEPTH,
    NOT_OPENED,
    UNLISTED,
    manifest_faults,
)
from llava_edge.runtime.artifact.old_manifest import with_prompt_of_2
from llava_edge.runtime.artifact.onnx_proto import HeaderLimits, read_onnx_header
from llava_edge.runtime.artifact.opened_files import OpenedFiles
from llava_edge.runtime.util.checksummed_json import check_seal, parse_strict
from llava_edge.runtime.util.json_codec import from_json
from llava_edge.runtime.util.safe_open import link_fault, read_bounded
from llava_edge.runtime.util.versions import own_version

_LOG = logging.getLogger(__name__)
_MANIFEST_LIMIT = 8 << 20
_AGAIN = "Copy the artifact again, or convert again."

READERS: Mapping[int, Callable[[Any], Manifest]] = {
    1: lambda document: _before_3(document, "decoder_int8_cache"),
    2: lambda document: _before_3(document),
    3: lambda document: _without(document),
    4: lambda document: from_json(Manifest, document, MANIFEST),
}
"""How each schema version ever released becomes today's Manifest."""


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. ``verified`` means that its certificate is for it and says passed.

    ``certificate`` is there whenever one can be read, also where it does not count.
    ``manifest_sha256`` is the SHA-256 of ``manifest.json`` as it lies in the folder, the value that
    a certificate refers to. ``files`` are the listed files, opened once each; they stay open until
    the artifact is closed or nobody holds it any more.
    """

    folder: Path
    manifest: Manifest
    manifest_sha256: str
    certificate: Certificate | None
    verified: bool
    files: OpenedFiles = field(repr=False, compare=False)

    def path(self, name: str) -> Path:
        """Where a listed file lies.

        Raises:
            ArtifactError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.folder / MANIFEST} lists no file {name!r:.120}. {_AGAIN}")
        return self.folder / name

    def close(self) -> None:
        """Close its files; idempotent."""
        self.files.close()


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
        folder: the artifact; the path to it may go through links, and files inside may be links to
            files. Unlisted files and folders whose names begin with a dot are not looked at.
        verify_digests: hash the files that running opens (all but ``gptq/`` and ``engines/``, which
            is looked at where an engine is chosen), or take the digests from the cache where the
            files are untouched since.
        require_verified: refuse an artifact without a certificate of its own that says passed.
        hash_everything: hash all files anew and do not ask the cache.
        read_certificate_too: anyone who is about to write a new one need not be stopped by the old.

    Raises:
        ArtifactError: something is missing, damaged, unsafe, unlisted, of a newer schema, or not
            verified although that is required. The message names the files.
    """
    root = _resolve(Path(folder))
    manifest, manifest_sha256 = read_manifest(root)
    check_listing(root, manifest)
    files = OpenedFiles(root, {**manifest.files, MANIFEST: _entry(root, manifest_sha256)})
    try:
        if verify_digests or hash_everything:
            _check_digests(files, manifest, manifest_sha256, hash_everything)
        check_graphs(files, manifest)
        certificate, verified = None, False
        if read_certificate_too:
            certificate, verified = _certified(root, manifest, manifest_sha256, require_verified)
    except BaseException:
        files.close()
        raise
    return Artifact(root, manifest, manifest_sha256, certificate, verified, files)


def _certified(
    root: Path, manifest: Manifest, manifest_sha256: str, require_verified: bool
) -> tuple[Certificate | None, bool]:
    certificate, reason = read_certificate(root, manifest, manifest_sha256)
    if reason is None:
        return certificate, True
    message = f"{root} is not verified: {reason}"
    if require_verified:
        raise ArtifactError(
            f"{message}, and a verified artifact is required. Take one whose certificate "
            "belongs to it, or do without the requirement."
        )
    _LOG.warning("%s", message)
    return certificate, False


def _entry(root: Path, manifest_sha256: str) -> FileEntry:
    return FileEntry((root / MANIFEST).stat().st_size, manifest_sha256)


def _resolve(folder: Path) -> Path:
    try:
        root = folder.resolve(strict=True)
    except PermissionError as error:
        raise ArtifactError(
            f"{folder} cannot be opened: {plain_reason(error)}. Check its permissions."
        ) from error
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
    data = read_bounded(path, _MANIFEST_LIMIT, follow_link=True)
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
    own = own_version()
    # Between two releases both have one version; to install that again would not help.
    is_other = isinstance(writer, str) and writer != own
    reads = f"llava-edge {writer!s:.40} or later" if is_other else "a newer llava-edge"
    raise ArtifactError(
        f"{path} has schema_version {stated}; this is llava-edge {own}, which reads "
        f"{known}. Install {reads} to open it, or convert again with this one."
    )


def _without(document: Any, *later: str) -> Manifest:
    """A manifest up to version 3, before some fields were there: those have today's default."""
    _refuse_later(document, later)
    return from_json(Manifest, document, MANIFEST)


def _before_3(document: Any, *later: str) -> Manifest:
    """A manifest up to version 2, with another prompt format."""
    _refuse_later(document, later)
    return _without(with_prompt_of_2(document), *later)


def _refuse_later(document: Any, later: tuple[str, ...]) -> None:
    if unknown := sorted(set(document) & {*later, *SINCE_4}):
        raise ArtifactError(f"{MANIFEST} has fields of a later schema_version: {unknown}")


def check_listing(root: Path, manifest: Manifest) -> None:
    """Compare the folder's files and their sizes with the manifest's list.

    What version control, download tools and file managers leave (``.gitattributes``, ``.cache``,
    ``.DS_Store``) is not looked at: unlisted names that begin with a dot. Nor is ``lost+found``,
    which most users may not list.

    Raises:
        ArtifactError: a file is missing, of another size, not listed, or no plain file; a link
            leads to a folder, to nothing or in a circle; the record of the conversion is too large.
    """
    faults: list[str] = []
    found: dict[str, int | None] = {}
    for name, entry in _walk(root, "", manifest.files, faults, MAX_FILES + len(UNLISTED)):
        shown = ascii(name)[1:-1]
        is_known = name in manifest.files or name in UNLISTED
        if is_known:
            found[name] = None
        try:
            status = entry.stat()
        except OSError as error:
            fault = link_fault(root / name, error) if entry.is_symlink() else error.strerror
            faults.append(f"{shown} cannot be opened: {fault}")
            continue
        if stat.S_ISDIR(status.st_mode):
            faults.append(f"{shown} is a link to a folder; an artifact may hold links to files")
        elif not is_known:
            faults.append(f"{shown} is not listed in {MANIFEST}; remove it")
        elif stat.S_ISREG(status.st_mode):
            found[name] = status.st_size
            if name == CONVERSION and status.st_size > CONVERSION_LIMIT:
                faults.append(
                    f"{name} has {format_above(status.st_size, CONVERSION_LIMIT)}; it may have "
                    f"{format_bytes(CONVERSION_LIMIT)}, and an "
                    "artifact does not need it: remove it"
                )
        else:
            faults.append(f"{shown} is no regular file; an artifact holds plain files only")
    for name, listed in manifest.files.items():
        if name not in found:
            faults.append(f"{name} is missing")
        elif found[name] not in (None, listed.bytes):
            faults.append(f"{name} has {found[name]} bytes; {MANIFEST} says {listed.bytes}")
    _raise(root, faults)


def _walk(
    root: Path, prefix: str, listed: Mapping[str, FileEntry], faults: list[str], limit: int
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Everything below a folder that is no folder; links are not followed."""
    pending = [prefix]
    seen = 0
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    is_foreign = entry.name.startswith(".") or name == LOST_AND_FOUND
                    if is_foreign and not _is_listed(name, listed):
                        continue
                    seen += 1
                    if seen > limit:
                        faults.append(f"the folder holds more than {limit} files")
                        return
                    if entry.is_dir(follow_symlinks=False):
                        if name.count("/") + 1 >= MAX_NAME_DEPTH:
                            faults.append(f"{ascii(name)[1:201]} is nested too deeply")
                        else:
                            pending.append(f"{name}/")
                    else:
                        yield name, entry
        except OSError as error:
            faults.append(
                f"{ascii(prefix)[1:-1] or 'the folder'} cannot be listed: {error.strerror}"
            )


def _is_listed(name: str, listed: Mapping[str, FileEntry]) -> bool:
    """Whether a file is listed, or anything in a folder."""
    return any(other == name or other.startswith(f"{name}/") for other in listed)


def _check_digests(
    files: OpenedFiles, manifest: Manifest, manifest_sha256: str, everything: bool
) -> None:
    expected = {name: entry.sha256 for name, entry in manifest.files.items()}
    expected[MANIFEST] = manifest_sha256
    # Graphs are judged and opened from memory: theirs is the digest of the bytes that are kept.
    actual = {
        name: hashlib.sha256(files[name].content(HeaderLimits().file_bytes)).hexdigest()
        for name in expected
        if _is_graph(name)
    }
    opened = [files[n] for n in expected if n not in actual and not n.startswith(NOT_OPENED)]
    if everything:
        actual |= hash_opened(opened)
        rest = {files.root / name: name for name in expected if name.startswith(NOT_OPENED)}
        actual |= {rest[path]: digest for path, digest in hash_files(rest).items()}
    else:
        actual |= DigestCache(files.root).hash_files(opened)
    _raise(
        files.root,
        [
            f"{name} is damaged: its SHA-256 is {digest}, {MANIFEST} says {expected[name]}"
            for name, digest in actual.items()
            if digest != expected[name]
        ],
    )


def _is_graph(name: str) -> bool:
    return name.endswith(".onnx") and not name.startswith(NOT_OPENED)


def check_graphs(files: OpenedFiles, manifest: Manifest) -> None:
    """Judge every graph of the artifact, and compare the named ones with their GraphSpec.

    Raises:
        ArtifactError: a graph is malformed, does what graphs may not, or differs from its spec.
    """
    specs: dict[str, list[GraphSpec]] = {}
    for spec in (manifest.vision, *manifest.decoders.values()):
        specs.setdefault(spec.file, []).append(spec)
    for name in manifest.files:
        if not _is_graph(name):
            continue
        header = read_onnx_header(files[name])
        beside = name.rpartition("/")[0]
        sizes = {
            other.rpartition("/")[2]: entry.bytes
            for other, entry in manifest.files.items()
            if other.rpartition("/")[0] == beside
        }
        faults = graph_faults(header, sizes)
        for spec in specs.get(name, []):
            faults += spec_faults(header, spec)
        _raise(files.root / name, faults)


def _raise(where: Path, faults: list[str]) -> None:
    if faults:
        listed = "\n  - ".join(faults[:20])
        rest = f"\n  - and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ArtifactError(f"{where} is refused:\n  - {listed}{rest}\n{_AGAIN}")
