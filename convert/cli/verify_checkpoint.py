"""The half of ``llava-edge verify`` that needs torch: an artifact against its checkpoint."""

from __future__ import annotations

import argparse
import json
import sys

from llava_edge.convert.util.progress import StageBars
from llava_edge.convert.verification.against import keep_certificate, verify_against
from llava_edge.profiles.command_line import wrapped
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
    with StageBars() as bars:
        certificate = verify_against(
            artifact, options.against, options.mode, options.threads, bars, bars.say
        )
    print(stage_table(certificate.stages), file=sys.stderr)
    verdict = (
        f"{artifact.folder} ({options.mode}, {certificate.seconds:.0f} s): "
        f"{verdict_line(certificate.stages)}"
    )
    print(f"{deviation_line(certificate.first_deviation)}{wrapped(verdict)}", file=sys.stderr)
    # Where this fails, hours of work are not lost: the verdict was shown.
    keep_certificate(artifact, certificate)
    if options.json:
        document = verification_json(certificate.stages)
        document["first_deviation"] = to_json(certificate.first_deviation)
        print(json.dumps(document, allow_nan=False))
    return 0 if certificate.verdict == "pass" else 1
