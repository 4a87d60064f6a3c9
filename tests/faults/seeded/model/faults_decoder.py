"""Faults of the language model's graph and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from llava_edge.convert.writing import artifact_builder as parts
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.runtime.util.arrays import Array
from tests.faults.fault import Fault
from tests.faults.models.tamper import Tampered

_Patch = pytest.MonkeyPatch
_LAYER = "language_model.layers.{}"
_FIRST = _LAYER.format(0)
_QKV = f"{_FIRST}.self_attn.q_proj.weight"
_HEADS, _KV_HEADS, _SIZE = 6, 2, 16
_QUERY, _KEY = _HEADS * _SIZE, _KV_HEADS * _SIZE


def _with(change: Callable[[TextDims], dict[str, Any]]) -> Callable[[_Patch], None]:
    """The builder takes other settings than the checkpoint's."""

    def plant(patch: _Patch) -> None:
        real = parts.build_decoder_graph

        def build(text: TextDims, *rest: Any, **weights: Any) -> Any:
            return real(replace(text, **change(text)), *rest, **weights)

        patch.setattr(parts, "build_decoder_graph", build)

    return plant


def _attention(**values: Any) -> Callable[[Tampered], None]:
    def plant(copy: Tampered) -> None:
        for node in copy.nodes("decoder", "GroupQueryAttention"):
            copy.set_attributes("decoder", node.name, **values)

    return plant


def _tensor(name: str, change: Callable[[Array], Array]) -> Callable[[Tampered], None]:
    return lambda copy: copy.change_tensor("decoder", name, change)


def _key_heads_swapped(weight: Array) -> Array:
    keys = slice(_QUERY, _QUERY + _KEY)
    heads = weight[:, keys].reshape(len(weight), _KV_HEADS, _SIZE)
    weight[:, keys] = heads[:, ::-1].reshape(len(weight), -1)
    return weight


def _keys_and_values_swapped(weight: Array) -> Array:
    parts_ = [weight[:, :_QUERY], weight[:, _QUERY + _KEY :], weight[:, _QUERY : _QUERY + _KEY]]
    return np.concatenate(parts_, 1)


def _query_shifted(copy: Tampered) -> None:
    """Queries of the first layer stand one position later than their keys."""
    graph = copy.model("decoder").graph
    attention = copy.node("decoder", f"{_FIRST}.self_attn.attention")
    half = _SIZE // 2
    angles = 10000.0 ** (-np.arange(half) * 2 / _SIZE)
    turn = np.zeros((_SIZE, _SIZE), np.float32)
    turn[:half, :half] = turn[half:, half:] = np.diag(np.cos(angles))
    turn[:half, half:], turn[half:, :half] = np.diag(np.sin(angles)), -np.diag(np.sin(angles))
    matrix = np.eye(_QUERY + 2 * _KEY, dtype=np.float32)
    for head in range(_HEADS):
        place = slice(head * _SIZE, (head + 1) * _SIZE)
        matrix[place, place] = turn
    graph.initializer.append(numpy_helper.from_array(matrix, "turn"))
    node = helper.make_node("MatMul", [attention.input[0], "turn"], ["turned"], "turn_queries")
    graph.node.insert(list(graph.node).index(attention), node)
    attention.input[0] = "turned"


def _layers_swapped(copy: Tampered) -> None:
    for part in ("gate", "up", "down"):
        names = [f"{_LAYER.format(layer)}.mlp.{part}_proj.weight" for layer in (0, 1)]
        copy.swap_tensors("decoder", names[0], names[1])


def _final_norm_missing(copy: Tampered) -> None:
    node = copy.node("decoder", "language_model.norm")
    sum_ = helper.make_node("Add", list(node.input[:2]), [node.output[0]], node.name)
    node.CopyFrom(sum_)


def _residual_dropped(copy: Tampered) -> None:
    """The second norm of layer 1 adds the attention's output to itself."""
    name = f"{_LAYER.format(1)}.post_attention_layernorm"
    copy.rewire("decoder", name, 0, copy.node("decoder", name).input[1])


def _first_position(copy: Tampered) -> None:
    """Logits of the first positions of a chunk, not of its last ones."""
    graph = copy.model("decoder").graph
    for node in copy.nodes("decoder", "Slice"):
        keep = f"{node.name}_keep"
        count = helper.make_node("Unsqueeze", ["logits_to_keep", "int64_0"], [keep], keep)
        if any(value.name == "logits_start" for value in graph.input):
            count = helper.make_node("Neg", ["logits_start"], [keep], keep)
        graph.node.insert(list(graph.node).index(node), count)
        copy.set_constant("decoder", node.name, 1, np.array([0], np.int64))
        node.input[2] = keep


def _gate_for_up(copy: Tampered) -> None:
    gate, up = (f"{_LAYER.format(1)}.mlp.{part}_proj.weight" for part in ("gate", "up"))
    copy.swap_tensors("decoder", gate, up)


def _fault(
    id_: str,
    wrong: str,
    plant: Callable[[Any], None],
    tensor: str,
    stage: str = "structure",
    **more: Any,
) -> Fault:
    where = more.pop("where", "artifact")
    return Fault(id_, "decoder", wrong, where, stage, plant, tensor=tensor, **more)


FAULTS = (
    _fault(
        "rope base",
        "the base of the rotary embedding is 500000, not 10000",
        _with(lambda _: {"rope_theta": 500000.0}),
        f"{_FIRST}.self_attn",
        where="conversion",
    ),
    _fault(
        "rope scaling dropped",
        "linear scaling by 4 is left out",
        _with(lambda _: {"rope_factor": 1.0}),
        f"{_FIRST}.self_attn",
        where="conversion",
        model="long",
    ),
    _fault(
        "query shifted",
        "queries stand one position later than keys",
        _query_shifted,
        f"{_FIRST}.self_attn",
    ),
    _fault(
        "interleaved rotary",
        "neighbours are rotated, not the halves of a head",
        _attention(rotary_interleaved=1),
        f"{_FIRST}.self_attn",
    ),
    _fault(
        "attention scale",
        "scores over the size of a head, not over its root",
        _attention(scale=1 / _SIZE),
        f"{_FIRST}.self_attn",
    ),
    _fault(
        "window on",
        "a window of 16 positions where the checkpoint has none",
        _with(lambda text: {"sliding_windows": (16,) * text.num_hidden_layers}),
        f"{_FIRST}.self_attn",
        where="conversion",
        model="mistral",
    ),
    _fault(
        "norm epsilon",
        "RMSNorm takes 1e-6, not 1e-5",
        _with(lambda _: {"rms_norm_eps": 1e-6}),
        "",
        where="conversion",
    ),
    _fault(
        "bias dropped",
        "projections of attention lose their biases",
        _with(lambda _: {"qkv_bias": False}),
        f"{_FIRST}.self_attn.qkv",
        where="conversion",
    ),
    _fault(
        "kv head order",
        "key heads change places",
        _tensor(_QKV, _key_heads_swapped),
        f"{_FIRST}.self_attn.qkv",
        "weights",
    ),
    _fault(
        "k and v swapped",
        "keys and values change places",
        _tensor(_QKV, _keys_and_values_swapped),
        f"{_FIRST}.self_attn.qkv",
        "weights",
    ),
    _fault(
        "gate and up swapped",
        "gate and up of layer 1 change places",
        _gate_for_up,
        f"{_LAYER.format(1)}.mlp.gate_proj",
        "weights",
    ),
    _fault(
        "layers swapped",
        "layers 0 and 1 have each other's MLP",
        _layers_swapped,
        f"{_FIRST}.mlp.gate_proj",
        "weights",
    ),
    _fault(
        "gain plus one",
        "a norm's gain counts from one",
        _tensor(f"{_LAYER.format(2)}.input_layernorm.weight", lambda gain: gain + 1),
        f"{_LAYER.format(2)}.input_layernorm",
        "weights",
    ),
    _fault(
        "missing input norm",
        "layer 0 reads the embeddings as they are",
        lambda copy: copy.bypass("decoder", f"{_FIRST}.input_layernorm"),
        f"{_FIRST}.input_layernorm",
    ),
    _fault(
        "residual dropped",
        "layer 1 forgets what came before its attention",
        _residual_dropped,
        f"{_LAYER.format(1)}.post_attention_layernorm",
    ),
    _fault(
        "final norm missing",
        "the head reads the residual stream as it is",
        _final_norm_missing,
        "language_model.norm",
    ),
    _fault(
        "head rows shifted",
        "logits belong to the next token id",
        _tensor("lm_head.weight", lambda head: np.roll(head, 1, axis=1)),
        "lm_head",
        "weights",
    ),
    _fault(
        "first position",
        "logits of the first positions of a chunk, not of its last",
        _first_position,
        "language_model.norm",
    ),
    Fault(
        "embedding rows shifted",
        "embeddings",
        "each token reads the row of the one before",
        "artifact",
        "weights",
        lambda copy: copy.change_embeddings("embed_tokens", lambda rows: np.roll(rows, 1, axis=0)),
    ),
    Fault(
        "newline zero",
        "embeddings",
        "the newline's row is zero",
        "artifact",
        "weights",
        lambda copy: copy.change_embeddings("image_newline", np.zeros_like),
    ),
)
