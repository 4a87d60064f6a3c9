"""Comparing what a graph has with the reference's modules: sentences for the stage "structure"."""

from __future__ import annotations

from typing import Any

import numpy as np

from llava_edge.convert.verification.structure.graph_attributes import (
    GraphWalk,
    LinearAttributes,
    NormAttributes,
)


def says(
    walk: GraphWalk, node: str, what: str, have: object, want: object, who: str = "config.json"
) -> None:
    """Note a fault where a node does not have what the configuration says."""
    if have != want:
        walk.faults.append(
            f"{walk.graph.label}, node {node}: {what} is {have!s}; {who} says {want!s}"
        )


def compare_norm(walk: GraphWalk, have: NormAttributes, name: str, module: Any) -> None:
    """Epsilon of a norm, and which tensors it reads.

    Args:
        walk: gets the faults.
        have: from the graph.
        name: canonical name of the norm that belongs there.
        module: the reference's.
    """
    want = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    says(walk, have.node, "epsilon", np.float32(have.epsilon), np.float32(want))
    _reads(walk, have.node, have.gain, f"{name}.weight")
    bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
    _reads(walk, have.node, have.bias, bias)


def compare_linear(
    walk: GraphWalk, have: LinearAttributes, names: list[str], modules: list[Any]
) -> None:
    """Sizes and bias of a linear layer, and which tensors it reads.

    Args:
        walk: gets the faults.
        have: from the graph.
        names: canonical names of the layers that are packed there, in order.
        modules: the reference's.
    """
    says(walk, have.node, "number of inputs", have.in_size, modules[0].in_features)
    outputs = sum(module.out_features for module in modules)
    says(walk, have.node, "number of outputs", have.out_size, outputs)
    _reads(walk, have.node, have.weight, f"{names[0]}.weight")
    has_bias = modules[0].bias is not None
    _reads(walk, have.node, have.bias, f"{names[0]}.bias" if has_bias else None)


def _reads(walk: GraphWalk, node: str, have: str | None, want: str | None) -> None:
    if have == want:
        return
    if want is None:
        text = f"it reads {have}; config.json has no such bias"
    else:
        text = f"it reads {have or 'nothing'} where {want} belongs"
    walk.faults.append(f"{walk.graph.label}, node {node}: {text}")
