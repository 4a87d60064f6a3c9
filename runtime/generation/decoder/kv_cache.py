"""KVCache: preallocated keys and values of every layer, and how much of them is valid.

They are of the type that the graph computes in, or int8 codes, whose scales stand in the graph.
Rows at and behind ``length`` are ignored by the kernel, so rewinding is setting a number.
"""

from __future__ import annotations

import numpy as np

from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.memory.buffers import kv_cache_shape
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.runtime.backends.onnxruntime import Binding, Buffer
from llava_edge.runtime.util.arrays import Array, DeviceKind


class KVCache:
    """One buffer per layer and part, ``[1, kv_heads, capacity, head_dim]``, past and present."""

    def __init__(
        self,
        text: TextDims,
        capacity: int,
        dtype: type[np.generic],
        device: DeviceKind,
        gpu: int = 0,
    ) -> None:
        self.capacity = capacity
        self.length = 0
        shape = kv_cache_shape(text, capacity)
        self._buffers = {
            f"{layer}.{part}": Buffer(shape, dtype, device, gpu)
            for layer in range(text.num_hidden_layers)
            for part in ("key", "value")
        }

    def bind(self, binding: Binding) -> None:
        """Bind every buffer as past and as present: the kernel writes new rows in place."""
        for name, buffer in self._buffers.items():
            binding.input(f"past_key_values.{name}", buffer)
            binding.output(f"present.{name}", buffer)

    def part(self, layer: int, name: str) -> Array:
        """Keys (``key``) or values (``value``) of a layer so far, [kv_heads, length, head_dim].

        For anyone who looks at a cache; on the CPU the memory itself.
        """
        return self._buffers[f"{layer}.{name}"].read()[0, :, : self.length]

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` positions."""
        if not 0 <= length <= self.length:
            raise RequestError(f"cannot rewind a cache of {self.length} positions to {length}")
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
