"""What the manifest records and no computation shows: labels, the plan, how layers were quantised.

Every key of the manifest is derived again somewhere, and here where no other stage does:

    schema_version, files, self_sha256      when the artifact is opened
    variant, target, precision, plan       here; the grid of the plan in ``manifest_settings``, and
                                            in "structure" the operators that each precision means
    prefill_chunk                           here, where the plan names a board that ships
    model, image_processing, tokens,        ``manifest_settings``, stages "prompt" and "tokenizer"
    video_processing, context_tokens
    prompt                                  stage "prompt", labels and ``special_tokens`` as well
    vision, decoder, decoder_int8_cache     when the graphs are opened, and "structure"
    embeddings, tokenizer                   files that are read and compared
    source                                  ``sha256`` by the command; ``layout`` and ``id`` here
    conversion                              here; digests and scales in "weights" and "structure"
    reference, tools                        which versions converted: nothing says this again
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llava_edge.convert.checkpoint.files import WEIGHT_DIGESTS
from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.planning.artifact_plan import variant_name
from llava_edge.convert.testing.random_checkpoint import RANDOM_KEY
from llava_edge.convert.verification.weights.tensor_mapping import linear_layers
from llava_edge.profiles.boards.hardware import load_profile, profile_names
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.memory.formats import part_precisions
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.profiles.plan import DeploymentPlan
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.util.versions import tool_versions

_NAME = "manifest.json"
_COMPUTES = {"cpu": "float32", "cuda": "float16"}
_TOOL = "llava-edge"
_STORED = "as stored (GPTQ checkpoint)"


def manifest_record_faults(artifact: Artifact, checkpoint: Checkpoint) -> list[str]:
    """Where the record differs from the checkpoint, or from what else the manifest says.

    Args:
        artifact: the one to judge; records of schema versions before 4 are not looked at.
        checkpoint: what it was made from.
    """
    manifest = artifact.manifest
    if manifest.schema_version < 4:
        return []
    return [
        *_label_faults(manifest, checkpoint),
        *_plan_faults(manifest),
        *_conversion_faults(manifest, checkpoint),
    ]


def _label_faults(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    source, plan = manifest.source, manifest.plan
    stored = part_precisions(str(plan.get("precision")), str(plan.get("vision_precision", "fp16")))
    have = manifest.precision
    wanted: dict[str, tuple[Any, Any, str]] = {
        "source.layout": (source.layout, checkpoint.layout, "the checkpoint's"),
        "model.model_type": (
            manifest.model.model_type,
            checkpoint.dims.model_type,
            "config.json's",
        ),
        "variant": (manifest.variant, variant_name(source.id), "that of source.id"),
        "plan.variant": (plan.get("variant"), manifest.variant, "variant"),
        "precision.computes": (have.computes, _COMPUTES[manifest.target], "the target's"),
        **{
            f"precision.{part}": (getattr(have, part), getattr(stored, part), "the plan's")
            for part in ("language_model", "lm_head", "vision_tower", "embeddings")
        },
    }
    for name, (found, want, whose) in wanted.items():
        if found != want:
            yield f"{_NAME}, {name}: it is {found!r:.60}; {whose} is {want!r:.60}"


def _plan_faults(manifest: Manifest) -> Iterator[str]:
    try:
        plan = DeploymentPlan.from_json(manifest.plan)
    except RequestError as error:
        yield f"{_NAME}, plan: {error}"
        return
    anyres: AnyRes = ImageProcessor(manifest.image_processing).anyres
    wanted = {
        "context_tokens": (plan.context_tokens, manifest.context_tokens, "the artifact has"),
        "max_tiles": (plan.max_tiles, anyres.max_tiles, "its grid has"),
        "max_image_tokens": (plan.max_image_tokens, anyres.max_image_tokens, "its grid has"),
        "fits": (plan.fits, True, "what does not fit is not converted; it must be"),
    }
    for name, (found, want, whose) in wanted.items():
        if found != want:
            yield f"{_NAME}, plan.{name}: it is {found}; {whose} {want}"
    # Boards' figures change between versions of this tool.
    same_tool = manifest.tools.get(_TOOL) == tool_versions((_TOOL,))[_TOOL]
    if plan.profile in profile_names() and same_tool:
        profile = load_profile(plan.profile)
        board: dict[str, tuple[Any, Any]] = {
            "flavour": (manifest.target, profile.target),
            "prefill_chunk": (manifest.prefill_chunk, profile.prefill_chunk),
        }
        for name, (have, right) in board.items():
            if have != right:
                yield f"{_NAME}, {name}: it is {have}; the board {plan.profile} has {right}"


def _conversion_faults(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    facts = manifest.conversion
    own = {*manifest.model.image_grid_pinpoints}
    for name, want in (
        ("random_weights", checkpoint.config.get(RANDOM_KEY) is True),
        ("is_trained_grid", {*manifest.image_processing.image_grid_pinpoints} <= own),
    ):
        if facts.get(name, want) != want:
            yield f"{_NAME}, conversion.{name}: it is {facts[name]!r:.40}; it must be {want}"
    if manifest.precision.language_model == "fp16":
        return
    if not facts.get(WEIGHT_DIGESTS):
        yield f"{_NAME}, conversion.{WEIGHT_DIGESTS}: no digest of any weight is recorded"
    bits = int(manifest.precision.language_model.removeprefix("int"))
    if facts.get("bits") != bits:
        yield f"{_NAME}, conversion.bits: it is {facts.get('bits')}; codes have {bits}"
    quantizer = facts.get("quantizer")
    wanted = (_STORED,) if checkpoint.gptq is not None else ("gptq", "rtn")
    if quantizer not in wanted:
        yield (
            f"{_NAME}, conversion.quantizer: it is {quantizer!r:.60}; of this checkpoint it can be "
            f"{' or '.join(wanted)}"
        )
    if quantizer == "gptq":
        yield from _solver_faults(facts, checkpoint, bits)


def _solver_faults(facts: Mapping[str, Any], checkpoint: Checkpoint, bits: int) -> Iterator[str]:
    """Every layer of a solved model has a record, and settings are those of the whole."""
    settings = facts.get("settings")
    settings = settings if isinstance(settings, Mapping) else {}
    for name, want in (
        ("bits", bits),
        ("group_size", facts.get("group_size")),
        ("quantizer", "gptq"),
    ):
        if settings.get(name) != want:
            yield (
                f"{_NAME}, conversion.settings.{name}: it is {settings.get(name)!r:.40}; the "
                f"artifact has {want}"
            )
    layers = facts.get("layers")
    recorded = {
        f"language_model.layers.{layer.get('layer')}.{name}"
        for layer in (layers if isinstance(layers, list) else [])
        if isinstance(layer, Mapping)
        for name in (layer.get("linears") or ())
    }
    lacking = [name for name in linear_layers(checkpoint)[:-1] if name not in recorded]
    if lacking:
        yield (
            f"{_NAME}, conversion.layers: {len(lacking)} solved layers have no record, "
            f"{lacking[0]} for one"
        )
