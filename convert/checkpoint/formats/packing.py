"""Packing: the exact layouts that codes and scales take in a checkpoint and in a graph.

Four layouts of one QuantizedWeight, N outputs and K inputs:

- GptqTensors, the Hugging Face GPTQ v1 checkpoint: ``qweight`` holds codes along K, low bits first,
  ``qzeros`` holds zero - 1.
- MatMulNBitsTensors, ONNX Runtime's com.microsoft.MatMulNBits: blocks along K, low bits first; no
  zero points, which means 2^(bits-1).
- MatMulIntegerTensors, com.microsoft.MatMulIntegerToFloat: signed int8 [K, N], one scale a column.
- DequantizeLinearTensors, the standard operator: signed [K, N], scales [groups, N].

Bytes are little-endian, whatever the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llava_edge.convert.checkpoint.formats.rounding import (
    GROUP_SIZES,
    PER_CHANNEL,
    QuantizationReport,
    QuantizedWeight,
)
from llava_edge.profiles.errors import CheckpointError, RequestError
from llava_edge.runtime.util.arrays import Array

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class GptqTensors:
    """One linear layer of a Hugging Face GPTQ v1 checkpoint.

    ``qweight`` int32 [K * bits / 32, N]; ``qzeros`` int32 [groups, N * bits / 32] of zero - 1;
    ``scales`` float16 [groups, N]; ``g_idx`` int32 [K], the group of each column.
    """

    qweight: Int32
    qzeros: Int32
    scales: Array
    g_idx: Int32


@dataclass(frozen=True)
class MatMulNBitsTensors:
    """Inputs B and scales of MatMulNBits: uint8 [N, blocks, block_size * bits / 8], [N, blocks]."""

    weight: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.floating[Any]]
    bits: int
    block_size: int


@dataclass(frozen=True)
class MatMulIntegerTensors:
    """Inputs B and b_scale of MatMulIntegerToFloat: int8 [K, N], float32 [N]."""

    weight: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]


@dataclass(frozen=True)
class DequantizeLinearTensors:
    """Inputs x and x_scale of DequantizeLinear: signed codes int8 [K, N], float16 [groups, N]."""

    weight: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float16]


def choose_group_size(columns: Sequence[int]) -> int:
    """The largest of 128, 64, 32 that divides every K, else -1: one scale a row.

    One size serves a whole model, since its checkpoint has one.
    """
    for size in GROUP_SIZES:
        if size != PER_CHANNEL and all(k % size == 0 for k in columns):
            return size
    return PER_CHANNEL


def to_gptq(quantized: QuantizedWeight) -> GptqTensors:
    """Pack for a GPTQ v1 checkpoint.

    Raises:
        CheckpointError: K or N does not fill whole int32 words.
    """
    bits = quantized.bits
    num_rows, num_columns = quantized.qweight.shape
    per_word = 32 // bits
    if num_rows % per_word or num_columns % per_word:
        raise CheckpointError(
            f"a {bits}-bit weight [{num_rows}, {num_columns}] does not fill whole 32-bit words; a "
            f"GPTQ checkpoint needs outputs and inputs that are multiples of {per_word}"
        )
    words = pack_codes(quantized.qweight, bits).view("<i4")
    num_groups = quantized.scales.shape[1]
    zeros = np.full((num_groups, num_rows), quantized.zero - 1, np.uint8)
    return GptqTensors(
        qweight=np.ascontiguousarray(words.T),
        qzeros=pack_codes(zeros, bits).view("<i4"),
        scales=np.ascontiguousarray(quantized.scales.T),
        g_idx=quantized.g_idx,
    )


def from_gptq(
    tensors: GptqTensors, *, bits: int, group_size: int, name: str = "weight"
) -> QuantizedWeight:
    """Unpack a layer of a GPTQ v1 checkpoint. Its report holds no error: the original is unknown.

    Raises:
        CheckpointError: the layer cannot be kept faithfully (zero points other than 2^(bits-1), a
            column order, other groups or bits, unusable scales) or its tensors do not go together;
            all reasons are listed.
    """
    if faults := gptq_faults(tensors, bits, group_size):
        listed = "\n  - ".join(faults)
        raise CheckpointError(
            f"{name} of the GPTQ checkpoint cannot be kept faithfully:\n  - {listed}\n"
            "Convert the unquantised checkpoint instead."
        )
    words = np.ascontiguousarray(tensors.qweight.T).astype("<i4", copy=False)
    scales = np.ascontiguousarray(tensors.scales.T.astype(np.float16))
    report = QuantizationReport(mse=None)
    return QuantizedWeight(
        unpack_codes(words.view(np.uint8), bits), scales, bits, group_size, report
    )


def gptq_faults(tensors: GptqTensors, bits: int, group_size: int) -> list[str]:
    """Why a layer cannot be kept faithfully; empty where it can. Codes are not looked at."""
    return _shape_faults(tensors, bits, group_size) or _value_faults(tensors, bits, group_size)


def _shape_faults(tensors: GptqTensors, bits: int, group_size: int) -> list[str]:
    faults: list[str] = []
    if bits not in (4, 8):
        faults.append(f"{bits} bits; only 4 and 8 have kernels")
    if group_size not in GROUP_SIZES:
        faults.append(f"group_size {group_size} is not one of 128, 64, 32, -1")
    for field in ("qweight", "qzeros", "g_idx"):
        dtype = getattr(tensors, field).dtype
        if dtype != np.int32:
            faults.append(f"{field} is {dtype}, not int32")
    if tensors.scales.dtype not in (np.float16, np.float32):
        faults.append(f"scales are {tensors.scales.dtype}, not float16")
    if tensors.qweight.ndim != 2:
        faults.append(f"qweight has {tensors.qweight.ndim} axes, not 2")
    if faults:
        return faults
    num_columns, num_rows = tensors.qweight.shape[0] * 32 // bits, tensors.qweight.shape[1]
    if group_size != PER_CHANNEL and num_columns % group_size:
        return [f"{num_columns} columns are no multiple of group_size {group_size}"]
    num_groups = 1 if group_size == PER_CHANNEL else num_columns // group_size
    expected = {
        "qzeros": (num_groups, num_rows * bits // 32),
        "scales": (num_groups, num_rows),
        "g_idx": (num_columns,),
    }
    for field, shape in expected.items():
        found = getattr(tensors, field).shape
        if found != shape:
            faults.append(f"{field} has shape {list(found)}; qweight asks for {list(shape)}")
    return faults


def _value_faults(tensors: GptqTensors, bits: int, group_size: int) -> list[str]:
    faults: list[str] = []
    columns = np.arange(len(tensors.g_idx))
    moved = tensors.g_idx != (0 if group_size == PER_CHANNEL else columns // group_size)
    if moved.any():
        faults.append(
            f"g_idx puts {int(moved.sum())} columns into other groups (act-order, desc_act), the "
            f"first is column {int(moved.argmax())}; no kernel here follows that order"
        )
    words = np.ascontiguousarray(tensors.qzeros).astype("<i4", copy=False)
    zeros = unpack_codes(words.view(np.uint8), bits)
    zero = 2 ** (bits - 1)
    other = zeros != zero - 1
    if bool((zeros == zero).all()):
        faults.append(f"qzeros hold {zero} everywhere, which is the gptq_v2 layout; v1 is read")
    elif other.any():
        faults.append(
            f"{int(other.sum())} of {other.size} zero points are not {zero}, the first is "
            f"{int(zeros[other][0]) + 1} (sym is false); only symmetric weights are kept"
        )
    with np.errstate(over="ignore"):
        halves = tensors.scales.astype(np.float16)
    if not np.isfinite(tensors.scales).all():
        faults.append("some scales are not finite")
    elif (tensors.scales <= 0).any():
        faults.append(f"{int((tensors.scales <= 0).sum())} scales are not positive")
    elif (halves != tensors.scales).any():
        faults.append("some float32 scales have no exact float16")
    return faults


def to_matmul_nbits(
    quantized: QuantizedWeight, *, block_size: int, scale_dtype: npt.DTypeLike = np.float32
) -> MatMulNBitsTensors:
    """Pack for MatMulNBits with blocks of ``block_size`` columns.

    A block smaller than the group repeats the group's scale, which changes no value. Columns that
    do not fill the last block of a row scaled per channel are filled with the value 0.

    Args:
        quantized: the weight.
        block_size: a power of two from 16 on that divides the group; any for per-channel scales.
        scale_dtype: float32 or float16, the type of the activations.

    Raises:
        RequestError: the block does not fit the group.
    """
    num_rows, num_columns = quantized.qweight.shape
    group = quantized.group_size
    if (
        block_size < 16
        or block_size & (block_size - 1)
        or (group != PER_CHANNEL and group % block_size)
    ):
        raise RequestError(
            f"block_size {block_size} was asked for groups of {group}; MatMulNBits takes powers of "
            "two from 16 on, and a block must not span two groups"
        )
    num_blocks = -(-num_columns // block_size)
    codes = quantized.qweight
    if num_columns % block_size:
        codes = np.full((num_rows, num_blocks * block_size), quantized.zero, np.uint8)
        codes[:, :num_columns] = quantized.qweight
    repeats = num_blocks // quantized.scales.shape[1]
    return MatMulNBitsTensors(
        weight=pack_codes(codes, quantized.bits).reshape(num_rows, num_blocks, -1),
        scales=np.repeat(quantized.scales, repeats, axis=1).astype(scale_dtype),
        bits=quantized.bits,
        block_size=block_size,
    )


def unpack_matmul_nbits(tensors: MatMulNBitsTensors, num_columns: int) -> npt.NDArray[np.float32]:
    """Values float32 [N, K] that MatMulNBits computes with; what fills the last block is cut."""
    num_rows = tensors.weight.shape[0]
    codes = unpack_codes(tensors.weight.reshape(num_rows, -1), tensors.bits)
    values = codes.astype(np.float32) - np.float32(2 ** (tensors.bits - 1))
    scales = tensors.scales.astype(np.float32).repeat(tensors.block_size, axis=1)
    return (values * scales)[:, :num_columns]


def to_matmul_integer(quantized: QuantizedWeight) -> MatMulIntegerTensors:
    """Lay an 8-bit weight with one scale a row out for MatMulIntegerToFloat.

    Raises:
        RequestError: it has other bits, or scales for groups of columns.
    """
    if quantized.bits != 8 or quantized.group_size != PER_CHANNEL:
        raise RequestError(
            f"a weight of {quantized.bits} bits with group_size {quantized.group_size} was given; "
            "MatMulIntegerToFloat takes 8 bits and one scale a row (group_size -1)"
        )
    # Code 0 stands for -128: the top bit is all that differs.
    signed = (quantized.qweight ^ np.uint8(0x80)).view(np.int8)
    return MatMulIntegerTensors(_turned(signed), quantized.scales[:, 0].astype(np.float32))


def to_dequantize_linear(quantized: QuantizedWeight) -> DequantizeLinearTensors:
    """Lay a weight out for DequantizeLinear in front of a MatMul: signed codes, K first."""
    # In 8 bits 0 - 128 wraps around to 128, which is -128 to an int8.
    signed = (quantized.qweight - np.uint8(quantized.zero)).view(np.int8)
    return DequantizeLinearTensors(_turned(signed), np.ascontiguousarray(quantized.scales.T))


def _turned(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """The transpose as a copy: torch works in cache-sized blocks, numpy takes 3 times as long."""
    turned: npt.NDArray[np.int8] = torch.from_numpy(codes).t().contiguous().numpy()
    return turned


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes [..., n] to bytes [..., n * bits / 8], low bits first."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def unpack_codes(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Bytes [..., n * bits / 8] to codes [..., n]; the inverse of ``pack_codes``."""
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    codes[..., 0::2] = packed & np.uint8(0x0F)
    codes[..., 1::2] = packed >> np.uint8(4)
    return codes
