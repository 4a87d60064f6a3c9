from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from llava_edge.convert.quantization.gptq.solver import (
    Hessian,
    QuantizedWeight,
    quantize_weight,
    round_to_nearest,
)
from llava_edge.profiles.errors import CheckpointError, RequestError

Solved = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and lose much where processors are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def correlated_hessian(columns: int, seed: int, rows: int | None = None) -> torch.Tensor:
    """Inputs of unequal size whose neighbours go together, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows or 3 * columns, columns)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = inputs @ (mixing / columns**0.5 + torch.eye(columns, dtype=torch.float64))
    inputs *= torch.randn(columns, generator=generator, dtype=torch.float64).mul(0.7).exp()
    hessian: torch.Tensor = inputs.T @ inputs / len(inputs)
    return hessian


def side_by_side(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The block-diagonal matrix of two."""
    size = len(first) + len(second)
    joined = torch.zeros(size, size, dtype=torch.float64)
    joined[: len(first), : len(first)] = first
    joined[len(first) :, len(first) :] = second
    return joined


def random_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(rows, columns, generator=generator) * 0.05


def best_scale(values: np.ndarray, importance: np.ndarray, bits: int, search: bool) -> float:
    """One row's scale by trying every candidate in turn."""
    half = 2 ** (bits - 1)

    def stored(scale: float) -> float:
        return float(np.float16(min(max(scale, 2.0**-14), 65504.0)))

    def round_with(scale: float) -> np.ndarray:
        return np.clip(np.round(values / scale), -half, half - 1)

    def error(scale: float) -> float:
        return float((importance * (round_with(scale) * scale - values) ** 2).sum())

    largest = np.abs(values).max()
    if not search:
        return stored(largest * 2.0 / (2**bits - 1))
    shrunk = [largest / ((half - 1) / (1.0 - 0.08 * step)) for step in range(8)]
    candidates = [stored(s) for s in [largest / (half - 0.5), largest / half, *shrunk]]
    best = min(candidates, key=error)
    codes = round_with(best)
    if (importance * codes * codes).sum() > 0:
        fitted = (importance * values * codes).sum() / (importance * codes * codes).sum()
        best = min([best, stored(fitted)], key=error)
    return best


def solve_slowly(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    damp_percent: float = 0.01,
    order: str = "gar",
    scale_search: bool = True,
) -> Solved:
    """GPTQ as the paper states it, one column at a time with an explicit inverse.

    After each column the error spreads over the rest along its row of H^-1, and the column is
    eliminated from H^-1. Returns codes and scales.
    """
    w, h = weight.double().numpy().copy(), hessian.numpy().copy()
    num_rows, num_columns = w.shape
    group = num_columns if group_size == -1 else group_size
    importance = h.diagonal().copy()
    dead = importance == 0
    w[:, dead] = 0
    mean = importance[~dead].mean()
    h[dead, dead] = mean
    inverse = np.linalg.inv(h + np.eye(num_columns) * damp_percent * mean)
    groups = [list(range(low, low + group)) for low in range(0, num_columns, group)]
    if order == "gar":
        groups = [sorted(columns, key=lambda c: -importance[c]) for columns in groups]
        groups.sort(key=lambda columns: -importance[columns].sum())
    codes = np.zeros((num_rows, num_columns))
    scales = np.zeros((num_rows, num_columns // group))
    for columns in groups:
        index, members = columns[0] // group, sorted(columns)
        for row in range(num_rows):
            scales[row, index] = best_scale(
                w[row, members], importance[members], bits, scale_search
            )
        for c in columns:
            scale = scales[:, index]
            codes[:, c] = np.clip(
                np.round(w[:, c] / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            )
            error = (w[:, c] - codes[:, c] * scale) / inverse[c, c]
            w -= np.outer(error, inverse[c])
            inverse -= np.outer(inverse[:, c], inverse[c]) / inverse[c, c]
    return codes + 2 ** (bits - 1), scales


def output_error(weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor) -> float:
    """||X (W - Ŵ)^T||² / ||X W^T||² from the definition."""
    exact = weight.double()
    delta = exact - torch.from_numpy(quantized.dequantize()).double()
    return float(((delta @ hessian) * delta).sum() / ((exact @ hessian) * exact).sum())


@pytest.mark.parametrize(
    ("columns", "bits", "group_size", "settings"),
    [
        pytest.param(256, 4, 128, {}, id="int4-g128"),
        pytest.param(256, 4, 128, {"order": "none"}, id="columns-as-they-stand"),
        pytest.param(256, 4, 128, {"scale_search": False}, id="absmax-scales"),
        pytest.param(256, 4, 128, {"damp_percent": 0.1}, id="more-damping"),
        pytest.param(192, 4, 64, {}, id="int4-g64-half-a-block-left"),
        pytest.param(288, 8, 32, {}, id="int8-g32-a-quarter-block-left"),
        pytest.param(203, 8, -1, {}, id="int8-per-channel-203-columns"),
        pytest.param(130, 4, -1, {}, id="int4-per-channel-two-past-a-block"),
    ],
)
def test_codes_and_scales_equal_the_column_by_column_procedure(
    columns: int, bits: int, group_size: int, settings: dict[str, object]
) -> None:
    weight, hessian = random_weight(11, columns, columns), correlated_hessian(columns, columns)

    codes, scales = solve_slowly(
        weight,
        hessian,
        bits=bits,
        group_size=group_size,
        **settings,  # type: ignore[arg-type]
    )
    found = quantize_weight(
        weight,
        hessian,
        bits=bits,
        group_size=group_size,
        never_worse=False,
        **settings,  # type: ignore[arg-type]
    )

    np.testing.assert_array_equal(found.scales, scales)
    np.testing.assert_array_equal(found.qweight, codes)
    assert found.report.relative_error == pytest.approx(output_error(weight, found, hessian))


@pytest.mark.parametrize("block_size", [32, 64, 256, 1024])
def test_the_block_size_changes_no_code(block_size: int) -> None:
    weight, hessian = random_weight(9, 256, 5), correlated_hessian(256, 5)

    usual = quantize_weight(weight, hessian, bits=4, group_size=128)
    other = quantize_weight(weight, hessian, bits=4, group_size=128, block_size=block_size)

    np.testing.assert_array_equal(other.qweight, usual.qweight)
    np.testing.assert_array_equal(other.scales, usual.scales)


def test_rows_in_chunks_on_two_threads_are_solved_as_if_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llava_edge.convert.util.parallel._ELEMENTS_AT_A_TIME", 1)
    torch.set_num_threads(2)
    weight, hessian = random_weight(600, 64, 6), correlated_hessian(64, 6)

    together = quantize_weight(weight, hessian, bits=4, group_size=32)
    alone = quantize_weight(weight[555:], hessian, bits=4, group_size=32)

    np.testing.assert_array_equal(together.qweight[555:], alone.qweight)
    np.testing.assert_array_equal(together.scales[555:], alone.scales)


def test_the_same_matrix_gives_the_same_bytes_again() -> None:
    weight, hessian = random_weight(40, 256, 7), correlated_hessian(256, 7)

    first, second = (quantize_weight(weight, hessian, bits=4, group_size=64) for _ in range(2))

    assert first.qweight.tobytes() == second.qweight.tobytes()
    assert first.scales.tobytes() == second.scales.tobytes()
    assert first.report == second.report


def test_the_error_is_below_rounding_on_every_case_and_below_absmax_scales_on_average() -> None:
    ratios = []
    for seed in range(12):
        columns, group_size, bits = [(128, 128, 4), (192, 64, 4), (96, 32, 8), (100, -1, 4)][
            seed % 4
        ]
        weight, hessian = random_weight(24, columns, seed), correlated_hessian(columns, seed)

        searched, plain = (
            quantize_weight(
                weight, hessian, bits=bits, group_size=group_size, scale_search=search,
                never_worse=False,
            ).report
            for search in (True, False)
        )  # fmt: skip

        assert searched.relative_error is not None
        assert searched.rtn_relative_error is not None
        assert plain.relative_error is not None
        assert searched.relative_error < searched.rtn_relative_error
        ratios.append(searched.relative_error / plain.relative_error)

    assert np.mean(ratios) < 0.9


def test_the_reported_rounding_error_is_that_of_round_to_nearest() -> None:
    weight, hessian = random_weight(24, 128, 3), correlated_hessian(128, 3)

    report = quantize_weight(weight, hessian, bits=4, group_size=32).report
    rounded = round_to_nearest(weight, bits=4, group_size=32)

    assert report.rtn_relative_error == pytest.approx(output_error(weight, rounded, hessian), 1e-4)


def test_group_aware_order_lowers_the_mean_error() -> None:
    ratios = []
    for seed in range(6):
        weight, hessian = random_weight(24, 256, seed), correlated_hessian(256, seed)
        aware, plain = (
            quantize_weight(weight, hessian, bits=4, group_size=64, order=order).report
            for order in ("gar", "none")
        )
        assert aware.relative_error is not None
        assert plain.relative_error is not None
        ratios.append(aware.relative_error / plain.relative_error)

    assert np.mean(ratios) < 0.95


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    # With H = I no column can answer for another: the solver is rounding to nearest.
    weight = random_weight(8, 64, 1)

    solved = quantize_weight(weight, torch.eye(64, dtype=torch.float64), bits=4, group_size=32)
    rounded = round_to_nearest(weight, bits=4, group_size=32)

    np.testing.assert_array_equal(solved.qweight, rounded.qweight)
    np.testing.assert_array_equal(solved.scales, rounded.scales)


def test_an_input_makes_up_for_the_error_of_its_twin() -> None:
    # The large column fixes the scale at 1. 0.2 rounds to 0 and hands its error to the twin, which
    # stands at 0.4 then and rounds to 0 as well; 0.3 hands on enough for the twin to become 1.
    hessian = torch.eye(32, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 0.999
    weight = torch.zeros(2, 32)
    weight[:, 0] = weight[:, 1] = torch.tensor([0.2, 0.3])
    weight[:, 31] = 7.5

    solved = quantize_weight(
        weight,
        hessian,
        bits=4,
        group_size=32,
        scale_search=False,
        damp_percent=0.0,
        never_worse=False,
    )

    assert solved.scales.tolist() == [[1.0], [1.0]]
    assert (solved.qweight[:, :2].astype(int) - 8).tolist() == [[0, 0], [0, 1]]


def test_rows_that_rounding_serves_better_keep_it() -> None:
    weight, hessian = random_weight(64, 200, 5), correlated_hessian(200, 5)

    free, guarded = (
        quantize_weight(
            weight, hessian, bits=4, group_size=-1, order="none", scale_search=False,
            never_worse=guard,
        )
        for guard in (False, True)
    )  # fmt: skip
    rounded = round_to_nearest(weight, bits=4, group_size=-1)
    changed = (guarded.scales != free.scales)[:, 0]

    assert guarded.report.rows_rounded > 0
    assert free.report.rows_rounded == 0
    np.testing.assert_array_equal(guarded.qweight[changed], rounded.qweight[changed])
    assert guarded.report.relative_error == pytest.approx(
        output_error(weight, guarded, hessian), rel=1e-4
    )


def test_codes_reach_the_lowest_of_the_range() -> None:
    # An outlier on the negative side alone: absmax / 8 covers it and wastes no code.
    weight = torch.zeros(1, 32)
    weight[0] = -torch.arange(32) / 4.0

    solved = quantize_weight(weight, torch.eye(32, dtype=torch.float64), bits=4, group_size=32)

    assert solved.qweight.min() == 0
    assert solved.qweight.max() == 8


def test_a_reduced_range_is_solved_within_7_bits() -> None:
    weight, hessian = random_weight(9, 100, 4), correlated_hessian(100, 4)

    codes, scales = solve_slowly(weight, hessian, bits=7, group_size=-1)
    solved = quantize_weight(
        weight, hessian, bits=8, group_size=-1, reduce_range=True, never_worse=False
    )

    np.testing.assert_array_equal(solved.scales, scales)
    np.testing.assert_array_equal(solved.qweight.astype(int) - 128, codes - 64)
    assert solved.report.relative_error == pytest.approx(output_error(weight, solved, hessian))


def test_a_dead_column_becomes_zero_and_is_counted() -> None:
    weight, hessian = random_weight(8, 64, 2), correlated_hessian(64, 2)
    hessian[5], hessian[:, 5] = 0, 0
    weight[:, 5] = 100.0

    solved = quantize_weight(weight, hessian, bits=4, group_size=32, never_worse=False)
    codes, scales = solve_slowly(weight, hessian, bits=4, group_size=32)

    assert solved.report.dead_columns == 1
    assert (solved.dequantize()[:, 5] == 0).all()
    # The dead weight's size is no reason for a coarser scale.
    assert solved.scales.max() < 0.1
    np.testing.assert_array_equal(solved.qweight, codes)
    np.testing.assert_array_equal(solved.scales, scales)


def test_a_column_of_zero_weights_makes_up_for_others_and_nothing_is_lost() -> None:
    weight, hessian = random_weight(8, 64, 2), correlated_hessian(64, 2)
    weight[:, 5] = 0.0

    solved = quantize_weight(weight, hessian, bits=4, group_size=32, never_worse=False)
    codes, scales = solve_slowly(weight, hessian, bits=4, group_size=32)

    # Its input is alive, so this is no dead column.
    assert solved.report.dead_columns == 0
    np.testing.assert_array_equal(solved.qweight, codes)
    np.testing.assert_array_equal(solved.scales, scales)
    assert solved.report.relative_error is not None
    assert solved.report.rtn_relative_error is not None
    assert solved.report.relative_error < solved.report.rtn_relative_error


def test_a_layer_without_any_input_is_rounded_to_nearest() -> None:
    weight = random_weight(8, 64, 2)

    solved = quantize_weight(
        weight, torch.zeros(64, 64, dtype=torch.float64), bits=4, group_size=32
    )
    rounded = round_to_nearest(weight, bits=4, group_size=32)

    np.testing.assert_array_equal(solved.qweight, rounded.qweight)
    assert solved.report.dead_columns == 64
    assert solved.report.relative_error is None


def test_zero_rows_and_groups_get_code_zero_and_the_smallest_normal_scale() -> None:
    weight, hessian = random_weight(4, 64, 2), correlated_hessian(64, 2)
    weight[1] = 0
    weight[2, 32:] = 0

    solved = quantize_weight(weight, hessian, bits=8, group_size=32, order="none")

    assert (solved.qweight[1] == 128).all()
    assert (solved.scales[1] == np.float16(2.0**-14)).all()
    assert np.isfinite(solved.scales).all()
    assert (solved.scales >= np.float16(2.0**-14)).all()


def test_a_zero_matrix_has_no_relative_error() -> None:
    hessian = correlated_hessian(32, 2)

    solved = quantize_weight(torch.zeros(3, 32), hessian, bits=4, group_size=32)

    assert (solved.dequantize() == 0).all()
    assert solved.report.relative_error is None


def test_half_precision_weights_give_what_their_float32_values_give() -> None:
    hessian = correlated_hessian(64, 4)
    halves = random_weight(8, 64, 4).to(torch.bfloat16)

    from_halves = quantize_weight(halves, hessian, bits=4, group_size=32)
    from_floats = quantize_weight(halves.float(), hessian, bits=4, group_size=32)

    np.testing.assert_array_equal(from_halves.qweight, from_floats.qweight)


def test_inputs_are_left_as_they_were() -> None:
    weight, hessian = random_weight(8, 64, 4), correlated_hessian(64, 4)
    hessian[3], hessian[:, 3] = 0, 0
    before = weight.clone(), hessian.clone()

    quantize_weight(weight, hessian, bits=4, group_size=32)

    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_column_blocks_are_solved_each_by_itself() -> None:
    weight = random_weight(12, 192, 8)
    blocks = (correlated_hessian(128, 8), correlated_hessian(64, 9))

    whole = quantize_weight(weight, Hessian(blocks, (0, 128, 192), 1, 1.0), bits=4, group_size=64)
    left = quantize_weight(weight[:, :128], blocks[0], bits=4, group_size=64)
    right = quantize_weight(weight[:, 128:], blocks[1], bits=4, group_size=64)

    np.testing.assert_array_equal(whole.qweight, np.hstack([left.qweight, right.qweight]))
    np.testing.assert_array_equal(whole.scales, np.hstack([left.scales, right.scales]))
    joined = side_by_side(*blocks)
    assert whole.report.relative_error == pytest.approx(output_error(weight, whole, joined))


def test_column_blocks_share_the_scale_of_a_row_scaled_per_channel() -> None:
    weight = random_weight(12, 150, 8)
    blocks = (correlated_hessian(100, 8), correlated_hessian(50, 9))

    in_blocks = quantize_weight(
        weight, Hessian(blocks, (0, 100, 150), 1, 1.0), bits=8, group_size=-1
    )
    joined = side_by_side(*blocks)
    whole = quantize_weight(weight, joined, bits=8, group_size=-1)

    np.testing.assert_array_equal(in_blocks.scales, whole.scales)
    assert in_blocks.report.relative_error == pytest.approx(output_error(weight, in_blocks, joined))


def test_damping_is_raised_until_the_factorisation_succeeds() -> None:
    # All inputs equal: the second pivot is exactly 0.
    solved = quantize_weight(
        random_weight(4, 32, 0),
        torch.ones(32, 32, dtype=torch.float64),
        bits=4,
        group_size=32,
        damp_percent=0.0,
    )

    assert solved.report.damp_percent == 0.01
    assert replace(solved.report, damp_percent=None) != solved.report


def test_a_matrix_that_is_no_second_moment_is_refused() -> None:
    hessian = torch.full((32, 32), 10.0, dtype=torch.float64)
    hessian.fill_diagonal_(1.0)

    with pytest.raises(CheckpointError, match="q_proj is not positive definite even with 1 of"):
        quantize_weight(random_weight(4, 32, 0), hessian, bits=4, group_size=32, name="q_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    weight = random_weight(4, 32, 0)
    weight[2, 7] = bad

    with pytest.raises(CheckpointError, match=r"q_proj holds 1 values .* at \[2, 7\]"):
        quantize_weight(weight, correlated_hessian(32, 0), bits=4, group_size=32, name="q_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_hessian_that_is_not_finite_or_negative_is_named(bad: float) -> None:
    hessian = correlated_hessian(32, 0)
    hessian[9, 9] = bad

    with pytest.raises(CheckpointError, match=r"Hessian of q_proj .* in 1 columns, the first 9"):
        quantize_weight(random_weight(4, 32, 0), hessian, bits=4, group_size=32, name="q_proj")


def test_columns_that_are_no_multiple_of_the_group_are_refused() -> None:
    with pytest.raises(CheckpointError, match="96 columns, no multiple of group_size 64"):
        quantize_weight(random_weight(4, 96, 0), correlated_hessian(96, 0), bits=4, group_size=64)


def test_a_hessian_of_another_size_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"64 columns, its Hessian blocks \[\(32, 32\)\]"):
        quantize_weight(random_weight(4, 64, 0), correlated_hessian(32, 0), bits=4, group_size=32)


def test_a_cut_through_a_group_is_refused() -> None:
    blocks = (correlated_hessian(48, 0), correlated_hessian(16, 0))

    with pytest.raises(RequestError, match="cuts must fall on multiples of group_size 32"):
        quantize_weight(
            random_weight(4, 64, 0), Hessian(blocks, (0, 48, 64), 1, 1.0), bits=4, group_size=32
        )


def test_settings_out_of_range_are_refused_together() -> None:
    with pytest.raises(RequestError, match=r"damp_percent is -1.*block_size 48 and group_size 32"):
        quantize_weight(
            random_weight(4, 32, 0),
            correlated_hessian(32, 0),
            bits=4,
            group_size=32,
            damp_percent=-1,
            block_size=48,
        )
