"""HessianFactor: a Hessian laid out in reverse order of treatment and factored.

Order of treatment is group-aware: whole groups by the sum of their diagonal, columns inside a group
by theirs, largest first. Reversed, so that LAPACK's lower factor is the one the solver needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from llava_edge.profiles.errors import CheckpointError

ColumnOrder = Literal["gar", "none"]

LARGEST_DAMP_PERCENT = 1.0
_ROWS_AT_A_TIME = 128


@dataclass(frozen=True)
class HessianFactor:
    """L with L L^T = H + damp I, for one block of columns.

    Place i of the layout holds column ``sequence[i]`` (int64) of the block; the solver goes from
    the last place to the first. ``lower`` is float64 [columns, columns] with zeros above its
    diagonal, ``diagonal`` that of H itself, float64 [columns], both in the layout. Places are
    grouped as columns are: ``group`` neighbours belong to one group.
    """

    lower: torch.Tensor
    sequence: torch.Tensor
    diagonal: torch.Tensor
    group: int
    damp: float
    damp_percent: float


def factor_hessian(
    matrix: torch.Tensor, group: int, order: ColumnOrder, damp_percent: float, name: str
) -> HessianFactor:
    """Factor a Hessian [columns, columns], which is not changed.

    ``damp_percent`` of the mean diagonal of live columns is added to the diagonal; doubled (from
    1 % on) until the factorisation succeeds.

    Raises:
        CheckpointError: it fails even with the whole mean added.
    """
    diagonal = matrix.diagonal().clone()
    sequence = _treatment_order(diagonal, group, order).flip(0)
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    # Nothing couples a dead column to others, so any positive pivot does.
    pivots = torch.where(live, diagonal, mean)[sequence]
    lower = torch.empty_like(matrix)
    info = torch.empty((), dtype=torch.int32)
    percent = damp_percent
    while True:
        for first in range(0, len(lower), _ROWS_AT_A_TIME):
            rows = slice(first, first + _ROWS_AT_A_TIME)
            lower[rows] = matrix[sequence[rows]][:, sequence]
        lower.diagonal().copy_(pivots + percent * mean)
        # In place: LAPACK takes columns first, and a symmetric matrix is its own transpose.
        torch.linalg.cholesky_ex(lower.mT, out=(lower.mT, info))
        if int(info) == 0:
            return HessianFactor(
                lower.mT, sequence, diagonal[sequence], group, percent * mean, percent
            )
        if percent >= LARGEST_DAMP_PERCENT:
            raise CheckpointError(
                f"the Hessian of {name} is not positive definite even with {percent:g} of its mean "
                "diagonal added; it must be a sum of w x x^T over calibration rows"
            )
        percent = min(LARGEST_DAMP_PERCENT, max(2.0 * percent, 0.01))


def _treatment_order(diagonal: torch.Tensor, group: int, order: ColumnOrder) -> torch.Tensor:
    if order == "none":
        return torch.arange(len(diagonal))
    grouped = diagonal.reshape(-1, group)
    groups = grouped.sum(1).argsort(descending=True, stable=True)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    return (groups[:, None] * group + inside[groups]).reshape(-1)
