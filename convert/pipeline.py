"""convert_checkpoint: open → check → export → write, in one straight line.

Everything that can be wrong with the request or the checkpoint is found before the output folder is
touched; whatever fails later leaves finished parts for the next run and nothing at the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from llava_edge.convert.checkpoint.config.image import read_image_processing
from llava_edge.convert.checkpoint.config.video import read_video_processing
from llava_edge.convert.checkpoint.files import SETTINGS, CheckpointFiles, setting_digests
from llava_edge.convert.checkpoint.hub.download import fetch_checkpoint
from llava_edge.convert.checkpoint.hub.preflight import check_download
from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.checkpoint.quantized.digested_source import DigestedSource
from llava_edge.convert.checkpoint.quantized.store import MEASURED
from llava_edge.convert.checkpoint.source import resolve_source
from llava_edge.convert.checkpoint.transformers_loader import meta_model
from llava_edge.convert.onnx.engine_plan import write_vision_engine
from llava_edge.convert.onnx.linear import QuantizedLayers
from llava_edge.convert.planning import (
    ArtifactPlan,
    as_variant,
    choose,
    lasting_plan,
    plan_artifact,
    seen_of_board,
)
from llava_edge.convert.quality.check import QualityCheck
from llava_edge.convert.quantization.export_hf import check_emit_hf, write_hf_gptq
from llava_edge.convert.quantization.kv_cache_scales import NUM_SAMPLES as CACHE_SAMPLES
from llava_edge.convert.quantization.plan import (
    BodyFormat,
    CalibrationInputs,
    calibration_conversations,
    calibration_samples,
    quantize,
    tile_conversations,
)
from llava_edge.convert.quantization.vision.calibration_tiles import cut_tiles
from llava_edge.convert.request import ConvertRequest
from llava_edge.convert.testing.random_checkpoint import RANDOM_KEY
from llava_edge.convert.text.chat_template import compile_chat_template
from llava_edge.convert.util.files import check_free_space
from llava_edge.convert.util.torch_threads import allowed_torch_threads, torch_threads
from llava_edge.convert.verification import Verification
from llava_edge.convert.verify.reference.model import REFERENCE
from llava_edge.convert.verify.weights.stage import DIGESTS
from llava_edge.convert.writing.artifact_builder import (
    EMBEDDINGS_FILE,
    TOKENIZER_FILE,
    PartBuilders,
)
from llava_edge.convert.writing.artifact_writer import (
    ArtifactWriter,
    refuse_existing,
    unfinished_request,
)
from llava_edge.convert.writing.card import write_card
from llava_edge.convert.writing.conversion_inputs import CalibrationFiles, environment
from llava_edge.profiles.boards.detect import detect_profile
from llava_edge.profiles.boards.hardware import load_profile
from llava_edge.profiles.errors import BudgetError, RequestError
from llava_edge.profiles.memory.formats import VisionFormat, part_precisions, weight_bytes
from llava_edge.profiles.models.variants import find_variant, load_variants
from llava_edge.profiles.plan import DeploymentPlan
from llava_edge.runtime.artifact.certificate import Certificate
from llava_edge.runtime.artifact.manifest import (
    SCHEMA_VERSION,
    GraphSpec,
    ImageProcessing,
    Manifest,
    Precision,
    PromptFormat,
    Source,
    TokenIds,
    VideoProcessing,
)
from llava_edge.runtime.backends.engine_cache import ENGINES, graph_digests
from llava_edge.runtime.util.json_codec import from_json, to_json
from llava_edge.runtime.util.progress import Notify, Progress
from llava_edge.runtime.util.versions import tool_versions

GPTQ_FOLDER = "gptq"
QUALITY = "quality"
"""In the work folder: what ``--quality`` asks before the artifact is made."""
_TOOLS = ("llava-edge", "onnx-ir", "onnxruntime", "tokenizers", "torch", "transformers")
_TEXTS_BYTES = 64 << 20
"""Room for tokenizer, graphs without weights, rotary tables."""
_ENGINE_BYTES = 32 << 20
"""Room for what an engine holds beside weights: 3 to 6 MiB were seen."""


@dataclass(frozen=True)
class Conversion:
    """A finished conversion."""

    folder: Path
    manifest: Manifest
    plan: DeploymentPlan
    artifact_bytes: int
    certificate: Certificate


@dataclass(frozen=True)
class _Written:
    """The parts of an artifact: what its manifest says of them, and what differs from run to run.

    ``measured`` are seconds and memory of the quantiser; ``plan`` is the one that was kept to.
    """

    manifest: Manifest
    plan: DeploymentPlan
    measured: dict[str, Any]


@dataclass(frozen=True)
class _Job:
    """A request with everything that was read and decided before writing."""

    request: ConvertRequest
    checkpoint: Checkpoint
    planned: ArtifactPlan
    processing: ImageProcessing
    video: VideoProcessing | None
    prompt: PromptFormat | None
    body: BodyFormat | None
    digest: str
    settings: dict[str, str]
    """SHA-256 of the checkpoint's files beside its weights, by name."""
    inputs: dict[str, str]
    """Digests and versions of everything else that parts are made from."""
    check_inputs: Callable[[], None]
    """Raises where files are no longer what they were when ``inputs`` was made."""


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
    checkpoint, files = _open(request, report, say)
    if request.quality is not None:
        request.quality.require_model(
            takes_video=checkpoint.dims.takes_video, has_template=request.use_template
        )
    planned = plan_artifact(request, checkpoint)
    out = request.out or default_output(planned)
    _refuse_inside(out, checkpoint, request.quantization.calibration)
    refuse_existing(out, force=request.force)
    planned = _as_begun(request, checkpoint, planned, out, say)
    for note in planned.notes:
        say(f"note: {note}")
    job = _prepare(request, checkpoint, files, planned, report, say)
    needed = _needed_bytes(job)
    reference = _fp16_of(job) if request.quality is not None else None
    if reference is not None:
        _require_room_for_fp16(reference)
        needed += _needed_bytes(reference)
    with (
        ArtifactWriter(
            out,
            _key(job),
            force=request.force,
            needed_bytes=needed,
            inputs=job.inputs,
            check_inputs=job.check_inputs,
            threads=torch.get_num_threads(),
            say=lambda text: say(f"note: {text}"),
        ) as writer,
        torch_threads(writer.threads),
    ):
        place = writer.work / QUALITY
        done = writer.finished_bytes + _bytes_below(place)
        check_free_space(writer.folder, max(0, needed - done))
        quality = None
        if request.quality is not None:
            quality = QualityCheck(request.quality, place, report, say)
            if reference is not None:
                fp16 = partial(_write_fp16, reference, place / "fp16", writer.threads, report)
                quality.ask_reference(fp16)
        written = _write_parts(job, writer, report)
        manifest = written.manifest
        verification = Verification(request.verify, checkpoint, report, say)
        verification.add_golden(manifest, writer)
        size = _bytes_below(writer.folder)
        record = replace(
            writer.record, quantization=written.measured, board=seen_of_board(written.plan)
        )
        prepared = writer.prepare(manifest, write_card(manifest, size, None), record)
        certificate = verification.certify(prepared, size, writer, quality)
        folder = writer.publish()
    return Conversion(folder, manifest, written.plan, size, certificate)


def _bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _fp16_of(job: _Job) -> _Job | None:
    """The same checkpoint at fp16 for the CPU, to be asked beside a quantised artifact.

    Returns:
        None where the artifact has the checkpoint's own weights.

    Raises:
        RequestError: the checkpoint is quantised already, so there is nothing to compare with.
    """
    plan = job.planned.plan
    if plan.precision == "fp16" and plan.vision_precision == "fp16":
        return None
    if job.checkpoint.gptq is not None:
        raise RequestError(
            f"--quality compares with fp16, and {job.checkpoint.source_id} is quantised already. "
            "Convert without it and ask the artifact: llava-edge bench OUT --quality FILE."
        )
    profile = job.request.profile
    if profile.target != "cpu":
        profile = load_profile("cpu-16gb")
    wishes = replace(job.request.wishes, precision="fp16", vision_precision=None, cache=None)
    request = replace(job.request, profile=profile, wishes=wishes, emit_hf=False, verify="none")
    plan = replace(plan, precision="fp16", vision_precision="fp16", engine="ort")
    planned = replace(job.planned, plan=plan, engine=None)
    return replace(job, request=request, planned=planned, body=None)


def _require_room_for_fp16(reference: _Job) -> None:
    """Make sure that this machine can run fp16, which ``--quality`` compares with.

    Raises:
        RequestError: it has too little memory.
    """
    here = replace(reference.request, profile=detect_profile(device="cpu"))
    variants = (as_variant(reference.checkpoint),)
    frames = reference.planned.num_frames
    wishes = replace(here.wishes, variants=variants, context_tokens=None, num_frames=frames)
    try:
        choose(here, wishes)
    except BudgetError as error:
        raise RequestError(
            f"--quality asks the model at fp16 on this machine first, and {error} Convert on a "
            "larger machine, or leave --quality out."
        ) from error


def _write_fp16(job: _Job, out: Path, threads: int, report: Progress) -> Path:
    """An artifact at fp16 in the work folder, unless an earlier run finished it."""
    if out.exists():
        return out
    with ArtifactWriter(
        out, _key(job), inputs=job.inputs, check_inputs=job.check_inputs, threads=threads
    ) as writer:
        manifest = _write_parts(job, writer, report).manifest
        return writer.finish(manifest, write_card(manifest, writer.finished_bytes, None))


def _write_parts(job: _Job, writer: ArtifactWriter, report: Progress) -> _Written:
    """Everything but manifest and card; the decoder last: its codes are found through the rest."""
    profile = job.request.profile
    build = PartBuilders(job.checkpoint, profile.target, job.planned.plan.context_tokens, report)
    vision_spec, vision_facts = writer.part(
        "vision", lambda folder: _vision(job, build, writer.work, folder)
    )
    vision = from_json(GraphSpec, vision_spec)
    job = _planned_again(job, vision_facts, writer)
    context = job.planned.plan.context_tokens
    build = PartBuilders(job.checkpoint, profile.target, context, report)
    target = job.planned.engine
    if target is not None:
        graph = graph_digests(writer.files, vision.file)
        writer.part(
            ENGINES,
            lambda folder: to_json(
                write_vision_engine(folder / vision.file, graph, target, folder / ENGINES, report)
            ),
        )
    writer.part("embeddings", build.embeddings)
    tokens = from_json(TokenIds, writer.part("tokenizer", build.tokenizer))
    parts = CalibrationInputs(
        writer.folder,
        tokens,
        job.prompt,
        job.processing,
        context,
        int8_vision=job.planned.plan.vision_precision == "int8",
    )

    @cache
    def codes() -> tuple[QuantizedLayers, dict[str, Any]]:
        assert job.body is not None
        return quantize(
            job.checkpoint,
            job.body,
            job.request.quantization,
            profile,
            parts,
            writer.work,
            job.digest,
            report,
        )

    def decoder(folder: Path) -> Any:
        if job.body is None:
            return [build.decoder(folder), {}]
        weights, facts = codes()
        noted = DigestedSource(weights.source)
        digested = replace(weights, source=noted, head=noted.head(weights.head))
        spec = build.decoder(folder, digested)
        # Anyone who reads the graph back can tell that it holds these very codes.
        return [spec, {**facts, "weights_sha256": noted.digests}]

    def gptq(folder: Path) -> None:
        (folder / GPTQ_FOLDER).mkdir()
        write_hf_gptq(
            folder / GPTQ_FOLDER,
            job.checkpoint,
            codes()[0].source,
            tokenizer_file=folder / TOKENIZER_FILE,
            progress=report,
        )

    spec, facts = writer.part("decoder", decoder)
    if job.request.emit_hf:
        writer.part(GPTQ_FOLDER, gptq)
    decoder_graph = from_json(GraphSpec, spec)
    stated = _facts(vision_facts, facts)
    manifest = _manifest(job, tokens, vision, decoder_graph, stated)
    written = _Written(manifest, job.planned.plan, facts.get(MEASURED, {}))
    if not _has_int8_cache(job):
        return written

    def int8_cache(folder: Path) -> Any:
        asked = job.request.quantization
        few = replace(asked, num_samples=min(CACHE_SAMPLES, asked.num_samples))
        with calibration_samples(job.checkpoint, few, profile, parts) as samples:
            return build.int8_cache(folder, decoder_graph, manifest.precision, samples, writer.work)

    spec, facts = writer.part("int8_cache", int8_cache)
    manifest = replace(
        manifest,
        decoder_int8_cache=from_json(GraphSpec, spec),
        conversion={**manifest.conversion, "int8_cache": facts},
    )
    return replace(written, manifest=manifest)


def _has_int8_cache(job: _Job) -> bool:
    """Whether the artifact gets a second decoder graph, with an int8 KV cache."""
    return job.request.wishes.cache == "int8"


def _facts(vision: Mapping[str, Any], decoder: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of both graphs; digests of all codes in one place, no measurements.

    The journal keeps what it was given for the next run, so nothing of it is changed here.
    """
    digests = {**vision.get(DIGESTS, {}), **decoder.get(DIGESTS, {})}
    own = {name: value for name, value in vision.items() if name != DIGESTS}
    stated = {n: value for n, value in decoder.items() if n not in (DIGESTS, MEASURED)}
    if own:
        stated["vision"] = own
    if digests:
        stated[DIGESTS] = digests
    return stated


def _vision(job: _Job, build: PartBuilders, work: Path, folder: Path) -> Any:
    """Tower and projector in the precision of the plan; its GraphSpec and what was decided."""
    int8 = job.planned.plan.vision_precision == "int8"
    if not _looks_at_tiles(job):
        return build.vision(folder)
    tiles = cut_tiles(*tile_conversations(job.request.quantization, job.processing), job.processing)
    return (build.int8_vision if int8 else build.guarded_vision)(folder, tiles, work)


def _looks_at_tiles(job: _Job) -> bool:
    """Whether calibration tiles decide on the tower.

    In the cpu target a float tower is stored in float16 and computed in float32: nothing can
    overflow.
    """
    return job.planned.plan.vision_precision == "int8" or job.request.profile.target == "cuda"


def _looks_at_samples(job: _Job) -> bool:
    """Whether anything in the artifact depends on calibration samples."""
    return job.body is not None or _looks_at_tiles(job) or _has_int8_cache(job)


def _planned_again(job: _Job, vision: Mapping[str, Any], writer: ArtifactWriter) -> _Job:
    """The plan with what calibration left wider in the tower: context shrinks first.

    The context is decided once, since parts are made for it and other memory may be free later.

    Raises:
        BudgetError: it does not fit any more.
    """
    left = int(vision.get("weights_in_float", vision.get("weights_in_float32", 0)))
    if not left:
        return job
    plan = job.planned.plan
    wishes = replace(
        job.request.wishes,
        variants=(as_variant(job.checkpoint),),
        num_frames=job.planned.num_frames,
        precision=plan.precision,
        vision_precision="int8" if plan.vision_precision == "int8" else None,
        vision_wide_weights=left,
    )
    if wishes.pinpoints is None:
        wishes = replace(wishes, grid=plan.grid)

    def decide(_: Path) -> int:
        try:
            return choose(job.request, wishes)[0].context_tokens
        except BudgetError as error:
            raise BudgetError(
                f"calibration keeps {left} weights of the tower wider than "
                f"{plan.vision_precision}, and with them {error}"
            ) from error

    wishes = replace(wishes, context_tokens=writer.part("plan", decide))
    again, _ = choose(_without_reserve(job.request), wishes)
    again = _as_seen(replace(again, engine=plan.engine), plan)
    return replace(job, planned=replace(job.planned, plan=again))


def _as_begun(
    request: ConvertRequest, checkpoint: Checkpoint, planned: ArtifactPlan, out: Path, say: Notify
) -> ArtifactPlan:
    """The context that an unfinished conversion began with, where free memory led to another."""
    plan = planned.plan
    begun = unfinished_request(out).get("context")
    if request.force or request.wishes.context_tokens is not None or type(begun) is not int:
        return planned
    if begun == plan.context_tokens:
        return planned
    wishes = replace(request.wishes, context_tokens=begun)
    try:
        again = plan_artifact(replace(_without_reserve(request), wishes=wishes), checkpoint)
    except RequestError:
        return planned
    chosen = (plan.variant, plan.precision, plan.vision_precision, plan.grid)
    found = again.plan
    if chosen != (found.variant, found.precision, found.vision_precision, found.grid):
        return planned
    say(
        f"note: keeps {begun} tokens of context, as it began; the memory that is free now "
        f"would give {plan.context_tokens} (--force begins again)"
    )
    return replace(again, plan=_as_seen(found, plan))


def _without_reserve(request: ConvertRequest) -> ConvertRequest:
    """The request for the whole board, whatever others hold of it now."""
    profile = replace(request.profile, system_reserve_bytes=0, host_reserve_bytes=0)
    return replace(request, profile=profile)


def _as_seen(plan: DeploymentPlan, first: DeploymentPlan) -> DeploymentPlan:
    """A plan with the budget that was there when the first one was made."""
    seen = first.memory
    memory = replace(
        plan.memory, budget_bytes=seen.budget_bytes, host_budget_bytes=seen.host_budget_bytes
    )
    return replace(plan, memory=memory, rejected=first.rejected)


def default_output(planned: ArtifactPlan) -> Path:
    """``artifacts/<variant>-<precision>-<profile>``."""
    plan = planned.plan
    return Path("artifacts") / f"{plan.variant}-{plan.precision}-{plan.profile}"


def _open(
    request: ConvertRequest, report: Progress, say: Notify
) -> tuple[Checkpoint, CheckpointFiles]:
    source = resolve_source(request.checkpoint or _planned_id(request, say))
    if source.folder is not None:
        files = CheckpointFiles(source.folder)
        return open_checkpoint(source.folder), files
    assert source.repo_id is not None
    _check_known(request, source.repo_id)
    parent = request.out.parent if request.out is not None else Path("artifacts")
    folder = fetch_checkpoint(
        source.repo_id,
        source.revision,
        progress=report,
        announce=lambda plan: check_download(plan, parent, say),
    )
    files = CheckpointFiles(folder)
    return open_checkpoint(folder), files


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


def _planned_id(request: ConvertRequest, say: Notify) -> str:
    """Hub id of the variant that the plan chooses where no checkpoint was named."""
    plan, _ = choose(request, request.wishes)
    hub_id = find_variant(plan.variant).hub_id
    if hub_id is None:
        raise RequestError(
            f"{plan.variant} was chosen and has no hub id. Give CHECKPOINT, a folder or a hub id."
        )
    say(f"{request.profile.name} takes {plan.variant} at {plan.precision}, grid {plan.grid}")
    return hub_id


def _check_known(request: ConvertRequest, repo_id: str) -> None:
    """A published variant that cannot fit is refused before it is downloaded."""
    for variant in load_variants():
        if repo_id in (variant.hub_id, variant.original_id):
            choose(request, replace(request.wishes, variants=(variant,)))


def _prepare(
    request: ConvertRequest,
    checkpoint: Checkpoint,
    files: CheckpointFiles,
    planned: ArtifactPlan,
    report: Progress,
    say: Notify,
) -> _Job:
    if request.verify != "none":
        # Now, since verification needs it after hours of work.
        meta_model(checkpoint.config)
    processing = read_image_processing(
        checkpoint.preprocessor_config(),
        checkpoint.dims,
        planned.grid.pinpoints,
        planned.reference,
    )
    video = None
    if checkpoint.dims.takes_video:
        settings = checkpoint.video_preprocessor_config()
        video = read_video_processing(settings, checkpoint.dims, planned.num_frames)
    prompt = None
    if request.use_template:
        prompt = compile_chat_template(
            checkpoint.folder, checkpoint.config, source_id=checkpoint.source_id
        )
    found = files.digests(checkpoint.weight_files, report)
    if request.emit_hf:
        check_emit_hf(checkpoint, planned.plan.precision)
    body = BodyFormat.of(checkpoint, planned.plan.precision, request.profile)
    inputs = {**{name: entry.sha256 for name, entry in found.items()}, **environment()}
    job = _Job(
        request,
        checkpoint,
        planned,
        processing,
        video,
        prompt,
        body,
        checkpoint.digest_of(found),
        setting_digests(found),
        inputs,
        files.check,
    )
    folder = request.quantization.calibration
    if folder is None or not _looks_at_samples(job):
        return job
    chosen, source = calibration_conversations(request.quantization, processing)
    # Said here alone: the same set is read again for the tower, the codes and the int8 cache.
    for each in source["left_out"]:
        say(f"calibration sample {each['sample']} is left out: {each['reason']}")
    samples = CalibrationFiles(folder, chosen)

    def check() -> None:
        files.check()
        samples.check()

    return replace(job, inputs={**inputs, "calibration": samples.digest}, check_inputs=check)


def _key(job: _Job) -> dict[str, object]:
    """What was asked; an unfinished conversion is taken over only under equal keys."""
    plan, profile = job.planned.plan, job.request.profile
    return {
        "checkpoint": job.checkpoint.source_id,
        "profile": profile.name,
        # What a plan leaves of the board; memory that is free now decides the plan alone.
        "int8_isa": profile.int8_isa,
        "prefill_chunk": profile.prefill_chunk,
        "flavour": profile.target,
        "precision": plan.precision,
        "vision_precision": plan.vision_precision,
        "pinpoints": to_json(job.planned.grid.pinpoints),
        "reference": job.planned.reference,
        "context": plan.context_tokens,
        "frames": job.planned.num_frames,
        "template": job.request.use_template,
        "emit_hf": job.request.emit_hf,
        "engine": None if job.planned.engine is None else job.planned.engine.key,
        "golden": job.request.verify != "none",
        "quantization": None if job.body is None else _quantization_key(job, job.body),
        "calibration": _calibration_key(job) if _looks_at_samples(job) else None,
        "int8_cache": _has_int8_cache(job),
    }


def _quantization_key(job: _Job, body: BodyFormat) -> dict[str, object]:
    asked = job.request.quantization
    return {
        "body": [body.bits, body.group_size, body.int8_route],
        "quantizer": asked.quantizer,
    }


def _calibration_key(job: _Job) -> dict[str, object]:
    asked = job.request.quantization
    return {
        "drawn": asked.calibration is None,
        "samples": asked.num_samples,
        "seed": asked.seed,
    }


def _needed_bytes(job: _Job) -> int:
    """Upper bound of the artifact, and of the solved layers that lie beside it meanwhile."""
    profile, precision = job.request.profile, job.planned.plan.precision
    dims, target = job.checkpoint.dims, profile.target
    # Any number of the tower's layers may stay as they are.
    sizes = weight_bytes(
        dims, precision, target, profile.int8_isa, resident=False, vision=VisionFormat()
    )
    tower = sizes.vision_tower + sizes.projector
    # The float graph of the tower lies beside the artifact while it is looked into.
    traced = tower if _looks_at_tiles(job) else 0
    solved = job.body is not None and job.request.quantization.quantizer == "gptq"
    # A GPTQ checkpoint keeps head and embeddings at fp16: at most twice what they take here.
    emitted = 2 * sizes.total if job.request.emit_hf else 0
    # An engine holds the tower's weights once more, and code.
    engine = 0 if job.planned.engine is None else tower + _ENGINE_BYTES
    solving = sizes.decoder if solved else 0
    return _TEXTS_BYTES + traced + sizes.total + solving + emitted + engine


def _manifest(
    job: _Job, tokens: TokenIds, vision: GraphSpec, decoder: GraphSpec, facts: dict[str, Any]
) -> Manifest:
    checkpoint, plan = job.checkpoint, job.planned.plan
    target = job.request.profile.target
    stored = part_precisions(plan.precision, plan.vision_precision)
    precision = Precision(
        language_model=stored.language_model,
        lm_head=stored.lm_head,
        vision_tower=stored.vision_tower,
        embeddings=stored.embeddings,
        computes="float32" if target == "cpu" else "float16",
        int8_route=None if job.body is None else job.body.int8_route,
    )
    return Manifest(
        schema_version=SCHEMA_VERSION,
        variant=plan.variant,
        target=target,
        precision=precision,
        plan=lasting_plan(plan),
        model=checkpoint.dims,
        image_processing=job.processing,
        video_processing=job.video,
        tokens=tokens,
        prompt=job.prompt,
        vision=vision,
        decoder=decoder,
        embeddings=EMBEDDINGS_FILE,
        tokenizer=TOKENIZER_FILE,
        context_tokens=plan.context_tokens,
        source=Source(checkpoint.source_id, checkpoint.revision, job.digest, checkpoint.layout),
        reference=REFERENCE,
        tools=tool_versions(_TOOLS),
        prefill_chunk=job.request.profile.prefill_chunk,
        conversion={
            "is_trained_grid": not job.planned.grid.beyond_stock,
            "asked_reference": job.request.reference,
            "template_left_out": not job.request.use_template,
            "random_weights": checkpoint.config.get(RANDOM_KEY) is True,
            SETTINGS: job.settings,
            **facts,
        },
        files={},
    )
