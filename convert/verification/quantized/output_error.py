"""OutputError: what a quantised layer's output loses, held against rounding of the same weights.

For rows x of what the layer reads, weights W and what ships for them Ŵ, output n loses

    e_n = mean |x (w_n - ŵ_n)|²

and rounding to nearest, W̃ with scales s, loses r_n. Where rounding is lucky r_n says nothing about
what is fair, so beside it stands what rounding costs where its errors do not know of each other,

    b_n = sum_k mean(x_k²) max((w_nk - w̃_nk)², s_nk² / 12).

A layer is as good as sum(e) / max(sum(r), sum(b)), an output as e_n / max(r_n, b_n); at 1 it is as
good as rounding. GPTQ minimises just this on its calibration samples. Inputs of both kinds, text
and images, are looked at, and the better one counts: samples of one kind leave the other to luck,
while codes that are wrong are wrong for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from llava_edge.convert.verification.quantized.reference_rounding import (
    Grid,
    cache_blocks,
    grouped,
    rounded,
)
from llava_edge.convert.verification.quantized.solver_traces import SolverTraces, Traces

_TRACED = 1 << 20
"""Weights of a layer in which a solver's traces are looked for."""


@dataclass(frozen=True)
class KindInputs:
    """Inputs of one layer on one kind of token.

    Attributes:
        sums: float32 [sums, K], random sums over the mean token.
        squares: float64 [K], mean square of each input.
    """

    sums: torch.Tensor
    squares: torch.Tensor

    def divided(self, scale: torch.Tensor) -> KindInputs:
        """Inputs over what a layer's input is divided by, float32 [K]."""
        return KindInputs(self.sums / scale, self.squares / scale.double().square())


@dataclass(frozen=True)
class OutputError:
    """One layer's errors over those of rounding to nearest.

    Attributes:
        layer: of all outputs together.
        output: of the worst output.
        worst: which one that is.
        step: median over all groups of the scale that ships over that of rounding.
        shift: mean of (Ŵ - W) / s over the layer, as a magnitude: rounding moves weights both ways.
        traces: what a solver leaves in the errors.
        unmoved: share of codes that are the nearest, of rows that are not recorded as kept so.
    """

    layer: float
    output: float
    worst: int
    step: float
    shift: float
    traces: Traces
    unmoved: float = 0.0

    @property
    def step_ratio(self) -> float:
        """``step`` or its inverse, whichever is larger."""
        return max(self.step, 1 / self.step) if self.step else math.inf


@dataclass(frozen=True)
class WeightRows:
    """Some outputs of a layer, float32.

    Attributes:
        original: the checkpoint's, [rows, K].
        shipped: the artifact's, [rows, K].
        scales: of rounding to nearest, [rows, groups].
        shipped_scales: of the artifact, [rows, groups].
    """

    original: torch.Tensor
    shipped: torch.Tensor
    scales: torch.Tensor
    shipped_scales: torch.Tensor


def output_error(
    parts: Iterable[WeightRows], grid: Grid, inputs: Sequence[KindInputs]
) -> OutputError:
    """Compare a layer with rounding to nearest.

    Args:
        parts: all outputs, in order.
        grid: of the codes.
        inputs: by kind of token; at least one.
    """
    traces: Traces | None = None
    sums = torch.zeros(len(inputs), 3, dtype=torch.float64)
    worst, place, first = -1.0, 0, 0
    steps: list[torch.Tensor] = []
    shift, count = 0.0, 0
    for part, whole in ((piece, each) for each in parts for piece in _pieces(each)):
        # Outputs that come first tell enough.
        traces = traces or _traces(whole, grid, inputs)
        fair = torch.empty(len(inputs), len(part.original), dtype=torch.float64)
        lost_by_rounding = rounded(part.original, part.scales, grid).sub_(part.original)
        # A step's error is uniform where nothing is known of it: a twelfth of its square.
        squares = grouped(lost_by_rounding.square(), part.scales, grid)
        expected = torch.maximum(squares, (part.scales.square() / 12)[..., None])
        expected = expected.flatten(1)[:, : part.original.shape[1]]
        lost = part.shipped - part.original
        steps.append((part.shipped_scales / part.scales).flatten())
        by_group = grouped(lost, part.shipped_scales, grid).sum(2, dtype=torch.float64)
        shift += float((by_group / part.shipped_scales).sum())
        count += lost.numel()
        for kind, given in enumerate(inputs):
            shipped = _squares(lost, given)
            by_rounding = _squares(lost_by_rounding, given)
            base = (expected @ given.squares.float()).double()
            sums[kind] += torch.stack([each.sum() for each in (shipped, by_rounding, base)])
            fair[kind] = _over(shipped, torch.maximum(by_rounding, base))
        ratios = fair.amin(0)
        largest = float(ratios.max())
        # NaN is worse than any number.
        if not largest <= worst:
            worst, place = largest, first + int(ratios.argmax())
        first += len(part.original)
    layer = _over(sums[:, 0], torch.maximum(sums[:, 1], sums[:, 2])).amin()
    median = float(torch.cat(steps).median())
    mean_shift = abs(shift) / max(1, count)
    traces = traces or Traces(1.0, 0.0, 0.0, 0.0)
    return OutputError(float(layer), worst, place, median, mean_shift, traces)


def _pieces(part: WeightRows) -> Iterator[WeightRows]:
    for rows in cache_blocks(part.original):
        yield WeightRows(
            part.original[rows], part.shipped[rows], part.scales[rows], part.shipped_scales[rows]
        )


def _traces(part: WeightRows, grid: Grid, inputs: Sequence[KindInputs]) -> Traces:
    some = slice(None, None, max(1, part.original.numel() // _TRACED))
    original, shipped, scales, shipped_scales = (
        each[some] for each in (part.original, part.shipped, part.scales, part.shipped_scales)
    )
    seen = SolverTraces(grid, [given.squares for given in inputs], len(original))
    seen.add(
        shipped,
        shipped - original,
        rounded(original, scales, grid).sub_(original),
        _by_column(shipped_scales, grid, original.shape[1]),
        _by_column(scales, grid, original.shape[1]),
    )
    return seen.result()


def _by_column(scales: torch.Tensor, grid: Grid, columns: int) -> torch.Tensor:
    """Scales [rows, groups] as [rows, columns]; one scale a row stays [rows, 1]."""
    if scales.shape[1] == 1:
        return scales
    return scales.repeat_interleave(grid.group, 1)[:, :columns]


def _squares(lost: torch.Tensor, given: KindInputs) -> torch.Tensor:
    """Mean squared output of rows [rows, K], float64 [rows]."""
    return (lost @ given.sums.T).double().square().sum(1)


def _over(lost: torch.Tensor, fair: torch.Tensor) -> torch.Tensor:
    """Nothing lost is 0, even of nothing; something lost of nothing is infinite."""
    return torch.where(lost == 0, torch.zeros_like(lost), lost / fair)
