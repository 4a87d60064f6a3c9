"""convert_checkpoint: inspect → plan → build → write → verify.

Everything that can be wrong with the request or the checkpoint is found before the output folder is
touched; whatever fails later leaves finished parts for the next run and nothing at the output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llava_edge.convert.checkpoint.quantized.store import MEASURED
from llava_edge.convert.output.artifact_writer import ArtifactWriter
from llava_edge.convert.planning.artifact_plan import seen_of_board
from llava_edge.convert.planning.conversion_plan import ConversionPlan, plan_conversion
from llava_edge.convert.planning.inspection import inspect_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quality.check import QualityCheck
from llava_edge.convert.util.files import check_free_space, folder_bytes
from llava_edge.convert.util.torch_threads import allowed_torch_threads, torch_threads
from llava_edge.convert.verification.conversion import Verification
from llava_edge.convert.writing.artifact_parts import build_parts
from llava_edge.convert.writing.card import write_card
from llava_edge.convert.writing.manifest import make_manifest
from llava_edge.profiles.plan import DeploymentPlan
from llava_edge.runtime.artifact.certificate import Certificate
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.util.progress import Notify, Progress

QUALITY = "quality"
"""In the work folder: what ``--quality`` asks before the artifact is made."""


@dataclass(frozen=True)
class Conversion:
    """A finished conversion."""

    folder: Path
    manifest: Manifest
    plan: DeploymentPlan
    artifact_bytes: int
    certificate: Certificate


@allowed_torch_threads()
def convert_checkpoint(request: ConvertRequest, report: Progress, say: Notify) -> Conversion:
    """Convert one checkpoint for one board.

    Args:
        request: what was asked.
        report: told about progress, stage by stage, in bytes.
        say: prints what was decided, a line at a time.

    Raises:
        RequestError: the request cannot be met or the checkpoint cannot be kept faithfully.
        HubError: a hub id was given and the hub could not be reached.
        ExportError: writing failed; the same command resumes.
        VerificationError: the artifact does not do what the checkpoint does; it is kept aside.
    """
    inspected = inspect_checkpoint(request, report, say)
    plan = plan_conversion(request, inspected, report, say)
    reference = plan.at_fp16() if request.quality is not None else None
    needed = plan.needed_bytes + (0 if reference is None else reference.needed_bytes)
    with _open_writer(plan, needed, say) as writer, torch_threads(writer.threads):
        place = writer.work / QUALITY
        done = writer.finished_bytes + folder_bytes(place)
        check_free_space(writer.folder, max(0, needed - done))
        quality = None
        if request.quality is not None:
            quality = QualityCheck(request.quality, place, report, say)
            if reference is not None:
                at_fp16 = replace(reference, out=place / "fp16")
                quality.ask_reference(lambda: _write_fp16(at_fp16, writer.threads, report))
        parts = build_parts(plan, writer, report)
        manifest = make_manifest(parts)
        verification = Verification(request.verify, plan.checkpoint, report, say)
        verification.add_golden(manifest, writer)
        size = folder_bytes(writer.folder)
        final = parts.plan.planned.plan
        record = replace(
            writer.record,
            quantization=parts.decoder.facts.get(MEASURED, {}),
            board=seen_of_board(final),
        )
        prepared = writer.prepare(manifest, write_card(manifest, size, None), record)
        certificate = verification.certify(prepared, size, writer, quality)
        folder = writer.publish()
    return Conversion(folder, manifest, final, size, certificate)


def _open_writer(plan: ConversionPlan, needed_bytes: int, say: Notify) -> ArtifactWriter:
    return ArtifactWriter(
        plan.out,
        plan.key,
        force=plan.request.force,
        needed_bytes=needed_bytes,
        inputs=plan.inputs,
        check_inputs=plan.check_inputs,
        threads=torch.get_num_threads(),
        say=lambda text: say(f"note: {text}"),
    )


def _write_fp16(plan: ConversionPlan, threads: int, report: Progress) -> Path:
    """The fp16 artifact in the work folder, unless an earlier run finished it."""
    if plan.out.exists():
        return plan.out
    with ArtifactWriter(
        plan.out, plan.key, inputs=plan.inputs, check_inputs=plan.check_inputs, threads=threads
    ) as writer:
        manifest = make_manifest(build_parts(plan, writer, report))
        return writer.finish(manifest, write_card(manifest, writer.finished_bytes, None))
