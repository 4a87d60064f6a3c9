"""Hessian: the second moment of a linear layer's inputs, X^T diag(w) X / sum(w).

GPTQ (Frantar et al., arXiv 2210.17323, section 3) minimises ||X (W - Ŵ)^T||²; the inputs X enter it
only through this matrix. Rows are tokens. Their weights let a handful of text tokens count beside
thousands of image tokens; padding has weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from llava_edge.profiles.errors import CheckpointError, RequestError

_TOKENS_AT_A_TIME = 1024
_COLUMNS_AT_A_TIME = 1024
_SMALLEST_BLOCK = 1024


@dataclass(frozen=True)
class HessianLayout:
    """Which columns share a Hessian.

    ``edges`` are the borders of the column blocks: (0, K) for one whole matrix, more for a block
    diagonal that ignores what lies between blocks, empty where nothing useful fits and the layer
    must be rounded to nearest. ``note`` says so in words, for the journal; None when nothing is
    released. ``num_bytes`` is the peak while solving: all blocks and one factor.
    """

    edges: tuple[int, ...]
    num_bytes: int
    note: str | None

    @property
    def fits(self) -> bool:
        """Whether there is any Hessian to solve with."""
        return bool(self.edges)


def plan_hessian(num_columns: int, byte_budget: int, multiple: int = 128) -> HessianLayout:
    """Fewest equal column blocks whose float64 Hessians and one factor fit ``byte_budget``.

    Args:
        num_columns: K of the layer.
        byte_budget: bytes that the Hessians and the factor of one block may take together.
        multiple: the group size; block borders fall on multiples of it.
    """
    whole = _peak_bytes((0, num_columns))
    num_blocks = 1
    while True:
        width = -(-num_columns // (num_blocks * multiple)) * multiple
        edges = (*range(0, num_columns, width), num_columns)
        if num_blocks > 1 and width < _SMALLEST_BLOCK:
            note = (
                f"the Hessian of {num_columns} columns takes {whole} bytes while solving; "
                f"{byte_budget} are allowed, too few even for blocks of {_SMALLEST_BLOCK} columns: "
                "the layer is rounded to nearest"
            )
            return HessianLayout((), 0, note)
        needed = _peak_bytes(edges)
        if needed <= byte_budget:
            break
        num_blocks += 1
    if num_blocks == 1:
        return HessianLayout(edges, needed, None)
    blocks = (
        f"the Hessian of {num_columns} columns takes {whole} bytes while solving; {byte_budget} "
        f"are allowed: solved in {len(edges) - 1} column blocks that ignore each other"
    )
    return HessianLayout(edges, needed, blocks)


def _peak_bytes(edges: tuple[int, ...]) -> int:
    squares = [(high - low) ** 2 for low, high in pairwise(edges)]
    return 8 * (sum(squares) + max(squares))


@dataclass(frozen=True)
class Hessian:
    """Mean of w x x^T over the calibration rows, float64, in column blocks.

    ``blocks[i]`` belongs to the columns ``edges[i]`` to ``edges[i + 1]``. ``num_tokens`` counts
    the rows of positive weight, ``weight_sum`` adds their weights.
    """

    blocks: tuple[torch.Tensor, ...]
    edges: tuple[int, ...]
    num_tokens: int
    weight_sum: float

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Hessian:
        """One whole matrix [K, K] as it is."""
        return cls((matrix,), (0, matrix.shape[0]), 0, 0.0)

    @property
    def num_columns(self) -> int:
        """K of the layer."""
        return self.edges[-1]

    def diagonal(self) -> torch.Tensor:
        """Second moment of each column, float64 [K]."""
        return torch.cat([block.diagonal() for block in self.blocks])

    def ranges(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """First column, column after the last, and matrix of each block."""
        return zip(self.edges[:-1], self.edges[1:], self.blocks, strict=True)


class HessianAccumulator:
    """Sums w x x^T over batches of rows.

    Products of up to 1024 rows are taken in the rows' precision (at least float32) and added up in
    float64, lower triangle only.
    """

    def __init__(self, num_columns: int, layout: HessianLayout | None = None) -> None:
        edges = (0, num_columns) if layout is None else layout.edges
        if len(edges) < 2 or edges[-1] != num_columns:
            raise RequestError(
                f"a Hessian of {num_columns} columns was asked for with the borders {edges}; "
                "round the layer to nearest where the layout holds no block"
            )
        self._edges = edges
        self._sums = [
            torch.zeros(high - low, high - low, dtype=torch.float64)
            for low, high in pairwise(edges)
        ]
        self._num_tokens = 0
        self._weight_sum = 0.0

    def add(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add inputs of the layer.

        Args:
            rows: float [tokens, K]. Rows of weight 0 are never looked at.
            weights: [tokens], finite and not negative; None counts each row once.

        Raises:
            RequestError: shapes do not go together or a weight is negative or not finite.
            CheckpointError: a row of positive weight is not finite.
        """
        if rows.ndim != 2 or rows.shape[1] != self._edges[-1]:
            raise RequestError(
                f"calibration rows have shape {list(rows.shape)}; this layer takes "
                f"[tokens, {self._edges[-1]}]"
            )
        if weights is None:
            weights = torch.ones(rows.shape[0], dtype=torch.float64)
        weights = weights.to(torch.float64)
        if weights.shape != rows.shape[:1] or not bool(((weights >= 0) & weights.isfinite()).all()):
            raise RequestError(
                f"token weights of shape {list(weights.shape)} for {rows.shape[0]} rows; there "
                "must be one finite weight of at least 0 for each row"
            )
        kept = (weights > 0).nonzero()[:, 0]
        for first in range(0, len(kept), _TOKENS_AT_A_TIME):
            chosen = kept[first : first + _TOKENS_AT_A_TIME]
            self._add_batch(rows[chosen], weights[chosen])
        self._num_tokens += len(kept)
        self._weight_sum += float(weights.sum())

    def _add_batch(self, rows: torch.Tensor, weights: torch.Tensor) -> None:
        precision = torch.float64 if rows.dtype == torch.float64 else torch.float32
        scaled = rows.to(precision) * weights.sqrt().to(precision)[:, None]
        if not bool(torch.isfinite(scaled.sum())):
            bad = (~torch.isfinite(scaled)).any(0).nonzero()[:, 0]
            if len(bad):
                raise CheckpointError(
                    f"the layer's calibration inputs are not finite in {len(bad)} columns, the "
                    f"first {int(bad[0])}; the checkpoint overflows on these samples"
                )
        for low, high, sums in zip(self._edges[:-1], self._edges[1:], self._sums, strict=True):
            for first in range(low, high, _COLUMNS_AT_A_TIME):
                last = min(first + _COLUMNS_AT_A_TIME, high)
                product = scaled[:, first:high].T @ scaled[:, first:last]
                sums[first - low :, first - low : last - low] += product

    def finish(self) -> Hessian:
        """The mean over all rows added. The accumulator gives its memory away and is spent.

        Raises:
            RequestError: no row of positive weight was added.
        """
        if not self._weight_sum > 0:
            raise RequestError(
                "no calibration token reached this layer: every row was padding or had weight 0; "
                "give samples with at least one token"
            )
        blocks, self._sums = tuple(self._sums), []
        for block in blocks:
            _mirror_lower(block)
            block.div_(self._weight_sum)
        return Hessian(blocks, self._edges, self._num_tokens, self._weight_sum)


def _mirror_lower(matrix: torch.Tensor) -> None:
    size = matrix.shape[0]
    for first in range(0, size, _COLUMNS_AT_A_TIME):
        last = min(first + _COLUMNS_AT_A_TIME, size)
        square = matrix[first:last, first:last].tril()
        matrix[first:last, first:last] = square + square.tril(-1).T
        matrix[first:last, last:] = matrix[last:, first:last].T


def hessian_norms(
    deltas: torch.Tensor, hessian: Hessian, precision: torch.dtype = torch.float64
) -> torch.Tensor:
    """D H d^T of each row d: its mean squared output over the calibration rows.

    Args:
        deltas: float [rows, K].
        hessian: of the same K.
        precision: float32 halves the time; enough where d is no solution of the solver, whose error
            hides in directions that H hardly sees.

    Returns:
        float64 [rows].
    """
    norms = torch.zeros(deltas.shape[0], dtype=torch.float64)
    for low, high, block in hessian.ranges():
        part = deltas[:, low:high].to(precision)
        size = high - low
        for first in range(0, size, _COLUMNS_AT_A_TIME):
            last = min(first + _COLUMNS_AT_A_TIME, size)
            # Symmetric: what lies below the square counts twice.
            panel = block[first:, first:last].to(precision)
            panel[: last - first] *= 0.5
            product = part[:, first:] @ panel
            norms += product.mul_(part[:, first:last]).sum(1, dtype=torch.float64) * 2.0
    return norms
