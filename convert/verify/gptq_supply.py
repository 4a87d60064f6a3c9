"""GptqSupply: the language model's weights as a GPTQ checkpoint itself means them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.checkpoint import Checkpoint
from llava_edge.convert.verify.gptq_values import GptqValues


class GptqSupply:
    """A ``LinearSupply`` over a GPTQ checkpoint, nothing rounded on the way.

    Args:
        checkpoint: one whose ``gptq`` is not None.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def linear(self, name: str) -> NDArray[np.float32]:
        """Weight [outputs, inputs] of a layer; the head is not quantised there."""
        if f"{name}.qweight" not in self._checkpoint.tensors:
            return self._checkpoint.read(f"{name}.weight").astype(np.float32)
        values = GptqValues(self._checkpoint, name)
        return values.rows(0, values.num_rows)

    def rounding(self, name: str) -> int | None:
        """No kernel is meant here."""
        return None
