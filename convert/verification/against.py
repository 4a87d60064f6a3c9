"""An artifact that is finished against the checkpoint that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llava_edge.convert.checkpoint.files import (
    SETTINGS,
    CheckpointFiles,
    changed_names,
    setting_digests,
)
from llava_edge.convert.checkpoint.hub.download import fetch_checkpoint
from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.checkpoint.source import resolve_source
from llava_edge.convert.output.artifact_writer import write_certificate
from llava_edge.convert.util.files import refusal
from llava_edge.convert.verification.estimate import spoken
from llava_edge.convert.verification.verifier import (
    QUICK_BYTES,
    VerifyOptions,
    open_reference,
    verification_seconds,
    verify_artifact,
)
from llava_edge.convert.writing.card import write_card
from llava_edge.profiles.errors import ArtifactError, ExportError, RequestError, shorten
from llava_edge.runtime.artifact.certificate import QUALITY_STAGE, Certificate, Mode
from llava_edge.runtime.artifact.certificate_file import read_certificate
from llava_edge.runtime.artifact.manifest_validation import CARD
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.util.atomic_write import write_atomic
from llava_edge.runtime.util.json_codec import to_json
from llava_edge.runtime.util.progress import Notify, Progress


def verify_against(
    artifact: Artifact,
    checkpoint: str,
    mode: Mode,
    threads: int,
    progress: Progress,
    notify: Notify,
) -> Certificate:
    """Compare; nothing is written.

    Args:
        artifact: opened, with every file hashed.
        checkpoint: folder or hub id.
        mode: how much is compared.
        threads: of the CPU; 0 for as many as this process may use.
        progress: told about stages.
        notify: told how long it will take.

    Returns:
        The certificate, with what an earlier one says of the user's questions.

    Raises:
        CheckpointError: the checkpoint changed meanwhile.
        RequestError: the checkpoint is not the one that the artifact was made from.
        HubError: a hub id was given and the hub could not be reached.
    """
    source = resolve_source(checkpoint)
    folder = source.folder
    if folder is None:
        assert source.repo_id is not None
        folder = fetch_checkpoint(source.repo_id, source.revision, progress=progress)
    files = CheckpointFiles(folder)
    opened = open_checkpoint(folder)
    found = files.digests(opened.weight_files, progress)
    digest = opened.digest_of(found)
    made_from = artifact.manifest.source
    if digest != made_from.sha256:
        raise RequestError(
            f"{artifact.folder} was made from {made_from.id} with the digest "
            f"{made_from.sha256[:16]}…; {folder} has {digest[:16]}…. Give the same checkpoint "
            "and revision."
        )
    _require_settings(artifact, folder, setting_digests(found))
    how = VerifyOptions(mode, QUICK_BYTES, threads)
    reference = open_reference(artifact, opened)
    seconds = verification_seconds(artifact, reference, how)
    notify(f"verifying ({mode}): {spoken(seconds)}")
    certificate = verify_artifact(artifact, opened, how, progress, reference)
    files.check()
    return _keep_quality(artifact, certificate)


def keep_certificate(artifact: Artifact, certificate: Certificate) -> None:
    """Card and certificate; a failed artifact keeps its failing one, so that users are told.

    Raises:
        ExportError: writing failed.
    """
    size = sum(entry.bytes for entry in artifact.manifest.files.values())
    card = write_card(artifact.manifest, size, certificate)
    try:
        write_atomic(artifact.folder / CARD, card.encode("utf-8"))
    except OSError as error:
        raise ExportError(
            f"the verification is done, and its certificate cannot be written: {refusal(error)}."
        ) from error
    write_certificate(artifact.folder, to_json(certificate))


def _keep_quality(artifact: Artifact, certificate: Certificate) -> Certificate:
    """What the user's questions showed of these very files stays; a damaged certificate goes."""
    try:
        old, _ = read_certificate(artifact.folder, artifact.manifest, artifact.manifest_sha256)
    except ArtifactError:
        return certificate
    if old is None or old.manifest_sha256 != artifact.manifest_sha256 or old.quality is None:
        return certificate
    rows = tuple(row for row in old.stages if row.name == QUALITY_STAGE)
    return replace(certificate, quality=old.quality, stages=(*certificate.stages, *rows))


def _require_settings(artifact: Artifact, folder: Path, found: Mapping[str, str]) -> None:
    """The same for tokenizer, template, processor and the like; older artifacts do not say."""
    known = artifact.manifest.conversion.get(SETTINGS)
    changed = changed_names(known, found) if isinstance(known, dict) else []
    if changed:
        raise RequestError(
            f"{artifact.folder} was made from other files than lie in {folder}, whose weights are "
            f"the same: {shorten(changed)}. Give the checkpoint as it was, or convert again."
        )
