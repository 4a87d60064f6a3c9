"""What a graph really holds, found by following its wiring backwards from an output.

Names of nodes are used in messages only: which layer computes what is decided by who reads whom.
``GraphWalk`` knows the few forms that linear layers, norms and activations take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llava_edge.convert.onnx.graph_file import INT64_MAX, GraphFile, attribute
from llava_edge.convert.verification.structure.operator_schema import default_of

_ELEMENT_TYPES = {1: "float32", 10: "float16"}
_INTEGER_KERNELS = 4
"""Level of MatMulNBits whose kernels round inputs to 8 bits."""


class WiringError(Exception):
    """The wiring is not that of the model; the message is a whole sentence."""


@dataclass(frozen=True)
class LinearAttributes:
    """One linear layer as the graph holds it.

    ``hidden`` is the value it reads. ``weight`` and ``bias`` are initializers. ``block_size`` is
    None where there are no blocks of columns with a scale of their own. ``input_factor`` is an
    initializer that multiplies ``hidden`` before it is rounded, or None. ``terms`` are the codes
    that stand for one activation.
    """

    node: str
    op_type: str
    hidden: str
    weight: str
    bias: str | None
    in_size: int
    out_size: int
    bits: int
    block_size: int | None = None
    input_factor: str | None = None
    terms: int = 1


@dataclass(frozen=True)
class NormAttributes:
    """One norm: its node, the initializers it reads, and its epsilon; ``bias`` only LayerNorms."""

    node: str
    gain: str
    bias: str | None
    epsilon: float
    axis: int


@dataclass(frozen=True)
class Activation:
    """``kind`` is gelu, gelu_tanh or quick_gelu; the last one has a factor ``alpha``."""

    node: str
    kind: str
    hidden: str
    alpha: float | None = None


class GraphWalk:
    """Follows values to their producers and notes what differs from what must be there.

    Args:
        graph: the graph.
        compute: ``float32`` or ``float16``.

    Attributes:
        faults: one sentence each, for everything that no configuration decides.
    """

    def __init__(self, graph: GraphFile, compute: str) -> None:
        self.graph = graph
        self.compute = compute
        self.faults: list[str] = []
        # Nodes by identity: names may be missing, or there twice.
        self._compared: dict[int, set[str]] = {}

    def meet(self, node: Any) -> Any:
        """Note that a node is a part of the model; returns it."""
        self._compared.setdefault(id(node), set())
        return node

    def has_met(self, node: Any) -> bool:
        """Whether the wiring led to a node."""
        return id(node) in self._compared

    def compared(self, node: Any) -> set[str]:
        """Attributes of a node that were asked for, to be compared."""
        return self._compared.get(id(node), set())

    def attribute(self, node: Any, name: str) -> Any:
        """An attribute's value, the operator's default where the node lacks it; None for neither.

        The caller compares it: ``node_faults`` does not look at it again.
        """
        self._compared.setdefault(id(node), set()).add(name)
        return attribute(node, name, default_of(node, name))

    def expect(self, node: Any, what: str, have: object, want: object) -> None:
        """Note a fault where ``have`` is not ``want``."""
        if have != want:
            self.faults.append(
                f"{self.graph.label}, node {node.name}: {what} is {have}, must be {want}"
            )

    def made_by(self, value: str, *op_types: str) -> Any:
        """The node that makes a value, which must be of one of these types.

        Raises:
            WiringError: it is not.
        """
        node = self.graph.producer(value)
        if node is None or node.op_type not in op_types:
            found = f"node {node.name} ({node.op_type})" if node else "no node"
            raise WiringError(
                f"{self.graph.label}: {value} comes from {found}, {' or '.join(op_types)} must be "
                "there"
            )
        return self.meet(node)

    def numbers(self, node: Any, place: int) -> list[Any]:
        """Values of a constant input as a flat list.

        Raises:
            WiringError: it is no constant of the file.
        """
        name = node.input[place] if len(node.input) > place else ""
        if name not in self.graph.initializers:
            raise WiringError(
                f"{self.graph.label}, node {node.name}: input {place} ({name or 'absent'}) is no "
                "constant of the file"
            )
        values: list[Any] = self.graph.read(name).reshape(-1).tolist()
        return values

    def expect_numbers(self, node: Any, place: int, what: str, want: Sequence[int | float]) -> None:
        """Note a fault where a constant input does not hold exactly these numbers."""
        self.expect(node, what, self.numbers(node, place), list(want))

    def stored(self, value: str) -> str | None:
        """The initializer behind a value, straight or through one Cast to the compute type."""
        if value in self.graph.initializers:
            return value
        node = self.graph.producer(value)
        if node is None or node.op_type != "Cast" or node.input[0] not in self.graph.initializers:
            return None
        self.meet(node)
        self.expect(node, "to", _ELEMENT_TYPES.get(self.attribute(node, "to")), self.compute)
        return str(node.input[0])

    def is_linear(self, value: str) -> bool:
        """Whether a value is a linear layer's output."""
        faults, compared = list(self.faults), dict(self._compared)
        try:
            self.linear(value)
        except WiringError:
            return False
        finally:
            self.faults, self._compared = faults, compared
        return True

    def linear(self, value: str) -> LinearAttributes:
        """The linear layer that makes a value.

        Raises:
            WiringError: none does.
        """
        node = self.made_by(value, "Add", "MatMul", "MatMulNBits", "Mul", "ReduceSum")
        bias = None
        if node.op_type == "Add":
            for place in (1, 0):
                name = str(node.input[place])
                if name in self.graph.initializers and len(self.graph.shape(name)) == 1:
                    bias = name
                    return self._product(node.input[1 - place], bias)
            raise WiringError(f"{self.graph.label}, node {node.name}: adds no bias")
        return self._product(value, bias)

    def _product(self, value: str, bias: str | None) -> LinearAttributes:
        node = self.made_by(value, "MatMul", "MatMulNBits", "Mul", "ReduceSum")
        if node.op_type == "MatMulNBits":
            return self._nbits(node, bias)
        if node.op_type == "Mul":
            return self._integer(node, bias, 1)
        if node.op_type == "ReduceSum":
            self.expect_numbers(node, 1, "axes", [0])
            self.expect(node, "keepdims", self.attribute(node, "keepdims"), 1)
            both = self.made_by(node.input[0], "Mul", "MatMulNBits")
            if both.op_type == "MatMulNBits":
                return self._block_terms(self._nbits(both, bias))
            return self._integer(both, bias, 2)
        weight = self.stored(node.input[1])
        if weight is not None:
            in_size, out_size = self._matrix(node, weight)
            if (kind := self.graph.dtype(weight)) not in ("float16", "float32"):
                self.expect(node, "type of the weight", kind, "float16")
            bits = 16 if kind == "float16" else 32
            return LinearAttributes(
                node.name, "MatMul", node.input[0], weight, bias, in_size, out_size, bits
            )
        unpack = self.made_by(node.input[1], "DequantizeLinear")
        weight = self._initializer(unpack, 0)
        in_size, out_size = self._matrix(unpack, weight)
        block = self.attribute(unpack, "block_size") or None
        self.expect(unpack, "axis", self.attribute(unpack, "axis"), 1 if block is None else 0)
        if len(unpack.input) > 2 and unpack.input[2]:
            self.expect(unpack, "zero point", set(self.numbers(unpack, 2)), {0})
        bits = 4 if self.graph.dtype(weight) == "int4" else 8
        return LinearAttributes(
            node.name,
            "DequantizeLinear",
            node.input[0],
            weight,
            bias,
            in_size,
            out_size,
            bits,
            block,
        )

    def _nbits(self, node: Any, bias: str | None) -> LinearAttributes:
        weight = self._initializer(node, 1)
        bits, block = self.attribute(node, "bits"), self.attribute(node, "block_size")
        in_size, out_size = self.attribute(node, "K"), self.attribute(node, "N")
        # The integer kernels are the CPU's, and what the reference rounds inputs for.
        level = _INTEGER_KERNELS if self.compute == "float32" else 0
        self.expect(node, "accuracy_level", self.attribute(node, "accuracy_level"), level)
        num_blocks = -(-in_size // block)
        self.expect(
            node,
            "shape of the weight",
            self.graph.shape(weight),
            (out_size, num_blocks, block * bits // 8),
        )
        scales = self._initializer(node, 2)
        size = int(np.prod(self.graph.shape(scales)))
        self.expect(node, "number of scales", size, out_size * num_blocks)
        for place, what in ((3, "zero points"), (4, "g_idx"), (5, "a bias")):
            if len(node.input) > place and node.input[place]:
                self.expect(node, what, node.input[place], "absent")
        return LinearAttributes(
            node.name, node.op_type, node.input[0], weight, bias, in_size, out_size, bits, block
        )

    def _block_terms(self, layer: LinearAttributes) -> LinearAttributes:
        """A layer of MatMulNBits over two rows: each block over its largest, rounded; the rest."""
        both = self.made_by(layer.hidden, "Concat")
        self.expect(both, "axis", self.attribute(both, "axis"), 0)
        self.expect(both, "number of terms", len(both.input), 2)
        rest = self.made_by(both.input[1], "Sub")
        hidden = str(rest.input[0])
        self.expect(rest, "what it takes off", rest.input[1], both.input[0])
        flat = self.made_by(both.input[0], "Reshape")
        self.expect_numbers(flat, 1, "shape", [0, 0, -1])
        values = self.made_by(flat.input[0], "Mul")
        back = self.made_by(values.input[0], "DequantizeLinear")
        quantize = self.made_by(back.input[0], "QuantizeLinear")
        self._codes((quantize, back), (1 / 127, 1 / 127), 128)
        blocks = self._over_largest(quantize, values, values.input[1])
        shaped = self.made_by(blocks, "Reshape")
        self.expect_numbers(shaped, 1, "shape", [0, 0, -1, layer.block_size or 0])
        self.expect(shaped, "the rows that it rounds", shaped.input[0], hidden)
        return replace(layer, hidden=hidden, terms=2)

    def _integer(self, scaled: Any, bias: str | None, terms: int) -> LinearAttributes:
        """Row over its largest → QuantizeLinear → MatMulIntegerToFloat → times the largest.

        With two terms the first has 63 steps each way, and what it leaves over has codes of 126 in
        each step; both are rows of one product.
        """
        node = self.made_by(scaled.input[0], "MatMulIntegerToFloat")
        weight = self._initializer(node, 1)
        in_size, out_size = self._matrix(node, weight)
        self.expect(node, "type of the weight", self.graph.dtype(weight), "int8")
        scales = self._initializer(node, 3)
        self.expect(node, "shape of the scales", self.graph.shape(scales), (out_size,))
        if len(node.input) > 5 and node.input[5]:
            self.expect(node, "zero point of the weight", set(self.numbers(node, 5)), {0})
        if terms == 1:
            quantize = self.made_by(node.input[0], "QuantizeLinear")
            self._codes((quantize, node), (1 / 127, 1 / 127), 128)
            multiplied = scaled.input[1]
        else:
            quantize = self._two_terms(node)
            by_term = self.made_by(scaled.input[1], "Mul")
            shares = [1.0, float(np.float32(1 / 126))]
            self.expect_numbers(by_term, 1, "what each term counts", shares)
            multiplied = by_term.input[0]
        hidden = self._over_largest(quantize, scaled, multiplied)
        factor = None
        multiply = self.graph.producer(hidden)
        if multiply is not None and multiply.op_type == "Mul":
            name = str(multiply.input[1])
            if name in self.graph.initializers and self.graph.shape(name) == (in_size,):
                self.meet(multiply)
                factor, hidden = name, str(multiply.input[0])
        return LinearAttributes(
            node.name,
            node.op_type,
            hidden,
            weight,
            bias,
            in_size,
            out_size,
            8,
            input_factor=factor,
            terms=terms,
        )

    def _over_largest(self, quantize: Any, scaled: Any, multiplied: str) -> str:
        """The rows that are quantised over their largest, by which ``scaled`` multiplies again."""
        divide = self.made_by(quantize.input[0], "Div")
        hidden, size = divide.input
        self.expect(scaled, "what the product is multiplied by", multiplied, size)
        largest = self.made_by(size, "Max")
        tiny = float(np.finfo(np.float32).tiny)
        self.expect_numbers(largest, 1, "smallest row size", [tiny])
        reduce = self.made_by(largest.input[0], "ReduceMax")
        self.expect_numbers(reduce, 1, "axes", [-1])
        self.expect(reduce, "keepdims", self.attribute(reduce, "keepdims"), 1)
        magnitude = self.made_by(reduce.input[0], "Abs")
        self.expect(magnitude, "the row whose size it takes", magnitude.input[0], hidden)
        return str(hidden)

    def _two_terms(self, product: Any) -> Any:
        """The node that makes the first of two terms of activations; the second is checked."""
        both = self.made_by(product.input[0], "Concat")
        self.expect(both, "axis", self.attribute(both, "axis"), 0)
        self.expect(both, "number of terms", len(both.input), 2)
        first, second = (self.made_by(value, "QuantizeLinear") for value in both.input[:2])
        rest = self.made_by(second.input[0], "Sub")
        back = self.made_by(rest.input[1], "DequantizeLinear")
        self.expect(
            rest, "the row that the first term is taken from", rest.input[0], first.input[0]
        )
        self.expect(back, "the codes that are taken off", back.input[0], first.output[0])
        step = 1 / 63
        self._codes((first, back, product, second), (step, step, step, step / 126), 64)
        return first

    def _codes(self, nodes: Sequence[Any], scales: Sequence[float], zero: int) -> None:
        """Note a fault where nodes do not round activations with these scales around ``zero``."""
        for node, scale in zip(nodes, scales, strict=True):
            place = 2 if node.op_type == "MatMulIntegerToFloat" else 1
            wanted = [float(np.float32(scale))]
            self.expect_numbers(node, place, "scale of the activations", wanted)
            place = 4 if place == 2 else 2
            self.expect_numbers(node, place, "zero point of the activations", [zero])

    def _initializer(self, node: Any, place: int) -> str:
        name = str(node.input[place]) if len(node.input) > place else ""
        if name not in self.graph.initializers:
            raise WiringError(
                f"{self.graph.label}, node {node.name}: input {place} ({name or 'absent'}) is no "
                "tensor of the file"
            )
        return name

    def _matrix(self, node: Any, weight: str) -> tuple[int, int]:
        shape = self.graph.shape(weight)
        if len(shape) != 2:
            raise WiringError(
                f"{self.graph.label}, node {node.name}: {weight} has shape {shape}, a matrix must "
                "be there"
            )
        return shape[0], shape[1]

    def layer_norm(self, value: str) -> tuple[NormAttributes, str]:
        """The LayerNormalization that makes a value, and what it reads.

        Raises:
            WiringError: none does.
        """
        node = self.made_by(value, "LayerNormalization")
        bias = self._initializer(node, 2) if len(node.input) > 2 and node.input[2] else None
        norm = NormAttributes(
            node.name,
            self._initializer(node, 1),
            bias,
            float(self.attribute(node, "epsilon")),
            int(self.attribute(node, "axis")),
        )
        self.expect(node, "axis", norm.axis, -1)
        return norm, str(node.input[0])

    def rms_norm(self, value: str) -> tuple[NormAttributes, str, str | None, str]:
        """The RMSNorm that makes a value.

        Returns:
            It; the residual and the delta that it adds up, the latter None where it reads one value
            only; the name of the sum.

        Raises:
            WiringError: none does.
        """
        node = self.made_by(
            value, "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"
        )
        skips = node.op_type.startswith("Skip")
        self.expect(node, "the output that is read as the norm", value, node.output[0])
        if skips and len(node.input) > 3 and node.input[3]:
            self.expect(node, "a bias", node.input[3], "absent")
        norm = NormAttributes(
            node.name,
            self._initializer(node, 2 if skips else 1),
            None,
            float(self.attribute(node, "epsilon")),
            -1 if skips else int(self.attribute(node, "axis")),
        )
        self.expect(node, "axis", norm.axis, -1)
        if not skips:
            return norm, str(node.input[0]), None, str(node.input[0])
        total = node.output[3] if len(node.output) > 3 else ""
        return norm, str(node.input[0]), str(node.input[1]), str(total)

    def activation(self, value: str) -> Activation:
        """The activation function that makes a value.

        Raises:
            WiringError: none that is known does.
        """
        node = self.made_by(value, "Gelu", "Mul")
        if node.op_type == "Gelu":
            form = self.attribute(node, "approximate")
            kind = "gelu" if form == "none" else f"gelu_{form}"
            return Activation(node.name, kind, node.input[0])
        hidden, gate = node.input
        scaled = self.made_by(self.made_by(gate, "Sigmoid").input[0], "Mul")
        self.expect(scaled, "what the sigmoid's factor multiplies", scaled.input[0], hidden)
        (alpha,) = self.numbers(scaled, 1)
        return Activation(node.name, "quick_gelu", hidden, float(alpha))

    def cut(self, value: str) -> tuple[Any, str, list[int], list[int], list[int]]:
        """The Slice that makes a value, what it reads, and its constant ends, axes and steps.

        Raises:
            WiringError: none does.
        """
        node = self.made_by(value, "Slice")
        steps = self.numbers(node, 4) if len(node.input) > 4 and node.input[4] else [1]
        self.expect_numbers(node, 2, "end", [INT64_MAX])
        self.expect(node, "steps", steps, [1])
        return node, str(node.input[0]), self.numbers(node, 2), self.numbers(node, 3), steps
