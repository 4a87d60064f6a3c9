"""Build: every part of an artifact, in the order in which they need each other.

Tower and projector come first, since what calibration leaves wider in them decides the context. The
decoder comes last: its codes are found by running samples through the other parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_edge.convert.checkpoint.files import WEIGHT_DIGESTS
from llava_edge.convert.checkpoint.quantized.digested_source import DigestedSource
from llava_edge.convert.onnx.engine_plan import write_vision_engine
from llava_edge.convert.onnx.graph_part import GraphPart
from llava_edge.convert.onnx.linear import QuantizedLayers
from llava_edge.convert.output.artifact_writer import ArtifactWriter
from llava_edge.convert.planning.conversion_plan import ConversionPlan
from llava_edge.convert.planning.replanning import context_with_wide_tower, with_wide_tower
from llava_edge.convert.quantization.export_hf import write_hf_gptq
from llava_edge.convert.quantization.kv_cache_scales import NUM_SAMPLES as CACHE_SAMPLES
from llava_edge.convert.quantization.plan import (
    CalibrationInputs,
    calibration_samples,
    quantize,
    tile_conversations,
)
from llava_edge.convert.quantization.vision.calibration_tiles import cut_tiles
from llava_edge.convert.writing.artifact_builder import TOKENIZER_FILE, PartBuilders
from llava_edge.runtime.artifact.manifest import TokenIds
from llava_edge.runtime.backends.engine_cache import ENGINES, graph_digests
from llava_edge.runtime.util.json_codec import from_json, to_json
from llava_edge.runtime.util.progress import Progress

GPTQ_FOLDER = "gptq"


@dataclass(frozen=True)
class ArtifactParts:
    """The finished parts of an artifact.

    Attributes:
        plan: that was kept to; its context may be shorter than at first.
        tokens: ids that the runtime knows by name.
        vision: tower and projector.
        decoder: the language model.
        int8_cache: the decoder with an int8 KV cache; None where it was not asked for.
    """

    plan: ConversionPlan
    tokens: TokenIds
    vision: GraphPart
    decoder: GraphPart
    int8_cache: GraphPart | None = None


def build_parts(plan: ConversionPlan, writer: ArtifactWriter, report: Progress) -> ArtifactParts:
    """Build every part that an earlier run did not finish.

    Args:
        plan: of the conversion.
        writer: of the output folder.
        report: told about progress, stage by stage, in bytes or steps.

    Raises:
        BudgetError: with what calibration leaves wider in the tower, nothing fits.
        ExportError: writing failed; finished parts stay.
    """
    vision = _graph(writer, "vision", lambda folder: _build_vision(plan, writer, report, folder))
    plan = _beside_vision(plan, vision, writer)
    engine = plan.planned.engine
    if engine is not None:
        graph, file = graph_digests(writer.files, vision.spec.file), vision.spec.file
        writer.part(
            ENGINES,
            lambda folder: to_json(
                write_vision_engine(folder / file, graph, engine, folder / ENGINES, report)
            ),
        )
    builders = PartBuilders(plan.checkpoint, plan.target, plan.context_tokens, report)
    writer.part("embeddings", builders.embeddings)
    tokens = from_json(
        TokenIds, writer.part("tokenizer", lambda folder: to_json(builders.tokenizer(folder)))
    )
    model = _LanguageModel(plan, tokens, builders, writer, report)
    decoder = _graph(writer, "decoder", model.build)
    if plan.request.emit_hf:
        writer.part(GPTQ_FOLDER, model.emit_hf)
    parts = ArtifactParts(plan, tokens, vision, decoder)
    if not plan.has_int8_cache:
        return parts
    int8_cache = _graph(
        writer, "int8_cache", lambda folder: model.build_int8_cache(folder, decoder)
    )
    return replace(parts, int8_cache=int8_cache)


def _graph(writer: ArtifactWriter, name: str, build: Callable[[Path], GraphPart]) -> GraphPart:
    return from_json(GraphPart, writer.part(name, lambda folder: to_json(build(folder))))


def _build_vision(
    plan: ConversionPlan, writer: ArtifactWriter, report: Progress, folder: Path
) -> GraphPart:
    """Tower and projector in the precision of the plan."""
    build = PartBuilders(plan.checkpoint, plan.target, plan.context_tokens, report)
    if not plan.needs_tiles:
        return build.vision(folder)
    processing = plan.image_processing
    tiles = cut_tiles(*tile_conversations(plan.request.quantization, processing), processing)
    if plan.has_int8_vision:
        return build.int8_vision(folder, tiles, writer.work)
    return build.guarded_vision(folder, tiles, writer.work)


def _beside_vision(
    plan: ConversionPlan, vision: GraphPart, writer: ArtifactWriter
) -> ConversionPlan:
    """The plan with what calibration left wider in the tower: context shrinks first.

    The context is decided once, since parts are made for it and other memory may be free later.
    """
    facts = vision.facts
    wide = int(facts.get("weights_in_float", facts.get("weights_in_float32", 0)))
    if not wide:
        return plan
    known = (plan.request, plan.checkpoint, plan.planned, wide)
    context = writer.part("plan", lambda _: context_with_wide_tower(*known))
    return replace(plan, planned=with_wide_tower(*known, context))


class _LanguageModel:
    """What is built of the decoder's weights; codes are found once, where anything needs them."""

    def __init__(
        self,
        plan: ConversionPlan,
        tokens: TokenIds,
        builders: PartBuilders,
        writer: ArtifactWriter,
        report: Progress,
    ) -> None:
        self._plan = plan
        self._builders = builders
        self._work = writer.work
        self._report = report
        self._inputs = CalibrationInputs(
            writer.folder,
            tokens,
            plan.prompt,
            plan.image_processing,
            plan.context_tokens,
            int8_vision=plan.has_int8_vision,
        )

    def build(self, folder: Path) -> GraphPart:
        if self._plan.body is None:
            return GraphPart(self._builders.decoder(folder))
        layers, facts = self._codes
        noted = DigestedSource(layers.source)
        digested = replace(layers, source=noted, head=noted.head(layers.head))
        spec = self._builders.decoder(folder, digested)
        # Anyone who reads the graph back can tell that it holds these very codes.
        return GraphPart(spec, {**facts, WEIGHT_DIGESTS: noted.digests})

    def emit_hf(self, folder: Path) -> None:
        (folder / GPTQ_FOLDER).mkdir()
        write_hf_gptq(
            folder / GPTQ_FOLDER,
            self._plan.checkpoint,
            self._codes[0].source,
            tokenizer_file=folder / TOKENIZER_FILE,
            progress=self._report,
        )

    def build_int8_cache(self, folder: Path, decoder: GraphPart) -> GraphPart:
        plan = self._plan
        asked = plan.request.quantization
        few = replace(asked, num_samples=min(CACHE_SAMPLES, asked.num_samples))
        with calibration_samples(
            plan.checkpoint, few, plan.request.profile, self._inputs
        ) as samples:
            return self._builders.int8_cache(
                folder, decoder.spec, plan.precision, samples, self._work
            )

    @cached_property
    def _codes(self) -> tuple[QuantizedLayers, dict[str, Any]]:
        plan = self._plan
        assert plan.body is not None
        return quantize(
            plan.checkpoint,
            plan.body,
            plan.request.quantization,
            plan.request.profile,
            self._inputs,
            self._work,
            plan.digest,
            self._report,
        )
