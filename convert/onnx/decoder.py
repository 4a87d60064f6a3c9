"""The decoder graph: one graph for prompt and decode, its cache updated in place.

    inputs_embeds [1, tokens, hidden], seqlens_k, total_sequence_length, logits_to_keep
    (cuda target: logits_start, its negative),
    past_key_values.N.{key,value} [1, kv_heads, capacity, head_dim]
        → logits float32 [1, logits_to_keep, vocab], present.N.{key,value}

``past`` and ``present`` are meant to be the same buffer. ``logits_to_keep`` has the reference's
meaning: that many last positions, 0 for all. Positions follow from the lengths; linear rope scaling
is folded into the tables.

Source: transformers ``LlamaModel``, ``MistralModel``, ``Qwen2Model`` 5.23.0; ONNX Runtime's
GroupQueryAttention contract.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from llava_edge.convert.checkpoint.weights import TensorSource, vectors
from llava_edge.convert.onnx.builder import MICROSOFT, GraphBuilder
from llava_edge.convert.onnx.linear import (
    FloatLinear,
    LinearLayer,
    LinearOps,
    QuantizedLayers,
    QuantizedLinear,
)
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.runtime.artifact.graph_inputs import LOGITS_START, LOGITS_TO_KEEP
from llava_edge.runtime.util.arrays import Array


def rope_tables(text: TextDims, num_positions: int) -> tuple[Array, Array]:
    """Cosine and sine, float32 (num_positions, head_dim / 2), in the reference's own operations.

    Angles lose digits as positions grow, so they are computed in torch float32 as the reference
    does; a float64 table would differ from it in the fourth digit at position 30,000.
    """
    steps = torch.arange(0, text.head_dim, 2, dtype=torch.int64).to(torch.float32)
    inv_freq = 1.0 / (text.rope_theta ** (steps / text.head_dim)) / text.rope_factor
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = (inv_freq[:, None] @ positions[None, :]).T
    return angles.cos().numpy(), angles.sin().numpy()


def build_decoder_graph(
    text: TextDims,
    source: TensorSource,
    compute: type[np.float32] | type[np.float16],
    context_tokens: int,
    *,
    weights: QuantizedLayers | None = None,
    num_best: int = 0,
) -> GraphBuilder:
    """Build the decoder for at most ``context_tokens`` positions.

    Args:
        text: dimensions of the language model.
        source: the checkpoint; all of it without ``weights``, norms and biases with them.
        compute: type of activations and cache.
        context_tokens: positions that the rotary tables cover.
        weights: quantised linear layers; None keeps them in fp16.
        num_best: so many of the largest logits, by falling value, are handed out as well:
            ``topk_logits`` float32 and ``best_ids`` int64 [1, logits_to_keep, num_best].

    Raises:
        RequestError: the weights do not go with the operators asked for them.
    """
    g = GraphBuilder("decoder", compute)
    ops = _linear_ops(text, source, weights)
    embeds = g.input("inputs_embeds", g.compute_name, [1, "tokens", text.hidden_size])
    inputs: dict[str, ir.Value] = {
        "seqlens_k": g.input("seqlens_k", "int32", [1]),
        "total_sequence_length": g.input("total_sequence_length", "int32", []),
    }
    starts = compute == np.float16
    kept = g.input(*((LOGITS_START, "int64", [1]) if starts else (LOGITS_TO_KEEP, "int64", [])))
    cosine, sine = rope_tables(text, context_tokens)
    inputs["cos_cache"] = g.vector("cos_cache", cosine)
    inputs["sin_cache"] = g.vector("sin_cache", sine)
    cache_shape: list[int | str] = [1, text.num_key_value_heads, "capacity", text.head_dim]
    caches = [
        tuple(
            g.input(f"past_key_values.{layer}.{part}", g.compute_name, cache_shape)
            for part in ("key", "value")
        )
        for layer in range(text.num_hidden_layers)
    ]
    presents: list[ir.Value] = []
    residual, delta = embeds, None
    for layer, (past_key, past_value) in enumerate(caches):
        prefix = f"language_model.layers.{layer}"
        norm = f"{prefix}.input_layernorm"
        normed, residual = _add_norm(g, text, source, norm, residual, delta)
        mixed, present = _attention(
            g, text, ops, layer, normed, {**inputs, "key": past_key, "value": past_value}
        )
        presents += present
        norm = f"{prefix}.post_attention_layernorm"
        normed, residual = _add_norm(g, text, source, norm, residual, mixed)
        delta = _mlp(g, text, ops, f"{prefix}.mlp", normed)
    assert delta is not None
    logits = _head(g, text, source, ops, residual, delta, kept)
    # float32 in both targets: sampling never sees fp16 ties.
    g.output(logits, "logits", "float32", [1, "logits_to_keep", text.vocab_size])
    if num_best:
        _best(g, logits, num_best)
    for index, present_value in enumerate(presents):
        name = f"present.{index // 2}.{('key', 'value')[index % 2]}"
        g.output(present_value, name, g.compute_name, cache_shape)
    return g


def _best(g: GraphBuilder, logits: ir.Value, count: int) -> None:
    # TopK and not ArgMax: reductions of the CUDA provider need cuDNN.
    values, ids = g.ops(
        "TopK", [logits, g.integers(count)], {"axis": -1, "largest": 1, "sorted": 1}, num_outputs=2
    )
    shape: list[int | str] = [1, "logits_to_keep", count]
    g.output(values, "best_logits", "float32", shape)
    g.output(ids, "best_ids", "int64", shape)


def _linear_ops(text: TextDims, source: TensorSource, weights: QuantizedLayers | None) -> LinearOps:
    if weights is not None:
        return QuantizedLinear(source, weights)
    tied = text.tie_word_embeddings
    return FloatLinear(source, f"{'language_model.embed_tokens' if tied else 'lm_head'}.weight")


def _add_norm(
    g: GraphBuilder,
    text: TextDims,
    source: TensorSource,
    prefix: str,
    residual: ir.Value,
    delta: ir.Value | None,
) -> tuple[ir.Value, ir.Value]:
    """RMSNorm of ``residual + delta``; returns it and the sum."""
    gain = g.vector(f"{prefix}.weight", vectors(source, [f"{prefix}.weight"]))
    attributes: dict[str, Any] = {"epsilon": text.rms_norm_eps}
    if delta is None:
        normed = g.op(
            "SimplifiedLayerNormalization", residual, gain, name=prefix, axis=-1, **attributes
        )
        return normed, residual
    outputs = g.ops(
        "SkipSimplifiedLayerNormalization",
        [residual, delta, gain],
        attributes,
        domain=MICROSOFT,
        num_outputs=4,
        name=prefix,
    )
    # Outputs 1 and 2 (mean, inverse deviation) exist for training only and stay unnamed.
    outputs[1].name = outputs[2].name = ""
    return outputs[0], outputs[3]


def _attention(
    g: GraphBuilder,
    text: TextDims,
    ops: LinearOps,
    layer: int,
    hidden: ir.Value,
    inputs: dict[str, ir.Value],
) -> tuple[ir.Value, list[ir.Value]]:
    prefix = f"language_model.layers.{layer}.self_attn"
    names = tuple(f"{prefix}.{part}_proj" for part in "qkv")
    packed_size = text.query_size + 2 * text.key_value_size
    layers = [LinearLayer(names, text.hidden_size, packed_size, text.qkv_bias)]
    (packed,) = ops.layers(g, hidden, layers)
    window = text.sliding_windows[layer]
    mixed, key, value = g.ops(
        "GroupQueryAttention",
        [
            packed,
            None,
            None,
            inputs["key"],
            inputs["value"],
            inputs["seqlens_k"],
            inputs["total_sequence_length"],
            inputs["cos_cache"],
            inputs["sin_cache"],
        ],
        {
            "num_heads": text.num_attention_heads,
            "kv_num_heads": text.num_key_value_heads,
            # Spelt out: TensorRT's importer refuses the node without it.
            "scale": text.head_dim**-0.5,
            "do_rotary": 1,
            "rotary_interleaved": 0,
            "local_window_size": window or -1,
        },
        domain=MICROSOFT,
        num_outputs=3,
        name=f"{prefix}.attention",
    )
    layers = [LinearLayer((f"{prefix}.o_proj",), text.query_size, text.hidden_size, text.o_bias)]
    (output,) = ops.layers(g, mixed, layers)
    return output, [key, value]


def _mlp(
    g: GraphBuilder, text: TextDims, ops: LinearOps, prefix: str, hidden: ir.Value
) -> ir.Value:
    narrow, wide = text.hidden_size, text.intermediate_size
    layers = [
        LinearLayer((f"{prefix}.{part}_proj",), narrow, wide, text.mlp_bias)
        for part in ("gate", "up")
    ]
    gate, up = ops.layers(g, hidden, layers)
    active = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    layers = [LinearLayer((f"{prefix}.down_proj",), wide, narrow, text.mlp_bias)]
    (output,) = ops.layers(g, active, layers)
    return output


def _head(
    g: GraphBuilder,
    text: TextDims,
    source: TensorSource,
    ops: LinearOps,
    residual: ir.Value,
    delta: ir.Value,
    kept: ir.Value,
) -> ir.Value:
    # From the end: 0 starts at the first position, which is "all", as in the reference.
    start = kept
    if kept.name == LOGITS_TO_KEEP:
        start = g.op("Unsqueeze", g.op("Neg", kept), g.integers(0))
    end, axis = g.integers(np.iinfo(np.int64).max), g.integers(1)
    last = [g.op("Slice", value, start, end, axis) for value in (residual, delta)]
    normed, _ = _add_norm(g, text, source, "language_model.norm", last[0], last[1])
    logits = ops.head(g, normed, text.hidden_size, text.vocab_size)
    if g.compute == np.float32:
        return logits
    return g.op("Cast", logits, to=int(ir.DataType.FLOAT))
