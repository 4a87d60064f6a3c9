"""ConversionPlan: everything that one conversion reads, decides and writes, made once.

Whatever can be wrong with the request or the checkpoint is found here, before the output folder is
touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llava_edge.convert.checkpoint.config.image import read_image_processing
from llava_edge.convert.checkpoint.config.video import read_video_processing
from llava_edge.convert.checkpoint.files import setting_digests
from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.transformers_loader import meta_model
from llava_edge.convert.output.output_path import refuse_existing, unfinished_request
from llava_edge.convert.planning.artifact_plan import (
    ArtifactPlan,
    default_output,
    plan_artifact,
)
from llava_edge.convert.planning.conversion_inputs import CalibrationFiles, environment
from llava_edge.convert.planning.inspection import Inspected
from llava_edge.convert.planning.replanning import require_room_for_fp16, with_begun_context
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.export_hf import check_emit_hf
from llava_edge.convert.quantization.plan import BodyFormat, calibration_conversations
from llava_edge.convert.text.chat_template import compile_chat_template
from llava_edge.profiles.boards.hardware import Target, load_profile
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.memory.formats import VisionFormat, part_precisions, weight_bytes
from llava_edge.runtime.artifact.manifest import (
    ImageProcessing,
    Precision,
    PromptFormat,
    VideoProcessing,
)
from llava_edge.runtime.util.json_codec import to_json
from llava_edge.runtime.util.progress import Notify, Progress

_TEXTS_BYTES = 64 << 20
"""Room for tokenizer, graphs without weights, rotary tables."""
_ENGINE_BYTES = 32 << 20
"""Room for what an engine holds beside weights: 3 to 6 MiB were seen."""


@dataclass(frozen=True)
class ConversionPlan:
    """A request with everything that was read and decided before writing.

    Attributes:
        request: what was asked.
        checkpoint: opened.
        out: the artifact's folder.
        planned: variant, precisions, grid, context and engine.
        image_processing: from pixels to tiles.
        video_processing: from frames to pixels; None for a model without video.
        prompt: the compiled chat template; None without one.
        body: format of the decoder's linear layers; None at fp16.
        digest: of the checkpoint.
        settings: SHA-256 of the checkpoint's files beside its weights, by name.
        inputs: digests and versions of everything that parts are made from.
        check_inputs: raises where files are no longer what they were when ``inputs`` was made.
    """

    request: ConvertRequest
    checkpoint: Checkpoint
    out: Path
    planned: ArtifactPlan
    image_processing: ImageProcessing
    video_processing: VideoProcessing | None
    prompt: PromptFormat | None
    body: BodyFormat | None
    digest: str
    settings: dict[str, str]
    inputs: dict[str, str]
    check_inputs: Callable[[], None]

    @property
    def target(self) -> Target:
        """What the artifact is made for."""
        return self.request.profile.target

    @property
    def context_tokens(self) -> int:
        """Positions of the cache."""
        return self.planned.plan.context_tokens

    @property
    def precision(self) -> Precision:
        """In what numbers each part is stored."""
        plan = self.planned.plan
        stored = part_precisions(plan.precision, plan.vision_precision)
        return Precision(
            language_model=stored.language_model,
            lm_head=stored.lm_head,
            vision_tower=stored.vision_tower,
            embeddings=stored.embeddings,
            computes="float32" if self.target == "cpu" else "float16",
            int8_route=None if self.body is None else self.body.int8_route,
        )

    @property
    def has_int8_vision(self) -> bool:
        """Whether the tower's layers have 8 bits."""
        return self.planned.plan.vision_precision == "int8"

    @property
    def has_int8_cache(self) -> bool:
        """Whether the artifact gets a second decoder graph, with an int8 KV cache."""
        return self.request.wishes.cache == "int8"

    @property
    def needs_tiles(self) -> bool:
        """Whether calibration tiles decide on the tower.

        In a cpu artifact a float tower is stored in float16 and computed in float32: nothing can
        overflow.
        """
        return self.has_int8_vision or self.target == "cuda"

    @property
    def needs_samples(self) -> bool:
        """Whether anything in the artifact depends on calibration samples."""
        return self.body is not None or self.needs_tiles or self.has_int8_cache

    @property
    def key(self) -> dict[str, object]:
        """What was asked; an unfinished conversion is taken over only under equal keys."""
        request, plan = self.request, self.planned.plan
        profile, quantization = request.profile, request.quantization
        body = self.body
        return {
            "checkpoint": self.checkpoint.source_id,
            "profile": profile.name,
            # What a plan leaves of the board; memory that is free now decides the plan alone.
            "int8_isa": profile.int8_isa,
            "prefill_chunk": profile.prefill_chunk,
            "flavour": profile.target,
            "precision": plan.precision,
            "vision_precision": plan.vision_precision,
            "pinpoints": to_json(self.planned.grid.pinpoints),
            "reference": self.planned.reference,
            "context": plan.context_tokens,
            "frames": self.planned.num_frames,
            "template": request.use_template,
            "emit_hf": request.emit_hf,
            "engine": None if self.planned.engine is None else self.planned.engine.key,
            "golden": request.verify != "none",
            "quantization": None
            if body is None
            else {
                "body": [body.bits, body.group_size, body.int8_route],
                "quantizer": quantization.quantizer,
            },
            "calibration": None
            if not self.needs_samples
            else {
                "drawn": quantization.calibration is None,
                "samples": quantization.num_samples,
                "seed": quantization.seed,
            },
            "int8_cache": self.has_int8_cache,
        }

    @property
    def needed_bytes(self) -> int:
        """Upper bound of the artifact, and of the solved layers that lie beside it meanwhile."""
        # Any number of the tower's layers may stay as they are.
        sizes = weight_bytes(
            self.checkpoint.dims,
            self.planned.plan.precision,
            self.target,
            self.request.profile.int8_isa,
            resident=False,
            vision=VisionFormat(),
        )
        tower = sizes.vision_tower + sizes.projector
        # The float graph of the tower lies beside the artifact while it is looked into.
        traced = tower if self.needs_tiles else 0
        solved = self.body is not None and self.request.quantization.quantizer == "gptq"
        # A GPTQ checkpoint keeps head and embeddings at fp16: at most twice what they need here.
        emitted = 2 * sizes.total if self.request.emit_hf else 0
        # An engine holds the tower's weights once more, and code.
        engine = 0 if self.planned.engine is None else tower + _ENGINE_BYTES
        solving = sizes.decoder if solved else 0
        return _TEXTS_BYTES + traced + sizes.total + solving + emitted + engine

    def at_fp16(self) -> ConversionPlan | None:
        """The same checkpoint at fp16 for the CPU, to be asked beside a quantised artifact.

        Returns:
            None where the artifact has the checkpoint's own weights.

        Raises:
            RequestError: the checkpoint is quantised already, so there is nothing to compare with;
                or this machine has too little memory.
        """
        plan = self.planned.plan
        if plan.precision == "fp16" and plan.vision_precision == "fp16":
            return None
        if self.checkpoint.gptq is not None:
            raise RequestError(
                f"--quality compares with fp16, and {self.checkpoint.source_id} is quantised "
                "already. Convert without it and ask the artifact: llava-edge bench OUT "
                "--quality FILE."
            )
        profile = self.request.profile
        if profile.target != "cpu":
            profile = load_profile("cpu-16gb")
        wishes = replace(self.request.wishes, precision="fp16", vision_precision=None, cache=None)
        request = replace(
            self.request, profile=profile, wishes=wishes, emit_hf=False, verify="none"
        )
        plan = replace(plan, precision="fp16", vision_precision="fp16", engine="ort")
        planned = replace(self.planned, plan=plan, engine=None)
        require_room_for_fp16(request, self.checkpoint, planned)
        return replace(self, request=request, planned=planned, body=None)


def plan_conversion(
    request: ConvertRequest, inspected: Inspected, report: Progress, say: Notify
) -> ConversionPlan:
    """Decide what will be written, and read everything that is small.

    Args:
        request: what was asked.
        inspected: the checkpoint.
        report: told about bytes of the checkpoint that are digested.
        say: told what was decided, a line at a time.

    Raises:
        RequestError: the request cannot be met or the checkpoint cannot be kept faithfully.
        OutputExistsError: the output is there, and ``force`` is not set.
    """
    checkpoint, files = inspected.checkpoint, inspected.files
    takes_video = checkpoint.dims.takes_video
    if request.quality is not None:
        request.quality.require_model(takes_video=takes_video, has_template=request.use_template)
    planned = plan_artifact(request, checkpoint)
    out = request.out or default_output(planned)
    _refuse_inside(out, checkpoint, request.quantization.calibration)
    refuse_existing(out, force=request.force)
    begun = unfinished_request(out).get("context")
    planned = with_begun_context(request, checkpoint, planned, begun, say)
    for note in planned.notes:
        say(f"note: {note}")
    if request.verify != "none":
        # Now, since verification needs it after hours of work.
        meta_model(checkpoint.config)
    image_processing = read_image_processing(
        checkpoint.preprocessor_config(),
        checkpoint.dims,
        planned.grid.pinpoints,
        planned.reference,
    )
    video_processing = None
    if takes_video:
        settings = checkpoint.video_preprocessor_config()
        video_processing = read_video_processing(settings, checkpoint.dims, planned.num_frames)
    prompt = None
    if request.use_template:
        prompt = compile_chat_template(
            checkpoint.folder, checkpoint.config, source_id=checkpoint.source_id
        )
    found = files.digests(checkpoint.weight_files, report)
    if request.emit_hf:
        check_emit_hf(checkpoint, planned.plan.precision)
    plan = ConversionPlan(
        request=request,
        checkpoint=checkpoint,
        out=out,
        planned=planned,
        image_processing=image_processing,
        video_processing=video_processing,
        prompt=prompt,
        body=BodyFormat.of(checkpoint, planned.plan.precision, request.profile),
        digest=checkpoint.digest_of(found),
        settings=setting_digests(found),
        inputs={**{name: entry.sha256 for name, entry in found.items()}, **environment()},
        check_inputs=files.check,
    )
    folder = request.quantization.calibration
    return plan if folder is None or not plan.needs_samples else _calibrated_on(plan, folder, say)


def _calibrated_on(plan: ConversionPlan, folder: Path, say: Notify) -> ConversionPlan:
    """The plan with the samples that were chosen of the user's set among its inputs."""
    chosen, source = calibration_conversations(plan.request.quantization, plan.image_processing)
    # Reported here alone: the same set is read again for the tower, the codes and the int8 cache.
    for each in source["left_out"]:
        say(f"calibration sample {each['sample']} is left out: {each['reason']}")
    samples = CalibrationFiles(folder, chosen)

    def check() -> None:
        plan.check_inputs()
        samples.check()

    inputs = {**plan.inputs, "calibration": samples.digest}
    return replace(plan, inputs=inputs, check_inputs=check)


def _refuse_inside(out: Path, checkpoint: Checkpoint, calibration: Path | None) -> None:
    """No folder that is read may hold the artifact, nor lie in it, where it would be replaced.

    Raises:
        RequestError: one does.
    """
    target = out.resolve()
    sources = {"the checkpoint": checkpoint.folder, "the calibration set": calibration}
    for what, folder in sources.items():
        if folder is None:
            continue
        source = folder.resolve()
        if target == source or target.is_relative_to(source):
            raise RequestError(f"{out} lies inside {what} {folder}. Name a folder outside it.")
        if source.is_relative_to(target):
            raise RequestError(f"{out} holds {what} {folder}. Name a folder that does not.")
