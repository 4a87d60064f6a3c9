"""What GPTQ leaves in the errors of a layer is told from damage, whatever its Hessian was."""

from __future__ import annotations

import pytest
import torch

from llava_edge.convert.checkpoint.formats.rounding import QuantizedWeight
from llava_edge.convert.quantization.gptq.solver import quantize_weight, round_to_nearest
from llava_edge.convert.verification.quantized.reference_rounding import (
    Grid,
    nearest_scales,
    rounded,
)
from llava_edge.convert.verification.quantized.solver_traces import SolverTraces, Traces

GRID = Grid(4, 32)
Layer = tuple[torch.Tensor, QuantizedWeight, torch.Tensor]


@pytest.fixture(scope="module")
def solved() -> Layer:
    """A weight, what GPTQ makes of it for inputs of few directions, and their mean squares."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(96, 96, generator=generator) * torch.logspace(0, -1.5, 96)
    rows = torch.randn(512, 96, generator=generator) @ mixed
    weight = torch.randn(160, 96, generator=generator)
    hessian = (rows.T @ rows / len(rows)).double()
    return weight, quantize_weight(weight, hessian, bits=4, group_size=32), hessian.diagonal()


def traces(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    squares: torch.Tensor,
    step: int = 160,
) -> Traces:
    found = SolverTraces(GRID, [squares], len(weight))
    ours, theirs = (
        each.repeat_interleave(32, 1) for each in (scales, nearest_scales(weight, GRID))
    )
    by_rounding = rounded(weight, nearest_scales(weight, GRID), GRID) - weight
    for rows in torch.arange(len(weight)).split(step):
        shipped = codes[rows] * ours[rows]
        lost = shipped - weight[rows]
        found.add(shipped, lost, by_rounding[rows], ours[rows], theirs[rows])
    return found.result()


def parts(quantized: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.from_numpy(quantized.qweight).float() - 8
    return codes, torch.from_numpy(quantized.scales).float()


def test_what_columns_make_up_for_each_other_is_explained(solved: Layer) -> None:
    weight, quantized, squares = solved
    codes, scales = parts(quantized)

    found = traces(weight, codes, scales, squares)
    in_pieces = traces(weight, codes, scales, squares, step=7)

    # Errors are many times those of rounding, and no larger where nothing came before.
    lost = codes * scales.repeat_interleave(32, 1) - weight
    by_rounding = rounded(weight, nearest_scales(weight, GRID), GRID) - weight
    assert float(lost.square().mean() / by_rounding.square().mean()) > 1.5
    assert 0.8 < found.unexplained < 1.5
    assert found.unmoved < 0.95
    assert abs(found.center) < 0.01
    assert in_pieces.unexplained == pytest.approx(found.unexplained, rel=1e-4)
    assert in_pieces.center == pytest.approx(found.center, abs=1e-5)


def test_codes_that_are_off_by_one_are_not(solved: Layer) -> None:
    weight, quantized, squares = solved
    codes, scales = parts(quantized)
    generator = torch.Generator().manual_seed(1)
    hit = torch.rand(codes.shape, generator=generator) < 0.1
    step = torch.where(torch.rand(codes.shape, generator=generator) < 0.5, -1.0, 1.0)

    found = traces(weight, (codes + hit * step).clamp(-8, 7), scales, squares)

    assert found.unexplained > 2.0


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_scales_that_were_changed_afterwards_show(solved: Layer, factor: float) -> None:
    weight, quantized, squares = solved
    codes, scales = parts(quantized)
    before = traces(weight, codes, scales, squares)

    after = traces(weight, codes, scales * factor, squares)

    assert before.center - after.center == pytest.approx(factor - 1, abs=0.003)


def test_rounding_to_nearest_moves_no_code(solved: Layer) -> None:
    weight, _, squares = solved

    found = traces(weight, *parts(round_to_nearest(weight, bits=4, group_size=32)), squares)

    assert found.unmoved == 1.0
    assert found.unexplained == pytest.approx(1.0, abs=1e-3)


def test_too_few_outputs_say_nothing_of_columns(solved: Layer) -> None:
    weight, quantized, squares = solved
    codes, scales = parts(quantized)

    found = traces(weight[:6], codes[:6], scales[:6], squares)

    assert found.unexplained == 1.0
    assert found.unmoved < 1.0
