from __future__ import annotations

import numpy as np
import pytest

from llava_edge.convert.quantization.calibration.token_weights import (
    KINDS,
    KindShares,
    count_kinds,
    spread_rows,
    token_kinds,
    token_weights,
)
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.models.anyres import AnyRes


def test_positions_of_two_images_are_told_apart() -> None:
    # Tiles of 2 x 2 patches. A 1x2 image: 4 patches, then 2 rows of 4 patches and a newline each.
    anyres = AnyRes(28, 14, ((28, 56), (56, 28)), "hf")
    wide, thumbnail = anyres.layout(28, 56), AnyRes(28, 14, (), "hf").layout(28, 56)
    ids = np.array([1, *[9] * 14, 2, *[9] * 5, 3])
    kinds = token_kinds(ids, 9, (wide, thumbnail), 2)
    written = "".join("tbTn"[kind] for kind in kinds)
    assert written == "t" + "bbbb" + "TTTTn" * 2 + "t" + "bbbb" + "n" + "t"
    assert count_kinds(kinds) == {"text": 3, "base": 8, "tile": 8, "newline": 3}


def test_text_has_only_one_kind() -> None:
    assert token_kinds(np.array([4, 5]), 9, (), 2).tolist() == [0, 0]


def test_each_kind_adds_up_to_its_share_however_many_tokens_it_has() -> None:
    kinds = np.repeat(np.arange(4, dtype=np.uint8), [2, 10, 84, 4])
    weights = token_weights(kinds, KindShares(text=0.5, base=0.2, tile=0.2, newline=0.1))
    sums = [weights[kinds == kind].sum() / weights.sum() for kind in range(4)]
    np.testing.assert_allclose(sums, [0.5, 0.2, 0.2, 0.1])
    assert weights.mean() == pytest.approx(1.0)
    assert weights[0] == pytest.approx(0.5 * 100 / 2)


def test_shares_of_absent_kinds_go_to_the_others() -> None:
    kinds = np.array([0, 0, 1], np.uint8)
    weights = token_weights(kinds, KindShares(text=0.3, base=0.1, tile=0.6, newline=0.0))
    np.testing.assert_allclose(weights, [9 / 8, 9 / 8, 3 / 4])


def test_a_kind_without_share_weighs_nothing_and_none_is_refused() -> None:
    shares = KindShares(text=0.0)
    assert token_weights(np.array([0, 2], np.uint8), shares).tolist() == [0.0, 2.0]
    with pytest.raises(RequestError, match="every kind among them has share 0"):
        token_weights(np.zeros(3, np.uint8), shares)


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf")])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(RequestError, match="finite"):
        KindShares(tile=share)
    with pytest.raises(RequestError, match="not all zero"):
        KindShares(0.0, 0.0, 0.0, 0.0)


def test_probe_rows_are_spread_over_all_samples() -> None:
    kinds = np.array([0] * 10 + [2] * 3 + [0] * 10, np.uint8)
    chosen = spread_rows(kinds, 4)
    assert np.flatnonzero(chosen).tolist() == [0, 5, 10, 11, 12, 13, 18]
    assert len(KINDS) == 4
