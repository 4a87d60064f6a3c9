"""Linear layers of the decoder as graph nodes, one way for every weight format.

    FloatLinear           MatMul over fp16 weights
    QuantizedLinear
      matmul_nbits        com.microsoft.MatMulNBits: 4 or 8 bits, one scale a block
      integer             row over its largest → QuantizeLinear → MatMulIntegerToFloat → times the
                          largest: signed 8 bits, one scale a column, batch-invariant
      two-term            the same with two rows of codes for each: 7 bits of the row, and 7 bits of
                          what those leave over; one product over both, and the sum of the two. A
                          head in groups is matmul_nbits over two rows likewise: 8 bits of each
                          block, and 8 bits of what those leave over
      portable            standard DequantizeLinear → MatMul, which ONNX Runtime fuses by itself

Layers that read the same activations are emitted together, so that they share the normalisation.

Sources: the operators' contracts in ONNX Runtime 1.32. The integer forms give a row the same bits
alone and among others, since sums of integers are exact and everything else is done value by value.
Products of 7 and 8 bits fit 16 bits in pairs (2 x 127 x 128 < 2^15), so that the two-term form has
the same bits on processors that sum pairs in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llava_edge.convert.checkpoint.formats.packing import (
    choose_group_size,
    to_dequantize_linear,
    to_matmul_integer,
    to_matmul_nbits,
)
from llava_edge.convert.checkpoint.formats.rounding import (
    PER_CHANNEL,
    QuantizationReport,
    QuantizedWeight,
)
from llava_edge.convert.checkpoint.quantized.source import HEAD, HEAD_BITS, QuantizedSource
from llava_edge.convert.checkpoint.weights import LazyWeight, TensorSource, linear, vectors
from llava_edge.convert.onnx.builder import MICROSOFT, GraphBuilder
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.memory.formats import Int8Route, matmul_block
from llava_edge.runtime.util.arrays import Array

_ACTIVATION_ZERO = 128
_LARGEST_CODE = 127
_TERM_ZERO = 64
_LARGEST_TERM_CODE = 63
_TERM_STEPS = 2 * _LARGEST_TERM_CODE
"""Steps of the second term in one of the first: what rounding leaves is half a step at most."""
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class LinearLayer:
    """One MatMul: the layers ``names`` (checkpoint names without ``.weight``) packed along N."""

    names: tuple[str, ...]
    in_size: int
    out_size: int
    bias: bool


class LinearOps(Protocol):
    """How linear layers become nodes."""

    def layers(
        self, g: GraphBuilder, hidden: ir.Value, layers: Sequence[LinearLayer]
    ) -> list[ir.Value]:
        """Emit layers that all read ``hidden``; one output each."""

    def head(self, g: GraphBuilder, hidden: ir.Value, in_size: int, out_size: int) -> ir.Value:
        """Emit the language model head."""


class FloatLinear:
    """Weights as they are, in fp16.

    Args:
        source: the checkpoint.
        head: name of the head's weight; that of the embeddings where they are shared.
    """

    def __init__(self, source: TensorSource, head: str) -> None:
        self._source = source
        self._head = head

    def layers(
        self, g: GraphBuilder, hidden: ir.Value, layers: Sequence[LinearLayer]
    ) -> list[ir.Value]:
        """See LinearOps."""
        return [self._layer(g, hidden, layer) for layer in layers]

    def head(self, g: GraphBuilder, hidden: ir.Value, in_size: int, out_size: int) -> ir.Value:
        """See LinearOps."""
        weight = linear(self._source, [self._head], in_size, out_size)
        return g.op("MatMul", hidden, g.compute_weight("lm_head.weight", weight), name="lm_head")

    def _layer(self, g: GraphBuilder, hidden: ir.Value, layer: LinearLayer) -> ir.Value:
        name = layer.names[0]
        weights = [f"{part}.weight" for part in layer.names]
        weight = linear(self._source, weights, layer.in_size, layer.out_size)
        product = g.op("MatMul", hidden, g.compute_weight(f"{name}.weight", weight), name=name)
        return _add_bias(g, self._source, layer, product)


@dataclass(frozen=True)
class QuantizedLayers:
    """Quantised weights and the operators that shall compute with them.

    Attributes:
        source: weights of the body.
        head: loads the head: 8 bits, groups of ``head_group_size``.
        head_group_size: None for the largest of 128, 64, 32, -1 that divides its inputs.
        int8_route: ``two-term`` or ``integer`` for 8 bits with one scale a channel, in float32
            graphs; ``nbits`` for everything.
        portable: standard operators only.
        largest_block: most columns of a block of MatMulNBits.
        nbits_layers: layers (names as in ``source.linear``) that take MatMulNBits in spite of
            ``integer``, whose activations have a scale a block instead of a row. The first of
            several packed layers decides.
        float_layers: layers that keep their weights in fp16, named likewise.
        input_scales: float32 [K] by layer: on the integer route its input is divided by them
            first, because the source's weights are multiplied by them. Powers of two, so that this
            is exact.
    """

    source: QuantizedSource
    head: Callable[[], QuantizedWeight]
    head_group_size: int | None = None
    int8_route: Int8Route = "nbits"
    portable: bool = False
    largest_block: int = 128
    nbits_layers: frozenset[str] = frozenset()
    float_layers: frozenset[str] = frozenset()
    input_scales: Mapping[str, Array] = field(default_factory=dict)


class QuantizedLinear:
    """Weights as integer codes.

    Args:
        source: the checkpoint, for biases.
        weights: quantised weights and the operators for them.

    Raises:
        RequestError: the integer route was asked for weights that it cannot hold.
    """

    def __init__(self, source: TensorSource, weights: QuantizedLayers) -> None:
        self._source = source
        self._weights = weights
        bits, group = weights.source.bits, weights.source.group_size
        if weights.int8_route != "nbits" and (bits, group) != (8, PER_CHANNEL):
            raise RequestError(
                f"the {weights.int8_route} route was asked for weights of {bits} bits with "
                f"group_size {group}; it takes 8 bits and one scale a channel (group_size -1). "
                "Take the nbits route."
            )

    def layers(
        self, g: GraphBuilder, hidden: ir.Value, layers: Sequence[LinearLayer]
    ) -> list[ir.Value]:
        """See LinearOps."""
        bits, group = self._weights.source.bits, self._weights.source.group_size
        rows: _IntegerRows | None = None
        outputs = []
        for layer in layers:
            if layer.names[0] in self._weights.float_layers:
                outputs += FloatLinear(self._source, HEAD).layers(g, hidden, [layer])
                continue
            weight = _Weight(
                layer.names[0], layer.in_size, layer.out_size, bits, group, self._loader(layer)
            )
            if self._is_integer(group) and layer.names[0] not in self._weights.nbits_layers:
                scale = self._weights.input_scales.get(layer.names[0])
                if scale is not None:
                    given = self._rows(g, _divided(g, hidden, layer.names[0], scale))
                else:
                    given = rows = rows or self._rows(g, hidden)
                product = _matmul_integer(g, given, weight)
            else:
                product = self._product(g, hidden, weight)
            outputs.append(_add_bias(g, self._source, layer, product))
        return outputs

    def head(self, g: GraphBuilder, hidden: ir.Value, in_size: int, out_size: int) -> ir.Value:
        """See LinearOps."""
        group = self._weights.head_group_size or choose_group_size([in_size])
        weight = _Weight(HEAD, in_size, out_size, HEAD_BITS, group, self._weights.head)
        if self._is_integer(group):
            return _matmul_integer(g, self._rows(g, hidden), weight)
        if self._weights.int8_route != "two-term" or self._weights.portable:
            return self._product(g, hidden, weight)
        rows = _block_terms(g, hidden, matmul_block(in_size, group, self._weights.largest_block))
        return g.op("ReduceSum", self._product(g, rows, weight), g.integers(0), keepdims=1)

    def _is_integer(self, group: int) -> bool:
        route = self._weights.int8_route
        return route != "nbits" and group == PER_CHANNEL and not self._weights.portable

    def _rows(self, g: GraphBuilder, hidden: ir.Value) -> _IntegerRows:
        return (_two_terms if self._weights.int8_route == "two-term" else _one_term)(g, hidden)

    def _product(self, g: GraphBuilder, hidden: ir.Value, weight: _Weight) -> ir.Value:
        if self._weights.portable:
            return _portable(g, hidden, weight)
        return _matmul_nbits(g, hidden, weight, self._weights.largest_block)

    def _loader(self, layer: LinearLayer) -> Callable[[], QuantizedWeight]:
        return lambda: _side_by_side([self._weights.source.linear(name) for name in layer.names])


@dataclass(frozen=True)
class _Weight:
    """A quantised weight before it is loaded."""

    name: str
    in_size: int
    out_size: int
    bits: int
    group_size: int
    load: Callable[[], QuantizedWeight]

    def loaded(self) -> QuantizedWeight:
        weight = self.load()
        have = (weight.qweight.shape, weight.bits, weight.group_size)
        want = ((self.out_size, self.in_size), self.bits, self.group_size)
        if have != want:
            raise ValueError(f"{self.name}: (shape, bits, group) is {have}, the graph has {want}")
        return weight

    def initializers(
        self,
        g: GraphBuilder,
        weight: tuple[tuple[int, ...], np.dtype[np.generic]],
        scales: tuple[tuple[int, ...], np.dtype[np.generic]],
        lay_out: Callable[[QuantizedWeight], tuple[Array, Array]],
    ) -> tuple[ir.Value, ir.Value]:
        """Weight and scales as lazy initializers that are loaded and laid out once for both.

        Initializers are written in order, so the scales wait for one tensor only.
        """
        waiting: list[Array] = []

        def load_weight() -> Array:
            codes, scale_array = lay_out(self.loaded())
            waiting[:] = [scale_array]
            return codes

        def load_scales() -> Array:
            return waiting.pop() if waiting else lay_out(self.loaded())[1]

        return (
            g.weight(f"{self.name}.weight", LazyWeight(*weight, load_weight)),
            g.weight(f"{self.name}.scales", LazyWeight(*scales, load_scales)),
        )


@dataclass(frozen=True)
class _IntegerRows:
    """Rows as uint8 around ``zero``, and what their products are multiplied by.

    ``codes`` are [terms, T, K] and ``size`` [terms, T, 1]; products of all terms are added up.
    """

    codes: ir.Value
    size: ir.Value
    code_scale: ir.Value
    zero: ir.Value
    terms: int


def _divided(g: GraphBuilder, hidden: ir.Value, name: str, scale: Array) -> ir.Value:
    return g.op("Mul", hidden, g.vector(f"{name}.input_factor", 1 / scale))


def _one_term(g: GraphBuilder, hidden: ir.Value) -> _IntegerRows:
    """Divide each row by its largest magnitude and round to 127 steps each way."""
    rows, size = _over_largest(g, hidden)
    scale = g.constant("activation_scale", np.array(1.0 / _LARGEST_CODE, np.float32))
    zero = g.constant("activation_zero", np.array(_ACTIVATION_ZERO, np.uint8))
    return _IntegerRows(g.op("QuantizeLinear", rows, scale, zero), size, scale, zero, 1)


def _two_terms(g: GraphBuilder, hidden: ir.Value) -> _IntegerRows:
    """Round each row [1, T, K] to 63 steps each way, and what that leaves to 126 in each step.

    Both terms are rows of one product, so that weights are read once.
    """
    rows, size = _over_largest(g, hidden)
    step = 1.0 / _LARGEST_TERM_CODE
    scale = g.constant("activation_scale", np.array(step, np.float32))
    zero = g.constant("activation_zero", np.array(_TERM_ZERO, np.uint8))
    rest_scale = g.constant("activation_rest_scale", np.array(step / _TERM_STEPS, np.float32))
    codes = g.op("QuantizeLinear", rows, scale, zero)
    rest = g.op("Sub", rows, g.op("DequantizeLinear", codes, scale, zero))
    rest_codes = g.op("QuantizeLinear", rest, rest_scale, zero)
    sizes = np.array([1.0, 1.0 / _TERM_STEPS], np.float32).reshape(2, 1, 1)
    return _IntegerRows(
        g.op("Concat", codes, rest_codes, axis=0),
        g.op("Mul", size, g.constant("activation_terms", sizes)),
        scale,
        zero,
        2,
    )


def _block_terms(g: GraphBuilder, hidden: ir.Value, block: int) -> ir.Value:
    """Rows [1, T, K] as [2, T, K]: what MatMulNBits keeps of them, and the rest.

    MatMulNBits rounds each block to 127 steps each way. Of the first row, which is rounded so
    already, it changes nothing; of the second it loses a step in 127 of half a step.
    """
    blocks = g.op("Reshape", hidden, g.integers(0, 0, -1, block))
    shares, size = _over_largest(g, blocks)
    scale = g.constant("activation_block_scale", np.array(1.0 / _LARGEST_CODE, np.float32))
    zero = g.constant("activation_block_zero", np.array(_ACTIVATION_ZERO, np.uint8))
    codes = g.op("QuantizeLinear", shares, scale, zero)
    values = g.op("Mul", g.op("DequantizeLinear", codes, scale, zero), size)
    first = g.op("Reshape", values, g.integers(0, 0, -1))
    return g.op("Concat", first, g.op("Sub", hidden, first), axis=0)


def _over_largest(g: GraphBuilder, hidden: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Rows over their largest magnitude, and that magnitude."""
    if g.compute != np.float32:
        raise RequestError(
            f"the integer route was asked in a {g.compute_name} graph; MatMulIntegerToFloat is "
            "used with float32 only (cpu target). Take the nbits route."
        )
    size = g.op("ReduceMax", g.op("Abs", hidden), g.integers(-1), keepdims=1)
    # A row of zeros: 0 / tiny * tiny is 0, where 0 / 0 would spread over the whole answer.
    size = g.op("Max", size, g.constant("smallest_normal", np.array(_SMALLEST_NORMAL, np.float32)))
    return g.op("Div", hidden, size), size


def _matmul_integer(g: GraphBuilder, rows: _IntegerRows, weight: _Weight) -> ir.Value:
    def lay_out(quantized: QuantizedWeight) -> tuple[Array, Array]:
        tensors = to_matmul_integer(quantized)
        return tensors.weight, tensors.scales

    codes, scales = weight.initializers(
        g,
        ((weight.in_size, weight.out_size), np.dtype(np.int8)),
        ((weight.out_size,), np.dtype(np.float32)),
        lay_out,
    )
    product = g.op(
        "MatMulIntegerToFloat",
        rows.codes,
        codes,
        rows.code_scale,
        scales,
        rows.zero,
        domain=MICROSOFT,
        name=weight.name,
    )
    scaled = g.op("Mul", product, rows.size)
    return scaled if rows.terms == 1 else g.op("ReduceSum", scaled, g.integers(0), keepdims=1)


def _matmul_nbits(g: GraphBuilder, hidden: ir.Value, weight: _Weight, largest: int) -> ir.Value:
    block = matmul_block(weight.in_size, weight.group_size, largest)
    num_blocks = -(-weight.in_size // block)

    def lay_out(quantized: QuantizedWeight) -> tuple[Array, Array]:
        tensors = to_matmul_nbits(quantized, block_size=block, scale_dtype=g.compute)
        return tensors.weight, tensors.scales

    codes, scales = weight.initializers(
        g,
        ((weight.out_size, num_blocks, block * weight.bits // 8), np.dtype(np.uint8)),
        ((weight.out_size, num_blocks), g.compute),
        lay_out,
    )
    return g.op(
        "MatMulNBits",
        hidden,
        codes,
        scales,
        domain=MICROSOFT,
        name=weight.name,
        K=weight.in_size,
        N=weight.out_size,
        bits=weight.bits,
        block_size=block,
        # Integer products on the CPU: 3 to 6 times as fast with 4 bits, the only kernel with 8.
        # CUDA has no such choice; there the level stays out and the CPU computes in full.
        accuracy_level=4 if g.compute == np.float32 else 0,
    )


def _portable(g: GraphBuilder, hidden: ir.Value, weight: _Weight) -> ir.Value:
    per_channel = weight.group_size == PER_CHANNEL
    code_type = np.dtype(ml_dtypes.int4) if weight.bits == 4 else np.dtype(np.int8)

    def lay_out(quantized: QuantizedWeight) -> tuple[Array, Array]:
        tensors = to_dequantize_linear(quantized)
        scales = tensors.scales[0] if per_channel else tensors.scales
        return tensors.weight.astype(code_type, copy=False), scales.astype(g.compute)

    groups = () if per_channel else (weight.in_size // weight.group_size,)
    codes, scales = weight.initializers(
        g,
        ((weight.in_size, weight.out_size), code_type),
        ((*groups, weight.out_size), g.compute),
        lay_out,
    )
    attributes = {"axis": 1} if per_channel else {"axis": 0, "block_size": weight.group_size}
    name = f"{weight.name}.dequantized"
    (values,) = g.ops("DequantizeLinear", [codes, scales], attributes, name=name)
    return g.op("MatMul", hidden, values, name=weight.name)


def _add_bias(
    g: GraphBuilder, source: TensorSource, layer: LinearLayer, product: ir.Value
) -> ir.Value:
    if not layer.bias:
        return product
    row = vectors(source, [f"{part}.bias" for part in layer.names])
    return g.op("Add", product, g.vector(f"{layer.names[0]}.bias", row))


def _side_by_side(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of the same inputs as one, outputs one after another."""
    if len(parts) == 1:
        return parts[0]
    return QuantizedWeight(
        np.concatenate([part.qweight for part in parts]),
        np.concatenate([part.scales for part in parts]),
        parts[0].bits,
        parts[0].group_size,
        QuantizationReport(),
    )
