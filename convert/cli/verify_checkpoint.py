"""The half of ``llava-edge verify`` that needs torch: an artifact against its checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
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
from llava_edge.convert.util.files import refusal, write_atomic
from llava_edge.convert.util.progress import StageBars
from llava_edge.convert.verify.estimate import spoken
from llava_edge.convert.verify.verifier import (
    QUICK_BYTES,
    VerifyOptions,
    open_reference,
    verification_seconds,
    verify_artifact,
)
from llava_edge.convert.writing.artifact_writer import write_certificate
from llava_edge.convert.writing.card import write_card
from llava_edge.profiles.errors import ArtifactError, ExportError, RequestError, shorten
from llava_edge.runtime.artifact.certificate import QUALITY_STAGE, Certificate
from llava_edge.runtime.artifact.certificate_file import read_certificate
from llava_edge.runtime.artifact.manifest_validation import CARD
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.util.json_codec import to_json
from llava_edge.runtime.verification.report import (
    deviation_line,
    stage_table,
    verdict_line,
    verification_json,
)


def main_against(options: argparse.Namespace, artifact: Artifact) -> int:
    """Verify, write the certificate and the card, and return the exit code.

    Raises:
        CheckpointError: the checkpoint changed meanwhile.
        ExportError: the certificate cannot be written; the verdict was shown.
        RequestError: the checkpoint is not the one that the artifact was made from.
    """
    source = resolve_source(options.against)
    folder = source.folder
    with StageBars() as bars:
        if folder is None:
            assert source.repo_id is not None
            folder = fetch_checkpoint(
                source.repo_id,
                source.revision,
                progress=lambda done, total: bars("download", done, total),
            )
        files = CheckpointFiles(folder)
        checkpoint = open_checkpoint(folder)
        found = files.digests(
            checkpoint.weight_files, lambda done, total: bars("digest", done, total)
        )
        digest = checkpoint.digest_of(found)
        made_from = artifact.manifest.source
        if digest != made_from.sha256:
            raise RequestError(
                f"{artifact.folder} was made from {made_from.id} with the digest "
                f"{made_from.sha256[:16]}…; {folder} has {digest[:16]}…. Give the same checkpoint "
                "and revision."
            )
        _require_settings(artifact, folder, setting_digests(found))
        how = VerifyOptions(options.mode, QUICK_BYTES, options.threads)
        reference = open_reference(artifact, checkpoint)
        seconds = verification_seconds(artifact, reference, how)
        bars.say(f"verifying ({options.mode}): {spoken(seconds)}")
        certificate = verify_artifact(artifact, checkpoint, how, bars, reference)
        files.check()
    certificate = _keep_quality(artifact, certificate)
    print(stage_table(certificate.stages), file=sys.stderr)
    print(
        f"{deviation_line(certificate.first_deviation)}{artifact.folder} ({options.mode}, "
        f"{certificate.seconds:.0f} s): {verdict_line(certificate.stages)}",
        file=sys.stderr,
    )
    # Where this fails, hours of work are not lost: the verdict was shown.
    _write(artifact, certificate)
    if options.json:
        document = verification_json(certificate.stages)
        document["first_deviation"] = to_json(certificate.first_deviation)
        print(json.dumps(document, allow_nan=False))
    return 0 if certificate.verdict == "pass" else 1


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


def _write(artifact: Artifact, certificate: Certificate) -> None:
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


def _require_settings(artifact: Artifact, folder: Path, found: Mapping[str, str]) -> None:
    """The same for tokenizer, template, processor and the like; older artifacts do not say."""
    known = artifact.manifest.conversion.get(SETTINGS)
    changed = changed_names(known, found) if isinstance(known, dict) else []
    if changed:
        raise RequestError(
            f"{artifact.folder} was made from other files than lie in {folder}, whose weights are "
            f"the same: {shorten(changed)}. Give the checkpoint as it was, or convert again."
        )
