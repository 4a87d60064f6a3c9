from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from llava_edge.convert.checkpoint.formats.rounding import (
    QuantizationReport,
    QuantizedWeight,
    find_scales,
    round_to_nearest,
)
from llava_edge.profiles.errors import CheckpointError, RequestError


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and lose much where processors are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_absmax_rounds_as_computed_by_hand() -> None:
    # Largest 7.5 gives the scale 1; halves go to the even code, 7.5 is cut at 7.
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([7.5, -7.5, 0.5, 1.5, -2.5, 0.49])

    rounded = round_to_nearest(weight, bits=4, group_size=32, scale="absmax")

    assert rounded.scales.tolist() == [[1.0]]
    assert (rounded.qweight[0, :6].astype(int) - 8).tolist() == [7, -8, 0, 2, -2, 0]
    assert (rounded.qweight[0, 6:] == 8).all()
    squares = [0.25, 0.25, 0.25, 0.25, 0.25, 0.49**2]
    assert rounded.report.mse == pytest.approx(sum(squares) / 32)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 32), (8, 64), (8, -1)])
def test_mse_scales_are_no_worse_than_absmax(bits: int, group_size: int) -> None:
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(0))

    plain = round_to_nearest(weight, bits=bits, group_size=group_size, scale="absmax")
    searched = round_to_nearest(weight, bits=bits, group_size=group_size)

    def row_errors(quantized: QuantizedWeight) -> np.ndarray:
        deltas = torch.from_numpy(quantized.dequantize()).double() - weight.double()
        return deltas.square().sum(1).numpy()

    assert (row_errors(searched) <= row_errors(plain) * (1 + 1e-12)).all()
    assert row_errors(searched).sum() < row_errors(plain).sum()
    assert searched.report.mse == pytest.approx(row_errors(searched).sum() / weight.numel())


def test_the_search_spares_a_weight_that_inputs_never_see() -> None:
    values = torch.tensor([[0.1], [0.7], [50.0]], dtype=torch.float64)
    importance = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)

    seen = find_scales(values, torch.ones(3, dtype=torch.float64), 4, search=True)
    unseen = find_scales(values, importance, 4, search=True)

    assert float(unseen) < float(seen)


def test_an_8_bit_row_is_scaled_as_a_whole() -> None:
    weight = torch.zeros(2, 50)
    weight[0, 0], weight[0, 49] = -128.0, 64.0

    rounded = round_to_nearest(weight, bits=8, group_size=-1)

    assert rounded.scales.tolist() == [[1.0], [2.0**-14]]
    assert rounded.qweight[0, [0, 1, 49]].tolist() == [0, 128, 192]
    assert rounded.columns_per_group == 50
    assert rounded.g_idx.tolist() == [0] * 50


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e30], ids=["subnormal", "tiny", "huge"])
def test_scales_stay_normal_half_precision_numbers(size: float) -> None:
    rounded = round_to_nearest(torch.full((1, 32), size), bits=4, group_size=32)

    scale = float(rounded.scales[0, 0])
    assert 2.0**-14 <= scale <= 65504.0


def test_values_are_code_less_zero_times_scale() -> None:
    quantized = QuantizedWeight(
        qweight=np.array([[0, 8, 15, 9]], np.uint8),
        scales=np.array([[0.5, 2.0]], np.float16),
        bits=4,
        group_size=2,
        report=QuantizationReport(),
    )

    assert quantized.dequantize().tolist() == [[-4.0, 0.0, 14.0, 2.0]]
    assert quantized.g_idx.tolist() == [0, 0, 1, 1]


def test_a_reduced_range_uses_half_the_codes() -> None:
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))

    reduced = round_to_nearest(weight, bits=8, group_size=-1, reduce_range=True)
    full = round_to_nearest(weight, bits=8, group_size=-1)

    assert reduced.qweight.min() >= 64
    assert reduced.qweight.max() <= 191
    assert np.abs(reduced.qweight.astype(int) - 128).max(1).min() >= 60
    assert reduced.report.mse is not None
    assert full.report.mse is not None
    # A step twice as wide squares to four times the error.
    assert reduced.report.mse / full.report.mse == pytest.approx(4.0, rel=0.15)


def test_four_bits_have_no_reduced_range() -> None:
    with pytest.raises(RequestError, match="reduce_range is for 8 bits"):
        round_to_nearest(torch.ones(2, 32), bits=4, group_size=32, reduce_range=True)


def test_bits_and_group_outside_their_sets_are_refused_together() -> None:
    with pytest.raises(RequestError, match=r"bits is 3.*group_size is 100"):
        round_to_nearest(torch.ones(2, 100), bits=3, group_size=100)


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.ones(4), id="one-axis"),
        pytest.param(torch.ones(0, 32), id="no-rows"),
        pytest.param(torch.ones(2, 32, dtype=torch.int32), id="integers"),
    ],
)
def test_what_is_no_float_matrix_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="non-empty float matrix"):
        round_to_nearest(weight, bits=4, group_size=32)


def test_largest_half_precision_weights_do_not_read_as_infinite() -> None:
    weight = torch.full((64, 1024), 65504.0, dtype=torch.float16)

    assert (round_to_nearest(weight, bits=8, group_size=128).dequantize() > 65000).all()
