"""The vision graph: tiles in, projected patch features out.

    pixel_values [tiles, 3, T, T] → patches → CLIP blocks up to the feature layer → class token off
    → linear_1 → gelu → linear_2 → image_features [tiles, patches, hidden]

Standard ONNX operators only, so that ONNX Runtime, TensorRT and TensorRT-RTX all take it. The patch
embedding is a reshape and a MatMul: a convolution whose stride equals its kernel is exactly that,
and no convolution library (cuDNN) is then needed. Blocks behind the feature layer are not built.

Source: transformers ``CLIPVisionTransformer`` and ``LlavaNextMultiModalProjector`` 5.23.0.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llava_edge.convert.graph import GraphBuilder
from llava_edge.convert.weights import TensorSource, linear, reshaped, vectors
from llava_edge.profiles.model_dims import ModelDims, VisionDims

QUICK_GELU_ALPHA = 1.702
NUM_CHANNELS = 3


def build_vision_graph(
    dims: ModelDims, source: TensorSource, compute: type[np.float32] | type[np.float16]
) -> GraphBuilder:
    """Build tower and projector; weights are read when the graph is saved."""
    vision = dims.vision
    g = GraphBuilder("vision", compute)
    side = vision.image_size
    pixels = g.input("pixel_values", g.compute_name, ["tiles", NUM_CHANNELS, side, side])
    hidden = _embed(g, vision, source, pixels)
    # hidden_states[0] is the embedding output after pre_layrnorm; entry k is the output of block k.
    states = {0: hidden}
    for index in range(vision.num_blocks_used):
        hidden = _block(g, vision, source, index, hidden)
        states[index + 1] = hidden
    last = g.integers(np.iinfo(np.int64).max)
    features = [
        g.op("Slice", states[layer], g.integers(1), last, g.integers(1))
        for layer in vision.feature_layers
    ]
    joined = features[0] if len(features) == 1 else g.op("Concat", *features, axis=-1)
    projected = _projector(g, dims, source, joined)
    g.output(
        projected,
        "image_features",
        g.compute_name,
        ["tiles", vision.num_patches, dims.text.hidden_size],
    )
    return g


def _embed(g: GraphBuilder, v: VisionDims, source: TensorSource, pixels: ir.Value) -> ir.Value:
    prefix = "vision_tower.embeddings"
    per_side, patch, width = v.patches_per_side, v.patch_size, v.hidden_size
    split = g.op("Reshape", pixels, g.integers(-1, NUM_CHANNELS, per_side, patch, per_side, patch))
    # [tiles, row, column, channel, y, x]: the channel-first order of the convolution's kernel
    ordered = g.op("Transpose", split, perm=[0, 2, 4, 1, 3, 5])
    flat_size = NUM_CHANNELS * patch * patch
    flat = g.op("Reshape", ordered, g.integers(-1, v.num_patches, flat_size))
    kernel = reshaped(
        source,
        f"{prefix}.patch_embedding.weight",
        (flat_size, width),
        lambda array: array.reshape(width, flat_size).T,
    )
    patches = g.op("MatMul", flat, g.compute_weight(f"{prefix}.patch_embedding.weight", kernel))
    class_token = g.vector(
        f"{prefix}.class_embedding",
        vectors(source, [f"{prefix}.class_embedding"]).reshape(1, 1, width),
    )
    tiles = g.op("Shape", pixels, start=0, end=1)
    shape = g.op("Concat", tiles, g.integers(1, width), axis=0)
    tokens = g.op("Concat", g.op("Expand", class_token, shape), patches, axis=1)
    positions = reshaped(
        source,
        f"{prefix}.position_embedding.weight",
        (v.num_patches + 1, width),
        lambda array: array,
    )
    table = g.compute_weight(f"{prefix}.position_embedding.weight", positions)
    return _norm(g, v, source, "vision_tower.pre_layrnorm", g.op("Add", tokens, table))


def _block(
    g: GraphBuilder, v: VisionDims, source: TensorSource, index: int, hidden: ir.Value
) -> ir.Value:
    prefix = f"vision_tower.encoder.layers.{index}"
    normed = _norm(g, v, source, f"{prefix}.layer_norm1", hidden)
    hidden = g.op("Add", hidden, _attention(g, v, source, f"{prefix}.self_attn", normed))
    normed = _norm(g, v, source, f"{prefix}.layer_norm2", hidden)
    up = _linear(g, source, [f"{prefix}.mlp.fc1"], v.hidden_size, v.intermediate_size, normed)
    active = _activation(g, v.hidden_act, up)
    down = _linear(g, source, [f"{prefix}.mlp.fc2"], v.intermediate_size, v.hidden_size, active)
    return g.op("Add", hidden, down)


def _attention(
    g: GraphBuilder, v: VisionDims, source: TensorSource, prefix: str, hidden: ir.Value
) -> ir.Value:
    names = [f"{prefix}.{part}_proj" for part in "qkv"]
    packed = _linear(g, source, names, v.hidden_size, 3 * v.hidden_size, hidden)
    heads, size = v.num_attention_heads, v.head_dim
    split = g.op("Reshape", packed, g.integers(0, 0, 3, heads, size))
    # [3, tiles, heads, tokens, size]
    ordered = g.op("Transpose", split, perm=[2, 0, 3, 1, 4])
    query, key, value = g.ops("Split", [ordered], {"axis": 0, "num_outputs": 3}, num_outputs=3)
    first = g.integers(0)
    query = g.op("Squeeze", query, first)
    scale = g.vector("attention_scale", np.array(size**-0.5))
    keys = g.op("Transpose", g.op("Squeeze", key, first), perm=[0, 1, 3, 2])
    scores = g.op("Softmax", g.op("MatMul", g.op("Mul", query, scale), keys), axis=-1)
    mixed = g.op("MatMul", scores, g.op("Squeeze", value, first))
    # [tiles, tokens, heads * size]
    merged = g.op("Reshape", g.op("Transpose", mixed, perm=[0, 2, 1, 3]), g.integers(0, 0, -1))
    return _linear(g, source, [f"{prefix}.out_proj"], v.hidden_size, v.hidden_size, merged)


def _projector(
    g: GraphBuilder, dims: ModelDims, source: TensorSource, features: ir.Value
) -> ir.Value:
    v, hidden = dims.vision, dims.text.hidden_size
    prefix = "multi_modal_projector"
    bias = v.projector_bias
    first = _linear(g, source, [f"{prefix}.linear_1"], v.feature_size, hidden, features, bias)
    active = g.op("Gelu", first, approximate="none")
    return _linear(g, source, [f"{prefix}.linear_2"], hidden, hidden, active, bias)


def _linear(
    g: GraphBuilder,
    source: TensorSource,
    prefixes: list[str],
    in_size: int,
    out_size: int,
    hidden: ir.Value,
    bias: bool = True,
) -> ir.Value:
    name = prefixes[0]
    weight = linear(source, [f"{prefix}.weight" for prefix in prefixes], in_size, out_size)
    product = g.op("MatMul", hidden, g.compute_weight(f"{name}.weight", weight), name=name)
    if not bias:
        return product
    row = vectors(source, [f"{prefix}.bias" for prefix in prefixes])
    return g.op("Add", product, g.vector(f"{name}.bias", row))


def _norm(
    g: GraphBuilder, v: VisionDims, source: TensorSource, prefix: str, hidden: ir.Value
) -> ir.Value:
    gain = g.vector(f"{prefix}.weight", vectors(source, [f"{prefix}.weight"]))
    bias = g.vector(f"{prefix}.bias", vectors(source, [f"{prefix}.bias"]))
    return g.op(
        "LayerNormalization", hidden, gain, bias, name=prefix, axis=-1, epsilon=v.layer_norm_eps
    )


def _activation(g: GraphBuilder, kind: str, hidden: ir.Value) -> ir.Value:
    if kind == "gelu":
        return g.op("Gelu", hidden, approximate="none")
    # x * sigmoid(1.702 x); ONNX Runtime fuses the three nodes into QuickGelu.
    alpha = g.vector("quick_gelu_alpha", np.array(QUICK_GELU_ALPHA))
    return g.op("Mul", hidden, g.op("Sigmoid", g.op("Mul", hidden, alpha)))
