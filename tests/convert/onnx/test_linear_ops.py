"""One quantised layer on its own: rows, zeros, layouts, refusals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from llava_edge.convert.checkpoint.formats.rounding import (
    PER_CHANNEL,
    QuantizedWeight,
    round_to_nearest,
)
from llava_edge.convert.onnx.builder import GraphBuilder
from llava_edge.convert.onnx.linear import LinearLayer, QuantizedLayers, QuantizedLinear
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.memory.formats import Int8Route, matmul_block
from llava_edge.runtime.util.arrays import Array

OUTPUTS = 48
INT8_ACTIVATIONS = 0.01
"""Error of 8-bit activations, of the largest output: measured at most 0.0041."""


@dataclass(frozen=True)
class Source:
    """Random weights of ``columns`` inputs; layer names are seeds."""

    bits: int
    group_size: int
    columns: int
    reduce_range: bool = False

    def linear(self, name: str) -> QuantizedWeight:
        generator = torch.Generator().manual_seed(len(name))
        weight = torch.randn(OUTPUTS, self.columns, generator=generator)
        return round_to_nearest(
            weight, bits=self.bits, group_size=self.group_size, reduce_range=self.reduce_range
        )


class Biases:
    def read(self, name: str) -> Array:
        return np.arange(OUTPUTS, dtype=np.float16)


def head() -> QuantizedWeight:
    raise AssertionError("no head in these graphs")


def session(
    folder: Path, source: Source, names: list[str], bias: bool = False, **settings: Any
) -> ort.InferenceSession:
    compute = settings.pop("compute", np.float32)
    ops = QuantizedLinear(Biases(), QuantizedLayers(source, head, **settings))
    g = GraphBuilder("layer", compute)
    x = g.input("x", g.compute_name, ["tokens", source.columns])
    layers = [LinearLayer((name,), source.columns, OUTPUTS, bias) for name in names]
    for index, value in enumerate(ops.layers(g, x, layers)):
        g.output(value, f"y{index}", g.compute_name, ["tokens", OUTPUTS])
    g.save(folder)
    return ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def operators(folder: Path) -> list[str]:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return [node.op_type for node in model.graph.node]


def rows(count: int, columns: int) -> NDArray[np.float32]:
    """Rows of very different sizes."""
    generator = np.random.default_rng(columns)
    sizes = 10.0 ** generator.uniform(-3, 3, (count, 1))
    return (generator.normal(size=(count, columns)) * sizes).astype(np.float32)


def integer_session(folder: Path, columns: int, names: list[str]) -> ort.InferenceSession:
    # 7-bit codes: the sums then stay exact on processors that add products in 16 bits.
    source = Source(8, PER_CHANNEL, columns, reduce_range=True)
    return session(folder, source, names, int8_route="integer")


@pytest.mark.parametrize("columns", [128, 72, 130])
def test_a_row_has_the_same_bits_alone_and_among_others_on_the_integer_route(
    tmp_path: Path, columns: int
) -> None:
    layer = integer_session(tmp_path, columns, ["a"])
    x = rows(33, columns)

    (together,) = layer.run(None, {"x": x})

    alone = np.concatenate([layer.run(None, {"x": x[i : i + 1]})[0] for i in range(33)])
    np.testing.assert_array_equal(alone, together)


def test_the_integer_route_is_the_arithmetic_that_it_states(tmp_path: Path) -> None:
    layer = integer_session(tmp_path, 130, ["a"])
    x = rows(9, 130)

    (y,) = layer.run(None, {"x": x})

    weight = Source(8, PER_CHANNEL, 130, reduce_range=True).linear("a")
    largest = np.abs(x).max(1, keepdims=True)
    codes = np.rint((x / largest) / np.float32(1 / 127)).astype(np.float64)
    exact = codes @ weight.dequantize().T.astype(np.float64) * largest / 127
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-6 * np.abs(exact).max())
    assert len(np.unique(codes)) > 200


def test_a_row_of_zeros_gives_zeros_and_tiny_rows_stay_finite(tmp_path: Path) -> None:
    layer = integer_session(tmp_path, 64, ["a"])
    x = rows(4, 64)
    x[1] = 0.0
    x[2] = 1e-42

    (y,) = layer.run(None, {"x": x})

    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[1], 0.0)
    np.testing.assert_array_equal(y[2], 0.0 * y[2])


def test_layers_on_the_same_rows_share_one_normalisation(tmp_path: Path) -> None:
    layer = integer_session(tmp_path, 64, ["gate", "to"])

    gate, up = layer.run(None, {"x": rows(3, 64)})

    assert not np.array_equal(gate, up)
    used = operators(tmp_path)
    assert used.count("MatMulIntegerToFloat") == 2
    assert used.count("QuantizeLinear") == used.count("ReduceMax") == 1


@pytest.mark.parametrize("compute", [np.float32, np.float16])
@pytest.mark.parametrize("portable", [False, True], ids=["nbits", "portable"])
@pytest.mark.parametrize(
    ("bits", "group", "columns"),
    [
        (4, 128, 256),
        (8, 64, 192),
        (4, 32, 96),
        (4, PER_CHANNEL, 256),
        (8, PER_CHANNEL, 144),
        (4, PER_CHANNEL, 136),
        (8, PER_CHANNEL, 130),
    ],
)
def test_every_layout_computes_the_product(
    tmp_path: Path, bits: int, group: int, columns: int, portable: bool, compute: type[Any]
) -> None:
    source = Source(bits, group, columns)
    layer = session(tmp_path, source, ["a"], bias=True, portable=portable, compute=compute)
    x = np.random.default_rng(0).normal(size=(5, columns)).astype(compute)

    (y,) = layer.run(None, {"x": x})

    exact = x.astype(np.float64) @ source.linear("a").dequantize().T.astype(np.float64)
    exact += np.arange(OUTPUTS)
    assert y.dtype == compute
    assert np.abs(y - exact).max() <= INT8_ACTIVATIONS * np.abs(exact).max()


@pytest.mark.parametrize(
    ("columns", "group", "block"),
    [(256, 64, 64), (256, -1, 128), (192, -1, 64), (96, -1, 32), (144, -1, 16), (130, -1, 16)],
)
def test_scales_of_a_row_are_repeated_for_the_largest_block_that_divides_it(
    columns: int, group: int, block: int
) -> None:
    assert matmul_block(columns, group) == block


def test_a_layer_can_leave_the_integer_route(tmp_path: Path) -> None:
    source = Source(8, PER_CHANNEL, 128, reduce_range=True)
    layer = session(tmp_path, source, ["a"], int8_route="integer", nbits_layers=frozenset({"a"}))
    x = rows(3, 128)
    x[:, 0] = 50 * np.abs(x).max(1)  # a scale a row leaves the rest of the row two codes

    (y,) = layer.run(None, {"x": x})

    assert operators(tmp_path) == ["MatMulNBits"]
    assert np.isfinite(y).all()


@pytest.mark.parametrize(
    ("source", "compute", "message"),
    [
        (Source(8, 128, 128), np.float32, "8 bits with group_size 128"),
        (Source(4, PER_CHANNEL, 128), np.float32, "4 bits with group_size -1"),
        (Source(8, PER_CHANNEL, 128), np.float16, "in a float16 graph"),
    ],
    ids=["groups", "4 bits", "fp16"],
)
def test_the_integer_route_refuses_what_it_cannot_hold(
    tmp_path: Path, source: Source, compute: type[Any], message: str
) -> None:
    route: Int8Route = "integer"
    with pytest.raises(RequestError, match=message):
        session(tmp_path, source, ["a"], int8_route=route, compute=compute)


def test_a_weight_of_another_shape_than_the_graph_has_is_refused(tmp_path: Path) -> None:
    class Wrong(Source):
        def linear(self, name: str) -> QuantizedWeight:
            return Source(4, 64, 128).linear(name)

    with pytest.raises(ValueError, match=r"a: .*64.* the graph has .*128"):
        session(tmp_path, Wrong(4, 128, 128), ["a"])
