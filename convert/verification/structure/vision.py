"""The vision graph against the reference's tower and projector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_edge.convert.onnx.graph_file import GraphFile
from llava_edge.convert.verification.reference.modules import ReferenceStructure
from llava_edge.convert.verification.structure.graph_attributes import (
    Activation,
    GraphWalk,
    LinearAttributes,
)
from llava_edge.convert.verification.structure.graph_comparison import (
    compare_linear,
    compare_norm,
    says,
)
from llava_edge.convert.verification.structure.node_faults import node_faults
from llava_edge.convert.verification.structure.vision_attributes import (
    BlockAttributes,
    EmbeddingAttributes,
    read_vision,
)
from llava_edge.convert.verification.weights.vision_weights import INPUT_FACTOR
from llava_edge.runtime.artifact.manifest import Manifest

_QUICK_GELU_ALPHA = 1.702
"""transformers' QuickGELUActivation: x * sigmoid(1.702 x)."""
_FIRST_PATCH = {"default": 1, "full": 0}


@dataclass
class _Form:
    """How linear layers are stored, as the manifest says.

    Attributes:
        weights_in_float: of those layers that were compared, in the graph.
    """

    is_int8: bool
    in_float: frozenset[str]
    weights_in_float: int = 0

    @classmethod
    def of(cls, manifest: Manifest) -> _Form:
        facts = manifest.conversion.get("vision")
        left = facts.get("layers_in_float", {}) if isinstance(facts, dict) else {}
        return cls(manifest.precision.vision_tower == "int8", frozenset(left))

    def compare(self, walk: GraphWalk, have: LinearAttributes, name: str) -> None:
        integer = self.is_int8 and name not in self.in_float
        form = "MatMulIntegerToFloat" if integer else "MatMul"
        says(walk, have.node, "operator", have.op_type, form, "manifest.json")
        says(walk, have.node, "number of codes of an activation", have.terms, 1, "the tower's form")
        if have.op_type == "MatMul":
            self.weights_in_float += have.in_size * have.out_size
        factor: str | None = f"{name}{INPUT_FACTOR}"
        if factor not in walk.graph.initializers:
            factor = None
        says(walk, have.node, "factor in front of it", have.input_factor, factor, "the file")


def vision_faults(graph: GraphFile, manifest: Manifest, reference: ReferenceStructure) -> list[str]:
    """Where a vision graph differs from the reference.

    Args:
        graph: tower and projector.
        manifest: says which type the graph computes in.
        reference: the expectation.
    """
    walk = GraphWalk(graph, manifest.precision.computes)
    if manifest.precision.computes == "float16":
        _islands(walk, manifest)
    found = read_vision(walk)
    wanted = reference.feature_layers
    if found.embedding is not None:
        _embedding(walk, found.embedding, reference)
        if list(found.feature_depths) != wanted:
            walk.faults.append(
                f"vision: the features are taken behind {_shown(found.feature_depths)} blocks; "
                f"config.json says {_shown(wanted)} (vision_feature_layer "
                f"{reference.config.vision_feature_layer})"
            )
    first = _FIRST_PATCH[reference.config.vision_feature_select_strategy]
    for place, have in enumerate(found.first_tokens):
        if have != first:
            walk.faults.append(
                f"vision, feature {place}: it begins at token {have}, must begin at {first}; token "
                "0 is the class token (vision_feature_select_strategy "
                f"{reference.config.vision_feature_select_strategy})"
            )
    if found.linear_1 is not None and found.is_pooled != reference.is_pooled:
        kinds = ("pooled", "single") if found.is_pooled else ("single", "pooled")
        walk.faults.append(
            f"vision: the projector reads {kinds[0]} patches; the reference's model has {kinds[1]}"
        )
    form = _Form.of(manifest)
    layers = reference.tower.encoder.layers
    for index, block in enumerate(found.blocks[: len(layers)]):
        _block(walk, block, f"vision_tower.encoder.layers.{index}", layers[index], form)
    projector = reference.projector
    for linear, name in ((found.linear_1, "linear_1"), (found.linear_2, "linear_2")):
        if linear is not None:
            module = getattr(projector, name)
            full = f"multi_modal_projector.{name}"
            compare_linear(walk, linear, [full], [module])
            form.compare(walk, linear, full)
    if found.activation is not None:
        _activation(walk, found.activation, projector.act)
    if form.is_int8:
        facts = manifest.conversion.get("vision")
        stated = facts if isinstance(facts, dict) else {}
        _says_count(walk, "weights_in_float", stated, form.weights_in_float)
    walk.faults += node_faults(walk, found.embedding is not None)
    return walk.faults


def _islands(walk: GraphWalk, manifest: Manifest) -> None:
    """Nodes in float32 are those that the manifest says; from here on casts are not looked at."""
    facts = manifest.conversion.get("vision")
    stated = facts if isinstance(facts, dict) else {}
    found = walk.graph.bypass_casts()
    for name in sorted(found.float32_nodes ^ set(map(str, stated.get("float32_nodes", [])))):
        have = "float32" if name in found.float32_nodes else "float16"
        walk.faults.append(
            f"vision, node {name}: it computes in {have}; manifest.json says otherwise"
        )
    for name in found.doubled:
        walk.faults.append(f"vision, node {name}: it widens what was rounded to float16 before")
    _says_count(walk, "weights_in_float32", stated, found.num_weights)


def _says_count(walk: GraphWalk, key: str, stated: Mapping[str, Any], have: int) -> None:
    """The memory of a plan follows from such counts."""
    said = stated.get(key, 0)
    if said != have:
        walk.faults.append(f"vision: {have} weights are wide; manifest.json says {said} ({key})")


def _embedding(walk: GraphWalk, have: EmbeddingAttributes, reference: ReferenceStructure) -> None:
    tower, vision = reference.tower, reference.vision
    prefix = "vision_tower.embeddings"
    for what, name, want in (
        ("patch embedding", have.kernel, f"{prefix}.patch_embedding.weight"),
        ("class token", have.class_token, f"{prefix}.class_embedding"),
        ("position embedding", have.positions, f"{prefix}.position_embedding.weight"),
    ):
        if name != want:
            walk.faults.append(f"vision, {what}: it reads {name} where {want} belongs")
    sides = (vision.image_size // vision.patch_size, vision.patch_size)
    if have.patches != sides:
        walk.faults.append(
            f"vision: a tile is cut into {have.patches[0]} patches a side of {have.patches[1]} "
            f"pixels; config.json says {sides[0]} of {sides[1]}"
        )
    flat = vision.num_channels * vision.patch_size**2
    for name, shape in (
        (have.kernel, (flat, vision.hidden_size)),
        (have.positions, tuple(tower.embeddings.position_embedding.weight.shape)),
    ):
        if walk.graph.shape(name) != shape:
            walk.faults.append(
                f"vision, {name}: its shape is {walk.graph.shape(name)}; config.json says {shape}"
            )
    if have.pre_norm is None:
        walk.faults.append("vision: there is no pre_layrnorm in front of the blocks")
    else:
        compare_norm(walk, have.pre_norm, "vision_tower.pre_layrnorm", tower.pre_layrnorm)


def _block(walk: GraphWalk, have: BlockAttributes, prefix: str, module: Any, form: _Form) -> None:
    attention = module.self_attn
    compare_norm(walk, have.norm1, f"{prefix}.layer_norm1", module.layer_norm1)
    compare_norm(walk, have.norm2, f"{prefix}.layer_norm2", module.layer_norm2)
    packed = ["q_proj", "k_proj", "v_proj"]
    for linear, owner, path, parts in (
        (have.qkv, attention, "self_attn", packed),
        (have.out, attention, "self_attn", ["out_proj"]),
        (have.fc1, module.mlp, "mlp", ["fc1"]),
        (have.fc2, module.mlp, "mlp", ["fc2"]),
    ):
        names = [f"{prefix}.{path}.{part}" for part in parts]
        compare_linear(walk, linear, names, [getattr(owner, part) for part in parts])
        form.compare(walk, linear, names[0])
    node = have.qkv.node
    says(walk, node, "number of heads", have.num_heads, attention.num_heads)
    says(walk, node, "size of a head", have.head_dim, attention.head_dim)
    says(walk, node, "attention scale", have.scale, _stored(walk, attention.scale))
    _activation(walk, have.activation, module.mlp.activation_fn)


def _activation(walk: GraphWalk, have: Activation, module: Any) -> None:
    says(walk, have.node, "activation", have.kind, ReferenceStructure.activation(module))
    if have.alpha is not None:
        alpha = _stored(walk, _QUICK_GELU_ALPHA)
        says(walk, have.node, "factor inside the sigmoid", have.alpha, alpha)


def _stored(walk: GraphWalk, value: float) -> float:
    """A constant rounded to the type that the graph computes in."""
    return float(np.dtype(walk.compute).type(value))


def _shown(depths: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, depths))
