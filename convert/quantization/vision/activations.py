"""VisionTrace: a float32 vision graph run piece by piece over tiles, with its inner values in hand.

A piece is a block of the tower, what lies before the first, or the projector. Only one piece is
loaded at a time, and its inner values are handed out tile by tile, so that a full-size tower is
looked into within the memory of one block.

Anyone who looks may add nodes to a piece, to have sums of its values computed where they arise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from llava_edge.convert.onnx.graph_view import GraphView
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.util.arrays import Array

PIXELS, FEATURES = "pixel_values", "image_features"
_BLOCK_BEGINS = ".layer_norm1"
_PROJECTOR_BEGINS = "multi_modal_projector.linear_1"


@dataclass(frozen=True)
class Piece:
    """Neighbouring nodes of the graph.

    Attributes:
        name: ``embeddings``, ``layers.3`` … or ``projector``.
        nodes: in order.
        inputs: values that earlier pieces or the caller make.
        outputs: values that later pieces read, or the graph's output.
    """

    name: str
    nodes: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Additions:
    """What is added to a piece: nodes behind its own, initializers, values to hand out."""

    outputs: Sequence[str]
    nodes: Sequence[Any] = ()
    initializers: Sequence[Any] = ()


class VisionTrace:
    """Walks a vision graph for the cpu target.

    Args:
        path: the graph; weights lie beside it.
        pixel_values: float32 [tiles, 3, T, T].
        threads: of the CPU provider; 0 for as many as are allowed.
        given: further inputs of the graph, the same for every tile.

    Attributes:
        view: the graph.
        features: float32 [tiles, patches, hidden], once the walk is over.
    """

    def __init__(
        self,
        path: Path,
        pixel_values: Array,
        threads: int = 0,
        given: Mapping[str, Array] | None = None,
    ) -> None:
        self.view = GraphView(path, "vision")
        self._given = dict(given or {})
        self.features: Array = np.empty(0, np.float32)
        self._tiles = pixel_values
        self._options = SessionOptions(device="cpu", threads=threads)

    def pieces(self) -> list[Piece]:
        """The graph in pieces, in order."""
        nodes = self.view.nodes
        starts = [0]
        names = ["embeddings"]
        for place, node in enumerate(nodes):
            if node.name.endswith(_BLOCK_BEGINS):
                starts.append(place)
                names.append(f"layers.{node.name.split('.')[-2]}")
        starts.append(self._projector())
        names.append("projector")
        stops = [*starts[1:], len(nodes)]
        return [
            self._piece(name, nodes[start:stop], nodes[stop:])
            for name, start, stop in zip(names, starts, stops, strict=True)
        ]

    def linears(self, piece: Piece) -> dict[str, Any]:
        """Products of a piece with a stored weight, by the name of the linear layer."""
        view = self.view
        return {
            node.name: node
            for node in piece.nodes
            if node.op_type == "MatMul" and f"{node.name}.weight" in view.initializers
        }

    def walk(
        self, ask: Callable[[Piece], Additions]
    ) -> Iterator[tuple[Piece, int, Mapping[str, Array]]]:
        """Run piece after piece.

        Args:
            ask: what is wanted of a piece; called before it is loaded.

        Yields:
            Piece, number of the tile, and the wanted values and inputs by name.
        """
        states: list[dict[str, Array]] = [
            {PIXELS: tile[None], **self._given} for tile in self._tiles
        ]
        pieces = self.pieces()
        for place, piece in enumerate(pieces):
            wanted = ask(piece)
            names = list(dict.fromkeys([*wanted.outputs, *piece.outputs]))
            # An input of the piece is at hand already.
            computed = [name for name in names if name not in piece.inputs]
            later = {FEATURES, *(name for each in pieces[place + 1 :] for name in each.inputs)}
            session = self._open(piece, wanted, computed, states[0])
            for index, state in enumerate(states):
                feeds = {name: state[name] for name in piece.inputs}
                values = dict(zip(computed, session.run(feeds, computed), strict=True))
                yield piece, index, {**feeds, **values}
                known = {**state, **values}
                states[index] = {name: known[name] for name in known if name in later}
                # Inner values of a tile are many times what is kept of it.
                del feeds, values, known
            del session
        self.features = np.concatenate([state[FEATURES] for state in states])

    def _projector(self) -> int:
        """Where the slices that drop the class token begin, or the projector's first product."""
        nodes = self.view.nodes
        last = self.view.place(_PROJECTOR_BEGINS)
        blocks = [p for p, node in enumerate(nodes) if node.name.endswith(".mlp.fc2")]
        # Behind the last block's second linear layer stand its bias and the residual sum.
        residual = self.view.consumers(self.view.linear(nodes[blocks[-1]].name))[0]
        return min(last, self.view.place(residual.name) + 1)

    def _piece(self, name: str, nodes: Sequence[Any], later: Sequence[Any]) -> Piece:
        made = {output for node in nodes for output in node.output if output}
        read = {value for node in nodes for value in node.input if value}
        wanted = {value for node in later for value in node.input} | {FEATURES}
        stored = self.view.initializers
        inputs = sorted(value for value in read if value not in made and value not in stored)
        return Piece(name, tuple(nodes), tuple(inputs), tuple(sorted(made & wanted)))

    def _open(
        self, piece: Piece, wanted: Additions, outputs: Sequence[str], state: Mapping[str, Array]
    ) -> Session:
        model = self.view.model
        nodes = [*piece.nodes, *wanted.nodes]
        read = {name for node in nodes for name in node.input}
        made = {name for node in nodes for name in node.output}
        types = {
            name: TensorProto.INT64 if state[name].dtype == np.int64 else TensorProto.FLOAT
            for name in piece.inputs
        }
        graph = helper.make_graph(
            nodes,
            piece.name,
            [
                helper.make_tensor_value_info(name, types[name], [None] * state[name].ndim)
                for name in piece.inputs
            ],
            [helper.make_empty_tensor_value_info(name) for name in outputs if name in made],
            [
                *(t for t in model.graph.initializer if t.name in read),
                *wanted.initializers,
            ],
        )
        cut = helper.make_model(
            graph, opset_imports=list(model.opset_import), ir_version=model.ir_version
        )
        return Session.from_bytes(cut.SerializeToString(), self.view.folder, self._options)
