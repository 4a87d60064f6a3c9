"""Which numbers a plan's precision means for the language model, and where the codes come from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.quantized.gptq_checkpoint import open_gptq
from llava_edge.convert.checkpoint.quantized.source import QuantizedSource, RtnSource, quantize_head
from llava_edge.convert.onnx.linear import QuantizedLayers
from llava_edge.convert.quantization.calibration.calibration_set import (
    CalibrationModel,
    CalibrationSet,
)
from llava_edge.convert.quantization.calibration.conversations import (
    Conversation,
    read_conversations,
)
from llava_edge.convert.quantization.calibration.synthetic import draw_conversations
from llava_edge.convert.quantization.gptq.language_model import (
    quantize_language_model,
)
from llava_edge.convert.quantization.gptq.settings import QuantizeSettings
from llava_edge.convert.quantization.request import NUM_SAMPLES as NUM_SAMPLES
from llava_edge.convert.quantization.request import QuantizationRequest as QuantizationRequest
from llava_edge.convert.quantization.request import Quantizer as Quantizer
from llava_edge.profiles.boards.hardware import HardwareProfile
from llava_edge.profiles.memory.formats import (
    Int8Route,
    group_size,
    head_group_size,
    int8_route,
    largest_block,
)
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.runtime.artifact.manifest import ImageProcessing, PromptFormat, TokenIds
from llava_edge.runtime.util.progress import Progress

_BITS: dict[str, Literal[4, 8]] = {"int8": 8, "int4": 4}
_PRECISIONS = {8: "int8", 4: "int4"}


@dataclass(frozen=True)
class BodyFormat:
    """Bits, group and operator of the decoder's linear layers."""

    bits: Literal[4, 8]
    group_size: int
    int8_route: Int8Route

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, precision: str, profile: HardwareProfile
    ) -> BodyFormat | None:
        """The format that the plan counted with; None at fp16."""
        if precision not in _BITS:
            return None
        bits = _BITS[precision]
        target, isa = profile.target, profile.int8_isa
        if checkpoint.gptq is not None:
            stored = open_gptq(checkpoint, precision)
            return cls(bits, stored.group_size, int8_route(bits, stored.group_size, target, isa))
        group = group_size(checkpoint.dims.text, precision, target, isa)
        return cls(bits, group, int8_route(bits, group, target, isa))


@dataclass(frozen=True)
class CalibrationInputs:
    """The finished parts that calibration runs samples through."""

    folder: Path
    tokens: TokenIds
    prompt: PromptFormat | None
    processing: ImageProcessing
    context_tokens: int
    int8_vision: bool = False


def quantize(
    checkpoint: Checkpoint,
    body: BodyFormat,
    request: QuantizationRequest,
    profile: HardwareProfile,
    parts: CalibrationInputs,
    work: Path,
    digest: str,
    report: Progress,
) -> tuple[QuantizedLayers, dict[str, Any]]:
    """Codes for the whole language model, and what there is to say of them.

    Args:
        checkpoint: the model.
        body: format of its linear layers.
        request: how to find the codes.
        profile: the board; its target is that of the vision graph.
        parts: vision graph, embeddings, tokenizer.
        work: folder for solved layers; the same request goes on with what lies there.
        digest: of the checkpoint.
        report: told about layers.

    Returns:
        The layers for the decoder graph, and plain JSON for the manifest.

    Raises:
        RequestError: no sample can be used.
        CheckpointError: a weight is not finite.
    """
    precision = _PRECISIONS[body.bits]
    head_group = head_group_size(checkpoint.dims.text, precision, profile.target)
    facts: dict[str, Any] = {
        "bits": body.bits,
        "group_size": body.group_size,
        "head_group_size": head_group,
    }
    source: QuantizedSource
    if checkpoint.gptq is not None:
        source = open_gptq(checkpoint, precision)
        facts |= {"quantizer": "as stored (GPTQ checkpoint)", "calibration": None}
    elif request.quantizer == "rtn":
        source = RtnSource(checkpoint, body.bits, body.group_size)
        facts |= {"quantizer": "rtn", "calibration": None}
    else:
        settings = QuantizeSettings(body.bits, body.group_size, "gptq", seed=request.seed)
        with calibration_samples(checkpoint, request, profile, parts) as samples:
            store = quantize_language_model(
                checkpoint, work, settings, samples, report, source_digest=digest
            )
        source = store
        facts |= {"quantizer": "gptq", **store.report}
    layers = QuantizedLayers(
        source=source,
        head=lambda: quantize_head(checkpoint, group_size=head_group),
        head_group_size=head_group,
        int8_route=body.int8_route,
        largest_block=largest_block(precision, profile.target),
    )
    return layers, facts


@contextmanager
def calibration_samples(
    checkpoint: Checkpoint,
    request: QuantizationRequest,
    profile: HardwareProfile,
    parts: CalibrationInputs,
) -> Iterator[CalibrationSet]:
    """The samples that were asked for, as tokens; they embed themselves as long as this is open.

    Raises:
        RequestError: no sample can be used.
    """
    with CalibrationModel.open(
        parts.folder,
        checkpoint.dims,
        parts.tokens,
        parts.prompt,
        parts.processing,
        profile.target,
        parts.context_tokens,
        int8_vision=parts.int8_vision,
    ) as model:
        yield model.prepare(*calibration_conversations(request, parts.processing))


def calibration_conversations(
    request: QuantizationRequest, processing: ImageProcessing
) -> tuple[tuple[Conversation, ...], dict[str, Any]]:
    """The conversations that were asked for, or drawn ones, and what is to be said of them."""
    anyres = AnyRes(
        processing.tile_size,
        processing.patch_size,
        processing.image_grid_pinpoints,
        processing.reference,
    )
    if request.calibration is None:
        return draw_conversations(anyres, request.num_samples, request.seed)
    return read_conversations(
        request.calibration, anyres, request.num_samples, request.seed, request.limits
    )


def tile_conversations(
    request: QuantizationRequest, processing: ImageProcessing
) -> tuple[tuple[Conversation, ...], dict[str, Any]]:
    """The same for the tower, which needs images: drawn ones where the folder holds none."""
    conversations, source = calibration_conversations(request, processing)
    if any(conversation.images for conversation in conversations):
        return conversations, source
    return calibration_conversations(replace(request, calibration=None), processing)
