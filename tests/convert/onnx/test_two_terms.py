"""The two-term route: each activation as a 7-bit code and the code of what that leaves over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from llava_edge.convert.checkpoint.formats.rounding import PER_CHANNEL, QuantizedWeight
from llava_edge.convert.onnx.builder import GraphBuilder
from llava_edge.convert.onnx.linear import LinearLayer, QuantizedLayers, QuantizedLinear
from llava_edge.profiles.memory.formats import Int8Route
from tests.convert.onnx.test_linear_ops import OUTPUTS, Biases, Source, head
from tests.faults.models.saturation import saturating

Rows = NDArray[np.float32]


def opened(
    folder: Path, columns: int, route: Int8Route = "two-term", source: Any = None
) -> ort.InferenceSession:
    """Two layers on the same rows [1, tokens, columns]."""
    weights = QuantizedLayers(source or Source(8, PER_CHANNEL, columns), head, int8_route=route)
    g = GraphBuilder("layers", np.float32)
    x = g.input("x", "float32", [1, "tokens", columns])
    layers = [LinearLayer((name,), columns, OUTPUTS, bias=True) for name in ("a", "bc")]
    for place, y in enumerate(QuantizedLinear(Biases(), weights).layers(g, x, layers)):
        g.output(y, f"y{place}", "float32", [1, "tokens", OUTPUTS])
    folder.mkdir(exist_ok=True)
    g.save(folder)
    return session_of(onnx.load(folder / "model.onnx"))


def session_of(model: Any) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def with_outliers(count: int, columns: int) -> Rows:
    rows = np.random.default_rng(0).normal(size=(1, count, columns)).astype(np.float32)
    rows[..., 3] *= 250  # as in down_proj of a trained model
    return rows


def exact(rows: Rows, columns: int, name: str = "a") -> NDArray[np.float64]:
    weight = Source(8, PER_CHANNEL, columns).linear(name).dequantize().astype(np.float64)
    product: NDArray[np.float64] = rows.astype(np.float64) @ weight.T + np.arange(OUTPUTS)
    return product


def relative_error(y: Rows, rows: Rows) -> float:
    """Of the output without the outlier channel, which alone would hide the others."""
    quiet = rows.copy()
    quiet[..., 3] = 0
    wanted = exact(rows, rows.shape[-1])
    return float(np.linalg.norm(y - wanted) / np.linalg.norm(exact(quiet, rows.shape[-1])))


def test_an_outlier_channel_leaves_the_others_their_digits(tmp_path: Path) -> None:
    rows = with_outliers(8, 128)

    two = opened(tmp_path / "two", 128).run(None, {"x": rows})[0]
    one = opened(tmp_path / "one", 128, "integer").run(None, {"x": rows})[0]

    assert relative_error(one, rows) > 0.1
    assert relative_error(two, rows) < 0.01


@pytest.mark.parametrize("columns", [128, 72, 130])
def test_a_row_has_the_same_bits_alone_and_among_others(tmp_path: Path, columns: int) -> None:
    layers, rows = opened(tmp_path, columns), with_outliers(33, columns)

    together = layers.run(None, {"x": rows})

    for place, row in enumerate(np.split(rows, 33, axis=1)):
        for alone, all_rows in zip(layers.run(None, {"x": row}), together, strict=True):
            np.testing.assert_array_equal(alone[0, 0], all_rows[0, place])


def test_it_is_the_arithmetic_that_it_states(tmp_path: Path) -> None:
    rows = with_outliers(9, 130)

    y = opened(tmp_path, 130).run(None, {"x": rows})[0]

    size = np.abs(rows).max(-1, keepdims=True)
    share = rows / size
    first = np.rint(share * 63)
    rest = np.rint((share - first / np.float32(63)) * (63 * 126))
    assert np.abs(first).max() == 63
    assert np.abs(rest).max() <= 63
    weight = Source(8, PER_CHANNEL, 130).linear("a").dequantize().T.astype(np.float64)
    wanted = (first / 63 + rest / (63 * 126)).astype(np.float64) @ weight * size
    # Code for code, but for halves that a float division may move by one of 7,938 steps.
    gap = np.abs(y - wanted - np.arange(OUTPUTS))
    assert np.quantile(gap / np.abs(wanted).max(), 0.9) < 1e-6
    assert gap.max() <= 2 * float(size.max()) / (63 * 126) * np.abs(weight).max()


class Extreme:
    """Weights whose codes are all the largest or all the smallest."""

    bits, group_size = 8, PER_CHANNEL

    def linear(self, name: str) -> QuantizedWeight:
        made = Source(8, PER_CHANNEL, 64).linear(name)
        codes = np.where(torch.arange(OUTPUTS)[:, None] % 2 == 0, 255, 0)
        codes = np.broadcast_to(codes, (OUTPUTS, 64)).astype(np.uint8)
        return QuantizedWeight(codes, made.scales, 8, PER_CHANNEL, made.report)


def test_sums_of_pairs_in_16_bits_do_not_saturate(tmp_path: Path) -> None:
    rows = np.full((1, 3, 64), 7.5, np.float32)
    rows[0, 1] *= -1
    rows[0, 2, ::2] = 7.4

    plain = opened(tmp_path, 64, source=Extreme())
    pairs = session_of(saturating(onnx.load(tmp_path / "model.onnx")))

    for ours, theirs in zip(
        pairs.run(None, {"x": rows}), plain.run(None, {"x": rows}), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)

    opened(tmp_path / "one", 64, "integer", Extreme())
    one = saturating(onnx.load(tmp_path / "one" / "model.onnx"))
    wrong = session_of(one).run(None, {"x": rows})[0]
    assert np.abs(wrong - plain.run(None, {"x": rows})[0]).max() > 0.1 * np.abs(wrong).max()


def test_a_row_of_zeros_gives_the_bias_and_tiny_rows_stay_finite(tmp_path: Path) -> None:
    rows = with_outliers(4, 64)
    rows[0, 1] = 0.0
    rows[0, 2] = 1e-42

    y = opened(tmp_path, 64).run(None, {"x": rows})[0]

    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[0, 1], np.arange(OUTPUTS))
    np.testing.assert_allclose(y[0, 2], np.arange(OUTPUTS), atol=1e-30)


def test_layers_on_the_same_rows_share_their_codes_and_read_weights_once(tmp_path: Path) -> None:
    opened(tmp_path, 64)

    used = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert used.count("MatMulIntegerToFloat") == 2
    assert used.count("QuantizeLinear") == 2
    assert used.count("ReduceMax") == 1


def opened_head(folder: Path, group: int, route: Int8Route = "two-term") -> ort.InferenceSession:
    """A head in groups over rows [1, tokens, 128]."""
    body = Source(8, PER_CHANNEL if route == "two-term" else 32, 128)
    weight = Source(8, group, 128).linear("head")
    layers = QuantizedLayers(
        body, lambda: weight, head_group_size=group, int8_route=route, largest_block=32
    )
    g = GraphBuilder("head", np.float32)
    x = g.input("x", "float32", [1, "tokens", 128])
    y = QuantizedLinear(Biases(), layers).head(g, x, 128, OUTPUTS)
    g.output(y, "y", "float32", [1, "tokens", OUTPUTS])
    folder.mkdir(exist_ok=True)
    g.save(folder)
    return session_of(onnx.load(folder / "model.onnx"))


def head_error(session: ort.InferenceSession, rows: Rows, group: int) -> float:
    """Largest gap from the exact product over the largest output."""
    weight = Source(8, group, 128).linear("head").dequantize().astype(np.float64)
    wanted = rows.astype(np.float64) @ weight.T
    return float(np.abs(session.run(None, {"x": rows})[0] - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_head_in_groups_is_close_to_float_as_well(tmp_path: Path, group: int) -> None:
    rows = np.random.default_rng(1).normal(size=(1, 9, 128)).astype(np.float32)

    assert head_error(opened_head(tmp_path / "one", group, "nbits"), rows, group) > 5e-4
    two = opened_head(tmp_path / "two", group)
    assert head_error(two, rows, group) < 1e-4
    assert head_error(two, rows[:, :1], group) < 1e-4


def test_a_head_in_groups_leaves_rows_of_zeros_and_tiny_rows_finite(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(1, 3, 128)).astype(np.float32)
    rows[0, 1] = 0
    rows[0, 2] = 1e-42

    (y,) = opened_head(tmp_path, 32).run(None, {"x": rows})

    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[0, 1], 0.0)
