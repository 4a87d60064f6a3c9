"""Vision graphs that tests build engines from: a small tower of ours, and ones with Q/DQ nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.writing.artifact_builder import PartBuilders


def write_vision_graph(checkpoint: Path, folder: Path) -> Path:
    """The float16 vision graph of a checkpoint, as convert writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    PartBuilders(open_checkpoint(checkpoint), "cuda", 512, lambda *_: None).vision(folder)
    return folder / "vision" / "model.onnx"


def write_quantized_graph(path: Path, element_type: int) -> Path:
    """One product whose two sides pass through Q/DQ nodes of an 8-bit type."""
    zero = helper.make_tensor("zero", element_type, [], [0])
    weight = np.linspace(-1, 1, 96, dtype=np.float16).reshape(12, 8)
    constants = [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.float16(0.05), "scale"),
        numpy_helper.from_array(np.array([0, -1, 12], np.int64), "shape"),
        zero,
    ]
    nodes = [helper.make_node("Reshape", ["pixel_values", "shape"], ["patches"])]
    for name in ("patches", "weight"):
        codes, back = f"{name} codes", f"{name} again"
        nodes += [
            helper.make_node("QuantizeLinear", [name, "scale", "zero"], [codes]),
            helper.make_node("DequantizeLinear", [codes, "scale", "zero"], [back]),
        ]
    nodes.append(helper.make_node("MatMul", ["patches again", "weight again"], ["image_features"]))
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)
        for name, shape in (
            ("pixel_values", ["tiles", 3, 8, 8]),
            ("image_features", ["tiles", 16, 8]),
        )
    ]
    graph = helper.make_graph(nodes, "quantised", values[:1], values[1:], constants)
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path
