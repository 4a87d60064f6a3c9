"""GraphView: a graph file whose nodes are found by name, to be cut and looked into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_edge.convert.onnx.graph_file import GraphFile
from llava_edge.profiles.errors import ArtifactError


class MissingNodeError(ArtifactError):
    """A graph lacks a node that the reference has a module for.

    Attributes:
        node: its name.
    """

    def __init__(self, label: str, node: str) -> None:
        super().__init__(f"the {label} graph has no node {node!r}")
        self.node = node


class GraphView(GraphFile):
    """Adds to ``GraphFile`` the names of nodes and of what linear layers hand on.

    Args:
        path: the ``.onnx`` file.
        label: what messages call it.

    Raises:
        ArtifactError: the file is no ONNX model.
    """

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        self._places = {node.name: index for index, node in enumerate(self.nodes)}

    @property
    def folder(self) -> Path:
        """Where the weights lie."""
        return self.path.parent

    def place(self, name: str) -> int:
        """Index of a node.

        Raises:
            MissingNodeError: there is no such node.
        """
        if name not in self._places:
            raise MissingNodeError(self.label, name)
        return self._places[name]

    def node(self, name: str) -> Any:
        """A node by name.

        Raises:
            MissingNodeError: there is no such node.
        """
        return self.nodes[self.place(name)]

    def linear(self, name: str) -> str:
        """The value of a linear layer, once its row scale, second term and bias are in it."""
        value: str = self.node(name).output[0]
        while len(users := self.consumers(value)) == 1:
            (user,) = users
            others = [each for each in user.input if each != value]
            is_bias = user.op_type == "Add" and bool(others) and others[0] in self.initializers
            maker = self.producer(others[0]) if others else None
            if user.op_type == "Cast":
                value = user.output[0]
                continue
            if maker is not None and maker.op_type == "Cast":
                others = [maker.input[0]]
            if maker is not None and maker.op_type == "Mul":
                # The size of a row, by what each of its two terms counts.
                maker = self.producer(maker.input[0])
            is_scale = user.op_type == "Mul" and maker is not None and maker.op_type == "Max"
            if not (is_bias or is_scale or user.op_type == "ReduceSum"):
                break
            value = user.output[0]
        return value
