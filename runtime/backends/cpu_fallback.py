"""Which nodes of a graph compute, and which only work out sizes.

A provider leaves nodes of sizes to the CPU on purpose: lengths and shapes lie in host memory, where
kernels read them. Every other node that it leaves there costs two copies a run, unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llava_edge.runtime.artifact.onnx_proto import OnnxHeader
from llava_edge.runtime.artifact.onnx_schema import ELEMENT_TYPES

_SIZES = "int64"
_SHOWN = 4


def nodes_that_compute(header: OnnxHeader, nodes: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Those of some nodes that do more than work out sizes.

    Args:
        header: of the graph, as it lies on disk.
        nodes: (op_type, name) of each. A name that the graph does not hold is of a node that the
            engine made itself; it counts as computing.

    Returns:
        ``op_type name`` of each, in their order.
    """
    harmless = size_nodes(header)
    return tuple(f"{kind} {name}" for kind, name in nodes if name not in harmless)


def size_nodes(header: OnnxHeader) -> frozenset[str]:
    """Names of nodes that read nothing but sizes: int64 inputs and constants, and shapes."""
    sizes = {value.name for value in header.inputs if value.dtype == _SIZES}
    sizes |= {t.name for t in header.tensors if ELEMENT_TYPES.get(t.data_type) == _SIZES}
    found = set()
    # A graph's nodes stand in an order in which every value is made before it is read.
    for node in header.nodes:
        read = [name for name in node.inputs if name]
        if node.op_type == "Shape" or (read and sizes.issuperset(read)):
            sizes.update(name for name in node.outputs if name)
            found.add(node.name)
    return frozenset(found)


def refusal(graph: str, device: str, nodes: Sequence[str]) -> str:
    """The sentence for anyone who asked for the device alone."""
    more = f" and {len(nodes) - _SHOWN} more" if len(nodes) > _SHOWN else ""
    return (
        f"{graph} was to run on {device} alone, and ONNX Runtime puts {len(nodes)} of its nodes on "
        f"the CPU: {', '.join(nodes[:_SHOWN])}{more}. Install the onnxruntime-gpu that this tool "
        "is tested with, or load without strict_device (--strict-device), which is slower and "
        "names these nodes in every answer."
    )
