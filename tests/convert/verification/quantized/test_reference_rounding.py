"""The verifier's rounding: what the quantiser's rounding is, written apart from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llava_edge.convert.checkpoint.formats.rounding import (
    PER_CHANNEL,
    QuantizedWeight,
    round_to_nearest,
)
from llava_edge.convert.verification.quantized.reference_rounding import (
    Disagreement,
    Grid,
    disagreement,
    nearest_scales,
    rounded,
)

FORMS = [(4, 128), (4, 64), (4, 32), (4, PER_CHANNEL), (8, 128), (8, 32), (8, PER_CHANNEL)]
TYPES = [torch.float16, torch.bfloat16, torch.float32]
AGREES = Disagreement(0, 0)


def drawn(dtype: torch.dtype = torch.float16, *, columns: int = 256) -> torch.Tensor:
    """Weights with loud columns, a row of zeros and a row of equal numbers."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(96, columns, generator=generator) * 0.02
    weight[:, 7] *= 30
    weight[4] = 0.0
    weight[5] = 0.125
    return weight.to(dtype)


def grid_of(quantized: QuantizedWeight, *, reduced: bool = False) -> Grid:
    return Grid(quantized.bits - reduced, quantized.columns_per_group)


def compare(weight: torch.Tensor, quantized: QuantizedWeight, grid: Grid) -> Disagreement:
    codes = torch.from_numpy(quantized.qweight.astype(np.int16)) - (1 << (quantized.bits - 1))
    return disagreement(weight.float(), codes, torch.from_numpy(quantized.scales).float(), grid)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_two_roundings_written_apart_agree_on_every_code_and_scale(
    bits: int, group: int, dtype: torch.dtype
) -> None:
    weight = drawn(dtype)
    quantized = round_to_nearest(weight, bits=bits, group_size=group)

    assert compare(weight, quantized, grid_of(quantized)) == AGREES
    scales = nearest_scales(weight.float(), grid_of(quantized))
    values = rounded(weight.float(), scales, grid_of(quantized))
    assert float((values - torch.from_numpy(quantized.dequantize())).abs().max()) < 1e-3


def test_a_reduced_range_agrees_where_it_is_known_and_only_there() -> None:
    weight = drawn()
    quantized = round_to_nearest(weight, bits=8, group_size=64, reduce_range=True)

    assert compare(weight, quantized, grid_of(quantized, reduced=True)) == AGREES
    assert compare(weight, quantized, grid_of(quantized)).scales > 300


def test_weights_that_lie_on_a_grid_already_agree() -> None:
    first = round_to_nearest(drawn(), bits=4, group_size=32).dequantize()
    weight = torch.from_numpy(first).half()

    quantized = round_to_nearest(weight, bits=4, group_size=32)

    assert compare(weight, quantized, grid_of(quantized)) == AGREES


def test_one_code_and_one_digit_of_one_scale_are_seen() -> None:
    weight = drawn()
    quantized = round_to_nearest(weight, bits=4, group_size=64)

    quantized.qweight[17, 100] ^= 1
    assert compare(weight, quantized, grid_of(quantized)) == Disagreement(1, 0)

    quantized.qweight[17, 100] ^= 1
    quantized.scales.view(np.uint16)[20, 1] += 1
    assert compare(weight, quantized, grid_of(quantized)).scales == 1


def test_scales_of_another_rule_are_seen_though_codes_are_nearest_by_them() -> None:
    weight = drawn()
    quantized = round_to_nearest(weight, bits=4, group_size=64, scale="absmax")

    found = compare(weight, quantized, grid_of(quantized))

    assert found.codes == 0
    assert found.scales > 200


def test_a_half_of_a_float32_weight_is_decided_by_its_last_digit() -> None:
    """A quotient that float32 rounds to a half is none where more digits are looked at."""
    scale = torch.tensor([[0.0999755859375]])
    close = np.nextafter(np.float32(2.5 * float(scale)), np.float32(1))
    weight = torch.full((1, 32), float(close))
    codes = torch.full((1, 32), 3 if float(close) / float(scale) > 2.5 else 2)

    assert disagreement(weight, codes, scale, Grid(4, 32)).codes == 0


def test_columns_of_a_group_that_is_cut_short_are_looked_at() -> None:
    weight = drawn(columns=80)
    scales = nearest_scales(weight.float(), Grid(8, 64))
    values = rounded(weight.float(), scales, Grid(8, 64))
    codes = (values / torch.repeat_interleave(scales, 64, dim=1)[:, :80]).round()

    assert scales.shape == (96, 2)
    assert disagreement(weight.float(), codes, scales, Grid(8, 64)) == AGREES
    codes[9, 79] += 1
    assert disagreement(weight.float(), codes, scales, Grid(8, 64)) == Disagreement(1, 0)
