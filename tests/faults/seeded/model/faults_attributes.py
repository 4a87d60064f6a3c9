"""Faults of single nodes: attributes, inputs and outputs that no configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from llava_edge.runtime.util.arrays import Array
from tests.faults.fault import Fault
from tests.faults.models.tamper import Part, Tampered

_Plant = Callable[[Tampered], None]
_LAYER = "language_model.layers.1"
_ATTENTION = f"{_LAYER}.self_attn.attention"
_NORM = f"{_LAYER}.input_layernorm"
_GATE, _DOWN = f"{_LAYER}.mlp.gate_proj", f"{_LAYER}.mlp.down_proj"
_BLOCK = "vision_tower.encoder.layers.1"


def _set(part: Part, name: str, **values: Any) -> _Plant:
    return lambda copy: copy.set_attributes(part, name, **values)


def _first(part: Part, op_type: str, **values: Any) -> _Plant:
    return lambda copy: copy.set_attributes(part, copy.nodes(part, op_type)[0].name, **values)


def _twice(part: Part, name: str, attribute: str, value: Any) -> _Plant:
    """A second entry of one name behind the right one."""

    def plant(copy: Tampered) -> None:
        copy.node(part, name).attribute.append(helper.make_attribute(attribute, value))

    return plant


def _new_input(part: Part, name: str, place: int, array: Array) -> _Plant:
    return lambda copy: copy.set_constant(part, name, place, array)


def _further(part: Part, op_type: str, array: Array) -> _Plant:
    """An operator of any number of inputs reads one more."""

    def plant(copy: Tampered) -> None:
        node = copy.nodes(part, op_type)[0]
        copy.set_constant(part, node.name, len(node.input), array)

    return plant


def _new_output(part: Part, name: str, place: int) -> _Plant:
    def plant(copy: Tampered) -> None:
        node = copy.node(part, name)
        node.output.extend([""] * (place + 1 - len(node.output)))
        node.output[place] = "further"

    return plant


def _scores_handed_out(copy: Tampered) -> None:
    node = copy.node("decoder", _ATTENTION)
    node.output.append("scores")
    copy.set_attributes("decoder", _ATTENTION, qk_output=1)


def _of_another_type(copy: Tampered) -> None:
    """``num_heads`` as a float: equal to the number that belongs there."""
    node = copy.node("decoder", _ATTENTION)
    (entry,) = (each for each in node.attribute if each.name == "num_heads")
    value = entry.i
    entry.Clear()
    entry.name, entry.type, entry.f = "num_heads", AttributeProto.FLOAT, float(value)


def _as_a_reference(copy: Tampered) -> None:
    (entry,) = (e for e in copy.node("decoder", _NORM).attribute if e.name == "epsilon")
    entry.ref_attr_name = "epsilon"


def _opset(domain: str, version: int) -> _Plant:
    def plant(copy: Tampered) -> None:
        (entry,) = (o for o in copy.model("decoder").opset_import if o.domain == domain)
        entry.version = version

    return plant


def _between(part: Part, name: str, place: int, node: Any, *tensors: Any) -> _Plant:
    """Another node changes what one reads; ``IN`` stands for what it read."""

    def plant(copy: Tampered) -> None:
        graph = copy.model(part).graph
        reader = copy.node(part, name)
        fresh = type(node)()
        fresh.CopyFrom(node)
        fresh.input[:] = [reader.input[place] if each == "IN" else each for each in node.input]
        graph.initializer.extend(tensors)
        graph.node.insert(list(graph.node).index(reader), fresh)
        reader.input[place] = fresh.output[0]

    return plant


def _left_over(copy: Tampered) -> None:
    node = helper.make_node("Sigmoid", ["inputs_embeds"], ["unread"], "left_over")
    copy.model("decoder").graph.node.insert(0, node)


def _two_of_one_name(copy: Tampered) -> None:
    graph = copy.model("decoder").graph
    fresh = numpy_helper.from_array(np.zeros(1, np.int64), "int64_1")
    graph.initializer.append(fresh)


def _query_of_another_block(copy: Tampered) -> None:
    """Queries of block 1 are those of block 0."""
    splits = copy.nodes("vision", "Split")
    (squeeze,) = (n for n in copy.nodes("vision", "Squeeze") if n.input[0] == splits[1].output[0])
    squeeze.input[0] = splits[0].output[0]


def _class_token_of_two(copy: Tampered) -> None:
    """The class token is repeated by another size than the number of tiles."""
    expand = copy.nodes("vision", "Expand")[0]
    (shape,) = (n for n in copy.nodes("vision", "Shape") if n.output[0] in _reads(copy, expand))
    copy.set_attributes("vision", shape.name, start=1, end=2)


def _reads(copy: Tampered, node: Any) -> list[str]:
    (concat,) = (n for n in copy.nodes("vision", "Concat") if n.output[0] == node.input[1])
    return list(concat.input)


def _constant(copy: Tampered) -> None:
    """A node in place of the tensor: its value is not looked at where tensors are compared."""
    graph = copy.model("vision").graph
    value = numpy_helper.from_array(np.array(0.25, np.float32), "value")
    graph.node.insert(0, helper.make_node("Constant", [], ["own_scale"], "own", value=value))
    (scaled,) = [n for n in graph.node if "attention_scale" in n.input][:1]
    scaled.input[1] = "own_scale"


_QKV = 96 + 2 * 32
_SWAP = numpy_helper.from_array(np.arange(96)[::-1].copy(), "backwards")
_BIAS = np.full(160, 0.5, np.float32)


def _fault(id_: str, wrong: str, plant: _Plant, **more: Any) -> Fault:
    return Fault(id_, "attributes", wrong, "artifact", "structure", plant, **more)


FAULTS = (
    _fault(
        "smooth softmax",
        "attention adds one to the sum of its exponentials",
        _set("decoder", _ATTENTION, smooth_softmax=1),
    ),
    _fault("softcap of scores", "scores are capped", _set("decoder", _ATTENTION, softcap=50.0)),
    _fault(
        "a window of the whole context",
        "a window as long as the context, which no short prompt shows",
        _set("decoder", _ATTENTION, local_window_size=1024),
    ),
    _fault(
        "a window of none",
        "a window of length 0 in place of none",
        _set("decoder", _ATTENTION, local_window_size=0),
    ),
    _fault(
        "neighbours rotated",
        "rotary pairs are neighbours in one layer",
        _set("decoder", _ATTENTION, rotary_interleaved=1),
    ),
    _fault(
        "no rotary",
        "one layer does not rotate",
        _set("decoder", _ATTENTION, do_rotary=None),
    ),
    _fault(
        "scale left to one",
        "scores are not scaled",
        _set("decoder", _ATTENTION, scale=1.0),
    ),
    _fault(
        "not causal",
        "attention sees later positions",
        _set("decoder", _ATTENTION, causal=0),
    ),
    _fault(
        "half the key heads",
        "attention counts one key head",
        _set("decoder", _ATTENTION, kv_num_heads=1),
    ),
    _fault(
        "scores handed out",
        "attention hands its scores out",
        _scores_handed_out,
    ),
    _fault(
        "attention bias",
        "attention adds numbers to its scores",
        _new_input("decoder", _ATTENTION, 10, np.zeros((1, 1, 1, 1024), np.float32)),
    ),
    _fault(
        "head sink",
        "every head has a sink that takes a share of the attention",
        _new_input("decoder", _ATTENTION, 11, np.zeros(6, np.float32)),
    ),
    _fault(
        "positions of its own",
        "positions are those of a tensor",
        _new_input("decoder", _ATTENTION, 9, np.zeros((1, 1), np.int64)),
    ),
    _fault(
        "norm of queries",
        "queries are normed",
        _new_input("decoder", _ATTENTION, 14, np.ones(16, np.float32)),
    ),
    _fault(
        "a quantised float cache",
        "the float cache is taken for codes",
        _set("decoder", _ATTENTION, k_quant_type="PER_TENSOR"),
    ),
    _fault(
        "an attribute of nobody",
        "attention has an attribute that the operator does not know",
        _set("decoder", _ATTENTION, alpha=2.0),
    ),
    _fault(
        "epsilon left out",
        "a norm without an epsilon takes the operator's 1e-12",
        _set("decoder", _NORM, epsilon=None),
    ),
    _fault(
        "epsilon twice",
        "a norm has two epsilons",
        _twice("decoder", _NORM, "epsilon", 0.1),
    ),
    _fault(
        "epsilon by reference",
        "an epsilon refers to an attribute of a function",
        _as_a_reference,
    ),
    _fault("number of heads as a float", "num_heads is a float", _of_another_type),
    _fault(
        "bias of a norm",
        "an RMSNorm adds a bias",
        _new_input("decoder", _NORM, 3, np.zeros(96, np.float32)),
    ),
    _fault(
        "mean of a norm",
        "an RMSNorm hands its mean out",
        _new_output("decoder", _NORM, 1),
    ),
    _fault(
        "axis of the first norm",
        "the first norm runs over positions",
        _set("decoder", "language_model.layers.0.input_layernorm", axis=1),
    ),
    _fault(
        "norm in half",
        "the first norm computes in float16",
        _set("decoder", "language_model.layers.0.input_layernorm", stash_type=10),
    ),
    _fault(
        "transposed product",
        "a product has an attribute transB",
        _set("decoder", _DOWN, transB=1),
    ),
    _fault("standard opset", "an older standard", _opset("", 20)),
    _fault("contributed opset", "another version", _opset("com.microsoft", 2)),
    _fault(
        "columns gathered backwards",
        "what o_proj reads is put into another order",
        _between(
            "decoder",
            f"{_LAYER}.self_attn.o_proj",
            0,
            helper.make_node("Gather", ["IN", "backwards"], ["reordered"], "reorder", axis=2),
            _SWAP,
        ),
    ),
    _fault(
        "a layer's output clipped",
        "down_proj reads clipped values",
        _between(
            "decoder",
            _DOWN,
            0,
            helper.make_node("Clip", ["IN", "low", "high"], ["clipped"], "clip"),
            helper.make_tensor("low", TensorProto.FLOAT, [], [-3.0]),
            helper.make_tensor("high", TensorProto.FLOAT, [], [3.0]),
        ),
    ),
    _fault("a node left over", "a node computes what nobody reads", _left_over),
    _fault("two tensors of one name", "an axis is there twice", _two_of_one_name),
    # The tower.
    _fault(
        "softmax over heads",
        "attention of the tower is normed over queries",
        _first("vision", "Softmax", axis=-2),
    ),
    _fault(
        "tower gelu by tanh",
        "the projector's GELU by its tanh formula",
        _first("vision", "Gelu", approximate="tanh"),
    ),
    _fault(
        "tower norm in half",
        "a norm of the tower computes in float16",
        _set("vision", f"{_BLOCK}.layer_norm1", stash_type=10),
    ),
    _fault(
        "tower norm over tokens",
        "a norm of the tower runs over tokens as well",
        _set("vision", f"{_BLOCK}.layer_norm1", axis=1),
    ),
    _fault(
        "tower norm without epsilon",
        "a norm of the tower has another epsilon",
        _set("vision", f"{_BLOCK}.layer_norm1", epsilon=1e-12),
    ),
    _fault(
        "zeros of a shape kept",
        "a reshape takes 0 for a size of 0",
        _first("vision", "Reshape", allowzero=1),
    ),
    _fault(
        "cast saturates not",
        "a cast of a weight has another rule for what is too large",
        _first("vision", "Cast", saturate=0),
    ),
    _fault(
        "cast to float16 on the way",
        "patches are rounded to bfloat16",
        lambda copy: copy.set_attributes("vision", copy.nodes("vision", "Cast")[0].name, to=16),
    ),
    _fault(
        "query of another block",
        "block 1 takes the queries of block 0",
        _query_of_another_block,
    ),
    _fault("class token by channels", "the class token is repeated wrongly", _class_token_of_two),
    _fault(
        "a third part of the tokens",
        "further tokens stand behind the patches",
        lambda copy: copy.set_constant(
            "vision",
            next(n for n in copy.nodes("vision", "Concat") if n.input[0].startswith("Expand")).name,
            2,
            np.zeros((1, 1, 48), np.float32),
        ),
    ),
    _fault("a scale that a node makes", "attention's scale comes from a Constant", _constant),
    # Quantised operators.
    _fault(
        "accuracy level",
        "inputs are not rounded",
        _set("decoder", _DOWN, accuracy_level=0),
        model="int4",
    ),
    _fault(
        "bits left out", "bits are the operator's own", _set("decoder", _DOWN, bits=2), model="int4"
    ),
    _fault(
        "block size", "blocks are half as long", _set("decoder", _DOWN, block_size=16), model="int4"
    ),
    _fault(
        "prepacked",
        "the codes are taken for packed ones",
        _set("decoder", _DOWN, weight_prepacked=1),
        model="int4",
    ),
    _fault(
        "bias of a product",
        "a product adds a bias that no layer has",
        _new_input("decoder", _DOWN, 5, np.zeros(96, np.float32)),
        model="int4",
    ),
    _fault(
        "axis of rounding",
        "activations are rounded along another axis",
        _first("decoder", "QuantizeLinear", axis=0),
        model="int8",
    ),
    _fault(
        "blocks of rounding",
        "activations have a scale a block",
        _first("decoder", "QuantizeLinear", block_size=32),
        model="int8",
    ),
    _fault(
        "rounding does not saturate",
        "codes beyond the range wrap around",
        _first("decoder", "QuantizeLinear", saturate=0),
        model="int8",
    ),
    _fault(
        "type of codes",
        "codes are of another type",
        _first("decoder", "QuantizeLinear", output_dtype=3),
        model="int8",
    ),
    _fault(
        "largest over nothing",
        "the largest of a row is the row",
        _first("decoder", "ReduceMax", noop_with_empty_axes=1),
        model="int8",
    ),
    _fault(
        "rows without an axis",
        "the size of a row loses its axis",
        _first("decoder", "ReduceMax", keepdims=0),
        model="int8",
    ),
    _fault(
        "a third largest",
        "rows are at least ten",
        _further("decoder", "Max", np.array(10.0, np.float32)),
        model="int8",
    ),
    _fault(
        "bias inside an integer product",
        "an integer product adds a bias that no layer has",
        _new_input("decoder", _DOWN, 6, np.zeros(96, np.float32)),
        model="int8",
    ),
    # The second graph, with an int8 cache.
    _fault(
        "type of the cache twice",
        "the scales are one a channel, and one for all",
        _twice("decoder_int8_cache", _ATTENTION, "k_quant_type", "PER_TENSOR"),
        model="int8 cache",
    ),
    _fault(
        "smooth softmax with an int8 cache",
        "attention over the int8 cache adds one to its sum",
        _set("decoder_int8_cache", _ATTENTION, smooth_softmax=1),
        model="int8 cache",
    ),
    _fault(
        "opset of the int8 cache",
        "the second graph is of another version",
        lambda copy: setattr(copy.model("decoder_int8_cache").opset_import[0], "version", 20),
        model="int8 cache",
    ),
    _fault(
        "bits of the cache",
        "the cache has 4 bits",
        _set("decoder_int8_cache", _ATTENTION, kv_cache_bit_width=4),
        model="int8 cache",
    ),
    # The cuda target, and video.
    _fault(
        "integer kernels on cuda",
        "the cuda target asks for the CPU's level",
        _set("decoder", _DOWN, accuracy_level=4),
        model="int4 cuda",
    ),
    _fault(
        "logits stay half",
        "logits are cast to float16",
        _first("decoder", "Cast", to=10),
        model="int4 cuda",
    ),
    _fault(
        "axis of the best",
        "the best positions, not the best tokens",
        _first("decoder", "TopK", axis=1),
        model="int4 cuda",
    ),
    _fault(
        "pooled by tiles",
        "patches are gathered along the tiles",
        _first("vision", "Gather", axis=0),
        model="video",
    ),
)
