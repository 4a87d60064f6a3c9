from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_edge.convert.checkpoint.formats.rounding import round_to_nearest
from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.checkpoint.quantized import source as quantized_source
from llava_edge.convert.checkpoint.quantized.source import (
    LINEARS,
    RtnSource,
    body_group_size,
    linear_name,
    quantize_head,
)
from llava_edge.profiles.errors import CheckpointError, RequestError


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(make_checkpoint("odd"))


@pytest.mark.parametrize("linear", LINEARS)
def test_a_linear_layer_is_its_tensor_rounded_to_nearest(
    checkpoint: Checkpoint, linear: str
) -> None:
    name = linear_name(1, linear)
    found = RtnSource(checkpoint, bits=4, group_size=32).linear(name)
    weight = torch.from_numpy(checkpoint.read(f"{name}.weight"))
    expected = round_to_nearest(weight, bits=4, group_size=32)
    np.testing.assert_array_equal(found.qweight, expected.qweight)
    np.testing.assert_array_equal(found.scales, expected.scales)


def test_rows_read_in_pieces_give_the_same_codes_and_error(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RtnSource(checkpoint, bits=8, group_size=-1, reduce_range=True)
    name = linear_name(0, "mlp.down_proj")
    whole = source.linear(name)
    monkeypatch.setattr(quantized_source, "_ELEMENTS_AT_A_TIME", 7 * 160)
    pieces = source.linear(name)
    np.testing.assert_array_equal(pieces.qweight, whole.qweight)
    np.testing.assert_array_equal(pieces.scales, whole.scales)
    assert pieces.report.mse == pytest.approx(whole.report.mse)
    assert int(whole.qweight.min()) >= 64
    assert int(whole.qweight.max()) <= 191


def test_the_group_of_a_model_divides_the_inputs_of_every_linear_layer(
    checkpoint: Checkpoint, make_checkpoint: Callable[..., Path]
) -> None:
    # 96 and 160 are multiples of 32; 64 and 128 of 64.
    assert body_group_size(checkpoint.dims.text) == 32
    assert body_group_size(open_checkpoint(make_checkpoint("tiny")).dims.text) == 64


def test_the_head_has_eight_bits_and_its_own_group(
    make_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = open_checkpoint(make_checkpoint("tiny", hidden_size=128, tie_word_embeddings=True))
    head = quantize_head(checkpoint)
    assert (head.bits, head.group_size) == (8, 128)
    table = checkpoint.read("language_model.embed_tokens.weight").astype(np.float32)
    assert np.abs(head.dequantize() - table).max() <= head.scales.astype(np.float32).max()
    assert quantize_head(checkpoint, group_size=64).scales.shape == (512, 2)
    assert quantize_head(checkpoint, group_size=-1).scales.shape == (512, 1)


def test_a_tensor_that_is_not_there_is_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.9\.mlp\.up_proj\.weight"):
        RtnSource(checkpoint, bits=4, group_size=32).linear(linear_name(9, "mlp.up_proj"))


def test_a_group_that_does_not_divide_names_the_tensor(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has 96 columns"):
        RtnSource(checkpoint, bits=4, group_size=64).linear(linear_name(0, "self_attn.q_proj"))


def test_settings_are_refused_before_anything_is_read(checkpoint: Checkpoint) -> None:
    with pytest.raises(RequestError, match="bits is 3"):
        RtnSource(checkpoint, bits=3, group_size=128)
