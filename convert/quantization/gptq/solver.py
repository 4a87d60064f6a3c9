"""GPTQ on one weight matrix; no files, no model.

GPTQ (Frantar et al., arXiv 2210.17323) rounds a matrix column by column and lets the columns still
to come make up for each error, H being the second moment of the layer's inputs. The paper works
with a Cholesky factor of H^-1. Here H itself is factored, which needs no inverse, a quarter of the
arithmetic and one matrix less of memory. The two are the same procedure (LDLQ and OPTQ in Chee et
al., arXiv 2307.13304): with the columns laid out in reverse order of treatment and
H = L L^T, column k is rounded at

    w_k + sum_{j > k} (w_j - ŵ_j) L_jk / L_kk,

j running over the columns already done, and it adds L_kk² (that value - ŵ_k)² to the error.

Column order is group-aware: whole groups by the sum of their diagonal of H, columns inside a group
by theirs, largest first. Results are put back in place, so ``g_idx`` stays trivial.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from llava_edge.convert.checkpoint.formats.rounding import (
    PER_CHANNEL,
    Codes,
    QuantizationReport,
    QuantizedWeight,
    Scales,
    dequantize,
    find_scales,
    nearest_codes,
    round_to_nearest,
    unsigned,
)
from llava_edge.convert.quantization.gptq.hessian import (
    Hessian,
    HessianAccumulator,
    HessianLayout,
    hessian_norms,
    plan_hessian,
)
from llava_edge.convert.quantization.gptq.hessian_factor import (
    LARGEST_DAMP_PERCENT,
    ColumnOrder,
    HessianFactor,
    factor_hessian,
)
from llava_edge.convert.util.parallel import map_rows
from llava_edge.profiles.errors import CheckpointError, RequestError

__all__ = [
    "Hessian",
    "HessianAccumulator",
    "HessianLayout",
    "QuantizationReport",
    "QuantizedWeight",
    "hessian_norms",
    "plan_hessian",
    "quantize_weight",
    "round_to_nearest",
]


def quantize_weight(
    weight: torch.Tensor,
    hessian: Hessian | torch.Tensor,
    *,
    bits: int,
    group_size: int,
    damp_percent: float = 0.01,
    block_size: int = 128,
    order: ColumnOrder = "gar",
    scale_search: bool = True,
    never_worse: bool = True,
    reduce_range: bool = False,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantise one matrix so that its output on the calibration rows changes least.

    Arithmetic is float64. The same inputs give the same bytes for the same number of threads; the
    last bits of a factorisation differ between thread counts.

    A dead column (its diagonal of H is 0: the input never occurred) gets the weight zero, as in the
    paper's code; where all are dead the matrix is rounded to nearest.

    Args:
        weight: float [N, K], any float type.
        hessian: second moment of the inputs, one matrix [K, K] or blocks; not changed.
        bits: 4 or 8.
        group_size: 128, 64, 32, or -1 for one scale a row.
        damp_percent: share of the mean diagonal added to the diagonal; doubled until the
            factorisation succeeds, up to 1. The report holds the one used.
        block_size: columns between two updates of all columns to come; changes speed only.
        order: ``gar`` by group-aware importance, ``none`` as the columns stand.
        scale_search: search scales weighted by H, or take the plain absolute maximum.
        never_worse: a row where rounding to nearest beats the solver on H keeps the rounding.
        reduce_range: keep 8-bit codes within 7 bits, see ``round_to_nearest``.
        name: what an error message calls the matrix.

    Raises:
        RequestError: a setting is outside its range.
        CheckpointError: weight or Hessian is not finite, the Hessian is not positive, shapes do
            not go together, or K is no multiple of the group.
    """
    if isinstance(hessian, torch.Tensor):
        hessian = Hessian.of(hessian)
    _check(weight, hessian, damp_percent, block_size, group_size, name)
    rounded = round_to_nearest(
        weight, bits=bits, group_size=group_size, reduce_range=reduce_range, name=name
    )
    dead_columns = int((hessian.diagonal() == 0).sum())
    if dead_columns == weight.shape[1]:
        return replace(rounded, report=replace(rounded.report, dead_columns=dead_columns))
    settings = _Settings(
        bits=bits,
        range_bits=bits - reduce_range,
        group_size=group_size,
        damp_percent=damp_percent,
        block_size=block_size,
        order=order,
        scale_search=scale_search,
        never_worse=never_worse,
        name=name,
    )
    solution = _solve(weight, hessian, settings)
    return _keep_better(weight, hessian, rounded, solution, settings)


@dataclass(frozen=True)
class _Settings:
    bits: int
    range_bits: int
    group_size: int
    damp_percent: float
    block_size: int
    order: ColumnOrder
    scale_search: bool
    never_worse: bool
    name: str


@dataclass(frozen=True)
class _Solution:
    """Codes uint8 [N, K], scales float16 [N, groups], each row's d H d^T float64 [N]."""

    qweight: Codes
    scales: Scales
    norms: torch.Tensor
    damp_percent: float


def _solve(weight: torch.Tensor, hessian: Hessian, settings: _Settings) -> _Solution:
    """Solve each block of columns that the Hessian has."""
    num_rows, num_columns = weight.shape
    per_channel = settings.group_size == PER_CHANNEL
    group = num_columns if per_channel else settings.group_size
    qweight = np.empty((num_rows, num_columns), np.uint8)
    scales = torch.empty(num_columns // group, num_rows, dtype=torch.float64)
    norms = torch.zeros(num_rows, dtype=torch.float64)
    if per_channel:
        scales[0] = _row_scales(weight, hessian.diagonal(), settings)
    damp_percent = 0.0
    for low, high, matrix in hessian.ranges():
        factor = factor_hessian(
            matrix, min(group, high - low), settings.order, settings.damp_percent, settings.name
        )
        damp_percent = max(damp_percent, factor.damp_percent)
        fixed = scales if per_channel else None
        codes, found, lost = _solve_columns(weight[:, low:high], factor, fixed, settings)
        qweight[:, low:high] = codes
        scales[low // group : low // group + len(found)] = found
        norms += lost
    return _Solution(qweight, scales.T.to(torch.float16).numpy(), norms, damp_percent)


def _row_scales(weight: torch.Tensor, diagonal: torch.Tensor, settings: _Settings) -> torch.Tensor:
    """One scale a row, float64 [N], from the weights as they are."""

    def work(rows: slice) -> torch.Tensor:
        values = _columns_first(weight[rows], diagonal == 0)
        return find_scales(values, diagonal, settings.range_bits, search=settings.scale_search)

    return torch.cat(map_rows(weight.shape, work))


def _columns_first(weight: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """float64 [columns, rows] with dead columns at zero."""
    values = weight.T.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    values[dead] = 0.0
    return values


def _solve_columns(
    weight: torch.Tensor, factor: HessianFactor, fixed: torch.Tensor | None, settings: _Settings
) -> tuple[Codes, torch.Tensor, torch.Tensor]:
    """Codes [N, columns], scales [groups, N] and losses [N] of one block of columns.

    ``fixed`` are scales [1, N] found beforehand.
    """
    num_rows, num_columns = weight.shape
    codes = np.empty((num_rows, num_columns), np.uint8)
    scales = torch.empty(num_columns // factor.group, num_rows, dtype=torch.float64)
    losses = torch.empty(num_rows, dtype=torch.float64)
    groups = factor.sequence[:: factor.group] // factor.group
    dead = factor.diagonal == 0

    def work(rows: slice) -> None:
        values = _columns_first(weight[rows][:, factor.sequence], dead)
        given = None if fixed is None else fixed[:, rows]
        solved, found, losses[rows] = _solve_rows(factor, values, given, settings)
        in_place = torch.empty_like(solved)
        in_place[factor.sequence] = solved
        codes[rows] = in_place.T.numpy()
        scales[groups, rows] = found

    map_rows(weight.shape, work)
    return codes, scales, losses


def _solve_rows(
    factor: HessianFactor, values: torch.Tensor, fixed: torch.Tensor | None, settings: _Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round columns from the last place to the first.

    Args:
        factor: of the Hessian.
        values: float64 [columns, rows] in the factor's layout.
        fixed: float64 [1, rows], scales found beforehand.
        settings: of the whole solve.

    Returns:
        uint8 codes [columns, rows], scales [groups, rows], d H d^T without damping [rows].
    """
    lower, group, size = factor.lower, factor.group, settings.block_size
    num_columns, num_rows = values.shape
    pivots = lower.diagonal().tolist()
    # pending[k] = sum over finished columns j of (w_j - ŵ_j) L_jk
    pending = torch.zeros_like(values)
    deltas = torch.empty(size, num_rows, dtype=torch.float64)
    codes = torch.empty(num_columns, num_rows, dtype=torch.uint8)
    scales = torch.empty(num_columns // group, num_rows, dtype=torch.float64)
    if fixed is not None:
        scales.copy_(fixed)
    loss = torch.zeros(num_rows, dtype=torch.float64)
    for stop in range(num_columns, 0, -size):
        start = max(0, stop - size)
        for top in range(stop, start, -min(group, size)):
            bottom = max(start, top - group)
            done = deltas[top - start : stop - start]
            pending[bottom:top].addmm_(lower[top:stop, bottom:top].T, done)
            if fixed is None and top % group == 0:
                scales[top // group - 1] = _group_scales(factor, values, pending, top, settings)
            scale = scales[bottom // group]
            for k in range(top - 1, bottom - 1, -1):
                later = deltas[k + 1 - start : top - start]
                target = torch.addmv(pending[k], later.T, lower[k + 1 : top, k])
                target.div_(pivots[k]).add_(values[k])
                code = nearest_codes(target, scale, settings.range_bits)
                codes[k] = unsigned(code, settings.bits)
                rounded = code.mul_(scale)
                delta = torch.sub(values[k], rounded, out=deltas[k - start])
                target.sub_(rounded)
                # The factor holds the damped matrix; the loss is that of the matrix itself.
                loss.addcmul_(target, target, value=pivots[k] ** 2)
                loss.addcmul_(delta, delta, value=-factor.damp)
        pending[:start].addmm_(lower[start:stop, :start].T, deltas[: stop - start])
    return codes, scales, loss


def _group_scales(
    factor: HessianFactor,
    values: torch.Tensor,
    pending: torch.Tensor,
    top: int,
    settings: _Settings,
) -> torch.Tensor:
    """Scales of the group that ends at place ``top``, for weights as finished columns left them.

    That is w + x with x L_gg = pending over the group: the best answer of all columns to come to
    the errors made so far.
    """
    places = slice(top - factor.group, top)
    square = factor.lower[places, places]
    moved = torch.linalg.solve_triangular(square.T, pending[places], upper=True)
    moved += values[places]
    diagonal = factor.diagonal[places]
    return find_scales(moved, diagonal, settings.range_bits, search=settings.scale_search)


def _keep_better(
    weight: torch.Tensor,
    hessian: Hessian,
    rounded: QuantizedWeight,
    solution: _Solution,
    settings: _Settings,
) -> QuantizedWeight:
    """Take the solver's rows, or the rounded one where that does better on H; add up the errors."""
    bits, qweight, scales = settings.bits, solution.qweight, solution.scales

    def work(rows: slice) -> tuple[float, ...]:
        values = weight[rows].to(torch.float32)
        rtn = torch.from_numpy(dequantize(rounded.qweight[rows], rounded.scales[rows], bits))
        both = torch.cat([values, values - rtn])
        norms = hessian_norms(both, hessian, torch.float32)
        output, rtn_lost = norms[: len(values)], norms[len(values) :]
        lost = solution.norms[rows].clamp(min=0.0)
        worse = (rtn_lost < lost).numpy() & settings.never_worse
        qweight[rows][worse] = rounded.qweight[rows][worse]
        scales[rows][worse] = rounded.scales[rows][worse]
        lost[worse] = rtn_lost[worse]
        solved = torch.from_numpy(dequantize(qweight[rows], scales[rows], bits))
        squared = (values - solved).square_().sum(dtype=torch.float64)
        sums = (output.sum(), rtn_lost.sum(), lost.sum(), squared, worse.sum())
        return tuple(float(each) for each in sums)

    sums = np.array(map_rows(weight.shape, work)).sum(0)
    output, rtn_lost, lost, squared, rows_rounded = sums.tolist()
    report = QuantizationReport(
        mse=squared / weight.numel(),
        relative_error=lost / output if output > 0 else None,
        rtn_relative_error=rtn_lost / output if output > 0 else None,
        damp_percent=solution.damp_percent,
        dead_columns=int((hessian.diagonal() == 0).sum()),
        rows_rounded=int(rows_rounded),
    )
    return QuantizedWeight(qweight, scales, bits, settings.group_size, report)


def _check(
    weight: torch.Tensor,
    hessian: Hessian,
    damp_percent: float,
    block_size: int,
    group_size: int,
    name: str,
) -> None:
    """Refuse settings and Hessians; round_to_nearest has looked at the weight itself."""
    faults: list[str] = []
    if not 0.0 <= damp_percent <= LARGEST_DAMP_PERCENT:
        faults.append(f"damp_percent is {damp_percent}; it must lie between 0 and 1")
    if block_size < 1 or (
        group_size != PER_CHANNEL and block_size % group_size and group_size % block_size
    ):
        faults.append(f"block_size {block_size} and group_size {group_size} do not divide another")
    if faults:
        raise RequestError("GPTQ settings cannot be met: " + "; ".join(faults))
    shapes = [tuple(block.shape) for block in hessian.blocks]
    expected = [(high - low,) * 2 for low, high in pairwise(hessian.edges)]
    if shapes != expected or hessian.num_columns != weight.shape[1]:
        raise CheckpointError(
            f"{name} has {weight.shape[1]} columns, its Hessian blocks {shapes}; the blocks must "
            "be square and cover the columns"
        )
    if group_size != PER_CHANNEL and any(edge % group_size for edge in hessian.edges[1:-1]):
        raise RequestError(
            f"the Hessian of {name} is cut at the columns {list(hessian.edges[1:-1])}; cuts must "
            f"fall on multiples of group_size {group_size}"
        )
    for low, _, block in hessian.ranges():
        # A sum is not finite where any element is not, and needs no mask of the matrix's size.
        if not bool(torch.isfinite(block.sum())) or bool((block.diagonal() < 0).any()):
            finite = torch.isfinite(block).all(0) & (block.diagonal() >= 0)
            bad = (~finite).nonzero()[:, 0] + low
            raise CheckpointError(
                f"the Hessian of {name} is not finite or has a negative diagonal in {len(bad)} "
                f"columns, the first {int(bad[0]) if len(bad) else low}; the layer's inputs "
                "overflow on the calibration samples"
            )
