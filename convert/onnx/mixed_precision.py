"""Islands of float32 in a float16 graph, with casts at their shores.

A node computes in float32 where it makes or reads a wide value. Between two such nodes a value
stays in float32; elsewhere it is cast, once for all its readers. Weights and constants of an island
are cast as well, which engines do while they load.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from llava_edge.convert.onnx.builder import GraphBuilder

WIDE = ".float32"
"""How the names of casts to float32 end."""


@dataclass(frozen=True)
class Islands:
    """What computes in float32.

    Attributes:
        nodes: names, casts not among them.
        num_weights: elements of the weights that are cast for them.
    """

    nodes: list[str]
    num_weights: int


def add_islands(g: GraphBuilder, wide: Collection[str], floats: Collection[str]) -> Islands:
    """Have a float16 graph keep some values in float32.

    Args:
        g: complete; changed in place.
        wide: values to keep.
        floats: all float values that nodes make or the graph is given.

    What the graph hands out stays float16.
    """
    inside = {
        node
        for node in g.nodes
        if any(value.name in wide for value in node.outputs)
        or any(value is not None and value.name in wide for value in node.inputs)
    }
    kept = {
        value.name
        for node in inside
        for value in node.outputs
        if not g.is_output(value)
        and (value.name in wide or (value.uses() and all(u.node in inside for u in value.uses())))
    }
    builder = _Casts(g, floats, kept)
    nodes: list[ir.Node] = []
    for node in g.nodes:
        if node not in inside:
            nodes.append(node)
            continue
        nodes += builder.widened(node)
        nodes.append(node)
        nodes += builder.narrowed(node)
    g.nodes = nodes
    return Islands([str(node.name) for node in nodes if node in inside], builder.num_weights)


class _Casts:
    def __init__(
        self, g: GraphBuilder, floats: Collection[str], kept: Collection[str | None]
    ) -> None:
        self._g = g
        self._floats = floats
        self._kept = kept
        self._wide: dict[str, ir.Value] = {}
        self.num_weights = 0

    def widened(self, node: ir.Node) -> list[ir.Node]:
        """Casts of what the node reads in float16, and the node changed to read them."""
        made: list[ir.Node] = []
        for place, value in enumerate(node.inputs):
            if value is None or not self._is_half(value):
                continue
            name = str(value.name)
            if name not in self._wide:
                cast = _cast(value, ir.DataType.FLOAT, f"{name}{WIDE}")
                made.append(cast)
                self._wide[name] = cast.outputs[0]
                if value.const_value is not None:
                    self.num_weights += int(value.const_value.size)
            node.replace_input_with(place, self._wide[name])
        return made

    def narrowed(self, node: ir.Node) -> list[ir.Node]:
        """Casts of what others read in float16."""
        made: list[ir.Node] = []
        for value in node.outputs:
            name = str(value.name)
            if name in self._kept or name not in self._floats:
                continue
            value.name = f"{name}{WIDE}"
            users = list(value.uses())
            cast = _cast(value, ir.DataType.FLOAT16, name)
            narrow = cast.outputs[0]
            for use in users:
                use.node.replace_input_with(use.idx, narrow)
            self._g.replace_output(value, narrow)
            self._wide[name] = value
            made.append(cast)
        return made

    def _is_half(self, value: ir.Value) -> bool:
        if value.const_value is not None:
            return value.dtype == ir.DataType.FLOAT16
        return value.name in self._floats and value.name not in self._kept


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(to)}, name=f"{name}.cast")
    node.outputs[0].name = name
    return node
