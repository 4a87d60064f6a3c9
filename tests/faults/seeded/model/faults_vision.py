"""Faults of tower and projector, planted in the converter or in a finished artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llava_edge.convert.onnx import vision as vision_graph
from llava_edge.convert.writing import artifact_builder as parts
from llava_edge.profiles.models.model_dims import ModelDims, VisionDims
from tests.faults.fault import Fault
from tests.faults.models.tamper import Tampered

_Patch = pytest.MonkeyPatch
_LAYERS = "vision_tower.encoder.layers"
_EMBEDDINGS = "vision_tower.embeddings"
_PROJECTOR = "multi_modal_projector"


def _with(change: Callable[[VisionDims], VisionDims]) -> Callable[[_Patch], None]:
    """The builder takes other settings than the checkpoint's."""

    def plant(patch: _Patch) -> None:
        real = parts.build_vision_graph

        def build(dims: ModelDims, *rest: Any) -> Any:
            return real(replace(dims, vision=change(dims.vision)), *rest)

        patch.setattr(parts, "build_vision_graph", build)

    return plant


def _last_layer(vision: VisionDims) -> VisionDims:
    return replace(vision, feature_layers=(vision.num_hidden_layers,))


def _class_token_kept(copy: Tampered) -> None:
    patches = 25
    (cut,) = copy.nodes("vision", "Slice")
    copy.set_constant("vision", cut.name, 1, np.array([0], np.int64))
    copy.set_constant("vision", cut.name, 2, np.array([patches], np.int64))


def _patches_by_channel_last(patch: _Patch) -> None:
    """Pixels of a patch as (y, x, channel), the kernel as (channel, y, x)."""
    real = vision_graph.GraphBuilder.op

    def op(self: Any, op_type: str, *inputs: Any, **attributes: Any) -> Any:
        if attributes.get("perm") == [0, 2, 4, 1, 3, 5]:
            attributes["perm"] = [0, 2, 4, 3, 5, 1]
        return real(self, op_type, *inputs, **attributes)

    patch.setattr(vision_graph.GraphBuilder, "op", op)


def _transposed(copy: Tampered) -> None:
    copy.change_tensor("vision", f"{_PROJECTOR}.linear_2.weight", np.transpose)


def _positions_reversed(copy: Tampered) -> None:
    name = f"{_EMBEDDINGS}.position_embedding.weight"
    copy.change_tensor("vision", name, lambda table: table[::-1])


def _class_embedding_zero(copy: Tampered) -> None:
    copy.change_tensor("vision", f"{_EMBEDDINGS}.class_embedding", np.zeros_like)


def _scale_of_width(copy: Tampered) -> None:
    copy.change_tensor("vision", "attention_scale", lambda scale: scale / np.sqrt(3))


def _fault(
    id_: str,
    wrong: str,
    plant: Callable[[Any], None],
    tensor: str,
    stage: str = "structure",
    part: str = "tower",
    **more: Any,
) -> Fault:
    where = more.pop("where", "artifact")
    return Fault(id_, part, wrong, where, stage, plant, tensor=tensor, **more)


FAULTS = (
    _fault(
        "layer -1",
        "features of the last block, not of the last but one",
        _with(_last_layer),
        f"{_PROJECTOR}.linear_1",
        where="conversion",
    ),
    _fault(
        "class token kept",
        "the class token stays and the last patch goes",
        _class_token_kept,
        f"{_PROJECTOR}.linear_1",
    ),
    _fault(
        "gelu for quick_gelu",
        "exact GELU in the tower",
        _with(lambda vision: replace(vision, hidden_act="gelu")),
        f"{_LAYERS}.0.mlp.fc2",
        where="conversion",
    ),
    _fault(
        "missing pre-norm",
        "the norm before the first block is left out",
        lambda copy: copy.bypass("vision", "vision_tower.pre_layrnorm"),
        "vision_tower.pre_layrnorm",
    ),
    _fault(
        "channels last",
        "a patch is flattened with its channels last",
        _patches_by_channel_last,
        _EMBEDDINGS,
        where="conversion",
    ),
    _fault(
        "tower attention scale",
        "scores over the square root of the width, not of a head",
        _scale_of_width,
        f"{_LAYERS}.0.self_attn",
    ),
    _fault(
        "tower epsilon",
        "the norms of the tower take 1e-6",
        _with(lambda vision: replace(vision, layer_norm_eps=1e-6)),
        "",
        where="conversion",
    ),
    _fault(
        "positions reversed",
        "the position embedding from the last row to the first",
        _positions_reversed,
        _EMBEDDINGS,
        "weights",
    ),
    _fault(
        "class embedding zero",
        "the class embedding is zero",
        _class_embedding_zero,
        _EMBEDDINGS,
        "weights",
    ),
    _fault(
        "projector transposed",
        "the second weight of the projector is transposed",
        _transposed,
        _PROJECTOR,
        "weights",
        "projector",
    ),
    _fault(
        "tanh gelu",
        "the projector's GELU by its tanh formula",
        lambda copy: copy.set_attributes(
            "vision", copy.nodes("vision", "Gelu")[-1].name, approximate="tanh"
        ),
        _PROJECTOR,
        part="projector",
    ),
    _fault(
        "projector bias dropped",
        "the projector has no biases",
        _with(lambda vision: replace(vision, projector_bias=False)),
        f"{_PROJECTOR}.linear_1",
        part="projector",
        where="conversion",
    ),
)
