"""StoredLinears: the language model of a GPTQ checkpoint in float32, as the checkpoint has it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.quantized.source import HEAD
from llava_edge.convert.verification.reference.gptq_values import GptqValues


class StoredLinears:
    """Weights for ``StreamedModel.use``: dequantised linear layers, and the head as it stands.

    Args:
        checkpoint: with GPTQ weights.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def linear(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Weight [outputs, inputs] by canonical name without ``.weight``, or some rows."""
        if name == HEAD:
            return self._checkpoint.read(f"{HEAD}.weight", rows).astype(np.float32)
        values = GptqValues(self._checkpoint, name)
        first, last, _ = (rows or slice(None)).indices(values.num_rows)
        return values.rows(first, last)

    def holds(self, name: str) -> bool:
        """Whether a layer is one of the language model's."""
        return name.startswith("language_model.layers.") and name.endswith("_proj")

    def input_scale(self, _name: str) -> NDArray[np.float32] | None:
        """Nothing is divided."""
        return None

    def rounding(self, name: str) -> int | None:
        """Nothing that the checkpoint's own arithmetic reads is rounded."""
        return None
