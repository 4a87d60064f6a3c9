"""StoredLinears: the language model of a GPTQ checkpoint in float32, as the checkpoint has it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.checkpoint import Checkpoint
from llava_edge.convert.quantized_source import HEAD
from llava_edge.convert.verify.gptq_values import GptqValues


class StoredLinears:
    """Weights for ``StreamedModel.use``: dequantised linear layers, and the head as it stands.

    Args:
        checkpoint: with GPTQ weights.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def linear(self, name: str) -> NDArray[np.float32]:
        """Weight [outputs, inputs] by canonical name without ``.weight``."""
        if name == HEAD:
            return self._checkpoint.read(f"{HEAD}.weight").astype(np.float32)
        values = GptqValues(self._checkpoint, name)
        return values.rows(0, values.num_rows)

    def rounding(self, name: str) -> int | None:
        """Nothing that the checkpoint's own arithmetic reads is rounded."""
        return None
