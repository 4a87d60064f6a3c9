"""VisionAttributes: blocks, norms, feature layers and projector of a vision graph, read from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_edge.convert.verification.structure.graph_attributes import (
    Activation,
    GraphWalk,
    LinearAttributes,
    NormAttributes,
    WiringError,
)
from llava_edge.runtime.artifact.graph_inputs import POOLING

_PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class BlockAttributes:
    """One block of the tower; ``scale`` multiplies the queries."""

    norm1: NormAttributes
    qkv: LinearAttributes
    num_heads: int
    head_dim: int
    scale: float
    out: LinearAttributes
    norm2: NormAttributes
    fc1: LinearAttributes
    activation: Activation
    fc2: LinearAttributes


@dataclass(frozen=True)
class EmbeddingAttributes:
    """The tower's entrance. Names are initializers; ``pre_norm`` is None where there is none.

    ``patches`` are (patches a side, patch size) of the first reshape.
    """

    kernel: str
    class_token: str
    positions: str
    patches: tuple[int, int]
    pre_norm: NormAttributes | None


@dataclass(frozen=True)
class VisionAttributes:
    """A whole vision graph; what could not be reached is None or empty.

    ``feature_depths`` says behind how many blocks each feature is taken, ``first_tokens`` the first
    token that is kept of it, ``is_pooled`` whether the projector reads means of patches.
    """

    embedding: EmbeddingAttributes | None
    blocks: tuple[BlockAttributes, ...]
    feature_depths: tuple[int, ...]
    first_tokens: tuple[int, ...]
    linear_1: LinearAttributes | None
    activation: Activation | None
    linear_2: LinearAttributes | None
    is_pooled: bool = False


def read_vision(walk: GraphWalk) -> VisionAttributes:
    """Follow a vision graph from its features to its pixels; faults are noted in ``walk``."""
    linear_1 = linear_2 = activation = embedding = None
    blocks: tuple[BlockAttributes, ...] = ()
    depths: tuple[int, ...] = ()
    first: tuple[int, ...] = ()
    is_pooled = False
    try:
        linear_2 = walk.linear("image_features")
        activation = walk.activation(linear_2.hidden)
        linear_1 = walk.linear(activation.hidden)
        features, is_pooled = _unpooled(walk, linear_1.hidden)
        states, first = _features(walk, features)
        chains = [_chain(walk, state) for state in states]
        depths = tuple(len(found) for found, _, _ in chains)
        blocks, entrance, passed = max(chains, key=lambda chain: len(chain[0]))
        for state in states:
            if state not in passed:
                raise WiringError(f"{walk.graph.label}: {state} is no output of a block of one row")
        embedding = _embedding(walk, entrance)
    except WiringError as error:
        walk.faults.append(str(error))
    return VisionAttributes(
        embedding, blocks, depths, first, linear_1, activation, linear_2, is_pooled
    )


def _unpooled(walk: GraphWalk, value: str) -> tuple[str, bool]:
    """What is pooled for the projector, and whether anything is.

    The mean must be over the patches that the input ``pooling`` names, all of them and once: a
    product with equal shares, or the ReduceMean of artifacts that were converted before.
    """
    node = walk.graph.producer(value)
    if node is None or node.op_type not in ("MatMul", "ReduceMean"):
        return value, False
    walk.meet(node)
    if node.op_type == "MatMul":
        _equal_shares(walk, node.input[0])
        gathered = node.input[1]
    else:
        walk.expect_numbers(node, 1, "axes", [2])
        walk.expect(node, "keepdims", walk.attribute(node, "keepdims"), 0)
        gathered = node.input[0]
    gather = walk.made_by(gathered, "Gather")
    walk.expect(gather, "axis", walk.attribute(gather, "axis"), 1)
    walk.expect(gather, "its indices", gather.input[1], POOLING)
    return str(gather.input[0]), True


def _equal_shares(walk: GraphWalk, value: str) -> None:
    """As many ones as ``pooling`` names patches for a token, over their sum."""
    divide = walk.made_by(value, "Div")
    ones = str(divide.input[0])
    total = walk.made_by(divide.input[1], "MatMul")
    column = walk.made_by(total.input[1], "Unsqueeze")
    walk.expect_numbers(column, 1, "axes", [1])
    walk.expect(total, "what it adds up", [total.input[0], column.input[0]], [ones, ones])
    expand = walk.made_by(ones, "Expand")
    walk.expect_numbers(expand, 0, "what it repeats", [1])
    shape = walk.made_by(expand.input[1], "Shape")
    walk.expect(shape, "whose shape it takes", shape.input[0], POOLING)
    places = walk.attribute(shape, "start"), walk.attribute(shape, "end")
    walk.expect(shape, "start and end", places, (1, 2))


def _features(walk: GraphWalk, value: str) -> tuple[list[str], tuple[int, ...]]:
    """States that the projector reads, and the first token kept of each."""
    node = walk.graph.producer(value)
    parts = [value]
    if node is not None and node.op_type == "Concat":
        walk.expect(walk.meet(node), "axis", walk.attribute(node, "axis"), -1)
        parts = [str(name) for name in node.input]
    states, first = [], []
    for part in parts:
        node = walk.graph.producer(part)
        if node is None or node.op_type != "Slice":
            states.append(part)
            first.append(0)
            continue
        node, state, _, axes, _ = walk.cut(part)
        walk.expect(node, "axes", axes, [1])
        states.append(state)
        first.append(int(walk.numbers(node, 1)[0]))
    return states, tuple(first)


def _chain(walk: GraphWalk, value: str) -> tuple[tuple[BlockAttributes, ...], str, set[str]]:
    """Blocks in front of a state, the value in front of all of them, and all states."""
    blocks: list[BlockAttributes] = []
    states = {value}
    while True:
        node = walk.graph.producer(value)
        is_sum = node is not None and node.op_type == "Add"
        if node is None or not is_sum or any(walk.stored(name) for name in node.input):
            return tuple(reversed(blocks)), value, states
        walk.meet(node)
        block, value = _block(walk, value)
        blocks.append(block)
        states.add(value)


def _sum(walk: GraphWalk, value: str) -> tuple[str, LinearAttributes]:
    """Residual and branch of a sum; the branch ends in a linear layer."""
    node = walk.made_by(value, "Add")
    for place in (1, 0):
        if walk.is_linear(node.input[place]):
            return str(node.input[1 - place]), walk.linear(node.input[place])
    raise WiringError(f"{walk.graph.label}, node {node.name}: it adds no linear layer's output")


def _block(walk: GraphWalk, value: str) -> tuple[BlockAttributes, str]:
    middle, fc2 = _sum(walk, value)
    activation = walk.activation(fc2.hidden)
    fc1 = walk.linear(activation.hidden)
    norm2, reads = walk.layer_norm(fc1.hidden)
    _expect_residual(walk, norm2, reads, middle)
    before, out = _sum(walk, middle)
    qkv, num_heads, head_dim, scale = _attention(walk, out.hidden)
    norm1, reads = walk.layer_norm(qkv.hidden)
    _expect_residual(walk, norm1, reads, before)
    return (
        BlockAttributes(norm1, qkv, num_heads, head_dim, scale, out, norm2, fc1, activation, fc2),
        before,
    )


def _expect_residual(walk: GraphWalk, norm: NormAttributes, reads: str, residual: str) -> None:
    if reads != residual:
        walk.faults.append(
            f"{walk.graph.label}, node {norm.node}: it reads {reads}, its branch is added to "
            f"{residual}; both must be one value"
        )


def _attention(walk: GraphWalk, value: str) -> tuple[LinearAttributes, int, int, float]:
    """Packed projection, heads, size of a head and scale of softmax(q k^T) v."""
    merged = walk.made_by(value, "Reshape")
    walk.expect_numbers(merged, 1, "shape", [0, 0, -1])
    product = walk.made_by(_turned(walk, merged.input[0], [0, 2, 1, 3]), "MatMul")
    softmax = walk.made_by(product.input[0], "Softmax")
    walk.expect(softmax, "axis", walk.attribute(softmax, "axis"), -1)
    scores = walk.made_by(softmax.input[0], "MatMul")
    scaled = walk.made_by(scores.input[0], "Mul")
    (scale,) = walk.numbers(scaled, 1)
    parts = [scaled.input[0], _turned(walk, scores.input[1], [0, 1, 3, 2]), product.input[1]]
    split = None
    for place, part in enumerate(parts):
        squeeze = walk.made_by(part, "Squeeze")
        walk.expect_numbers(squeeze, 1, "axes", [0])
        maker = walk.made_by(squeeze.input[0], "Split")
        walk.expect(squeeze, "the Split that it reads", maker.name, (split or maker).name)
        split = maker
        found = list(split.output).index(squeeze.input[0])
        if found != place:
            walk.faults.append(
                f"{walk.graph.label}, node {split.name}: its part {found} is used as "
                f"{_PARTS[place]}; the parts are {', '.join(_PARTS)}"
            )
    assert split is not None
    walk.expect(split, "axis", walk.attribute(split, "axis"), 0)
    walk.expect(split, "number of parts", len(split.output), 3)
    walk.expect(split, "num_outputs", walk.attribute(split, "num_outputs"), 3)
    reshape = walk.made_by(_turned(walk, split.input[0], [2, 0, 3, 1, 4]), "Reshape")
    shape = walk.numbers(reshape, 1)
    walk.expect(reshape, "leading sizes of the shape", shape[:3], [0, 0, 3])
    return walk.linear(reshape.input[0]), int(shape[-2]), int(shape[-1]), float(scale)


def _turned(walk: GraphWalk, value: str, order: Sequence[int]) -> str:
    """What a Transpose reads, which must have this order of axes."""
    node = walk.made_by(value, "Transpose")
    walk.expect(node, "perm", list(walk.attribute(node, "perm") or []), list(order))
    return str(node.input[0])


def _expect_one_a_tile(walk: GraphWalk, expand: Any) -> None:
    """The class token is repeated once for each tile."""
    shape = walk.made_by(expand.input[1], "Concat")
    walk.expect(shape, "axis", walk.attribute(shape, "axis"), 0)
    walk.expect(shape, "number of inputs", len(shape.input), 2)
    tiles = walk.made_by(shape.input[0], "Shape")
    walk.expect(tiles, "whose shape it takes", tiles.input[0], "pixel_values")
    places = walk.attribute(tiles, "start"), walk.attribute(tiles, "end")
    walk.expect(tiles, "start and end", places, (0, 1))
    walk.expect(shape, "sizes behind the tiles", walk.numbers(shape, 1)[:-1], [1])


def _embedding(walk: GraphWalk, value: str) -> EmbeddingAttributes:
    node = walk.made_by(value, "LayerNormalization", "Add")
    pre_norm = None
    if node.op_type == "LayerNormalization":
        pre_norm, value = walk.layer_norm(value)
    total = walk.made_by(value, "Add")
    positions = walk.stored(total.input[1])
    tokens = walk.made_by(total.input[0], "Concat")
    walk.expect(tokens, "axis", walk.attribute(tokens, "axis"), 1)
    walk.expect(tokens, "number of inputs", len(tokens.input), 2)
    expand = walk.made_by(tokens.input[0], "Expand")
    _expect_one_a_tile(walk, expand)
    product = walk.made_by(tokens.input[1], "MatMul")
    kernel = walk.stored(product.input[1])
    class_token = walk.stored(expand.input[0])
    if positions is None or kernel is None or class_token is None:
        raise WiringError(
            f"{walk.graph.label}: class token, position embedding or patch embedding is no tensor "
            "of the file"
        )
    flat = walk.made_by(product.input[0], "Reshape")
    split = walk.made_by(_turned(walk, flat.input[0], [0, 2, 4, 1, 3, 5]), "Reshape")
    walk.expect(split, "what it reads", split.input[0], "pixel_values")
    sizes = walk.numbers(split, 1)
    side, patch = int(sizes[2]), int(sizes[3])
    walk.expect(split, "shape", sizes, [-1, 3, side, patch, side, patch])
    walk.expect_numbers(flat, 1, "shape", [-1, side * side, 3 * patch * patch])
    return EmbeddingAttributes(kernel, class_token, positions, (side, patch), pre_norm)
