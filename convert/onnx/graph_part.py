"""GraphPart: a graph that was written, with what was decided while writing it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llava_edge.runtime.artifact.manifest import GraphSpec


@dataclass(frozen=True)
class GraphPart:
    """One graph of an artifact.

    Attributes:
        spec: of the graph, for the manifest.
        facts: plain JSON for ``manifest.conversion``; empty where nothing was decided.
    """

    spec: GraphSpec
    facts: dict[str, Any] = field(default_factory=dict)
