from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llava_edge.convert.quantization.gptq.hessian import (
    Hessian,
    HessianAccumulator,
    hessian_norms,
    plan_hessian,
)
from llava_edge.profiles.errors import CheckpointError, RequestError


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and lose much where processors are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_rows_give_the_mean_of_their_outer_products() -> None:
    accumulator = HessianAccumulator(2)

    accumulator.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    hessian = accumulator.finish()

    assert hessian.blocks[0].tolist() == [[5.0, 1.0], [1.0, 2.0]]
    assert hessian.diagonal().tolist() == [5.0, 2.0]
    assert (hessian.num_tokens, hessian.weight_sum) == (2, 2.0)


def test_a_row_of_weight_two_counts_as_the_row_twice() -> None:
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weighted, doubled = HessianAccumulator(40), HessianAccumulator(40)

    weighted.add(rows, torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]))
    doubled.add(rows)
    doubled.add(rows[1:2])

    torch.testing.assert_close(weighted.finish().blocks[0], doubled.finish().blocks[0])


def test_padding_is_never_looked_at() -> None:
    rows = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]])
    accumulator = HessianAccumulator(2)

    accumulator.add(rows, torch.tensor([1.0, 0.0]))
    hessian = accumulator.finish()

    assert hessian.blocks[0].tolist() == [[1.0, 2.0], [2.0, 4.0]]
    assert hessian.num_tokens == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_many_batches_sum_to_the_definition_in_every_input_type(dtype: torch.dtype) -> None:
    # 1100 columns and 2100 rows: both exceed what is multiplied at a time.
    rows = torch.randn(2100, 1100, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights = torch.rand(2100, generator=torch.Generator().manual_seed(2))
    accumulator = HessianAccumulator(1100)

    accumulator.add(rows[:1500], weights[:1500])
    accumulator.add(rows[1500:], weights[1500:])
    found = accumulator.finish().blocks[0]

    exact = rows.double()
    expected = (exact * weights[:, None]).T @ exact / weights.sum(dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert torch.equal(found, found.T)


def test_column_blocks_hold_the_diagonal_of_the_whole() -> None:
    rows = torch.randn(50, 3000, generator=torch.Generator().manual_seed(3))
    layout = plan_hessian(3000, 8 * 2 * 3000 * 3000 // 2 - 1, multiple=8)
    whole, in_blocks = HessianAccumulator(3000), HessianAccumulator(3000, layout)

    whole.add(rows)
    in_blocks.add(rows)
    (matrix,) = whole.finish().blocks

    assert len(layout.edges) == 4 - 1
    for low, high, block in in_blocks.finish().ranges():
        torch.testing.assert_close(block, matrix[low:high, low:high], rtol=0, atol=1e-6)


def test_norms_are_the_quadratic_form_of_each_row() -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(1300, 1200, generator=generator, dtype=torch.float64)
    deltas = torch.randn(3, 1200, generator=generator, dtype=torch.float64)
    accumulator = HessianAccumulator(1200)

    accumulator.add(rows)
    norms = hessian_norms(deltas, accumulator.finish())

    torch.testing.assert_close(norms, ((deltas @ rows.T) ** 2).mean(1))


def test_norms_add_up_over_column_blocks() -> None:
    hessian = Hessian(
        (torch.tensor([[2.0]]).double(), torch.tensor([[3.0]]).double()), (0, 1, 2), 1, 1.0
    )

    assert hessian_norms(torch.tensor([[1.0, 10.0]]), hessian).tolist() == [302.0]


def test_a_hessian_that_fits_is_kept_whole() -> None:
    # Matrix and factor, 8 bytes each.
    layout = plan_hessian(4096, 2 * 8 * 4096**2)

    assert layout.edges == (0, 4096)
    assert layout.num_bytes == 2 * 8 * 4096**2
    assert layout.note is None


def test_a_hessian_one_byte_too_large_is_cut_in_blocks_and_says_so() -> None:
    layout = plan_hessian(4096, 2 * 8 * 4096**2 - 1)

    assert layout.edges == (0, 2048, 4096)
    assert layout.num_bytes == 3 * 8 * 2048**2
    assert layout.note is not None
    assert "2 column blocks" in layout.note


def test_cuts_fall_on_groups_where_columns_do_not_divide() -> None:
    layout = plan_hessian(11008, 10**9)

    assert layout.edges == (0, 5504, 11008)
    assert all(edge % 128 == 0 for edge in layout.edges)


def test_a_hopeless_budget_falls_to_rounding_and_says_so() -> None:
    layout = plan_hessian(4096, 1000)

    assert not layout.fits
    assert layout.note is not None
    assert "rounded to nearest" in layout.note
    with pytest.raises(RequestError, match="round the layer to nearest"):
        HessianAccumulator(4096, layout)


def test_a_layer_narrower_than_the_smallest_block_is_not_cut() -> None:
    assert not plan_hessian(512, 8 * 512**2).fits


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(RequestError, match=r"\[1, 3\]; this layer takes \[tokens, 2\]"):
        HessianAccumulator(2).add(torch.ones(1, 3))


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param([1.0], id="one-weight-for-two-rows"),
        pytest.param([1.0, -1.0], id="negative"),
        pytest.param([1.0, float("nan")], id="nan"),
    ],
)
def test_unusable_token_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(RequestError, match="one finite weight of at least 0"):
        HessianAccumulator(2).add(torch.ones(2, 2), torch.tensor(weights))


def test_inputs_that_overflow_are_named_by_column() -> None:
    rows = torch.ones(2, 4)
    rows[1, 2] = float("inf")

    with pytest.raises(CheckpointError, match="not finite in 1 columns, the first 2"):
        HessianAccumulator(4).add(rows)


def test_nothing_but_padding_is_refused() -> None:
    accumulator = HessianAccumulator(2)
    accumulator.add(torch.ones(2, 2), torch.zeros(2))

    with pytest.raises(RequestError, match="no calibration token reached this layer"):
        accumulator.finish()
