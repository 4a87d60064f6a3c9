from __future__ import annotations

import numpy as np
import pytest

from llava_edge.convert.checkpoint.weights import as_float16, linear, vectors
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.util.arrays import Array


class Tensors:
    def __init__(self, **tensors: Array) -> None:
        self._tensors = tensors

    def read(self, name: str) -> Array:
        return self._tensors[name]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(dtype: type[np.generic], value: float) -> None:
    array = np.zeros((2, 3), dtype)
    array[1, 2] = value

    with pytest.raises(CheckpointError, match=r"tensor gate holds a value that is not a finite"):
        as_float16("gate", array)


@pytest.mark.parametrize("value", [65520.0, -1e6])
def test_what_fp16_cannot_hold_is_named_with_its_size(value: float) -> None:
    with pytest.raises(CheckpointError, match=r"reaches .*; fp16 holds at most 65504"):
        as_float16("gate", np.array([0.0, value], np.float32))


def test_the_largest_fp16_values_pass_unchanged() -> None:
    array = np.array([65504.0, -65504.0, 6e-8], np.float16)

    np.testing.assert_array_equal(as_float16("gate", array), array)


def test_packed_linears_stand_side_by_side_along_n() -> None:
    q = np.arange(6, dtype=np.float16).reshape(2, 3)
    k = -q[:1]

    weight = linear(Tensors(q=q, k=k), ["q", "k"], 3, 3)

    np.testing.assert_array_equal(weight.load(), [[0, 3, 0], [1, 4, -1], [2, 5, -2]])
    assert weight.nbytes == 18


def test_vectors_are_rounded_to_fp16_and_kept_in_float32() -> None:
    joined = vectors(Tensors(a=np.array([0.1], np.float32), b=np.array([2.0], np.float16)), "ab")

    assert joined.dtype == np.float32
    np.testing.assert_array_equal(joined, [np.float16(0.1), 2.0])
