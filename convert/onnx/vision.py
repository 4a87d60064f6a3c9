"""The vision graph: tiles in, projected patch features out.

    pixel_values [tiles, 3, T, T] → patches → CLIP blocks up to the feature layer → class token off
    → linear_1 → gelu → linear_2 → image_features [tiles, patches, hidden]

A video model's graph has a second input, ``pooling`` int64 [tokens, pooled]: the patches whose mean
each token is, taken in front of the projector. One patch a token makes features of tiles, four make
those of frames, so that both come from one graph and one set of weights.

Standard ONNX operators only, so that ONNX Runtime, TensorRT and TensorRT-RTX all take it. The patch
embedding is a reshape and a MatMul: a convolution whose stride equals its kernel is exactly that,
and no convolution library (cuDNN) is then needed. Blocks behind the feature layer are not built.

Source: transformers ``CLIPVisionTransformer`` and ``LlavaNextMultiModalProjector`` 5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llava_edge.convert.checkpoint.weights import TensorSource, reshaped, vectors
from llava_edge.convert.onnx.builder import GraphBuilder
from llava_edge.convert.onnx.linear import FloatLinear, LinearLayer, LinearOps
from llava_edge.profiles.models.model_dims import ModelDims, VisionDims
from llava_edge.runtime.artifact.graph_inputs import POOLING
from llava_edge.runtime.util.arrays import Array

QUICK_GELU_ALPHA = 1.702
NUM_CHANNELS = 3


@dataclass(frozen=True)
class _Parts:
    """What all functions here share: the builder, sizes, tensors, and how layers become nodes."""

    g: GraphBuilder
    vision: VisionDims
    source: TensorSource
    linears: LinearOps
    norm_scales: Mapping[str, Array]


def build_vision_graph(
    dims: ModelDims,
    source: TensorSource,
    compute: type[np.float32] | type[np.float16],
    linears: LinearOps | None = None,
    norm_scales: Mapping[str, Array] | None = None,
) -> GraphBuilder:
    """Build tower and projector; weights are read when the graph is saved.

    Args:
        dims: of the model.
        source: the checkpoint.
        compute: type of pixels, activations and features.
        linears: how linear layers become nodes; None for weights as they are.
        norm_scales: float32 [width] by name of a layer norm: its gain and bias are divided by it,
            because the layer behind it holds weights multiplied by it.
    """
    vision = dims.vision
    g = GraphBuilder("vision", compute)
    parts = _Parts(
        g,
        vision,
        source,
        linears or FloatLinear(source, head=""),
        norm_scales or {},
    )
    side = vision.image_size
    pixels = g.input("pixel_values", g.compute_name, ["tiles", NUM_CHANNELS, side, side])
    hidden = _embed(parts, pixels)
    # hidden_states[0] is the embedding output after pre_layrnorm; entry k is the output of block k.
    states = {0: hidden}
    for index in range(vision.num_blocks_used):
        hidden = _block(parts, index, hidden)
        states[index + 1] = hidden
    last = g.integers(np.iinfo(np.int64).max)
    features = [
        g.op("Slice", states[layer], g.integers(1), last, g.integers(1))
        for layer in vision.feature_layers
    ]
    joined = features[0] if len(features) == 1 else g.op("Concat", *features, axis=-1)
    num_tokens: int | str = vision.num_patches
    if dims.takes_video:
        joined, num_tokens = _pooled(g, joined), "tokens"
    projected = _projector(parts, dims.text.hidden_size, joined)
    g.output(
        projected,
        "image_features",
        g.compute_name,
        ["tiles", num_tokens, dims.text.hidden_size],
    )
    return g


def _pooled(g: GraphBuilder, features: ir.Value) -> ir.Value:
    """Mean of the patches that the input ``pooling`` names for each token.

    As a product of equal shares [pooled] with the patches: ONNX Runtime's CUDA provider takes cuDNN
    for a ReduceMean, which nothing else here needs. On the CPU both give the same bits.

    Ones over their own sum, so that no number is cast: islands of float32 in a float16 graph follow
    values that are floats from the start.
    """
    pooling = g.input(POOLING, "int64", ["tokens", "pooled"])
    # [tiles, tokens, pooled, width]
    gathered = g.op("Gather", features, pooling, axis=1)
    ones = g.op("Expand", g.vector("one", np.ones(1)), g.op("Shape", pooling, start=1, end=2))
    total = g.op("MatMul", ones, g.op("Unsqueeze", ones, g.integers(1)))
    shares = g.op("Div", ones, total)
    return g.op("MatMul", shares, gathered)


def _embed(p: _Parts, pixels: ir.Value) -> ir.Value:
    g, v, source = p.g, p.vision, p.source
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
    return _norm(p, "vision_tower.pre_layrnorm", g.op("Add", tokens, table))


def _block(p: _Parts, index: int, hidden: ir.Value) -> ir.Value:
    g, v = p.g, p.vision
    prefix = f"vision_tower.encoder.layers.{index}"
    normed = _norm(p, f"{prefix}.layer_norm1", hidden)
    hidden = g.op("Add", hidden, _attention(p, f"{prefix}.self_attn", normed))
    normed = _norm(p, f"{prefix}.layer_norm2", hidden)
    up = _linear(p, [f"{prefix}.mlp.fc1"], v.hidden_size, v.intermediate_size, normed)
    active = _activation(g, v.hidden_act, up)
    down = _linear(p, [f"{prefix}.mlp.fc2"], v.intermediate_size, v.hidden_size, active)
    return g.op("Add", hidden, down)


def _attention(p: _Parts, prefix: str, hidden: ir.Value) -> ir.Value:
    g, v = p.g, p.vision
    names = [f"{prefix}.{part}_proj" for part in "qkv"]
    packed = _linear(p, names, v.hidden_size, 3 * v.hidden_size, hidden)
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
    return _linear(p, [f"{prefix}.out_proj"], v.hidden_size, v.hidden_size, merged)


def _projector(p: _Parts, hidden: int, features: ir.Value) -> ir.Value:
    g, v = p.g, p.vision
    prefix = "multi_modal_projector"
    bias = v.projector_bias
    first = _linear(p, [f"{prefix}.linear_1"], v.feature_size, hidden, features, bias)
    active = g.op("Gelu", first, approximate="none")
    return _linear(p, [f"{prefix}.linear_2"], hidden, hidden, active, bias)


def _linear(
    p: _Parts,
    names: list[str],
    in_size: int,
    out_size: int,
    hidden: ir.Value,
    bias: bool = True,
) -> ir.Value:
    layer = LinearLayer(tuple(names), in_size, out_size, bias)
    return p.linears.layers(p.g, hidden, [layer])[0]


def _norm(p: _Parts, prefix: str, hidden: ir.Value) -> ir.Value:
    rows = [vectors(p.source, [f"{prefix}.{part}"]) for part in ("weight", "bias")]
    scale = p.norm_scales.get(prefix)
    if scale is not None:
        rows = [row / scale for row in rows]
    gain, bias = (
        p.g.vector(f"{prefix}.{part}", row)
        for part, row in zip(("weight", "bias"), rows, strict=True)
    )
    epsilon = p.vision.layer_norm_eps
    return p.g.op("LayerNormalization", hidden, gain, bias, name=prefix, axis=-1, epsilon=epsilon)


def _activation(g: GraphBuilder, kind: str, hidden: ir.Value) -> ir.Value:
    if kind == "gelu":
        return g.op("Gelu", hidden, approximate="none")
    # x * sigmoid(1.702 x); ONNX Runtime fuses the three nodes into QuickGelu.
    alpha = g.vector("quick_gelu_alpha", np.array(QUICK_GELU_ALPHA))
    return g.op("Mul", hidden, g.op("Sigmoid", g.op("Mul", hidden, alpha)))
