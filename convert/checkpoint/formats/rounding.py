"""QuantizedWeight: integer codes and scales of one weight matrix, and rounding to the nearest code.

Symmetric: ``value = (code - zero) * scale`` with ``zero = 2^(bits-1)``, so codes reach down to -8
(4 bits) or -128 (8 bits) scales. Scales are rounded to float16 before anything is rounded with
them: what is stored is what was solved for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from llava_edge.convert.util.parallel import map_rows
from llava_edge.profiles.errors import CheckpointError, RequestError

Codes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.float16]
ScaleRule = Literal["absmax", "mse"]

PER_CHANNEL = -1
GROUP_SIZES = (128, 64, 32, PER_CHANNEL)
SMALLEST_SCALE = 2.0**-14
"""Smallest normal float16; kernels may flush smaller ones to zero."""
LARGEST_SCALE = 65504.0

# Four times as many factors lower the solver's error by half a percent.
_SHRINK_FACTORS = tuple(1.0 - 0.08 * step for step in range(8))
_ELEMENTS_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class QuantizationReport:
    """What rounding one matrix cost.

    ``relative_error`` is ||X (W - Ŵ)^T||² / ||X W^T||² over the calibration rows X, and
    ``rtn_relative_error`` the same for rounding to nearest with the MSE scale; both are None where
    no Hessian was given. ``mse`` is the plain mean of (W - Ŵ)², None where W is unknown.
    ``dead_columns`` counts inputs that were zero in every calibration row, ``rows_rounded`` the
    rows that keep rounding to nearest because the solver did not beat it there.
    """

    mse: float | None = None
    relative_error: float | None = None
    rtn_relative_error: float | None = None
    damp_percent: float | None = None
    dead_columns: int = 0
    rows_rounded: int = 0


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes and scales of a weight matrix of N outputs and K inputs.

    ``qweight`` is uint8 [N, K], ``scales`` float16 [N, K / group_size]; a group is that many
    neighbouring columns, or the whole row where ``group_size`` is -1.
    """

    qweight: Codes
    scales: Scales
    bits: int
    group_size: int
    report: QuantizationReport

    @property
    def zero(self) -> int:
        """The code of the value 0."""
        return int(2 ** (self.bits - 1))

    @property
    def columns_per_group(self) -> int:
        """Columns that share a scale."""
        return int(self.qweight.shape[1] // self.scales.shape[1])

    @property
    def g_idx(self) -> npt.NDArray[np.int32]:
        """Group of each column, int32 [K]; always ``column // group_size``."""
        columns = np.arange(self.qweight.shape[1], dtype=np.int32)
        return columns // np.int32(self.columns_per_group)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Exact float32 values [N, K]: an 8-bit integer times a float16 fits float32's mantissa."""
        return dequantize(self.qweight, self.scales, self.bits)


def dequantize(qweight: Codes, scales: Scales, bits: int) -> npt.NDArray[np.float32]:
    """Values float32 [N, K] of codes [N, K] and scales [N, groups]."""
    num_rows, num_columns = qweight.shape
    values = qweight.astype(np.float32)
    values -= np.float32(1 << (bits - 1))
    grouped = values.reshape(num_rows, scales.shape[1], -1)
    grouped *= scales.astype(np.float32)[:, :, None]
    return grouped.reshape(num_rows, num_columns)


def round_to_nearest(
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    scale: ScaleRule = "mse",
    reduce_range: bool = False,
    name: str = "weight",
) -> QuantizedWeight:
    """Round each weight to the nearest code.

    Args:
        weight: float [N, K], any float type.
        bits: 4 or 8.
        group_size: 128, 64, 32, or -1 for one scale a row.
        scale: ``absmax`` covers the largest weight, ``mse`` minimises the squared error.
        reduce_range: keep 8-bit codes within -64 … 63 scales. Processors that add two products of
            uint8 and int8 in 16 bits (AVX2 and AVX-512 without VNNI) saturate beyond; the layouts
            stay those of 8 bits.
        name: what an error message calls the matrix.

    Raises:
        RequestError: bits or group size are not among those above, or 4 bits are to be reduced.
        CheckpointError: the matrix is malformed, not finite, or K is no multiple of the group.
    """
    check_settings(bits, group_size, reduce_range)
    check_weight(weight, group_size, name)
    range_bits = bits - reduce_range
    num_rows, num_columns = weight.shape
    group = num_columns if group_size == PER_CHANNEL else group_size
    qweight = np.empty((num_rows, num_columns), np.uint8)
    scales = np.empty((num_rows, num_columns // group), np.float16)

    def work(rows: slice) -> float:
        values = weight[rows].T.to(torch.float64, memory_format=torch.contiguous_format)
        squared = 0.0
        for index, low in enumerate(range(0, num_columns, group)):
            part = values[low : low + group]
            found = find_scales(part, None, range_bits, search=scale == "mse")
            codes = nearest_codes(part, found, range_bits)
            scales[rows, index] = found.to(torch.float16).numpy()
            qweight[rows, low : low + group] = unsigned(codes, bits).T.numpy()
            squared += float(codes.mul_(found).sub_(part).square_().sum())
        return squared

    squared = sum(map_rows(weight.shape, work, small=True))
    report = QuantizationReport(mse=squared / weight.numel())
    return QuantizedWeight(qweight, scales, bits, group_size, report)


def find_scales(
    values: torch.Tensor, column_weights: torch.Tensor | None, bits: int, *, search: bool
) -> torch.Tensor:
    """Scale of each row for one group of columns.

    Without ``search`` it is 2 max|w| / (2^bits - 1), GPTQ's own symmetric scale. With it, the scale
    that minimises sum_k h_k (w_k - ŵ_k)² among that one, max|w| / 2^(bits-1), and max|w| /
    (2^(bits-1) - 1) times 1.00, 0.92 … 0.44, then the least-squares scale of the best one's codes.
    The earlier candidate wins a tie.

    Args:
        values: float64 [columns, rows]; columns first, so that a column is contiguous.
        column_weights: h, float64 [columns]; None weighs all columns alike.
        bits: range of the codes: -2^(bits-1) … 2^(bits-1) - 1.
        search: whether to search at all.

    Returns:
        float64 [rows], each exactly a float16 in the normal range.
    """
    if not search:
        return _representable(values.abs().amax(0) * (2.0 / (2**bits - 1)))
    if column_weights is None:
        column_weights = torch.ones(values.shape[0], dtype=torch.float64)
    # Slices that stay in the processor's cache: every candidate passes over them again.
    step = max(64, _ELEMENTS_AT_A_TIME // values.shape[0])
    parts = [values[:, first : first + step] for first in range(0, values.shape[1], step)]
    return torch.cat([_search(part.contiguous(), column_weights, bits) for part in parts])


def _search(values: torch.Tensor, column_weights: torch.Tensor, bits: int) -> torch.Tensor:
    largest = values.abs().amax(0)
    highest = 2 ** (bits - 1) - 1
    dividers = [highest + 0.5, highest + 1.0, *(highest / factor for factor in _SHRINK_FACTORS)]
    codes = torch.empty_like(values)
    scratch = torch.empty_like(values)
    best = torch.ones_like(largest)
    best_error = torch.full_like(largest, torch.inf)

    def consider(scale: torch.Tensor) -> None:
        torch.div(values, scale, out=codes).round_().clamp_(-highest - 1, highest)
        torch.mul(codes, scale, out=scratch).sub_(values).square_()
        error = torch.mv(scratch.T, column_weights)
        better = error < best_error
        best_error[better] = error[better]
        best[better] = scale[better]

    for divider in dividers:
        consider(_representable(largest / divider))
    # For given codes q the best scale is sum h w q / sum h q^2.
    torch.div(values, best, out=codes).round_().clamp_(-highest - 1, highest)
    top = torch.mv(torch.mul(codes, values, out=scratch).T, column_weights)
    bottom = torch.mv(codes.square_().T, column_weights)
    consider(_representable(torch.where(bottom > 0, top / bottom, best)))
    return best


def _representable(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16).to(torch.float64)


def nearest_codes(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes of ``values`` in their own float type, halves to the even code, range cut."""
    half = 2 ** (bits - 1)
    return torch.div(values, scale).round_().clamp_(-half, half - 1)


def unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes of a float type to uint8 with zero at 2^(bits-1)."""
    return (codes + float(2 ** (bits - 1))).to(torch.uint8)


def check_settings(bits: int, group_size: int, reduce_range: bool) -> None:
    """Refuse what neither the kernels nor the checkpoint format have.

    Raises:
        RequestError: names every setting that is outside its set.
    """
    faults: list[str] = []
    if bits not in (4, 8):
        faults.append(f"bits is {bits}; allowed are 4, 8")
    if group_size not in GROUP_SIZES:
        faults.append(f"group_size is {group_size}; allowed are 128, 64, 32, -1 (per channel)")
    if reduce_range and bits == 4:
        faults.append("reduce_range is for 8 bits; 4-bit products do not saturate")
    if faults:
        raise RequestError("quantisation settings cannot be met: " + "; ".join(faults))


def check_weight(weight: torch.Tensor, group_size: int, name: str) -> None:
    """Refuse a matrix that cannot be quantised.

    Raises:
        CheckpointError: it is empty, no matrix, not a float type, not finite, or its columns are no
            multiple of the group.
    """
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise CheckpointError(
            f"{name} is {weight.dtype} {list(weight.shape)}; quantisation takes a non-empty float "
            "matrix [outputs, inputs]"
        )
    num_columns = weight.shape[1]
    if group_size != PER_CHANNEL and num_columns % group_size:
        raise CheckpointError(
            f"{name} has {num_columns} columns, no multiple of group_size {group_size}; take the "
            "largest of 128, 64, 32, -1 that divides every layer"
        )
    # A sum is not finite where any element is not, and needs no mask of the matrix's size.
    if not bool(torch.isfinite(weight.sum(dtype=torch.float64))):
        bad = (~torch.isfinite(weight)).nonzero()
        row, column = (int(i) for i in bad[0])
        raise CheckpointError(
            f"{name} holds {len(bad)} values that are not finite, the first "
            f"{float(weight[row, column])} at [{row}, {column}]; the checkpoint is damaged"
        )
