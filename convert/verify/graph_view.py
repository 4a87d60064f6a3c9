"""GraphView: an ONNX graph without its weights, to be asked who makes and who reads a value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from llava_edge.profiles.errors import ArtifactError


class GraphView:
    """Nodes by name, values by maker and readers.

    Attributes:
        model: the parsed ONNX model; external data is not loaded.
        nodes: in the graph's order.
        folder: where the weights lie.
    """

    def __init__(self, path: Path) -> None:
        self.model: Any = onnx.load(path, load_external_data=False)
        self.folder = path.parent
        self.nodes: list[Any] = list(self.model.graph.node)
        self._places = {node.name: index for index, node in enumerate(self.nodes)}
        self._makers = {made: node for node in self.nodes for made in node.output}
        self._initializers = {tensor.name for tensor in self.model.graph.initializer}
        self._readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def place(self, name: str) -> int:
        """Index of a node.

        Raises:
            ArtifactError: there is no such node.
        """
        if name not in self._places:
            raise ArtifactError(f"{self.folder.name}/ has a graph without a node {name!r}")
        return self._places[name]

    def node(self, name: str) -> Any:
        """A node by name.

        Raises:
            ArtifactError: there is no such node.
        """
        return self.nodes[self.place(name)]

    def maker(self, value: str) -> Any:
        """The node that makes a value; None for inputs and initializers."""
        return self._makers.get(value)

    def readers(self, value: str) -> list[Any]:
        """The nodes that read a value."""
        return self._readers.get(value, [])

    def linear(self, name: str) -> str:
        """The value of a linear layer, once its row scale and bias are in it."""
        value: str = self.node(name).output[0]
        while len(users := self.readers(value)) == 1:
            (user,) = users
            others = [each for each in user.input if each != value]
            is_bias = user.op_type == "Add" and bool(others) and others[0] in self._initializers
            maker = self.maker(others[0]) if others else None
            is_scale = user.op_type == "Mul" and maker is not None and maker.op_type == "Max"
            if not (is_bias or is_scale):
                break
            value = user.output[0]
        return value
