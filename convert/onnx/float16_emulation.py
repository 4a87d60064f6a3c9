"""What a float16 vision graph hands out where every float16 value really is one.

ONNX Runtime's CPU provider computes float16 graphs in float32 and leaves roundings between nodes
out, so that an overflow is not seen there. Here the graph runs in float32, and each value of type
float16 is rounded to it where it arises; products are summed in float32, as CUDA's kernels do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, shape_inference

from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.encoder import VisionEncoder

_HALF, _FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def emulate_float16(path: Path, dims: ModelDims, pixel_values: Array) -> Array:
    """Features of some tiles, float32 [tiles, patches, hidden], infinities where they arise.

    Args:
        path: a float16 vision graph of standard operators.
        dims: of the model.
        pixel_values: float32 [tiles, 3, T, T].
    """
    options = SessionOptions(device="cpu", optimise=False)
    session = Session.from_bytes(_rounding(path).SerializeToString(), path.parent, options)
    shape = (len(pixel_values), dims.vision.num_patches, dims.text.hidden_size)
    features = np.empty(shape, np.float32)
    VisionEncoder(session, dims, 1, np.float32).encode(pixel_values, features)
    return features


def _rounding(path: Path) -> Any:
    """The graph with float32 for float16, and a rounding behind what was float16."""
    model = shape_inference.infer_shapes(
        onnx.load(str(path), load_external_data=False), strict_mode=True
    )
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    half = {v.name for v in values if v.type.tensor_type.elem_type == _HALF}
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type == _HALF}
    nodes = [helper.make_node("Cast", [name], [f"{name}.exact"], to=_FLOAT) for name in stored]
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in stored:
                node.input[place] = f"{name}.exact"
        if node.op_type == "Cast":
            # Either into float32, which it is in, or out of it, which the rounding does.
            node.attribute[0].i = _FLOAT
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in half:
                node.output[place] = f"{name}.raw"
                nodes += [
                    helper.make_node("Cast", [f"{name}.raw"], [f"{name}.half"], to=_HALF),
                    helper.make_node("Cast", [f"{name}.half"], [name], to=_FLOAT),
                ]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == _HALF:
            value.type.tensor_type.elem_type = _FLOAT
    return model
