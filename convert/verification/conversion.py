"""Verification of an artifact that is about to take its place.

Golden probes are a part of the artifact; the certificate is written beside the finished manifest.
An artifact that fails is kept aside with its report and does not take its place.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.output.artifact_writer import ArtifactWriter, write_certificate
from llava_edge.convert.quality.check import QualityCheck
from llava_edge.convert.util.progress import spoken_seconds
from llava_edge.convert.verification.estimate import spoken
from llava_edge.convert.verification.reference.answer import Reference
from llava_edge.convert.verification.verifier import (
    QUICK_BYTES,
    VerifyOptions,
    golden_probes,
    open_reference,
    unverified,
    verification_seconds,
    verify_artifact,
)
from llava_edge.convert.writing.card import write_card
from llava_edge.profiles.errors import LlavaEdgeError, VerificationError
from llava_edge.runtime.artifact.certificate import Certificate, Mode, Quality, StageResult
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.manifest_validation import CARD
from llava_edge.runtime.artifact.open import Artifact, read_manifest
from llava_edge.runtime.artifact.opened_files import OpenedFiles
from llava_edge.runtime.util.atomic_write import write_atomic
from llava_edge.runtime.util.json_codec import to_json
from llava_edge.runtime.util.progress import Notify, Progress
from llava_edge.runtime.verification.golden.probes import GOLDEN_FILE, golden_bytes
from llava_edge.runtime.verification.report import deviation_line, stage_table, verdict_line


class Verification:
    """Verification within one conversion.

    Args:
        mode: how much.
        checkpoint: what the artifact is made from.
        report: told about stages.
        say: prints what was decided or found, a line at a time.
    """

    def __init__(self, mode: Mode, checkpoint: Checkpoint, report: Progress, say: Notify) -> None:
        self._mode = mode
        self._checkpoint = checkpoint
        self._report = report
        self._say = say
        self._reference: Reference | None = None
        self._started = time.perf_counter()

    def add_golden(self, manifest: Manifest, writer: ArtifactWriter) -> None:
        """Add the golden probes as a part of the artifact, which so far has all but a manifest."""
        if self._mode == "none":
            return

        def build(folder: Path) -> None:
            listed = replace(manifest, files=dict(writer.files))
            artifact = Artifact(folder, listed, "", None, False, OpenedFiles(folder, listed.files))
            try:
                reference = self._announce(artifact)
                probes, loop = golden_probes(artifact, reference)
            except (LlavaEdgeError, ValueError, RuntimeError) as error:
                # Verifying will meet the same, and says at which stage.
                self._say(f"note: no golden prompts were made: {error}")
                return
            media = reference.media.golden
            (folder / GOLDEN_FILE).write_bytes(golden_bytes(probes, listed, loop.to_json(), media))

        writer.part("golden", build)

    def _announce(self, artifact: Artifact) -> Reference:
        """Open the reference, and say how long verification will take."""
        self._started = time.perf_counter()
        self._reference = reference = open_reference(artifact, self._checkpoint)
        options = VerifyOptions(self._mode, QUICK_BYTES)
        seconds = verification_seconds(artifact, reference, options)
        self._say(f"verifying ({self._mode}): {spoken(seconds)}")
        return reference

    def certify(
        self,
        folder: Path,
        artifact_bytes: int,
        writer: ArtifactWriter,
        quality: QualityCheck | None = None,
    ) -> Certificate:
        """Verify a prepared folder and put certificate and card into it.

        Args:
            folder: the artifact, complete but for its certificate.
            artifact_bytes: of it, for the card.
            writer: keeps it aside where it fails.
            quality: asks it the user's questions, whether or not it is verified.

        Raises:
            VerificationError: a stage failed, or more right answers are lost than is allowed; the
                folder is then kept aside with the report.
        """
        manifest, digest = read_manifest(folder)
        artifact = Artifact(
            folder, manifest, digest, None, False, OpenedFiles(folder, manifest.files)
        )
        if self._mode == "none":
            certificate = unverified(artifact)
        else:
            options = VerifyOptions(self._mode, QUICK_BYTES)
            reference = self._reference or self._announce(artifact)
            certificate = verify_artifact(
                artifact, self._checkpoint, options, self._report, reference
            )
            took = spoken_seconds(time.perf_counter() - self._started)
            verdict = verdict_line(certificate.stages)
            self._say(f"verified ({self._mode}) in {took}: {verdict}")
        what = f"the artifact does not do what {self._checkpoint.source_id} does"
        if quality is not None and certificate.verdict != "fail":
            certificate = _with_quality(certificate, *quality.compare(folder))
            what = "the artifact answers fewer questions right than --max-loss allows"
        if certificate.verdict == "fail":
            kept = writer.keep_failed(to_json(certificate))
            raise VerificationError(
                f"{what}.\n"
                f"{stage_table(certificate.stages)}\n{deviation_line(certificate.first_deviation)}"
                f"It is kept in {kept} with its report, and did not take its place."
            )
        write_certificate(folder, to_json(certificate))
        card = write_card(manifest, artifact_bytes, certificate)
        write_atomic(folder / CARD, card.encode("utf-8"))
        return certificate


def _with_quality(certificate: Certificate, found: Quality, row: StageResult) -> Certificate:
    """A certificate that did not fail, with what the user's questions showed."""
    verdict = "fail" if row.verdict == "fail" else certificate.verdict
    return replace(
        certificate,
        quality=found,
        stages=(*certificate.stages, row),
        verdict=verdict,
        passed=certificate.passed and verdict == "pass",
    )
