"""The half of ``llava-edge convert`` that needs torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quality.request import QualityRequest
from llava_edge.convert.quantization.request import QuantizationRequest
from llava_edge.convert.util.progress import StageBars
from llava_edge.profiles.boards.hardware import HardwareProfile
from llava_edge.profiles.command_line import wrapped
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.profiles.sizes import format_bytes
from llava_edge.runtime.util.json_codec import to_json


def convert_and_print(
    options: argparse.Namespace,
    out: Path | None,
    profile: HardwareProfile,
    wishes: PlanRequest,
    quantization: QuantizationRequest,
    quality: QualityRequest | None,
) -> int:
    """Convert, print, and return the exit code.

    Raises:
        LlavaEdgeError: see ``convert_checkpoint``.
    """
    request = ConvertRequest(
        checkpoint=options.checkpoint,
        out=out,
        profile=profile,
        wishes=wishes,
        quantization=quantization,
        emit_hf="hf" in options.emit,
        reference=options.reference,
        use_template=not options.no_template,
        force=options.force,
        verify=options.verify,
        quality=quality,
    )
    start = time.perf_counter()
    with StageBars() as bars:
        conversion = convert_checkpoint(request, bars, bars.say)
    seconds = time.perf_counter() - start
    manifest = conversion.manifest
    size = format_bytes(conversion.artifact_bytes)
    line = (
        f"{conversion.folder}: {manifest.variant}, {manifest.target} target, "
        f"{manifest.plan['precision']}, grid {manifest.plan['grid']} "
        f"(at most {manifest.plan['max_image_tokens']} tokens an image), context "
        f"{manifest.context_tokens}, {size} in {seconds:.1f} s"
    )
    print(wrapped(line), file=sys.stderr)
    if options.json:
        result = {
            "artifact": str(conversion.folder),
            "artifact_bytes": conversion.artifact_bytes,
            "seconds": seconds,
            "plan": conversion.plan.to_json(),
            "verdict": conversion.certificate.verdict,
            "verified": conversion.certificate.passed,
            "quality": to_json(conversion.certificate.quality),
        }
        print(json.dumps(result))
    else:
        print(conversion.folder)
    return 0
