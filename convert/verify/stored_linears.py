"""StoredLinears: the language model of a GPTQ checkpoint in float32, as the checkpoint has it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.checkpoint import Checkpoint
from llava_edge.convert.gptq_checkpoint import open_gptq
from llava_edge.convert.quantized_source import HEAD


class StoredLinears:
    """Weights for ``StreamedModel.use``: dequantised linear layers, and the head as it stands.

    Args:
        checkpoint: with GPTQ weights.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.gptq is not None
        self._checkpoint = checkpoint
        self._source = open_gptq(checkpoint, f"int{checkpoint.gptq.bits}")

    def linear(self, name: str) -> NDArray[np.float32]:
        """Weight [outputs, inputs] by canonical name without ``.weight``."""
        if name == HEAD:
            return self._checkpoint.read(f"{HEAD}.weight").astype(np.float32)
        return self._source.linear(name).dequantize()

    def rounding(self, name: str) -> int | None:
        """Nothing that the checkpoint's own arithmetic reads is rounded."""
        return None
