"""A GPTQ checkpoint's weights as the tools that read such checkpoints compute them.

    weight[k, n] = scales[g_idx[k], n] * (code[k, n] - (zero[g_idx[k], n] + 1))

Codes lie along K and zeros along N, low bits first, in words of 32 bits. Written from GPTQModel's
and AutoGPTQ's dequantisation; shares nothing with the reader that converts such a checkpoint.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.profiles.errors import CheckpointError


class GptqValues:
    """One linear layer of a GPTQ checkpoint; some of its outputs at a time.

    Args:
        checkpoint: one whose ``gptq`` is not None.
        name: canonical name of the layer.

    Raises:
        CheckpointError: it is no GPTQ checkpoint, or has no such layer.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        if checkpoint.gptq is None:
            raise CheckpointError(f"{checkpoint.folder} is no GPTQ checkpoint")
        self._bits = checkpoint.gptq.bits
        self._words = checkpoint.read(f"{name}.qweight").view(np.uint32)
        zeros = checkpoint.read(f"{name}.qzeros").view(np.uint32)
        self._scales = checkpoint.read(f"{name}.scales").astype(np.float32)
        num_columns = len(self._words) * 32 // self._bits
        if f"{name}.g_idx" in checkpoint.tensors:
            self._groups = checkpoint.read(f"{name}.g_idx").astype(np.int64)
        else:
            size = num_columns // len(self._scales)
            self._groups = np.arange(num_columns) // size
        # Along N, eight (or four) a word.
        shifts = np.arange(0, 32, self._bits, dtype=np.uint32)
        codes = (zeros[:, :, None] >> shifts) & np.uint32(2**self._bits - 1)
        self._zeros = codes.reshape(len(zeros), -1).astype(np.float32) + 1

    @property
    def num_rows(self) -> int:
        """Outputs N."""
        return int(self._words.shape[1])

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Values float32 [last - first, K]."""
        words = self._words[:, first:last]
        shifts = np.arange(0, 32, self._bits, dtype=np.uint32)
        codes = (words[:, None, :] >> shifts[:, None]) & np.uint32(2**self._bits - 1)
        values = codes.reshape(-1, words.shape[1]).astype(np.float32)
        values -= self._zeros[self._groups, first:last]
        values *= self._scales[self._groups, first:last]
        return np.ascontiguousarray(values.T)
