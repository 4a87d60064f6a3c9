"""Rounding to nearest as the verifier does it: the yardstick for every quantised weight.

Written from the rule and not from the quantiser, of which no function is imported (a contract of
import-linter holds that), so that one mistake cannot be on both sides. The rule, symmetric, for a
group of weights w that share a scale s and codes c from -2^(b-1) to 2^(b-1) - 1:

    code    w / s to the nearest integer, halves to the even one, cut to the range
    scale   of these candidates the one that makes sum (w - c s)^2 smallest, the first where two do:
            max|w| over 2^(b-1) - 1/2, over 2^(b-1), over 2^(b-1) - 1 times 1.00, 0.92 … 0.44;
            then sum(c w) / sum(c c) for the codes of the best of them
    stored  a scale is a float16 of at least 2^-14

The search runs in float32, which decides nearly all groups; where the artifact has another scale,
the group is searched again in float64, and two scales whose errors are equal there count as equal.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from llava_edge.convert.util.torch_threads import torch_threads

T = TypeVar("T")

_LEAST = 2.0**-14
_MOST = 65504.0
_SHRUNK = tuple(1.0 - 0.08 * step for step in range(8))
_ELEMENTS_AT_A_TIME = 1 << 17
"""Half a MiB of float32: larger blocks would be mapped anew for every operation, which takes longer
than the operation (``configure_process``)."""
_EQUAL = 1e-9
"""Errors of two scales that differ by less, relatively, are equal but for the order of sums."""
_MOST_DOUBTED = 1 << 22
"""Weights of one call whose groups are searched again; of sound groups one in a thousand is."""


@dataclass(frozen=True)
class Grid:
    """Which codes and scales a weight may take.

    Attributes:
        bits: that the codes use; one less than they are stored in where the range is reduced.
        group: neighbouring columns that share a scale; the last ones may be fewer.
    """

    bits: int
    group: int

    @property
    def half(self) -> int:
        """Codes reach from minus this to one below it."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Disagreement:
    """Where codes and scales are not those of rounding to nearest.

    Attributes:
        codes: codes that are not the nearest to the weight by the scale that is there.
        scales: groups whose scale is not the one that the rule chooses.
    """

    codes: int
    scales: int

    def __add__(self, other: Disagreement) -> Disagreement:
        """Over further rows."""
        return Disagreement(self.codes + other.codes, self.scales + other.scales)


def nearest_scales(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The scale of each group, float32 [N, groups], for a weight float32 [N, K]."""
    return torch.cat(_by_rows(weight, lambda rows: _row_scales(weight[rows], grid)))


def rounded(weight: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Values [N, K] of the nearest codes, by scales [N, groups] of the weight's float type."""
    values = torch.empty_like(weight)

    def fill(rows: slice) -> None:
        part, over = weight[rows], scales[rows]
        found = grouped(_nearest(part, over, grid), over, grid).mul_(over[..., None])
        values[rows] = found.flatten(1)[:, : part.shape[1]]

    _by_rows(weight, fill)
    return values


def disagreement(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, grid: Grid
) -> Disagreement:
    """Compare codes and scales with rounding to nearest.

    Args:
        weight: float32 [N, K], the numbers that were quantised.
        codes: signed, integers of any type [N, K].
        scales: float32 [N, groups], as stored.
        grid: range and groups.
    """

    def examine(rows: slice) -> tuple[int, torch.Tensor]:
        part, held = weight[rows], scales[rows]
        wrong = (_nearest(part, held, grid) != codes[rows]).nonzero()
        if len(wrong):
            # A quotient of float32 numbers may need more digits to be told from a half.
            row, column = wrong[:, 0], wrong[:, 1]
            place = part[row, column].double() / held[row, column // grid.group].double()
            nearest = place.round_().clamp_(-grid.half, grid.half - 1)
            wrong = wrong[nearest != codes[rows][row, column]]
        return len(wrong), (_row_scales(part, grid) != held).nonzero() + torch.tensor(
            [rows.start, 0]
        )

    examined = _by_rows(weight, examine)
    doubts = torch.cat([other for _, other in examined])
    # Beyond what is looked at again, doubts count as faults: no sound weight has so many.
    looked_at = doubts[: max(64, _MOST_DOUBTED // grid.group)]
    chosen = 0
    for some in torch.split(looked_at, max(1, _ELEMENTS_AT_A_TIME // grid.group)):
        row, group = some[:, :1], some[:, 1:]
        column = group * grid.group + torch.arange(grid.group)
        # What is beyond the last column of a short group costs nothing by any scale.
        values = weight[row, column.clamp(max=weight.shape[1] - 1)] * (column < weight.shape[1])
        held = scales[row[:, 0], group[:, 0]]
        chosen += int(_is_chosen(values.double(), held.double(), grid.half).sum())
    return Disagreement(sum(count for count, _ in examined), len(doubts) - chosen)


def cache_blocks(weight: torch.Tensor) -> list[slice]:
    """Rows of a weight [N, K] that together fit a processor's cache."""
    step = max(1, _ELEMENTS_AT_A_TIME // max(1, weight.shape[1]))
    return [slice(first, first + step) for first in range(0, len(weight), step)]


def _by_rows(weight: torch.Tensor, work: Callable[[slice], T]) -> list[T]:
    """Call ``work`` on rows that together fit a processor's cache, on all threads."""
    parts = cache_blocks(weight)
    workers = min(torch.get_num_threads(), len(parts))
    # Threads of torch's own would wait for each other at every one of many short operations.
    with torch_threads(1):
        if workers == 1:
            return [work(rows) for rows in parts]
        with ThreadPoolExecutor(workers, "rounding") as pool:
            return list(pool.map(work, parts))


def _row_scales(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    groups = _in_groups(weight, grid.group)
    return _searched(groups.reshape(-1, groups.shape[-1]), grid.half).reshape(groups.shape[:2])


def _nearest(weight: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    codes = torch.div(grouped(weight, scales, grid), scales[..., None])
    codes = codes.round_().clamp_(-grid.half, grid.half - 1)
    return codes.flatten(1)[:, : weight.shape[1]]


def _searched(groups: torch.Tensor, half: int) -> torch.Tensor:
    """Scales [M] of groups [M, group]."""
    largest = groups.abs().amax(1)
    best = torch.full_like(largest, _LEAST)
    least = torch.full_like(largest, torch.inf)
    for divider in _dividers(half):
        scale = _stored(largest.double() / divider, groups.dtype)
        error = _error(groups, scale, half)
        better = error < least
        best = torch.where(better, scale, best)
        least = torch.where(better, error, least)
    scale = _fitted(groups, best, half)
    error = _error(groups, scale, half)
    return torch.where(error < least, scale, best)


def _is_chosen(groups: torch.Tensor, scales: torch.Tensor, half: int) -> torch.Tensor:
    """Whether the rule may choose these scales [M]: bool [M], all in float64."""
    largest = groups.abs().amax(1)
    tried = [_stored(largest / divider, groups.dtype) for divider in _dividers(half)]
    errors = torch.stack([_error(groups, scale, half) for scale in tried])
    least = errors.amin(0)
    theirs = _error(groups, scales, half)
    chosen = torch.zeros(len(groups), dtype=torch.bool)
    # Candidates may tie; each then has codes, and so a last candidate, of its own.
    for scale, error in zip(tried, errors, strict=True):
        ties = error <= least * (1 + _EQUAL)
        fitted = _error(groups, _fitted(groups, scale, half), half)
        final = torch.minimum(error, fitted)
        chosen |= ties & ((theirs - final).abs() <= _EQUAL * final)
    return chosen


def _dividers(half: int) -> list[float]:
    highest = half - 1
    return [highest + 0.5, highest + 1.0, *(highest / factor for factor in _SHRUNK)]


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scale.clamp(_LEAST, _MOST).half().to(dtype)


def _codes(groups: torch.Tensor, scale: torch.Tensor, half: int) -> torch.Tensor:
    return torch.div(groups, scale[:, None]).round_().clamp_(-half, half - 1)


def _error(groups: torch.Tensor, scale: torch.Tensor, half: int) -> torch.Tensor:
    """Sum of squares of what rounding loses, [M]."""
    if groups.dtype == torch.float64:
        lost = _codes(groups, scale, half).mul_(scale[:, None]).sub_(groups)
        return lost.square_().sum(1)
    # In steps: at a half both codes are equally far, so a product by the inverse serves.
    places = groups * scale.reciprocal()[:, None]
    lost = places.round().clamp_(-half, half - 1).sub_(places)
    norm: torch.Tensor = torch.linalg.vector_norm(lost, dim=1)
    return norm.square_().mul_(scale.square())


def _fitted(groups: torch.Tensor, scale: torch.Tensor, half: int) -> torch.Tensor:
    codes = _codes(groups, scale, half)
    bottom = codes.square().sum(1)
    top = codes.mul_(groups).sum(1)
    return _stored(torch.where(bottom > 0, top / bottom, scale).double(), groups.dtype)


def _in_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """[N, K] as [N, groups, group], the last one filled up with zeros."""
    short = -weight.shape[1] % group
    if short:
        weight = torch.nn.functional.pad(weight, (0, short))
    return weight.reshape(len(weight), -1, group)


def grouped(values: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Values [N, K] as [N, groups, width] beside their scales [N, groups, 1]; zeros fill it up."""
    return values[:, None] if scales.shape[1] == 1 else _in_groups(values, grid.group)
