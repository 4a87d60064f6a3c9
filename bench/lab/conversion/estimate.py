"""GPTQ of models too large to measure here: memory and time a layer, by arithmetic.

Time grows with the floating point operations of a layer, memory with its widest Hessian and its
largest weight; both start from what was measured on a 7B. Sums, not measurements.

Operations of one layer, T calibration tokens, linear layers of N outputs and K inputs, float64
counted twice:

- forward: 2 T N K of each linear layer;
- second moments: T K^2 of each group of inputs (half of a symmetric product);
- solution: K^3 / 3 a factor and N K^2 of updates in float64, 2 N K^2 for errors in float32.

Columns beyond what ``convert`` grants a Hessian are solved in blocks that ignore each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.profiles.models.variants import find_variant

MEASURED = "llava-v1.6-mistral-7b"
LARGER = ("llava-v1.6-34b", "llava-next-110b")

HESSIAN_BYTES = 4 << 30
"""What ``convert`` grants the Hessians and a factor (its quantize_settings)."""
PROCESS_BYTES = 400 << 20
"""A conversion of next to nothing: 390 to 424 MiB of libraries."""
_GROUP = 128


@dataclass(frozen=True)
class Estimate:
    """One model.

    Attributes:
        variant: its name.
        layers: of its decoder.
        hessian_bytes: widest Hessian and its factor, in blocks where it must be.
        blocks: how many.
        weight_bytes: largest weight of a layer in float32.
        operations: of one layer.
    """

    variant: str
    layers: int
    hessian_bytes: int
    blocks: int
    weight_bytes: int
    operations: float

    @classmethod
    def of(cls, variant: str, tokens: int) -> Estimate:
        """For so many calibration tokens."""
        text = find_variant(variant).dims.text
        linears = _linears(text)
        plans = {columns: column_blocks(columns) for columns, _ in linears}
        widest = max(plans)
        return cls(
            variant=variant,
            layers=text.num_hidden_layers,
            hessian_bytes=_peak_bytes(widest, plans[widest]),
            blocks=plans[widest],
            weight_bytes=4 * max(columns * max(rows) for columns, rows in linears),
            operations=sum(
                _operations(columns, rows, plans[columns], tokens) for columns, rows in linears
            ),
        )


def larger_models(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The larger models, from what ``gptq`` measured.

    Returns:
        One object a model: ``variant``, ``layers``, ``blocks``, ``peak_bytes``,
        ``seconds_per_layer``, ``hours``.
    """
    tokens = measured["tokens_total"]
    base = Estimate.of(MEASURED, tokens)
    rest = measured["peak_bytes"] - base.hessian_bytes - PROCESS_BYTES
    found = []
    for variant in LARGER:
        each = Estimate.of(variant, tokens)
        grown = rest * each.weight_bytes / base.weight_bytes
        seconds = measured["seconds_per_layer"] * each.operations / base.operations
        found.append(
            {
                "variant": variant,
                "layers": each.layers,
                "blocks": each.blocks,
                "peak_bytes": round(each.hessian_bytes + PROCESS_BYTES + grown),
                "seconds_per_layer": seconds,
                "hours": seconds * each.layers / 3600,
            }
        )
    return found


def column_blocks(columns: int, budget: int = HESSIAN_BYTES) -> int:
    """Fewest column blocks whose float64 Hessians and one factor fit the budget."""
    blocks = 1
    while _peak_bytes(columns, blocks) > budget:
        blocks += 1
    return blocks


def _peak_bytes(columns: int, blocks: int) -> int:
    width = -(-columns // (blocks * _GROUP)) * _GROUP
    edges = [*range(0, columns, width), columns]
    squares: list[int] = [(high - low) ** 2 for low, high in itertools.pairwise(edges)]
    return 8 * (sum(squares) + max(squares))


def _linears(text: TextDims) -> list[tuple[int, list[int]]]:
    """Each set of inputs, and the outputs of the linear layers that read it."""
    hidden, query, inner = text.hidden_size, text.query_size, text.intermediate_size
    grouped = text.num_key_value_heads * text.head_dim
    return [
        (hidden, [query, grouped, grouped]),
        (query, [hidden]),
        (hidden, [inner, inner]),
        (inner, [hidden]),
    ]


def _operations(columns: int, rows: list[int], blocks: int, tokens: int) -> float:
    square = columns**2 / blocks
    forward = 2.0 * tokens * columns * sum(rows)
    moments = tokens * square
    factors = blocks * (columns / blocks) ** 3 / 3
    return forward + moments + 2 * (factors + sum(rows) * square) + 2 * sum(rows) * square
