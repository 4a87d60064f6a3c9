"""The decoder with an int8 KV cache: a second small graph over the weights file of the first.

It is made from the finished graph and differs from it in what the cache is and in nothing else:
caches go in and out as int8 codes, and each GroupQueryAttention is given one scale a channel,
``[1, kv_heads, 1, head_dim]`` float32, for its keys behind the rotary embedding and for its values.
A code is ``clip(round(value / scale), -128, 127)``; attention reads ``code * scale`` of all
positions, those of the same run included.

Source: ONNX Runtime 1.32, GroupQueryAttention inputs 12 and 13, ``k_quant_type``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from llava_edge.profiles.memory.buffers import cache_scale_shape
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.runtime.artifact.graph_signature import scale_names
from llava_edge.runtime.artifact.manifest import GraphSpec, TensorSpec

INT8_CACHE_FILE = "int8_cache.onnx"
LARGEST_CODE = 127
ATTENTION = "GroupQueryAttention"
SCALE_INPUTS = (12, 13)
"""Where GroupQueryAttention takes the scales of keys and of values."""
CACHE_ATTRIBUTES: dict[str, Any] = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}
CACHE_NAMES = ("past_key_values.", "present.")
"""How the names of caches begin, as inputs and as outputs."""


@dataclass(frozen=True)
class CacheScales:
    """Scales of an int8 cache, float32 [layers, kv_heads, head_dim] each; all above zero."""

    key: np.ndarray[Any, np.dtype[np.float32]]
    value: np.ndarray[Any, np.dtype[np.float32]]


def scales_digest(*scales: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    """SHA-256, in hex, of scales of keys and of values."""
    digest = hashlib.sha256()
    for array in scales:
        digest.update(np.ascontiguousarray(array, "<f4").tobytes())
    return digest.hexdigest()


def write_int8_cache_graph(
    folder: Path, decoder: GraphSpec, text: TextDims, scales: CacheScales
) -> GraphSpec:
    """Write the graph beside the decoder that it is made from.

    Args:
        folder: of the artifact.
        decoder: the float graph, which is only read.
        text: dimensions of the language model.
        scales: of all layers.

    Returns:
        What goes in and out of the new graph.
    """
    source = folder / decoder.file
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    attentions = [node for node in graph.node if node.op_type == ATTENTION]
    shape = cache_scale_shape(text)
    for layer, node in enumerate(attentions):
        names = scale_names(layer)
        empty = SCALE_INPUTS[0] - len(node.input)
        node.input.extend([*[""] * empty, *names])
        node.attribute.extend(helper.make_attribute(*item) for item in CACHE_ATTRIBUTES.items())
        for name, array in zip(names, (scales.key, scales.value), strict=True):
            tensor = numpy_helper.from_array(array[layer].reshape(shape), name)
            graph.initializer.append(tensor)
    for value in (*graph.input, *graph.output):
        if value.name.startswith(CACHE_NAMES):
            value.type.tensor_type.elem_type = TensorProto.INT8
    target = source.with_name(INT8_CACHE_FILE)
    target.write_bytes(model.SerializeToString())
    return GraphSpec(
        file=target.relative_to(folder).as_posix(),
        inputs=_with_codes(decoder.inputs),
        outputs=_with_codes(decoder.outputs),
    )


def _with_codes(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(
        replace(tensor, dtype="int8") if tensor.name.startswith(CACHE_NAMES) else tensor
        for tensor in tensors
    )
