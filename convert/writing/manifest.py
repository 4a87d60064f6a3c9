"""The manifest of a conversion: what the runtime needs to know, and what was decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_edge.convert.checkpoint.files import SETTINGS, WEIGHT_DIGESTS
from llava_edge.convert.checkpoint.quantized.store import MEASURED
from llava_edge.convert.checkpoint.transformers_loader import REFERENCE
from llava_edge.convert.planning.artifact_plan import lasting_plan
from llava_edge.convert.testing.random_checkpoint import RANDOM_KEY
from llava_edge.convert.writing.artifact_builder import EMBEDDINGS_FILE, TOKENIZER_FILE
from llava_edge.convert.writing.artifact_parts import ArtifactParts
from llava_edge.runtime.artifact.manifest import SCHEMA_VERSION, Manifest, Source
from llava_edge.runtime.util.versions import tool_versions

_TOOLS = ("llava-edge", "onnx-ir", "onnxruntime", "tokenizers", "torch", "transformers")


def make_manifest(parts: ArtifactParts) -> Manifest:
    """The manifest of finished parts; the writer adds the files."""
    plan = parts.plan
    checkpoint, deployment = plan.checkpoint, plan.planned.plan
    conversion = {
        "is_trained_grid": not plan.planned.grid.beyond_stock,
        "asked_reference": plan.request.reference,
        "template_left_out": not plan.request.use_template,
        "random_weights": checkpoint.config.get(RANDOM_KEY) is True,
        SETTINGS: plan.settings,
        **_graph_facts(parts.vision.facts, parts.decoder.facts),
    }
    if parts.int8_cache is not None:
        conversion["int8_cache"] = parts.int8_cache.facts
    return Manifest(
        schema_version=SCHEMA_VERSION,
        variant=deployment.variant,
        target=plan.target,
        precision=plan.precision,
        plan=lasting_plan(deployment),
        model=checkpoint.dims,
        image_processing=plan.image_processing,
        video_processing=plan.video_processing,
        tokens=parts.tokens,
        prompt=plan.prompt,
        vision=parts.vision.spec,
        decoder=parts.decoder.spec,
        decoder_int8_cache=None if parts.int8_cache is None else parts.int8_cache.spec,
        embeddings=EMBEDDINGS_FILE,
        tokenizer=TOKENIZER_FILE,
        context_tokens=plan.context_tokens,
        source=Source(checkpoint.source_id, checkpoint.revision, plan.digest, checkpoint.layout),
        reference=REFERENCE,
        tools=tool_versions(_TOOLS),
        prefill_chunk=plan.request.profile.prefill_chunk,
        conversion=conversion,
        files={},
    )


def _graph_facts(vision: Mapping[str, Any], decoder: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of both graphs; digests of all codes in one place, no measurements."""
    digests = {**vision.get(WEIGHT_DIGESTS, {}), **decoder.get(WEIGHT_DIGESTS, {})}
    own = {name: value for name, value in vision.items() if name != WEIGHT_DIGESTS}
    stated = {n: value for n, value in decoder.items() if n not in (WEIGHT_DIGESTS, MEASURED)}
    if own:
        stated["vision"] = own
    if digests:
        stated[WEIGHT_DIGESTS] = digests
    return stated
