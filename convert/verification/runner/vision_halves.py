"""VisionHalves: the artifact's own tower cut in two, for a machine that shall not hold it whole.

The first half hands out what the middle block makes, the second reads it. Both keep the names of
the whole graph's input and output, so that the runtime runs each half as it runs the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from llava_edge.convert.onnx.graph_view import GraphView
from llava_edge.convert.verification.runner.vision_values import VisionValues
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.artifact.graph_inputs import POOLING
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.encoder import VisionEncoder

_INPUT, _OUTPUT = "pixel_values", "image_features"


class VisionHalves:
    """Encodes tiles one half of the graph after the other; see ``VisionEncoder``.

    Args:
        path: of the vision graph.
        dims: of the model.
        options: of the sessions.
        dtype: of pixels and features.

    Raises:
        ArtifactError: a block is not there.
    """

    def __init__(
        self,
        path: Path,
        dims: ModelDims,
        options: SessionOptions,
        dtype: type[np.float32] | type[np.float16],
    ) -> None:
        self._view = GraphView(path, "vision")
        self._dims = dims
        self._options = options
        self._dtype = dtype
        blocks = dims.vision.num_blocks_used
        middle = f"vision_tower.encoder.layers.{blocks // 2 - 1}"
        self._cut = VisionValues(path, blocks).outline()[middle]

    def encode(self, pixel_values: Array, out: Array) -> None:
        """Write the features of all tiles; see ``VisionEncoder.encode``."""
        vision = self._dims.vision
        states = np.empty(
            (len(pixel_values), vision.num_patches + 1, vision.hidden_size), self._dtype
        )
        opening = helper.make_node("Identity", [_INPUT], [self._cut])
        closing = helper.make_node("Identity", [self._cut], [_OUTPUT])
        self._run([*self._nodes(self._cut, ""), closing], pixel_values, states)
        self._run([opening, *self._nodes(_OUTPUT, self._cut)], states, out)

    def _run(self, nodes: Sequence[Any], given: Array, out: Array) -> None:
        graph = self._view.model.graph
        read = {name for node in nodes for name in node.input}
        kind = graph.input[0].type.tensor_type.elem_type
        pooling = [each for each in graph.input if each.name == POOLING and POOLING in read]
        half = helper.make_graph(
            list(nodes),
            "half of the tower",
            [helper.make_tensor_value_info(_INPUT, kind, ["tiles", *given.shape[1:]]), *pooling],
            [helper.make_tensor_value_info(_OUTPUT, kind, ["tiles", *out.shape[1:]])],
            [tensor for tensor in graph.initializer if tensor.name in read],
        )
        model = helper.make_model(
            half,
            opset_imports=list(self._view.model.opset_import),
            ir_version=self._view.model.ir_version,
        )
        session = Session.from_bytes(model.SerializeToString(), self._view.folder, self._options)
        VisionEncoder(session, self._dims, 1, self._dtype).encode(given, out)

    def _nodes(self, target: str, stop: str) -> list[Any]:
        """Nodes that a value follows from, back to another value, in the graph's order."""
        wanted, seen = [target], {stop}
        names: set[str] = set()
        while wanted:
            value = wanted.pop()
            maker = self._view.producer(value)
            if value in seen or maker is None:
                continue
            seen.add(value)
            names.add(maker.name)
            wanted += list(maker.input)
        return [node for node in self._view.nodes if node.name in names]
