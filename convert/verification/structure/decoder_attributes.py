"""DecoderAttributes: layers, norms, attention and wiring, as a decoder graph has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_edge.convert.verification.structure.graph_attributes import (
    GraphWalk,
    LinearAttributes,
    NormAttributes,
    WiringError,
)
from llava_edge.runtime.artifact.graph_inputs import LOGITS_START, LOGITS_TO_KEEP

_LENGTHS = ("seqlens_k", "total_sequence_length")
_FLOAT = 1


@dataclass(frozen=True)
class AttentionAttributes:
    """One GroupQueryAttention; ``cache`` are past key, past value, present key, present value.

    ``scale`` 0 means that the operator takes 1 / sqrt(head size); ``window`` -1 means none.
    """

    node: str
    num_heads: int
    kv_num_heads: int
    scale: float
    do_rotary: int
    rotary_interleaved: int
    window: int
    softcap: float
    tables: tuple[str, str]
    cache: tuple[str, str, str, str]


@dataclass(frozen=True)
class DecoderLayerAttributes:
    """One layer; ``qkv`` is the packed projection, ``gate`` the one that goes through Sigmoid."""

    input_norm: NormAttributes
    qkv: LinearAttributes
    attention: AttentionAttributes
    o: LinearAttributes
    post_norm: NormAttributes
    gate: LinearAttributes
    up: LinearAttributes
    down: LinearAttributes


@dataclass(frozen=True)
class DecoderAttributes:
    """A whole decoder. ``layers`` runs from the first to the last.

    Where the wiring breaks off, ``is_whole`` is false and ``layers`` are those behind the break.
    """

    layers: tuple[DecoderLayerAttributes, ...]
    final_norm: NormAttributes | None
    head: LinearAttributes | None
    is_whole: bool


def read_decoder(walk: GraphWalk) -> DecoderAttributes:
    """Follow a decoder from its logits to its embeddings; faults are noted in ``walk``."""
    layers: list[DecoderLayerAttributes] = []
    norm = head = None
    delta: str | None
    is_whole = False
    try:
        _best(walk)
        head = _head(walk)
        norm, residual, delta = _final_norm(walk, head.hidden)
        while delta is not None:
            layer, residual, delta = _layer(walk, residual, delta)
            layers.append(layer)
        if residual != "inputs_embeds":
            raise WiringError(f"{walk.graph.label}: the first layer reads {residual}")
        is_whole = True
    except WiringError as error:
        walk.faults.append(str(error))
    return DecoderAttributes(tuple(reversed(layers)), norm, head, is_whole)


def _best(walk: GraphWalk) -> None:
    """Where the graph picks its best logits out, they are the largest of those it hands out."""
    if not any(walk.graph.producer(name) for name in ("best_logits", "best_ids")):
        return
    node = walk.made_by("best_logits", "TopK")
    walk.expect(node, "what it orders", node.input[0], "logits")
    walk.expect(node, "what it hands out", list(node.output), ["best_logits", "best_ids"])
    for name, want in (("axis", -1), ("largest", 1), ("sorted", 1)):
        walk.expect(node, name, walk.attribute(node, name), want)


def _head(walk: GraphWalk) -> LinearAttributes:
    node = walk.graph.producer("logits")
    if node is not None and node.op_type == "Cast":
        walk.expect(walk.meet(node), "to", walk.attribute(node, "to"), _FLOAT)
        return walk.linear(node.input[0])
    return walk.linear("logits")


def _is_given(walk: GraphWalk, name: str) -> bool:
    """Whether anyone who runs the graph says what a value is, and nothing in the graph does."""
    made = walk.graph.producer(name) is not None or name in walk.graph.initializers
    return name in walk.graph.inputs and not made


def _final_norm(walk: GraphWalk, hidden: str) -> tuple[NormAttributes, str, str]:
    """The last norm, and the residual and delta in front of the cut to the kept positions."""
    norm, last_residual, last_delta, _ = walk.rms_norm(hidden)
    values: list[str] = []
    for name in (last_residual, last_delta):
        if name is None:
            raise WiringError(f"{walk.graph.label}, node {norm.node}: it adds no layer's output")
        node, value, _, axes, _ = walk.cut(name)
        walk.expect(node, "axes", axes, [1])
        if node.input[1] != LOGITS_START or not _is_given(walk, LOGITS_START):
            # As an input it is what the runtime writes; anything else is worked out here.
            start = walk.made_by(node.input[1], "Unsqueeze")
            walk.expect_numbers(start, 1, "axes", [0])
            negative = walk.made_by(start.input[0], "Neg")
            walk.expect(negative, "what it negates", negative.input[0], LOGITS_TO_KEEP)
        values.append(value)
    return norm, values[0], values[1]


def _layer(
    walk: GraphWalk, residual: str, delta: str
) -> tuple[DecoderLayerAttributes, str, str | None]:
    """The layer whose sums are ``residual`` and ``delta``, and what it reads in turn."""
    down = walk.linear(delta)
    gate, up = _gated(walk, down.hidden)
    if gate.hidden != up.hidden:
        walk.faults.append(
            f"{walk.graph.label}, node {up.node}: it reads {up.hidden}, the gate reads "
            f"{gate.hidden}; both must read one norm"
        )
    post_norm, middle, mixed, total = walk.rms_norm(gate.hidden)
    _expect_residual(walk, post_norm, residual, total)
    if mixed is None:
        raise WiringError(f"{walk.graph.label}, node {post_norm.node}: it adds no attention")
    o = walk.linear(mixed)
    node = walk.made_by(o.hidden, "GroupQueryAttention")
    walk.expect(node, "the output that o_proj reads", o.hidden, node.output[0])
    attention = _attention(walk, node)
    qkv = walk.linear(node.input[0])
    input_norm, before, previous, total = walk.rms_norm(qkv.hidden)
    _expect_residual(walk, input_norm, middle, total)
    layer = DecoderLayerAttributes(input_norm, qkv, attention, o, post_norm, gate, up, down)
    return layer, before, previous


def _expect_residual(walk: GraphWalk, norm: NormAttributes, have: str, want: str) -> None:
    if have != want:
        walk.faults.append(
            f"{walk.graph.label}, behind node {norm.node}: the residual is {have}, must be the sum "
            f"that this norm takes ({want})"
        )


def _gated(walk: GraphWalk, value: str) -> tuple[LinearAttributes, LinearAttributes]:
    """Gate and up of ``gate * sigmoid(gate) * up``."""
    product = walk.made_by(value, "Mul")
    for place in (0, 1):
        node = walk.graph.producer(product.input[place])
        if node is None or node.op_type != "Mul":
            continue
        for inner in (0, 1):
            sigmoid = walk.graph.producer(node.input[1 - inner])
            if sigmoid is None or sigmoid.op_type != "Sigmoid":
                continue
            walk.meet(node)
            gate = node.input[inner]
            walk.expect(walk.meet(sigmoid), "what it reads", sigmoid.input[0], gate)
            return walk.linear(gate), walk.linear(product.input[1 - place])
    raise WiringError(
        f"{walk.graph.label}, node {product.name}: it is not gate * sigmoid(gate) * up (SiLU)"
    )


def _attention(walk: GraphWalk, node: Any) -> AttentionAttributes:
    inputs = [*node.input, *[""] * 9]
    walk.expect(node, "separate key and value", (inputs[1], inputs[2]), ("", ""))
    walk.expect(node, "lengths", (inputs[5], inputs[6]), _LENGTHS)
    for name in inputs[7:9]:
        if name not in walk.graph.initializers:
            raise WiringError(
                f"{walk.graph.label}, node {node.name}: its rotary table {name or '(absent)'} is "
                "no tensor of the file"
            )
    outputs = [*node.output, "", ""]
    return AttentionAttributes(
        node=node.name,
        num_heads=int(walk.attribute(node, "num_heads") or 0),
        kv_num_heads=int(walk.attribute(node, "kv_num_heads") or 0),
        scale=float(walk.attribute(node, "scale")),
        do_rotary=int(walk.attribute(node, "do_rotary") or 0),
        rotary_interleaved=int(walk.attribute(node, "rotary_interleaved") or 0),
        window=int(walk.attribute(node, "local_window_size") or 0),
        softcap=float(walk.attribute(node, "softcap")),
        tables=(inputs[7], inputs[8]),
        cache=(inputs[3], inputs[4], outputs[1], outputs[2]),
    )
