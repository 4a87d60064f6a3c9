"""Makes artifacts out of checkpoints. The heavy half: torch, transformers, onnx-ir.

    from llava_edge.convert import convert, verify

    conversion = convert("llava-hf/llava-v1.6-mistral-7b-hf", "artifact", precision="int4")
    certificate = verify(conversion.folder, "llava-hf/llava-v1.6-mistral-7b-hf", mode="full")

Torch and transformers are imported when a function is called.
"""

from __future__ import annotations

import os
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from llava_edge.convert.pipeline import Conversion
    from llava_edge.convert.quantization.request import Quantizer
    from llava_edge.profiles.boards.hardware import HardwareProfile
    from llava_edge.profiles.memory.formats import PrecisionName
    from llava_edge.profiles.plan_request import Engine, Prefer
    from llava_edge.runtime.artifact.certificate import Certificate, Mode
    from llava_edge.runtime.artifact.manifest import Reference
    from llava_edge.runtime.util.limits import Limits
    from llava_edge.runtime.util.progress import Notify, Progress

__all__ = ["Certificate", "Conversion", "convert", "verify"]

_HOMES = {
    "Certificate": "llava_edge.runtime.artifact.certificate",
    "Conversion": "llava_edge.convert.pipeline",
}


def convert(
    checkpoint: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    profile: str | HardwareProfile | None = None,
    model: str | None = None,
    precision: PrecisionName | None = None,
    vision_precision: PrecisionName | None = None,
    grid: str | None = None,
    pinpoints: str | None = None,
    context_tokens: int | None = None,
    num_images: int = 1,
    num_frames: int = 0,
    cache: Literal["fp32", "fp16", "int8"] | None = None,
    prefer: Prefer = "largest",
    engine: Engine = "auto",
    quantizer: Quantizer = "gptq",
    calibration: str | os.PathLike[str] | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    emit_hf: bool = False,
    reference: Reference | None = None,
    use_template: bool = True,
    verify: Mode = "quick",
    quality: str | os.PathLike[str] | None = None,
    max_loss: float | None = None,
    limits: Limits | None = None,
    force: bool = False,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Conversion:
    """Convert a checkpoint for a board, as ``llava-edge convert`` does.

    Args:
        checkpoint: folder, ``owner/name`` or ``owner/name@revision``; None for the variant that the
            planner chooses.
        out: folder of the artifact; None for ``artifacts/<variant>-<precision>-<profile>``.
        profile: name or file of a board, or a profile; None for this machine.
        model: variant to plan for where no checkpoint is named.
        precision: of the language model; None for the largest that fits.
        vision_precision: of tower and projector; None for int8 where model and board allow it.
        grid: name of an AnyRes grid; None for the largest that fits.
        pinpoints: candidates of one's own, ``HxW,…`` in pixels.
        context_tokens: positions of the cache; None for as many as fit.
        num_images: full images that one prompt must hold.
        num_frames: frames that one video prompt must hold.
        cache: type of the KV cache; ``int8`` adds a second decoder graph.
        prefer: what the planner puts first.
        engine: what runs the vision tower on a GPU.
        quantizer: how int8 and int4 codes are found.
        calibration: folder or file of conversations; None draws a small set.
        num_samples: calibration samples; None for 32.
        seed: of drawn samples.
        emit_hf: also write a Hugging Face GPTQ checkpoint, into ``OUT/gptq``.
        reference: order of grid candidates on ties.
        use_template: compile the chat template.
        verify: how much is compared with the checkpoint before the artifact takes its place.
        quality: file of questions that fp16 and the artifact are asked.
        max_loss: largest share of right answers that may be lost, 0 to 1.
        limits: bounds on images of calibration and questions.
        force: replace an artifact, and discard an unfinished conversion.
        progress: told about stages, steps or bytes.
        notify: told what was decided, a line at a time.

    Returns:
        The folder, its manifest, the plan and the certificate.

    Raises:
        RequestError: the request cannot be met, or the checkpoint cannot be kept faithfully.
        OutputExistsError: ``out`` exists, and ``force`` is not set.
        HubError: the hub could not be reached.
        ExportError: writing failed; the same call resumes.
        VerificationError: the artifact does not do what the checkpoint does; it is kept aside.
    """
    from llava_edge.convert.pipeline import convert_checkpoint
    from llava_edge.convert.planning.request import ConvertRequest
    from llava_edge.convert.quality.request import QualityRequest
    from llava_edge.convert.quantization.request import NUM_SAMPLES, QuantizationRequest
    from llava_edge.profiles.boards.detect import detect_profile
    from llava_edge.profiles.boards.hardware import HardwareProfile, load_profile
    from llava_edge.profiles.errors import RequestError
    from llava_edge.profiles.memory.buffers import CACHE_FLAGS
    from llava_edge.profiles.models.variants import find_variant
    from llava_edge.profiles.plan_request import PlanRequest
    from llava_edge.runtime.util.limits import Limits
    from llava_edge.runtime.util.progress import no_progress
    from llava_edge.runtime.util.validation import require_name

    if checkpoint is not None and model is not None:
        raise RequestError(
            f"checkpoint {str(checkpoint)!r:.80} and model {model!r:.80} were both given. Give one."
        )
    if max_loss is not None and quality is None:
        raise RequestError(
            f"max_loss {max_loss} was given without quality, whose questions it is measured on."
        )
    if cache is not None:
        require_name("cache", "types", cache, tuple(CACHE_FLAGS))
    if isinstance(profile, HardwareProfile):
        board = profile
    else:
        board = detect_profile(device="auto") if profile is None else load_profile(profile)
    limits = Limits() if limits is None else limits
    request = ConvertRequest(
        checkpoint=None if checkpoint is None else os.fspath(checkpoint),
        out=None if out is None else Path(out),
        profile=board,
        wishes=PlanRequest(
            variants=() if model is None else (find_variant(model),),
            precision=precision,
            vision_precision=vision_precision,
            grid=grid,
            pinpoints=pinpoints,
            context_tokens=context_tokens,
            num_images=num_images,
            num_frames=num_frames,
            cache=None if cache is None else CACHE_FLAGS[cache],
            prefer=prefer,
            engine=engine,
        ),
        quantization=QuantizationRequest(
            quantizer=quantizer,
            calibration=None if calibration is None else Path(calibration),
            num_samples=NUM_SAMPLES if num_samples is None else num_samples,
            seed=seed,
            limits=limits,
        ),
        emit_hf=emit_hf,
        reference=reference,
        use_template=use_template,
        force=force,
        verify=verify,
        quality=None if quality is None else QualityRequest(Path(quality), max_loss, limits),
    )
    return convert_checkpoint(request, progress or no_progress, notify or _no_notice)


def verify(
    artifact: str | os.PathLike[str],
    against: str | os.PathLike[str],
    *,
    mode: Literal["quick", "full"] = "quick",
    threads: int = 0,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Certificate:
    """Compare an artifact with its checkpoint and write the certificate, whatever it says.

    Args:
        artifact: folder that ``convert`` wrote.
        against: the checkpoint that it was made from, folder or hub id.
        mode: how much is compared.
        threads: of the CPU; 0 for as many as this process may use.
        progress: told about stages.
        notify: told how long it will take.

    Returns:
        The certificate; ``passed`` and ``verdict`` say how it ended.

    Raises:
        ArtifactError: the artifact is damaged.
        CheckpointError: the checkpoint changed meanwhile.
        RequestError: it is another checkpoint than the artifact was made from.
        ExportError: the certificate cannot be written.
    """
    from llava_edge.convert.verification.against import keep_certificate, verify_against
    from llava_edge.runtime.artifact.open import open_artifact
    from llava_edge.runtime.util.progress import no_progress
    from llava_edge.runtime.util.validation import require_name

    require_name("mode", "modes", mode, ("quick", "full"))
    opened = open_artifact(artifact, hash_everything=True, read_certificate_too=False)
    with closing(opened):
        certificate = verify_against(
            opened, os.fspath(against), mode, threads, progress or no_progress, notify or _no_notice
        )
        keep_certificate(opened, certificate)
    return certificate


def _no_notice(line: str) -> None:
    """Show nothing."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
