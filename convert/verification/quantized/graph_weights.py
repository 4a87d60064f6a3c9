"""GraphWeights: the linear layers of an artifact's decoder, read back from what its graph holds.

The unpackers here are their own, written from the operators' contracts; the writer's functions
(``convert/checkpoint/formats/packing.py``) are not asked, or one mistake would hide the other.

    MatMul                 [K, N] float, perhaps through a Cast
    MatMulNBits            [N, blocks, block_size * bits / 8], low bits first; no zero points mean
                           2^(bits-1)
    MatMulIntegerToFloat   int8 [K, N], one scale a column; activations in one term of codes or two
    DequantizeLinear       int4 or int8 [K, N], scales [N] or [K / block_size, N]

Source: the operators' contracts of ONNX Runtime 1.32 and ONNX opset 21.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llava_edge.convert.onnx.graph_file import GraphFile, attribute
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.util.arrays import Array

WHOLE_ROW = -1
"""``GraphWeights.rounding``: one scale for a whole row of activations."""
TWO_TERMS = -2
"""The same, and what the codes of the row leave over has codes of its own."""
_WITH_CODES = ("MatMulNBits", "MatMulIntegerToFloat", "DequantizeLinear")
_INTEGER_ACCURACY = 4
# What ONNX Runtime makes of DequantizeLinear with one scale a column when it fuses it.
_FUSED_BLOCK = 32
_ELEMENTS_AT_A_TIME = 1 << 22
_CACHED_ELEMENTS = 1 << 17
"""Float32 numbers that stay in a processor's cache from one operation to the next."""


def row_blocks(
    num_rows: int, num_columns: int, elements: int = _ELEMENTS_AT_A_TIME
) -> Iterator[slice]:
    """Rows of a matrix [rows, columns], as many at a time as are looked at together."""
    step = max(1, elements // max(1, num_columns))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


@dataclass(frozen=True)
class GraphCodes:
    """One quantised linear layer of N outputs and K inputs as the graph holds it.

    ``value = (code - zero) * scale``. ``codes`` are uint8 [N, K] and ``scales`` [N, blocks] in the
    graph's type, one for ``block_size`` neighbouring columns (the last block may be cut short).
    ``zeros`` is one code for all, or uint8 [N, blocks].
    """

    codes: NDArray[np.uint8]
    scales: Array
    zeros: int | NDArray[np.uint8]
    bits: int
    block_size: int

    @property
    def has_default_zero(self) -> bool:
        """Whether the value 0 is at 2^(bits-1) everywhere."""
        return bool(np.all(np.asarray(self.zeros) == 2 ** (self.bits - 1)))

    def cut(self, rows: slice) -> GraphCodes:
        """Some of the outputs, without a copy."""
        zeros = self.zeros if isinstance(self.zeros, int) else self.zeros[rows]
        return GraphCodes(self.codes[rows], self.scales[rows], zeros, self.bits, self.block_size)

    def dequantize(self) -> NDArray[np.float32]:
        """Values float32 [N, K]."""
        num_rows, num_columns = self.codes.shape
        values = np.empty((num_rows, num_columns), np.float32)
        for rows in row_blocks(num_rows, num_columns, _CACHED_ELEMENTS):
            part, out = self.cut(rows), values[rows]
            out[...] = part.codes
            if isinstance(part.zeros, int):
                out -= np.float32(part.zeros)
            else:
                out -= self._spread(part.zeros.astype(np.float32))
            out *= self._spread(part.scales.astype(np.float32))
        return values

    def _spread(self, by_block: NDArray[np.float32]) -> NDArray[np.float32]:
        if by_block.shape[1] == 1:
            return by_block
        return by_block.repeat(self.block_size, axis=1)[:, : self.codes.shape[1]]


class GraphWeights:
    """Reads one linear layer of a graph at a time; layers packed along N come apart.

    A layer is found by the name of its initializer; operator, scales and zero points are those of
    the node that reads it.

    Args:
        graph: decoder, or tower and projector.
        query_size: outputs of a query projection, by which packed ones are split.
        key_value_size: outputs of a key or value projection.
    """

    def __init__(self, graph: GraphFile, query_size: int, key_value_size: int) -> None:
        self.graph = graph
        self._sizes = (query_size, key_value_size)

    @classmethod
    def open(cls, artifact: Artifact) -> GraphWeights:
        """The decoder of an opened artifact.

        Raises:
            ArtifactError: the graph cannot be read.
        """
        manifest = artifact.manifest
        graph = GraphFile(artifact.path(manifest.decoder.file), "decoder")
        text = manifest.model.text
        return cls(graph, text.query_size, text.key_value_size)

    def holds(self, name: str) -> bool:
        """Whether a layer is one of the language model's."""
        return name.startswith("language_model.layers.") and name.endswith("_proj")

    def input_scale(self, _name: str) -> NDArray[np.float32] | None:
        """Nothing: no input of the language model is divided by anything but its rows' sizes."""
        return None

    def linear(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Dequantised weight of one layer.

        Args:
            name: canonical name without ``.weight``, such as
                ``language_model.layers.3.self_attn.k_proj`` or ``lm_head``.
            rows: some of the outputs, so that a head need not be in memory whole.

        Returns:
            float32 [N, K], the numbers that the kernel computes with.

        Raises:
            ArtifactError: the graph holds no such layer, or in a form that is not known.
        """
        codes = self.codes(name, rows)
        if codes is not None:
            return codes.dequantize()
        return _turned(self.floats(name)[:, rows or slice(None)]).astype(np.float32, copy=False)

    def floats(self, name: str) -> Array:
        """Weight [K, N] of a layer that is not quantised, in the type it is stored in.

        Raises:
            ArtifactError: there is no such layer, or it is quantised.
        """
        _, weight = self._find(name)
        if self.graph.dtype(weight) not in ("float16", "float32"):
            raise ArtifactError(f"{self.graph.path}: {weight} holds no float numbers")
        rows = self._rows(name, weight)
        values = self.graph.read(weight)
        return values if rows is None else values[:, rows]

    def codes(self, name: str, rows: slice | None = None) -> GraphCodes | None:
        """Codes of one layer, or of some of its outputs; None where it is stored as floats.

        Raises:
            ArtifactError: the graph holds no such layer, or in a form that is not known.
        """
        node, weight = self._find(name)
        rows = _within(self._rows(name, weight), rows)
        if node.op_type == "MatMulNBits":
            return self._nbits(node, rows)
        if node.op_type == "MatMulIntegerToFloat":
            return self._integer(node, rows)
        if node.op_type == "DequantizeLinear":
            return self._dequantized(node, rows)
        return None

    def holds_codes(self, name: str) -> bool:
        """Whether a layer is quantised; nothing of it is read.

        Raises:
            ArtifactError: the graph holds no such layer.
        """
        return self._find(name)[0].op_type in _WITH_CODES

    def tensors(self, name: str) -> set[str]:
        """Initializers that a layer is made of: its weight and, where it has codes, the scales."""
        node, weight = self._find(name)
        place = {"MatMulNBits": 2, "MatMulIntegerToFloat": 3, "DequantizeLinear": 1}
        if node.op_type not in place:
            return {weight}
        return {weight, str(node.input[place[node.op_type]])}

    def rounding(self, name: str) -> int | None:
        """How the layer's kernel rounds its activations to 8 bits.

        Returns:
            Columns that share a scale; ``WHOLE_ROW`` or ``TWO_TERMS`` for a whole row; None where
            it computes with the activations as they are, or with 16 bits of each block.
        """
        node, _ = self._find(name)
        if node.op_type == "MatMulNBits":
            level = attribute(node, "accuracy_level", 0)
            maker = self.graph.producer(node.input[0])
            if maker is not None and maker.op_type == "Concat":
                return None
            return attribute(node, "block_size") if level == _INTEGER_ACCURACY else None
        if node.op_type == "MatMulIntegerToFloat":
            maker = self.graph.producer(node.input[0])
            return WHOLE_ROW if maker is None or maker.op_type != "Concat" else TWO_TERMS
        if node.op_type == "DequantizeLinear" and self.graph.dtype(node.input[1]) == "float32":
            # ONNX Runtime fuses it with its MatMul into MatMulNBits at the integer level.
            return attribute(node, "block_size", 0) or _FUSED_BLOCK
        return None

    def _find(self, name: str) -> tuple[Any, str]:
        """The node that reads a layer's weight, and the initializer."""
        packed = name
        if name.endswith("_proj") and f"{name}.weight" not in self.graph.initializers:
            packed = f"{name.rsplit('.', 1)[0]}.q_proj"
        weight = f"{packed}.weight"
        if weight not in self.graph.initializers:
            raise ArtifactError(f"{self.graph.path} holds no weight of {name}")
        nodes = self.graph.consumers(weight)
        if len(nodes) != 1:
            raise ArtifactError(f"{self.graph.path}: {len(nodes)} nodes read {weight}, not one")
        return nodes[0], weight

    def _rows(self, name: str, weight: str) -> slice | None:
        """Outputs of a layer within the packed one; None where it stands alone."""
        kind = name.rsplit(".", 1)[-1]
        if not weight.endswith("self_attn.q_proj.weight"):
            return None
        queries, keys = self._sizes
        starts = {"q_proj": 0, "k_proj": queries, "v_proj": queries + keys}
        return slice(starts[kind], starts[kind] + (queries if kind == "q_proj" else keys))

    def _nbits(self, node: Any, rows: slice | None) -> GraphCodes:
        bits, block = attribute(node, "bits", 4), attribute(node, "block_size")
        num_columns = attribute(node, "K")
        extra = [name for name in node.input[4:] if name]
        if bits not in (4, 8) or extra:
            raise ArtifactError(
                f"{self.graph.path}: {node.name} has {bits} bits and further inputs {extra}; read "
                "are 4 and 8 bits with weight, scales and zero points"
            )
        packed = self.graph.read(node.input[1], rows)
        codes = _low_bits_first(packed.reshape(len(packed), -1), bits)[:, :num_columns]
        # Scales may be stored flat.
        scales = self.graph.read(node.input[2]).reshape(attribute(node, "N"), -1)
        scales = scales if rows is None else scales[rows]
        zeros: int | NDArray[np.uint8] = 1 << (bits - 1)
        if len(node.input) > 3 and node.input[3]:
            stored = self.graph.read(node.input[3]).reshape(attribute(node, "N"), -1)
            zeros = _low_bits_first(stored, bits)[:, : scales.shape[1]]
            zeros = zeros if rows is None else zeros[rows]
        return GraphCodes(codes, scales, zeros, bits, block)

    def _integer(self, node: Any, rows: slice | None) -> GraphCodes:
        codes = self._signed(node.input[1], node.input[5] if len(node.input) > 5 else "", 8, rows)
        scales = self.graph.read(node.input[3]).reshape(-1)
        scales = scales if rows is None else scales[rows]
        return GraphCodes(codes, scales[:, None], 128, 8, codes.shape[1])

    def _dequantized(self, node: Any, rows: slice | None) -> GraphCodes:
        bits = 4 if self.graph.dtype(node.input[0]) in ("int4", "uint4") else 8
        zero = node.input[2] if len(node.input) > 2 else ""
        codes = self._signed(node.input[0], zero, bits, rows)
        scales = self.graph.read(node.input[1])
        by_row = scales.T if scales.ndim == 2 else scales.reshape(-1, 1)
        by_row = by_row if rows is None else by_row[rows]
        block = attribute(node, "block_size", 0) or codes.shape[1]
        return GraphCodes(codes, by_row, 1 << (bits - 1), bits, block)

    def _signed(self, weight: str, zero: str, bits: int, rows: slice | None) -> NDArray[np.uint8]:
        """Codes [N, K] with zero at 2^(bits-1) of a weight [K, N] that counts from its own zero."""
        if zero and np.any(self.graph.read(zero)):
            raise ArtifactError(f"{self.graph.path}: {weight} has a zero point other than 0")
        if not self.graph.dtype(weight).startswith("int"):
            raise ArtifactError(f"{self.graph.path}: {weight} is {self.graph.dtype(weight)}")
        turned = _turned(self._columns(weight, rows))
        codes: NDArray[np.uint8] = turned.view(np.uint8)
        # Modulo 256, -128 + 128 is 0 as it should be.
        codes += np.uint8(1 << (bits - 1))
        return codes

    def _columns(self, weight: str, columns: slice | None) -> Array:
        """Some columns of a weight [K, N], read in blocks of rows."""
        if columns is None:
            return self.graph.read(weight)
        num_rows, width = self.graph.shape(weight)
        blocks = (self.graph.read(weight, rows)[:, columns] for rows in row_blocks(num_rows, width))
        return np.concatenate([np.ascontiguousarray(block) for block in blocks])


def _within(layer: slice | None, rows: slice | None) -> slice | None:
    """Some outputs of a layer as outputs of the packed one that it may be part of."""
    if layer is None or rows is None:
        return layer or rows
    return slice(layer.start + rows.start, layer.start + rows.stop)


def _low_bits_first(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [N, n] of bytes [N, n * bits / 8]."""
    if bits == 8:
        return packed
    codes = np.empty((packed.shape[0], packed.shape[1], 2), np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, :, 0])
    np.right_shift(packed, 4, out=codes[:, :, 1])
    return codes.reshape(packed.shape[0], -1)


def _turned(values: Array) -> Array:
    """The transpose as a copy; torch works in cache-sized blocks on all cores."""
    turned: Array = torch.from_numpy(values).t().contiguous().numpy()
    return turned
