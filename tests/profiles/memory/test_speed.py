from dataclasses import replace

import pytest

from llava_edge.profiles.boards.hardware import HardwareProfile, load_profile
from llava_edge.profiles.memory.constants import speed_constants
from llava_edge.profiles.memory.speed import (
    attention_operations,
    predict_speed,
    prefill_operations,
    vision_operations,
)
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.profiles.models.variants import find_variant


@pytest.fixture
def dims() -> ModelDims:
    return find_variant("llava-v1.6-mistral-7b").dims


@pytest.fixture
def a100() -> HardwareProfile:
    return load_profile("a100")


def test_operations_are_twice_the_weights_a_token_meets(dims: ModelDims) -> None:
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    assert prefill_operations(dims.text, 10) == 2 * (10 * 32 * layer + 32064 * 4096)
    assert attention_operations(dims.text, 10) == 2 * 100 * 4096 * 32


def test_five_tiles_cost_about_two_tera_operations(dims: ModelDims) -> None:
    assert 1.7e12 < 5 * vision_operations(dims) < 2.1e12


def test_decode_streams_weights_and_cache(dims: ModelDims, a100: HardwareProfile) -> None:
    groups = speed_constants()
    free = {**groups, "cuda": groups["cuda"].replace(bandwidth=1.0, step=0.0)}
    found = predict_speed(dims, "fp16", a100, media_tokens=0, num_tiles=0, constants=free)
    weights = 2 * (32 * (218_112_000) + 4096 + 32064 * 4096)
    assert found.decode_tokens_per_second == pytest.approx(
        2.039e12 / (weights + 131_072 * (64 + 64))
    )


def test_a_prompt_pays_for_its_weights_and_for_its_square(
    dims: ModelDims, a100: HardwareProfile
) -> None:
    groups = speed_constants()
    free = {**groups, "cuda": groups["cuda"].replace(matmul=1.0, attention=0.5)}
    found = predict_speed(dims, "int4", a100, media_tokens=936, num_tiles=1, constants=free)
    linear, square = prefill_operations(dims.text, 1000), attention_operations(dims.text, 1000)
    assert found.prefill_seconds == pytest.approx((linear + 2 * square) / 312e12)


def test_unknown_rates_give_no_prediction(dims: ModelDims, a100: HardwareProfile) -> None:
    blind = replace(a100, bandwidth=None, peak_fp16=None, peak_int8=None)
    found = predict_speed(dims, "int4", blind, media_tokens=2928, num_tiles=5)
    assert found.decode_tokens_per_second is None
    assert found.ttft_seconds is None
    assert found.answer_seconds is None


@pytest.mark.parametrize("board", ["a100", "cpu-16gb", "jetson-agx-orin-64gb"])
def test_fewer_bits_and_fewer_tokens_are_never_slower(dims: ModelDims, board: str) -> None:
    profile = load_profile(board)
    rates = [
        predict_speed(dims, p, profile, media_tokens=2928, num_tiles=5) for p in ("fp16", "int4")
    ]
    assert rates[0].decode_tokens_per_second < rates[1].decode_tokens_per_second  # type: ignore[operator]
    base = predict_speed(dims, "int4", profile, media_tokens=577, num_tiles=1)
    assert base.ttft_seconds < rates[1].ttft_seconds  # type: ignore[operator]


def test_more_devices_are_faster(dims: ModelDims, a100: HardwareProfile) -> None:
    one, four = (
        predict_speed(dims, "fp16", a100, media_tokens=2928, num_tiles=5, num_devices=n)
        for n in (1, 4)
    )
    assert four.answer_seconds < one.answer_seconds  # type: ignore[operator]
