"""Which values of the tower float16 cannot hold, found on calibration tiles.

A value is *wide* where it overflows (its largest magnitude, with room for other images, is beyond
65504) or where rounding it loses too much: each node is also run on the rounded value, and what
comes out is compared, row by row. That shows large scores in front of a softmax, a common offset in
front of a layer norm, and activations so small that they vanish. Nodes that make or read a wide
value compute in float32; the rest stays as it is (``onnx/mixed_precision.py``).

Kernels sum products and squares in float32, as CUDA's do, so only values between nodes count.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.onnx.builder import GraphBuilder
from llava_edge.convert.onnx.float16_emulation import emulate_float16
from llava_edge.convert.onnx.graph_part import GraphPart
from llava_edge.convert.onnx.mixed_precision import add_islands
from llava_edge.convert.onnx.vision import build_vision_graph
from llava_edge.convert.quantization.vision.activations import (
    FEATURES,
    Additions,
    Piece,
    VisionTrace,
)
from llava_edge.profiles.errors import RequestError
from llava_edge.runtime.artifact.manifest import GraphSpec
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.cosine import TileCosine

_LOG = logging.getLogger(__name__)

Save = Callable[[GraphBuilder], GraphSpec]

LARGEST = float(np.finfo(np.float16).max)
HEADROOM = 4.0
"""A calibration set does not hold every image: a quarter of the range is all that may be used."""
WHOLE = -1.0
LOSS_BOUNDS = (0.02, 0.005, 0.001, WHOLE)
"""Relative error of a row that rounding one value may make behind one node. The next is taken where
the whole graph is not near enough with the one before: errors also add up. ``WHOLE`` keeps the
whole tower in float32, which is dear and right."""
_SHARE_OF_A_SUM = 4.0
"""A summand counts as about as large as the sum from a quarter of it on."""
_LAST_AXIS, _SMALLEST = "guard.last_axis", "guard.smallest"
_TINY = float(np.finfo(np.float32).tiny)
COSINE_LOSS = 1e-4
"""One minus the cosine to float32 that the worst calibration tile may have."""
MOVING = frozenset(
    {"Concat", "Expand", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
)
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

    def reason(self, loss_bound: float) -> str:
        """What a certificate says."""
        if loss_bound == WHOLE:
            return "with fewer values in float32 the features were not near enough"
        if self.largest * HEADROOM > LARGEST:
            return (
                f"reaches {self.largest:.4g}; float16 holds {LARGEST:.0f}, {HEADROOM:g} x is kept"
            )
        return f"rounding it changes what follows by {self.loss:.2g}; {loss_bound:g} is allowed"


@dataclass
class Float16Ranges:
    """Ranges and losses of all values.

    Attributes:
        largest: largest magnitude by value.
        loss: largest relative error behind a node by value; values that are only moved lack it.
        floats: all float values that nodes make or the graph is given.
        pieces: name of the piece that makes a value.
    """

    largest: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    floats: set[str] = field(default_factory=set)
    pieces: dict[str, str] = field(default_factory=dict)
    _trace: VisionTrace | None = None

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
        found._trace = trace
        return found

    def per_piece(self) -> dict[str, float]:
        """Largest magnitude in each piece, in order."""
        largest: dict[str, float] = {}
        for value, piece in self.pieces.items():
            largest[piece] = max(largest.get(piece, 0.0), self.largest.get(value, 0.0))
        return largest

    def wide(self, loss_bound: float) -> dict[str, WideValue]:
        """Values that float16 cannot hold, by name, in order.

        Args:
            loss_bound: see ``LOSS_BOUNDS``; below zero for every value there is.
        """
        assert self._trace is not None
        found: dict[str, WideValue] = {}
        for value, largest in self.largest.items():
            loss = self.loss.get(value, 0.0)
            overflows = not largest * HEADROOM <= LARGEST
            if overflows or not loss <= loss_bound:
                self._widen(self._trace, value, float("nan") if overflows else loss, found)
        return {value: found[value] for value in self.largest if value in found}

    def _widen(
        self, trace: VisionTrace, value: str, loss: float, found: dict[str, WideValue]
    ) -> None:
        """Note a value and what it follows from, where rounding that would lose as much.

        That is what it was moved from and, of a sum, what is about as large as the sum: something
        common to both that a later norm takes out is then in either.
        """
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if value in found or value not in self.pieces:
                continue
            largest = self.largest[value]
            behind = _named_before(trace, value)
            found[value] = WideValue(value, self.pieces[value], behind, largest, loss)
            maker = trace.view.producer(value)
            if maker is None:
                continue
            sources = [str(name) for name in maker.input]
            if maker.op_type in MOVING:
                waiting += sources
            elif maker.op_type == "Add" and np.isfinite(loss):
                waiting += [
                    name
                    for name in sources
                    if self.largest.get(name, 0.0) * _SHARE_OF_A_SUM >= largest
                ]


class _Watch:
    """Nodes added to a piece that compute ranges and losses as scalars."""

    def __init__(self, trace: VisionTrace, piece: Piece, floats: set[str]) -> None:
        self._trace = trace
        self._piece = piece
        self._nodes: list[Any] = []
        self._largest: dict[str, str] = {}
        self._loss: list[tuple[str, str]] = []
        self._sized: set[str] = set()
        if not floats:
            floats |= set(piece.inputs)
        made = list(_float_values(trace, piece, floats))
        floats |= set(made)
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
        outputs = [*self._largest.values(), *(name for _, name in self._loss)]
        constants = [
            numpy_helper.from_array(np.array([-1], np.int64), _LAST_AXIS),
            numpy_helper.from_array(np.array(_TINY, np.float32), _SMALLEST),
        ]
        return Additions(outputs, self._nodes, constants)

    def read(self, values: Mapping[str, Array], into: Float16Ranges) -> None:
        """Take one tile's scalars."""
        for value, name in self._largest.items():
            into.largest[value] = _larger(into.largest.get(value, 0.0), float(values[name]))
            into.pieces.setdefault(value, self._piece.name)
        for value, name in self._loss:
            loss = float(values[name]) ** 0.5
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
        size, error, worst = f"guard.size.{output}", f"guard.error.{key}", f"guard.worst.{key}"
        if output not in self._sized:
            self._sized.add(output)
            self._nodes += [
                helper.make_node("ReduceSumSquare", [output, _LAST_AXIS], [f"{size}.square"]),
                # A row of zeros has no error either: 0 / tiny is 0.
                helper.make_node("Max", [f"{size}.square", _SMALLEST], [size]),
            ]
        # Row by row: a token with huge activations must not hide what others lose.
        self._nodes += [
            copy,
            helper.make_node("Sub", [output, copy.output[0]], [f"guard.gap.{key}"]),
            helper.make_node("ReduceSumSquare", [f"guard.gap.{key}", _LAST_AXIS], [error]),
            helper.make_node("Div", [error, size], [f"guard.share.{key}"]),
            helper.make_node("ReduceMax", [f"guard.share.{key}"], [worst], keepdims=0),
        ]
        self._loss.append((value, worst))


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
    return a if a != a or b <= a else b


def write_guarded_vision(
    checkpoint: Checkpoint, trace: VisionTrace, pixel_values: Array, folder: Path, save: Save
) -> GraphPart:
    """Write the float16 graph with as few islands as keep its features.

    Args:
        checkpoint: the model.
        trace: of the float32 graph, over the tiles.
        pixel_values: the tiles, float32 [tiles, 3, T, T].
        folder: where ``save`` puts the graph's own folder ``vision``.
        save: writes a graph.

    Raises:
        RequestError: what the graph hands out does not fit float16.
    """
    ranges = Float16Ranges.of(trace)
    reached = ranges.largest[FEATURES]
    if not reached <= LARGEST:
        raise RequestError(
            f"the projector's features reach {reached:.4g} on calibration tiles; float16, in which "
            f"the cuda target hands them to the language model, holds {LARGEST:.0f}. Convert for "
            "a CPU board, whose target computes in float32."
        )
    tried: dict[str, dict[str, float]] = {}
    for loss_bound in LOSS_BOUNDS:
        wide = ranges.wide(loss_bound)
        graph = build_vision_graph(checkpoint.dims, checkpoint, np.float16)
        total = len(graph.nodes)
        island = add_islands(graph, wide, ranges.floats)
        shutil.rmtree(folder / "vision", ignore_errors=True)
        saved = save(graph)
        features = emulate_float16(folder / "vision" / "model.onnx", checkpoint.dims, pixel_values)
        found = TileCosine.of(features, trace.features)
        tried["whole" if loss_bound == WHOLE else f"{loss_bound:g}"] = {
            "mean": _json_number(found.mean_loss),
            "worst": _json_number(found.worst_loss),
        }
        if found.worst_loss <= COSINE_LOSS:
            break
    else:
        _LOG.warning(
            "the float16 tower is %.2g off on its worst calibration tile, %g is aimed at",
            found.worst_loss,
            COSINE_LOSS,
        )
    islands: dict[str, list[dict[str, str]]] = {}
    if loss_bound == WHOLE:
        # One entry a piece says it all.
        wide = {
            value.piece: replace(value, name="all", behind=value.piece) for value in wide.values()
        }
    for value in wide.values():
        entry = {"value": value.name, "behind": value.behind, "why": value.reason(loss_bound)}
        islands.setdefault(value.piece, []).append(entry)
    facts = {
        "precision": "fp16",
        "islands": islands,
        "float32_nodes": island.nodes,
        "float32_share": len(island.nodes) / total,
        "weights_in_float32": island.num_weights,
        "largest_by_layer": ranges.per_piece(),
        "tile_cosine_loss": tried,
    }
    return GraphPart(saved, facts)


def _json_number(value: float) -> float:
    """What is not finite has no JSON form; a loss of 2 is as far as rows can be apart."""
    return value if np.isfinite(value) else 2.0
