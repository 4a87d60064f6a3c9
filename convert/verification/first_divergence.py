"""First deviation: the first tensor of the model that leaves the reference, when a stage failed.

Every layer is given exactly what the reference's layer was given, so an error stays in the layer
that makes it. Layers are cut out of the artifact's own graph, with their inner tensors as outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from onnx import helper

from llava_edge.convert.onnx.graph_view import GraphView
from llava_edge.convert.verification.reference.answer import Reference, ReferenceAnswer
from llava_edge.convert.verification.runner.artifact_runner import ArtifactRunner
from llava_edge.convert.verification.runner.metrics import statistics, whole_gap
from llava_edge.convert.verification.runner.vision_values import VisionValues
from llava_edge.runtime.artifact.certificate import Deviation
from llava_edge.runtime.artifact.graph_inputs import POOLING
from llava_edge.runtime.backends.logits_to_keep import logits_input
from llava_edge.runtime.backends.onnxruntime import Session
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.tolerances import Bounds
from llava_edge.runtime.vision.pooling import pooling_index

_STAGE, _METRIC = "tensor", "max_gap_of_range"


def first_decoder_deviation(
    subject: ArtifactRunner, reference: Reference, answer: ReferenceAnswer, bounds: Bounds
) -> Deviation | None:
    """Compare layer after layer of the decoder, then final norm and head, on one probe.

    Returns:
        The first tensor outside its bound; None where every layer by itself is within.
    """
    bound = bounds.value(_STAGE, _METRIC)
    inputs = reference.layer_inputs(answer)
    for layer in range(subject.dims.text.num_hidden_layers):
        rows = inputs.load(layer)
        theirs = _layer_tensors(reference, rows, layer)
        theirs["language_model.norm"] = inputs.normed[list(answer.positions.kept)]
        theirs["lm_head"] = answer.export
        found = _compare(_run_layer(subject, layer, rows, answer), theirs, bound)
        if found is not None:
            return found
    return None


def first_vision_deviation(
    subject: ArtifactRunner, reference: Reference, answer: ReferenceAnswer, bounds: Bounds
) -> Deviation | None:
    """Compare the tower's blocks, then the projector, on the tiles of one probe.

    The first block outside its bound is looked at once more, part by part.
    """
    bound = bounds.value(_STAGE, _METRIC)
    values = VisionValues(subject.vision_path(), subject.dims.vision.num_blocks_used)
    coarse = _vision_difference(subject, reference, answer, values.outline(), bound)
    if coarse is None or coarse.tensor not in (parts := values.blocks()):
        return coarse
    fine = _vision_difference(subject, reference, answer, parts[coarse.tensor], bound)
    return fine or coarse


def _vision_difference(
    subject: ArtifactRunner,
    reference: Reference,
    answer: ReferenceAnswer,
    values: Mapping[str, str],
    bound: float,
) -> Deviation | None:
    theirs: dict[str, Array] = {}

    def see(name: str, _first: torch.Tensor, output: torch.Tensor) -> None:
        theirs[name] = output.numpy().copy()

    reference.model.use(reference.supply)
    with reference.model.observed([*values], see):
        reference.model.embed(answer.inputs)
    for name in theirs:
        scale = reference.norm_scale(name)
        if scale is not None:
            theirs[name] /= scale
    frames = answer.inputs.frame_pixels
    tiles = answer.inputs.pixel_values or ([] if frames is None else [frames])
    feeds = {"pixel_values": torch.cat(list(tiles)).numpy().astype(subject.dtype)}
    if subject.dims.takes_video:
        feeds[POOLING] = pooling_index(subject.dims.vision, answer.features.shape[1])
    view = GraphView(subject.vision_path(), "vision")
    known = {value.name for value in view.model.graph.output}
    view.model.graph.output.extend(
        helper.make_empty_tensor_value_info(name)
        for name in dict.fromkeys(values.values())
        if name not in known
    )
    session = Session.from_bytes(view.model.SerializeToString(), view.folder, subject.options)
    ours = dict(zip(values, session.run(feeds, [*values.values()]), strict=True))
    return _compare(ours, theirs, bound)


def _compare(
    ours: Mapping[str, Array], theirs: Mapping[str, Array], bound: float
) -> Deviation | None:
    for name, tensor in ours.items():
        wanted = theirs[name].reshape(-1, theirs[name].shape[-1])
        have = tensor.reshape(-1, tensor.shape[-1])
        if have.shape != wanted.shape:
            return Deviation(name, float(abs(have.size - wanted.size)), bound, {}, {})
        gap = whole_gap(have, wanted)
        if not gap <= bound:
            shown = gap if np.isfinite(gap) else float(np.finfo(np.float32).max)
            return Deviation(name, shown, bound, statistics(have), statistics(wanted))
    return None


def _layer_tensors(reference: Reference, rows: Array, layer: int) -> dict[str, Array]:
    """Inner tensors of one layer of the reference, under the names that the artifact's have."""
    prefix = f"language_model.layers.{layer}"
    names = [f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"]
    names += [f"{prefix}.self_attn.{part}_proj" for part in "qkvo"]
    names += [f"{prefix}.mlp.{part}_proj" for part in ("gate", "up", "down")]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def see(name: str, first: torch.Tensor, output: torch.Tensor) -> None:
        seen[name] = (first[0].clone(), output[0].clone())

    reference.model.use(reference.supply)
    with reference.model.observed(names, see):
        reference.model.layer(layer, torch.from_numpy(rows))
    found = {name: output.numpy() for name, (_, output) in seen.items()}
    projections = [seen[f"{prefix}.self_attn.{part}_proj"][1] for part in "qkv"]
    found[f"{prefix}.self_attn.qkv"] = torch.cat(projections, -1).numpy()
    found[f"{prefix}.self_attn"] = seen[f"{prefix}.self_attn.o_proj"][0].numpy()
    return found


def _run_layer(
    subject: ArtifactRunner, layer: int, rows: Array, answer: ReferenceAnswer
) -> dict[str, Array]:
    """Inner tensors of one layer of the artifact, all positions at once."""
    values = subject.graph.layer_values(layer)
    names = list(values.values())
    cut = subject.graph.slice(layer, layer + 1, names)
    session = cut.open(subject.options)
    feeds = _feeds(subject, rows, cut.text.num_key_value_heads)
    feeds |= logits_input(session, len(answer.positions.kept))
    return dict(zip(values, session.run(feeds, names), strict=True))


def _feeds(subject: ArtifactRunner, rows: Array, heads: int) -> dict[str, Array]:
    count = len(rows)
    shape = (1, heads, count, subject.dims.text.head_dim)
    return {
        "inputs_embeds": rows[None].astype(subject.dtype),
        "seqlens_k": np.array([count - 1], np.int32),
        "total_sequence_length": np.array(count, np.int32),
        "past_key_values.0.key": np.zeros(shape, subject.dtype),
        "past_key_values.0.value": np.zeros(shape, subject.dtype),
    }
