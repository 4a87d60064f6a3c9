"""``python -m llava_edge.bench.lab.gpu.kernels SIZES``: a decoder's matrix products.

Which layout of integer weights is fastest is decided here, before a large model is converted in
each: blocks of 128 by ONNX Runtime's default kernels, and blocks of 32 (each scale of 128 repeated,
or groups of 32) by its weight-only ones, beside float16. A graph holds several layers of the same
size with weights of their own, so that none stays in a cache; the time of one is the difference
between graphs of many and of one, over the number of layers between, which leaves the cost of a
call out. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.backends.onnxruntime import Buffer, Session, SessionOptions
from llava_edge.runtime.util.arrays import DeviceKind

_FEW, _MANY = 1, 10
_MOST_BYTES = 1_600_000_000
"""Of a graph's weights: protobuf holds 2 GiB."""
_ROWS = (1, 8, 512, 2048)
_SECONDS, _RUNS = 0.05, 100
_DOMAIN = "com.microsoft"
_INT8_PRODUCTS = 4
"""The accuracy level of artifacts; it speaks to the CPU alone."""

LAYOUTS: Mapping[str, tuple[int, int, bool]] = {
    "fp16": (16, 0, False),
    "int8 block 128": (8, 128, False),
    "int8 block 32": (8, 32, False),
    "int8 block 32, weight-only": (8, 32, True),
    "int4 block 128": (4, 128, False),
    "int4 block 32": (4, 32, False),
    "int4 block 32, weight-only": (4, 32, True),
}
"""Bits, columns a scale, and whether the weight-only kernels are switched on."""


def kernel_sizes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a decoder's layers, by name, from the sizes of a random checkpoint."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    packed = hidden + 2 * hidden * sizes["kv_heads"] // sizes["heads"]
    return {
        "qkv": (hidden, packed),
        "o": (hidden, hidden),
        "gate": (hidden, inner),
        "down": (inner, hidden),
        "head": (hidden, sizes["vocab_size"]),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description="Matrix products of a decoder, one by one.")
    parser.add_argument("sizes", type=json.loads, help="JSON: name to [inputs, outputs]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=_ROWS)
    options = parser.parse_args(argv)
    # The CPU's activations are float32, as in the cpu target.
    rows = options.rows if options.device == "cuda" else options.rows[:1]
    found = []
    for name, (columns, outputs) in options.sizes.items():
        for layout in LAYOUTS:
            seconds = _seconds(layout, columns, outputs, options.device, rows)
            for count, taken in zip(rows, seconds, strict=True):
                entry = {"layer": name, "layout": layout, "rows": count, "seconds": taken}
                found.append({**entry, "weight_bytes": weight_bytes(layout, columns, outputs)})
    print(json.dumps({"device": options.device, "products": found}))
    return 0


def weight_bytes(layout: str, columns: int, outputs: int) -> int:
    """Codes and scales of one layer."""
    bits, block, _ = LAYOUTS[layout]
    scales = 2 * outputs * -(-columns // block) if block else 0
    return columns * outputs * bits // 8 + scales


def _seconds(
    layout: str, columns: int, outputs: int, device: DeviceKind, rows: Sequence[int]
) -> list[float]:
    """Of one layer, for each number of rows."""
    most = max(_FEW + 1, min(_MANY, _MOST_BYTES // weight_bytes(layout, columns, outputs)))
    few, many = (_timed(layout, (columns, outputs), count, device, rows) for count in (_FEW, most))
    return [max(0.0, long - short) / (most - _FEW) for short, long in zip(few, many, strict=True)]


def _timed(
    layout: str, size: tuple[int, int], count: int, device: DeviceKind, rows: Sequence[int]
) -> list[float]:
    columns, outputs = size
    model = product_model(layout, columns, outputs, count)
    cuda = CudaOptions(weight_only_gemm=LAYOUTS[layout][2])
    options = SessionOptions(device=device, cuda=cuda, prompt_tokens=max(rows))
    session = Session.from_bytes(model, Path(), options)
    found = []
    for height in rows:
        binding = session.binding()
        given = Buffer((height, columns), np.float16, device)
        given.write(np.full((height, columns), 0.01, np.float16))
        binding.input("x", given)
        for index in range(count):
            binding.output(f"y{index}", Buffer((height, outputs), np.float16, device))
        binding.run()
        times: list[float] = []
        while len(times) < 3 or (sum(times) < _SECONDS and len(times) < _RUNS):
            start = time.perf_counter()
            binding.run()
            times.append(time.perf_counter() - start)
        found.append(min(times))
    return found


def product_model(layout: str, columns: int, outputs: int, count: int) -> bytes:
    """``x [rows, columns]`` times ``count`` matrices of their own: ``y0 … [rows, outputs]``."""
    bits, block, _ = LAYOUTS[layout]
    draw = np.random.default_rng(columns + outputs)
    if block:
        blocks = -(-columns // block)
        codes = draw.integers(0, 256, (outputs, blocks, block * bits // 8), np.uint8)
        scales = draw.uniform(0.001, 0.002, (outputs, blocks)).astype(np.float16)
        values = {"w": codes, "s": scales}
        attributes: dict[str, Any] = {"K": columns, "N": outputs, "bits": bits, "block_size": block}
        attributes["accuracy_level"] = _INT8_PRODUCTS
    else:
        small = draw.integers(-99, 99, (columns, outputs), np.int8).astype(np.float16)
        values, attributes = {"w": small / np.float16(9999)}, {}
    nodes: list[Any] = []
    tensors: list[Any] = []
    for index in range(count):
        # The same values again, in memory of their own.
        names = [f"{name}{index}" for name in values]
        tensors += map(numpy_helper.from_array, values.values(), names)
        operator, domain = ("MatMulNBits", _DOMAIN) if block else ("MatMul", "")
        node = helper.make_node(operator, ["x", *names], [f"y{index}"], domain=domain, **attributes)
        nodes.append(node)
    kind = TensorProto.FLOAT16
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", kind, ["rows", columns])],
        [helper.make_tensor_value_info(f"y{n}", kind, ["rows", outputs]) for n in range(count)],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_DOMAIN, 1)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return made


if __name__ == "__main__":
    sys.exit(main())
