"""VisionWeights: the codes of an int8 tower, and what its inputs are divided by.

A layer behind a layer norm reads what the norm's gain and bias already divide, so the divisor is
what the checkpoint's gain is over the graph's; elsewhere the graph multiplies by a factor of its
own. Either must be a power of two. ``ArtifactWeights`` offers both graphs' layers as one supply.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.onnx.graph_file import GraphFile
from llava_edge.convert.quantization.vision.int8 import norm_of, packed_name
from llava_edge.convert.verification.quantized.graph_weights import GraphCodes, GraphWeights
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.open import Artifact

Scale = NDArray[np.float32]

INPUT_FACTOR = ".input_factor"
"""How the name of the factor in front of a layer ends."""


class VisionWeights:
    """Linear layers of tower and projector, one at a time.

    Args:
        graph: the vision graph.
        checkpoint: what it was made from.
    """

    def __init__(self, graph: GraphFile, checkpoint: Checkpoint) -> None:
        self.graph = graph
        self._checkpoint = checkpoint
        width = checkpoint.dims.vision.hidden_size
        self._weights = GraphWeights(graph, width, width)

    @classmethod
    def open(cls, artifact: Artifact, checkpoint: Checkpoint) -> VisionWeights:
        """The vision graph of an opened artifact."""
        path = artifact.path(artifact.manifest.vision.file)
        return cls(GraphFile(path, "vision"), checkpoint)

    def layers(self) -> list[str]:
        """Names of the layers that hold codes, packed ones apart, in the checkpoint's order."""
        ends = ("_proj.weight", ".fc1.weight", ".fc2.weight", "linear_1.weight", "linear_2.weight")
        return [name for name in self._names(ends) if self.codes(name) is not None]

    def codes(self, name: str, rows: slice | None = None) -> GraphCodes | None:
        """See ``GraphWeights.codes``."""
        return self._weights.codes(name, rows)

    def holds(self, name: str) -> bool:
        """Whether a layer is one of the tower's or projector's and holds codes."""
        if not name.startswith(("vision_tower.encoder.layers.", "multi_modal_projector.")):
            return False
        try:
            return self._weights.rounding(name) is not None
        except ArtifactError:
            return False

    def linear(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Dequantised weight, which is for an input divided by ``scale``."""
        return self._weights.linear(name, rows)

    def rounding(self, name: str) -> int | None:
        """See ``GraphWeights.rounding``."""
        return self._weights.rounding(name)

    def tensors(self, name: str) -> set[str]:
        """Initializers of a layer: weight, scales and factor."""
        found = self._weights.tensors(name)
        factor = f"{packed_name(name)}{INPUT_FACTOR}"
        return found | ({factor} if factor in self.graph.initializers else set())

    def scale(self, name: str) -> Scale | None:
        """What the input of a layer with codes is divided by, float32 [K]; None for nothing."""
        packed = packed_name(name)
        factor = f"{packed}{INPUT_FACTOR}"
        norm = norm_of(packed)
        if factor in self.graph.initializers:
            scale = 1.0 / self.graph.read(factor).astype(np.float32)
        elif norm is not None and self.holds(packed):
            scale = self._norm_scale(norm)
        else:
            return None
        return None if bool((scale == 1).all()) else scale

    def norm_scale(self, tensor: str) -> Scale | None:
        """What the gain or bias ``tensor`` of a layer norm was divided by; None for nothing."""
        for packed in self.graph.initializers:
            name = packed.removesuffix(".weight")
            norm = norm_of(name) if packed.endswith(".weight") else None
            if norm is not None and tensor in (f"{norm}.weight", f"{norm}.bias"):
                return self.scale(name) if self.holds(name) else None
        return None

    def _norm_scale(self, norm: str) -> Scale:
        """The power of two nearest to what gain, or bias where that is zero, was divided by."""
        scale = np.ones(self.graph.shape(f"{norm}.weight"), np.float32)
        for part in ("bias", "weight"):
            held = self.graph.read(f"{norm}.{part}").astype(np.float64).reshape(-1)
            own = self._checkpoint.read(f"{norm}.{part}").astype(np.float16).astype(np.float64)
            known = (held != 0) & (own != 0)
            ratio = np.abs(own[known] / held[known])
            scale[known] = np.exp2(np.round(np.log2(ratio))).astype(np.float32)
        return scale

    def _names(self, ends: tuple[str, ...]) -> list[str]:
        blocks = self._checkpoint.dims.vision.num_blocks_used
        used = tuple(f"vision_tower.encoder.layers.{block}." for block in range(blocks))
        return [
            name.removesuffix(".weight")
            for name in self._checkpoint.tensors
            if name.startswith((*used, "multi_modal_projector.")) and name.endswith(ends)
        ]


class ArtifactWeights:
    """Quantised layers of both graphs, see ``streamed_model.LinearSupply``.

    Args:
        decoder: the language model's.
        vision: the tower's; None where it is in float.
    """

    def __init__(self, decoder: GraphWeights, vision: VisionWeights | None) -> None:
        self._decoder = decoder
        self._vision = vision

    def holds(self, name: str) -> bool:
        """Whether a layer's weight is to be taken from here."""
        if self._vision is not None and self._vision.holds(name):
            return True
        return self._decoder.holds(name)

    def linear(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Weight of a layer."""
        return self._of(name).linear(name, rows)

    def rounding(self, name: str) -> int | None:
        """How a layer's inputs are rounded."""
        return self._of(name).rounding(name)

    def input_scale(self, name: str) -> Scale | None:
        """What a layer's input is divided by before it is rounded."""
        of = self._of(name)
        return of.scale(name) if isinstance(of, VisionWeights) else None

    def _of(self, name: str) -> GraphWeights | VisionWeights:
        if self._vision is not None and self._vision.holds(name):
            return self._vision
        return self._decoder


def is_power_of_two(scale: Scale) -> bool:
    """Whether every value is one, and none is below 1."""
    return bool((np.frexp(scale)[0] == 0.5).all() and (scale >= 1).all())
