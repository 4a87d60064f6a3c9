"""SolverTraces: what GPTQ leaves in a layer's errors, whatever it was calibrated on.

GPTQ rounds column after column, and lets columns to come make up for errors made so far. So the
error of a column, in steps of its scale, is an error of rounding and a sum over the errors of the
columns before it, by factors that all outputs share:

    E = R A^T,    A triangular with ones on its diagonal, R as rounding to nearest leaves it.

For the columns that come first, det(E^T E) is therefore det(R^T R), however strongly they make up
for each other: codes that are off by a step add to it, and nothing takes it away again. Which
columns come first, the solver decides by its calibration; here it is those that the probes use
most, and the least of several groups counts (``unexplained``). Columns that other columns act on
only have more.

``unmoved`` is the share of codes that are the nearest to the weight by their scale, all of them
where nothing made up for anything. ``bias`` and ``noise`` tell of scales that were changed after
the codes were found, over all values v = code * scale of weights w:

    bias = sum v (w - v) / sum v v,    noise = (sum (w - v)^2 - sum s^2 / 12) / sum v v

Scales that are larger by a share d lower the bias by d. What columns make up for each other lowers
it as well, by no more than the noise: the true bias lies between ``bias`` and ``bias + noise``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llava_edge.convert.verification.quantized.reference_rounding import Grid

_MOST_COLUMNS = 64
_LEAST_COLUMNS = 4
_GROUPS = 4
_HALF = 0.501
"""Steps: nearest but for the last digits of a quotient."""


@dataclass(frozen=True)
class Traces:
    """Of one layer.

    Attributes:
        unexplained: geometric mean of the squared errors that no other column explains, over that
            of rounding; 1 where there are too few outputs to tell.
        unmoved: share of codes that are the nearest.
        bias: see above.
        noise: see above.
    """

    unexplained: float
    unmoved: float
    bias: float
    noise: float

    @property
    def center(self) -> float:
        """The upper end of where the bias lies, which sound layers have near zero."""
        return self.bias + self.noise


class SolverTraces:
    """Sums over the outputs of one layer.

    Args:
        grid: of the codes.
        squares: mean square of each input by kind of token, float64 [K] each.
        num_rows: outputs of the layer.
    """

    def __init__(self, grid: Grid, squares: Sequence[torch.Tensor], num_rows: int) -> None:
        self._half, self._num_rows = grid.half, 0
        self._columns = _first_columns(grid, squares, num_rows)
        self._errors = [_zeros(len(columns)) for columns in self._columns]
        self._rounding = [_zeros(len(columns)) for columns in self._columns]
        self._sums = torch.zeros(5, dtype=torch.float64)

    def add(
        self,
        shipped: torch.Tensor,
        lost: torch.Tensor,
        lost_by_rounding: torch.Tensor,
        over: torch.Tensor,
        step: torch.Tensor,
    ) -> None:
        """Add some outputs.

        Args:
            shipped: values [rows, K].
            lost: what they differ by from the weight.
            lost_by_rounding: the same of rounding to nearest.
            over: scales that ship, [rows, K] or [rows, 1].
            step: those of rounding to nearest.
        """
        for columns, errors, rounding in zip(
            self._columns, self._errors, self._rounding, strict=True
        ):
            errors += _products(lost, over, columns)
            rounding += _products(lost_by_rounding, step, columns)
        spread = shipped.shape[1] / over.shape[1]
        self._sums += torch.stack(
            [
                -_dot(shipped, lost),
                _dot(shipped, shipped),
                _dot(lost, lost),
                _dot(over, over) * spread / 12,
                self._share_moved(shipped, lost, over) * len(lost),
            ]
        )
        self._num_rows += len(lost)

    def _share_moved(
        self, shipped: torch.Tensor, lost: torch.Tensor, over: torch.Tensor
    ) -> torch.Tensor:
        steps, codes = lost / over, (shipped / over).round_()
        moved = (steps > _HALF) & (codes > -self._half)
        moved |= (steps < -_HALF) & (codes < self._half - 1)
        return moved.double().mean()

    def result(self) -> Traces:
        """Of all outputs that were added."""
        found = [
            (_log_volume(errors, given) - _log_volume(rounding, given)) / int(given.sum())
            for errors, rounding in zip(self._errors, self._rounding, strict=True)
            # Columns of zeros lose nothing either way.
            for given in [(errors.diagonal() > 0) & (rounding.diagonal() > 0)]
            if int(given.sum()) >= _LEAST_COLUMNS
        ]
        product, size, squares, steps, moved = self._sums.tolist()
        least = min(found, default=0.0)
        return Traces(
            unexplained=math.exp(least) if least < math.log(1e9) else math.inf,
            unmoved=1 - moved / max(1, self._num_rows),
            bias=product / size if size else 0.0,
            noise=(squares - steps) / size if size else 0.0,
        )


def _first_columns(
    grid: Grid, squares: Sequence[torch.Tensor], num_rows: int
) -> list[torch.Tensor]:
    """Columns that a solver may well take first: the most used ones of the most used groups."""
    total = torch.stack([each / each.sum().clamp(min=1e-30) for each in squares]).sum(0)
    group = min(grid.group, len(total))
    count = min(_MOST_COLUMNS, group, num_rows // 2)
    if count < _LEAST_COLUMNS:
        return []
    whole = len(total) // group
    sums = total[: whole * group].reshape(whole, group).sum(1)
    found = []
    for index in sums.argsort(descending=True)[:_GROUPS].tolist():
        first = index * group
        order = total[first : first + group].argsort(descending=True)
        found.append(order[:count].sort().values + first)
    return found


def _zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, count, dtype=torch.float64)


def _products(lost: torch.Tensor, over: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    steps = lost[:, columns] / (over if over.shape[1] == 1 else over[:, columns])
    return (steps.T @ steps).double()


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vecdot(one, other).sum(dtype=torch.float64)
    return found


def _log_volume(products: torch.Tensor, given: torch.Tensor) -> float:
    """Logarithm of the determinant; what is singular has none, and counts as far below."""
    part = products[given][:, given]
    tiny = 1e-9 * part.diagonal().mean()
    return float(torch.linalg.slogdet(part + tiny * torch.eye(len(part), dtype=part.dtype))[1])
