"""VisionValues: inner values of the vision graph, by the names of the reference's modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llava_edge.convert.onnx.graph_view import GraphView

_BLOCK = "vision_tower.encoder.layers.{}"


class VisionValues:
    """Where in the graph the output of each module is.

    Args:
        path: of the vision graph.
        num_blocks: blocks up to the feature layer.

    Raises:
        ArtifactError: a node is not there.
    """

    def __init__(self, path: Path, num_blocks: int) -> None:
        self._view = GraphView(path, "vision")
        self._num_blocks = num_blocks

    def outline(self) -> dict[str, str]:
        """Embedding, first norm, every block and the projector, in order."""
        norm = self._view.node("vision_tower.pre_layrnorm")
        found = {
            "vision_tower.embeddings": norm.input[0],
            "vision_tower.pre_layrnorm": norm.output[0],
        }
        for index in range(self._num_blocks):
            found[_BLOCK.format(index)] = self._block(index)
        linear = "multi_modal_projector.linear_1"
        found[linear] = self._view.linear(linear)
        found["multi_modal_projector"] = "image_features"
        return found

    def blocks(self) -> Mapping[str, Mapping[str, str]]:
        """The parts of each block, in order, the block itself last."""
        found: dict[str, dict[str, str]] = {}
        for index in range(self._num_blocks):
            block = _BLOCK.format(index)
            found[block] = {
                f"{block}.layer_norm1": self._view.node(f"{block}.layer_norm1").output[0],
                f"{block}.self_attn": self._view.linear(f"{block}.self_attn.out_proj"),
                f"{block}.layer_norm2": self._view.node(f"{block}.layer_norm2").output[0],
                f"{block}.mlp.fc1": self._view.linear(f"{block}.mlp.fc1"),
                f"{block}.mlp.fc2": self._view.linear(f"{block}.mlp.fc2"),
                block: self._block(index),
            }
        return found

    def _block(self, index: int) -> str:
        """The sum behind the second linear layer."""
        name = f"{_BLOCK.format(index)}.mlp.fc2"
        value: str = self._view.consumers(self._view.linear(name))[0].output[0]
        return value
