"""Which values of the tower float16 cannot hold, found on calibration tiles.

A value is *wide* where it overflows (its largest magnitude, with room for other images, is beyond
65504) or where rounding it loses too much: each node is also run on the rounded value, and what
comes out is compared. That shows large scores in front of a softmax, a common offset in front of a
layer norm, and activations so small that they vanish. Nodes that make or read a wide value compute
in float32; the rest stays as it is (``float16_islands``).

Kernels sum products and squares in float32, as CUDA's do, so only values between nodes count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from llava_edge.convert.vision_trace import Additions, Piece, VisionTrace
from llava_edge.runtime.session import Array

LARGEST = float(np.finfo(np.float16).max)
HEADROOM = 4.0
"""A calibration set does not hold every image: a quarter of the range is all that may be used."""
LOSS_BOUND = 0.02
"""Relative error that rounding one value may make behind one node; 2e-4 to 5e-4 is usual."""
MOVING = frozenset({"Concat", "Expand", "Reshape", "Slice", "Split", "Squeeze", "Transpose"})
"""Operators that hand values on as they are."""


@dataclass(frozen=True)
class WideValue:
    """A value that float16 cannot hold.

    Attributes:
        name: in the graph.
        piece: ``layers.3`` and the like.
        behind: the layer or norm whose output it is, or follows from.
        largest: its largest magnitude on the tiles.
        loss: largest relative error that rounding it makes behind a node; NaN where it overflows.
    """

    name: str
    piece: str
    behind: str
    largest: float
    loss: float

    @property
    def reason(self) -> str:
        """What a certificate says."""
        if self.largest * HEADROOM > LARGEST:
            return (
                f"reaches {self.largest:.4g}; float16 holds {LARGEST:.0f}, {HEADROOM:g} x is kept"
            )
        return f"rounding it changes what follows by {self.loss:.2g}; {LOSS_BOUND:g} is allowed"


@dataclass
class Float16Ranges:
    """Ranges and losses of all values.

    Attributes:
        largest: largest magnitude by value.
        loss: largest relative error behind a node by value; values that are only moved lack it.
        wide: values that float16 cannot hold.
        floats: all float values that nodes make or the graph is given.
        pieces: name of the piece that makes a value.
    """

    largest: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    wide: dict[str, WideValue] = field(default_factory=dict)
    floats: set[str] = field(default_factory=set)
    pieces: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: VisionTrace) -> Float16Ranges:
        """Walk a float32 graph over its tiles."""
        found = cls()
        watches: dict[str, _Watch] = {}

        def ask(piece: Piece) -> Additions:
            watch = watches[piece.name] = _Watch(trace, piece, found.floats)
            return watch.additions()

        for piece, _, values in trace.walk(ask):
            watches[piece.name].read(values, found)
        found._judge(trace)
        return found

    def per_piece(self) -> dict[str, float]:
        """Largest magnitude in each piece, in order."""
        largest: dict[str, float] = {}
        for value, piece in self.pieces.items():
            largest[piece] = max(largest.get(piece, 0.0), self.largest.get(value, 0.0))
        return largest

    def _judge(self, trace: VisionTrace) -> None:
        for value, largest in self.largest.items():
            loss = self.loss.get(value, 0.0)
            overflows = not largest * HEADROOM <= LARGEST
            if overflows or not loss <= LOSS_BOUND:
                self._widen(trace, value, float("nan") if overflows else loss)

    def _widen(self, trace: VisionTrace, value: str, loss: float) -> None:
        """Note a value and what it was moved from: rounded there, it would be lost as well."""
        while value not in self.wide and value in self.pieces:
            behind = _named_before(trace, value)
            largest = self.largest[value]
            self.wide[value] = WideValue(value, self.pieces[value], behind, largest, loss)
            maker = trace.view.producer(value)
            if maker is None or maker.op_type not in MOVING:
                return
            value = str(maker.input[0])


class _Watch:
    """Nodes added to a piece that compute ranges and losses as scalars."""

    def __init__(self, trace: VisionTrace, piece: Piece, floats: set[str]) -> None:
        self._trace = trace
        self._piece = piece
        self._nodes: list[Any] = []
        self._largest: dict[str, str] = {}
        self._loss: list[tuple[str, str, str]] = []
        if not floats:
            floats |= set(piece.inputs)
        made = list(_float_values(trace, piece, floats))
        floats |= set(made)
        self._made = made
        for value in made:
            self._range(value)
        rounded: dict[str, str] = {}
        for node in piece.nodes:
            if node.op_type in MOVING or node.op_type in ("Cast", "Shape"):
                continue
            for place, value in enumerate(node.input):
                if value in floats:
                    self._compare(node, place, value, rounded)

    def additions(self) -> Additions:
        """What the piece is to run as well."""
        outputs = [*self._largest.values(), *(n for _, a, b in self._loss for n in (a, b))]
        axes = numpy_helper.from_array(np.array([], np.int64), "guard.axes")
        return Additions(list(dict.fromkeys(outputs)), self._nodes, [axes])

    def read(self, values: Mapping[str, Array], into: Float16Ranges) -> None:
        """Take one tile's scalars."""
        for value, name in self._largest.items():
            into.largest[value] = _larger(into.largest.get(value, 0.0), float(values[name]))
            into.pieces.setdefault(value, self._piece.name)
        for value, error, size in self._loss:
            square = float(values[size])
            loss = (float(values[error]) / square) ** 0.5 if square else float(values[error])
            into.loss[value] = _larger(into.loss.get(value, 0.0), loss)

    def _range(self, value: str) -> None:
        name = f"guard.largest.{value}"
        self._nodes += [
            helper.make_node("Abs", [value], [f"guard.abs.{value}"]),
            helper.make_node("ReduceMax", [f"guard.abs.{value}"], [name], keepdims=0),
        ]
        self._largest[value] = name

    def _compare(self, node: Any, place: int, value: str, rounded: dict[str, str]) -> None:
        """Run a node on one rounded input, and compare what it makes with what it made."""
        if value not in rounded:
            rounded[value] = f"guard.rounded.{value}"
            half = f"guard.half.{value}"
            self._nodes += [
                helper.make_node("Cast", [value], [half], to=TensorProto.FLOAT16),
                helper.make_node("Cast", [half], [rounded[value]], to=TensorProto.FLOAT),
            ]
        output = node.output[0]
        key = f"{output}.{place}"
        copy = type(node)()
        copy.CopyFrom(node)
        copy.name = f"guard.{key}"
        copy.input[place] = rounded[value]
        del copy.output[:]
        copy.output.append(f"guard.again.{key}")
        size, error = f"guard.size.{output}", f"guard.error.{key}"
        self._nodes += [
            copy,
            helper.make_node("Sub", [output, copy.output[0]], [f"guard.gap.{key}"]),
            helper.make_node("ReduceSumSquare", [f"guard.gap.{key}"], [error], keepdims=0),
        ]
        if all(size != known for _, _, known in self._loss):
            self._nodes.append(helper.make_node("ReduceSumSquare", [output], [size], keepdims=0))
        self._loss.append((value, error, size))


def _float_values(trace: VisionTrace, piece: Piece, floats: set[str]) -> Iterator[str]:
    """Values of a piece that follow from float activations, in order; no weights."""
    known = set(floats)
    for node in piece.nodes:
        # The class token is a weight until it is laid out for every tile.
        follows = node.op_type == "Expand" or any(name in known for name in node.input)
        if not follows or node.op_type == "Shape":
            continue
        for output in node.output:
            known.add(output)
            yield output


def _named_before(trace: VisionTrace, value: str) -> str:
    """The nearest node before a value that has a name of the model's."""
    maker = trace.view.producer(value)
    while maker is not None and "." not in maker.name:
        value = str(maker.input[0])
        maker = trace.view.producer(value)
    return value if maker is None else str(maker.name)


def _larger(a: float, b: float) -> float:
    """The larger; what is not a number is larger than all."""
    return b if not b <= a else a


def island_report(ranges: Float16Ranges, nodes: Sequence[str], total: int) -> dict[str, Any]:
    """What the manifest and the certificate say, as plain JSON.

    Args:
        ranges: over the tiles.
        nodes: that compute in float32.
        total: nodes of the graph.
    """
    islands: dict[str, list[dict[str, Any]]] = {}
    for value in ranges.wide.values():
        entry = {"value": value.name, "behind": value.behind, "why": value.reason}
        islands.setdefault(value.piece, []).append(entry)
    return {
        "precision": "fp16",
        "islands": islands,
        "float32_nodes": list(nodes),
        "float32_share": len(nodes) / total,
        "largest_by_layer": ranges.per_piece(),
    }
