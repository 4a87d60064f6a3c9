from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from llava_edge.convert.checkpoint.formats.packing import (
    GptqTensors,
    MatMulNBitsTensors,
    choose_group_size,
    from_gptq,
    to_gptq,
    to_matmul_integer,
    to_matmul_nbits,
    unpack_matmul_nbits,
)
from llava_edge.convert.checkpoint.formats.rounding import (
    QuantizationReport,
    QuantizedWeight,
    round_to_nearest,
)
from llava_edge.profiles.errors import CheckpointError, RequestError


def random_quantized(
    rows: int, columns: int, bits: int, group_size: int, reduce_range: bool = False
) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns + bits))
    return round_to_nearest(weight, bits=bits, group_size=group_size, reduce_range=reduce_range)


def counting(rows: int, columns: int, bits: int, group_size: int) -> QuantizedWeight:
    """Codes 0, 1, 2 … along each row, starting at the row's number; scales count as well."""
    codes = np.add.outer(np.arange(rows), np.arange(columns)) % 2**bits
    groups = 1 if group_size == -1 else columns // group_size
    scales = 1.0 + np.arange(rows * groups).reshape(rows, groups)
    report = QuantizationReport()
    return QuantizedWeight(
        codes.astype(np.uint8), scales.astype(np.float16), bits, group_size, report
    )


def run_graph(nodes: list[Any], tensors: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, rows.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        onnx.ModelProto.SerializeToString(model), providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"x": rows})
    assert isinstance(result, np.ndarray)
    return result


def run_matmul_nbits(tensors: MatMulNBitsTensors, rows: np.ndarray, level: int) -> np.ndarray:
    node = helper.make_node(
        "MatMulNBits",
        ["x", "b", "scales"],
        ["y"],
        domain="com.microsoft",
        K=rows.shape[1],
        N=len(tensors.weight),
        bits=tensors.bits,
        block_size=tensors.block_size,
        accuracy_level=level,
    )
    return run_graph([node], {"b": tensors.weight, "scales": tensors.scales}, rows)


def run_matmul_integer(weight: np.ndarray, scales: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Each row over its largest, to uint8 around 128, integer product, times the row's largest."""
    nodes = [
        helper.make_node("Abs", ["x"], ["abs"]),
        helper.make_node("ReduceMax", ["abs", "axes"], ["largest"], keepdims=1),
        helper.make_node("Div", ["x", "largest"], ["unit"]),
        helper.make_node("QuantizeLinear", ["unit", "step", "middle"], ["codes"]),
        helper.make_node(
            "MatMulIntegerToFloat",
            ["codes", "b", "step", "scales", "middle"],
            ["product"],
            domain="com.microsoft",
        ),
        helper.make_node("Mul", ["product", "largest"], ["y"]),
    ]
    tensors: dict[str, np.ndarray] = {
        "axes": np.array([-1], np.int64),
        "step": np.array(1 / 127, np.float32),
        "middle": np.array(128, np.uint8),
        "b": weight,
        "scales": scales,
    }
    return run_graph(nodes, tensors, rows)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        pytest.param([4096, 11008], 128, id="7b"),
        pytest.param([4096, 14336], 128, id="mistral"),
        pytest.param([1024, 4160], 64, id="one-layer-not-by-128"),
        pytest.param([1024, 96], 32, id="one-layer-not-by-64"),
        pytest.param([1024, 1000], -1, id="one-layer-not-by-32"),
    ],
)
def test_the_group_is_the_largest_that_divides_every_layer(
    columns: list[int], expected: int
) -> None:
    assert choose_group_size(columns) == expected


def test_checkpoint_words_hold_eight_codes_low_bits_first() -> None:
    packed = to_gptq(counting(rows=8, columns=32, bits=4, group_size=32))

    # Row 0 counts 0 … 15 twice, row 1 starts at 1: the first code stands in the lowest four bits.
    assert packed.qweight.shape == (4, 8)
    assert packed.qweight.view(np.uint32)[0, 0] == 0x76543210
    assert packed.qweight.view(np.uint32)[1, 0] == 0xFEDCBA98
    assert packed.qweight.view(np.uint32)[0, 1] == 0x87654321
    # Zero is 8; the layout holds one less.
    assert packed.qzeros.view(np.uint32).tolist() == [[0x77777777]]
    assert packed.scales.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert packed.g_idx.tolist() == [0] * 32


def test_checkpoint_words_hold_four_8_bit_codes() -> None:
    packed = to_gptq(counting(rows=4, columns=64, bits=8, group_size=32))

    assert packed.qweight.shape == (16, 4)
    assert packed.qweight.view(np.uint32)[0, 0] == 0x03020100
    assert packed.qzeros.view(np.uint32).tolist() == [[0x7F7F7F7F]] * 2
    assert packed.scales.tolist() == [[1, 3, 5, 7], [2, 4, 6, 8]]
    assert packed.g_idx.tolist() == [0] * 32 + [1] * 32
    dtypes = [packed.qweight.dtype, packed.qzeros.dtype, packed.scales.dtype, packed.g_idx.dtype]
    assert dtypes == [np.int32, np.int32, np.float16, np.int32]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [128, 64, 32, -1])
def test_a_checkpoint_layer_reads_back_as_it_was(bits: int, group_size: int) -> None:
    written = random_quantized(24, 256, bits, group_size)

    read = from_gptq(to_gptq(written), bits=bits, group_size=group_size)

    np.testing.assert_array_equal(read.qweight, written.qweight)
    np.testing.assert_array_equal(read.scales, written.scales)
    assert (read.bits, read.group_size) == (bits, group_size)
    assert read.report == QuantizationReport()


@pytest.mark.parametrize(
    ("rows", "columns", "bits"),
    [
        pytest.param(12, 32, 4, id="outputs-not-by-8"),
        pytest.param(8, 36, 4, id="inputs-not-by-8"),
        pytest.param(6, 32, 8, id="outputs-not-by-4"),
    ],
)
def test_what_leaves_words_unfilled_has_no_checkpoint_layout(
    rows: int, columns: int, bits: int
) -> None:
    with pytest.raises(CheckpointError, match="does not fill whole 32-bit words"):
        to_gptq(counting(rows, columns, bits, -1))


def test_other_zero_points_are_refused() -> None:
    packed = to_gptq(counting(8, 32, 4, 32))
    qzeros = packed.qzeros.copy()
    qzeros[0, 0] = 0x77777747  # the second nibble holds 4: zero point 5

    with pytest.raises(CheckpointError, match=r"q_proj .*\n.*1 of 8 zero points are not 8.*is 5"):
        from_gptq(replace(packed, qzeros=qzeros), bits=4, group_size=32, name="q_proj")


def test_the_second_version_of_the_layout_is_refused_by_name() -> None:
    packed = to_gptq(counting(8, 32, 4, 32))
    qzeros = np.full_like(packed.qzeros.view(np.uint32), 0x88888888).view(np.int32)

    with pytest.raises(CheckpointError, match="gptq_v2"):
        from_gptq(replace(packed, qzeros=qzeros), bits=4, group_size=32)


def test_a_column_order_is_refused() -> None:
    packed = to_gptq(counting(8, 64, 4, 32))
    g_idx = packed.g_idx.copy()
    g_idx[[3, 40]] = g_idx[[40, 3]]

    with pytest.raises(CheckpointError, match=r"2 columns into other groups .* first is column 3"):
        from_gptq(replace(packed, g_idx=g_idx), bits=4, group_size=32)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 128), (4, 16), (2, 256)])
def test_other_bits_and_groups_are_refused(bits: int, group_size: int) -> None:
    packed = to_gptq(counting(8, 64, 4, 32))

    with pytest.raises(CheckpointError, match=r"kernels|is not one of 128, 64, 32, -1"):
        from_gptq(packed, bits=bits, group_size=group_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"scales": np.full((1, 8), np.nan, np.float16)}, "not finite", id="nan-scales"
        ),
        pytest.param(
            {"scales": np.full((1, 8), -1, np.float16)}, "8 scales are not positive", id="negative"
        ),
        pytest.param(
            {"scales": np.full((1, 8), 0.1, np.float32)}, "no exact float16", id="fine-scales"
        ),
        pytest.param(
            {"scales": np.ones((1, 8), np.int32)}, "int32, not float16", id="integer-scales"
        ),
        pytest.param(
            {"scales": np.ones((2, 8), np.float16)},
            r"scales has shape \[2, 8\]; qweight asks for \[1, 8\]",
            id="two-groups",
        ),
        pytest.param(
            {"qzeros": np.zeros((1, 2), np.int32)}, r"qzeros has shape \[1, 2\]", id="wide-zeros"
        ),
        pytest.param(
            {"g_idx": np.zeros(31, np.int32)}, r"g_idx has shape \[31\]", id="short-g_idx"
        ),
        pytest.param(
            {"qweight": np.zeros((4, 8), np.int64)}, "qweight is int64, not int32", id="wide-words"
        ),
        pytest.param(
            {"qweight": np.zeros(32, np.int32)}, "qweight has 1 axes, not 2", id="flat-words"
        ),
        pytest.param(
            {"qweight": np.zeros((5, 8), np.int32)}, "40 columns are no multiple", id="odd-columns"
        ),
    ],
)
def test_malformed_checkpoint_tensors_are_refused(changes: dict[str, Any], message: str) -> None:
    packed = to_gptq(counting(8, 32, 4, 32))

    with pytest.raises(CheckpointError, match=message):
        from_gptq(replace(packed, **changes), bits=4, group_size=32)


def test_several_reasons_are_given_together() -> None:
    packed = to_gptq(counting(8, 32, 4, 32))
    broken = GptqTensors(
        packed.qweight, packed.qzeros * 0, packed.scales * 0, packed.g_idx[::-1] + np.int32(1)
    )

    with pytest.raises(CheckpointError) as caught:
        from_gptq(broken, bits=4, group_size=32)

    assert str(caught.value).count("\n  - ") == 3
    assert "unquantised checkpoint" in str(caught.value)


def test_float32_scales_that_are_float16_values_are_read() -> None:
    written = random_quantized(8, 64, 4, 32)
    packed = to_gptq(written)

    read = from_gptq(
        replace(packed, scales=packed.scales.astype(np.float32)), bits=4, group_size=32
    )

    np.testing.assert_array_equal(read.scales, written.scales)


def test_graph_blocks_hold_two_codes_a_byte_low_bits_first() -> None:
    packed = to_matmul_nbits(counting(2, 64, 4, 32), block_size=32)

    assert packed.weight.shape == (2, 2, 16)
    assert packed.weight[0, 0, :4].tolist() == [0x10, 0x32, 0x54, 0x76]
    assert packed.weight[1, 1, :2].tolist() == [0x21, 0x43]
    assert packed.scales.tolist() == [[1, 2], [3, 4]]
    assert packed.scales.dtype == np.float32


def test_graph_weights_are_the_bytes_of_the_checkpoint() -> None:
    quantized = random_quantized(16, 256, 4, 128)

    graph, checkpoint = to_matmul_nbits(quantized, block_size=128), to_gptq(quantized)

    columns = np.ascontiguousarray(checkpoint.qweight.T)
    assert graph.weight.tobytes() == columns.tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_smaller_blocks_repeat_the_scale_and_change_no_value(bits: int) -> None:
    quantized = random_quantized(8, 256, bits, 128)

    fine = to_matmul_nbits(quantized, block_size=32, scale_dtype=np.float16)

    assert fine.weight.shape == (8, 8, 32 * bits // 8)
    assert fine.scales.dtype == np.float16
    np.testing.assert_array_equal(fine.scales[:, :4], quantized.scales[:, :1].repeat(4, 1))
    np.testing.assert_array_equal(unpack_matmul_nbits(fine, 256), quantized.dequantize())


@pytest.mark.parametrize(("bits", "byte"), [(4, 0x88), (8, 0x80)])
def test_what_fills_the_last_block_stands_for_zero(bits: int, byte: int) -> None:
    packed = to_matmul_nbits(counting(3, 72, bits, -1), block_size=32)

    assert packed.weight.shape == (3, 3, 32 * bits // 8)
    assert (packed.weight[:, 2, 8 * bits // 8 :] == byte).all()
    assert packed.scales.tolist() == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]


@pytest.mark.parametrize(
    ("group_size", "block_size"),
    [
        pytest.param(32, 64, id="spans-two-groups"),
        pytest.param(128, 8, id="below-16"),
        pytest.param(-1, 96, id="no-power-of-two"),
    ],
)
def test_blocks_that_do_not_fit_the_group_are_refused(group_size: int, block_size: int) -> None:
    with pytest.raises(RequestError, match=f"block_size {block_size} was asked for"):
        to_matmul_nbits(counting(2, 128, 4, group_size), block_size=block_size)


@pytest.mark.parametrize(
    ("bits", "columns", "group_size", "block_size"),
    [
        pytest.param(4, 256, 128, 128, id="int4-g128"),
        pytest.param(4, 256, 128, 32, id="int4-g128-in-blocks-of-32"),
        pytest.param(4, 192, 64, 64, id="int4-g64"),
        pytest.param(4, 96, 32, 32, id="int4-g32"),
        pytest.param(4, 72, -1, 32, id="int4-per-channel-last-block-not-full"),
        pytest.param(8, 256, 128, 128, id="int8-g128"),
        pytest.param(8, 200, -1, 128, id="int8-per-channel-last-block-not-full"),
    ],
)
@pytest.mark.parametrize("level", [0, 1])
def test_matmul_nbits_computes_with_the_dequantised_weight(
    bits: int, columns: int, group_size: int, block_size: int, level: int
) -> None:
    quantized = random_quantized(48, columns, bits, group_size)
    rows = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)

    result = run_matmul_nbits(to_matmul_nbits(quantized, block_size=block_size), rows, level)

    exact = rows.astype(float) @ quantized.dequantize().astype(float).T
    assert np.abs(result - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_nbits_with_integer_activations_stays_within_its_rounding(bits: int) -> None:
    quantized = random_quantized(48, 256, bits, 128)
    rows = np.random.default_rng(1).standard_normal((5, 256)).astype(np.float32)

    result = run_matmul_nbits(to_matmul_nbits(quantized, block_size=128), rows, 4)

    # Activations in 8 bits a block: measured 5e-3 to 8e-3 of the largest output.
    exact = rows @ quantized.dequantize().T
    assert np.abs(result - exact).max() < 0.02 * np.abs(exact).max()


def test_signed_weights_are_codes_less_128_inputs_first() -> None:
    quantized = QuantizedWeight(
        np.array([[0, 128, 255], [1, 127, 129]], np.uint8),
        np.array([[0.5], [2.0]], np.float16),
        bits=8,
        group_size=-1,
        report=QuantizationReport(),
    )

    packed = to_matmul_integer(quantized)

    assert packed.weight.dtype == np.int8
    assert packed.weight.tolist() == [[-128, -127], [0, -1], [127, 1]]
    assert packed.weight.flags.c_contiguous
    assert packed.scales.tolist() == [0.5, 2.0]
    assert packed.scales.dtype == np.float32


@pytest.mark.parametrize(("bits", "group_size"), [(4, -1), (8, 32)])
def test_the_signed_route_takes_8_bits_per_channel_only(bits: int, group_size: int) -> None:
    with pytest.raises(RequestError, match="takes 8 bits and one scale a row"):
        to_matmul_integer(counting(4, 32, bits, group_size))


def test_the_signed_route_multiplies_exact_integers() -> None:
    # The whole reduced range: 2 * 255 * 64 still fits the 16 bits that some processors sum in.
    codes = np.random.default_rng(2).integers(64, 192, (40, 96), dtype=np.uint8)
    scales = np.linspace(0.01, 0.4, 40).astype(np.float16)[:, None]
    packed = to_matmul_integer(QuantizedWeight(codes, scales, 8, -1, QuantizationReport()))
    rows = np.random.default_rng(3).standard_normal((7, 96)).astype(np.float32)

    result = run_matmul_integer(packed.weight, packed.scales, rows)

    largest = np.abs(rows).max(1, keepdims=True)
    quantised = np.rint((rows / largest) / np.float32(1 / 127)).astype(int)
    integers = quantised @ packed.weight.astype(int)
    expected = integers / 127 * scales[:, 0].astype(float) * largest
    assert np.abs(result - expected).max() < 1e-6 * np.abs(expected).max()


def test_the_signed_route_stays_near_float_and_does_not_depend_on_other_rows() -> None:
    quantized = random_quantized(64, 256, 8, -1, reduce_range=True)
    packed = to_matmul_integer(quantized)
    rows = np.random.default_rng(4).standard_normal((33, 256)).astype(np.float32)
    rows[0] *= 1000

    together = run_matmul_integer(packed.weight, packed.scales, rows)
    alone = run_matmul_integer(packed.weight, packed.scales, rows[5:6])

    exact = rows @ quantized.dequantize().T
    worst = np.abs(together - exact).max(1) / np.abs(exact).max(1)
    assert worst.max() < 0.02
    np.testing.assert_array_equal(alone[0], together[5])
