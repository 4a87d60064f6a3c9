"""GptqSource: an existing GPTQ checkpoint as the source of a conversion; no code is changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava_edge.convert.checkpoint.formats.packing import GptqTensors, from_gptq, gptq_faults
from llava_edge.convert.checkpoint.formats.rounding import PER_CHANNEL, QuantizedWeight
from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.quantized.source import LINEARS, linear_name
from llava_edge.profiles.errors import CheckpointError, RequestError
from llava_edge.runtime.util.arrays import Array

_SHOWN_FAULTS = 8


@dataclass(frozen=True)
class GptqSource:
    """Codes and scales of a GPTQ checkpoint; a QuantizedSource.

    Attributes:
        checkpoint: one whose ``gptq`` is not None, as ``open_gptq`` gives it.
    """

    checkpoint: Checkpoint

    @property
    def bits(self) -> int:
        """4 or 8."""
        return self._settings[0]

    @property
    def group_size(self) -> int:
        """Columns that share a scale; -1 for one scale a row."""
        return self._settings[1]

    def linear(self, name: str) -> QuantizedWeight:
        """Read and unpack one layer.

        Raises:
            CheckpointError: there is no such layer, or it cannot be kept faithfully.
        """
        tensors = self._tensors(name, self.checkpoint.read(f"{name}.qweight"))
        return from_gptq(tensors, bits=self.bits, group_size=self.group_size, name=name)

    def faults(self) -> list[str]:
        """Why the checkpoint cannot be kept faithfully, layer by layer; codes are not read."""
        found: list[str] = []
        for layer in range(self.checkpoint.dims.text.num_hidden_layers):
            for linear in LINEARS:
                name = linear_name(layer, linear)
                shape = self.checkpoint.tensors[f"{name}.qweight"].shape
                tensors = self._tensors(name, np.broadcast_to(np.int32(0), shape))
                faults = gptq_faults(tensors, self.bits, self.group_size)
                found += [f"{name}: {fault}" for fault in faults + self._bias_faults(name)]
        return found

    @property
    def _settings(self) -> tuple[int, int]:
        settings = self.checkpoint.gptq
        if settings is None:
            raise CheckpointError(f"{self.checkpoint.folder} is no GPTQ checkpoint")
        return settings.bits, settings.group_size

    def _tensors(self, name: str, qweight: Array) -> GptqTensors:
        read, group_size = self.checkpoint.read, self.group_size
        if f"{name}.g_idx" in self.checkpoint.tensors:
            g_idx = read(f"{name}.g_idx")
        else:
            columns = np.arange(qweight.shape[0] * 32 // self.bits, dtype=np.int32)
            g_idx = columns // np.int32(len(columns) if group_size == PER_CHANNEL else group_size)
        return GptqTensors(qweight, read(f"{name}.qzeros"), read(f"{name}.scales"), g_idx)

    def _bias_faults(self, name: str) -> list[str]:
        """Some tools write a bias of zeros where the model has none; any other would be lost."""
        text, bias = self.checkpoint.dims.text, f"{name}.bias"
        part = name.rsplit(".", 1)[1]
        has_bias = text.mlp_bias
        if ".self_attn." in name:
            has_bias = text.o_bias if part == "o_proj" else text.qkv_bias
        if has_bias or bias not in self.checkpoint.tensors:
            return []
        if not np.any(self.checkpoint.read(bias)):
            return []
        return [f"it has a bias, which config.json says {text.model_type} layers do not have"]


def open_gptq(checkpoint: Checkpoint, precision: str) -> GptqSource:
    """Use a GPTQ checkpoint's own codes for a conversion.

    Scales, zero points and column order of every layer are read and checked here, so that nothing
    is found wrong after an hour of work.

    Args:
        checkpoint: one whose ``gptq`` is not None.
        precision: what was asked for; must be the checkpoint's own.

    Raises:
        RequestError: another precision was asked for than the weights have.
        CheckpointError: layers cannot be kept faithfully; reasons are listed.
    """
    source = GptqSource(checkpoint)
    own = f"int{source.bits}"
    if precision != own:
        raise RequestError(
            f"{precision} was asked for, and {checkpoint.source_id} holds GPTQ weights of "
            f"{source.bits} bits. Codes are kept as they are: take --precision {own}, or give the "
            "float16 or bfloat16 checkpoint."
        )
    if faults := source.faults():
        more = [f"and {len(faults) - _SHOWN_FAULTS} more"] if len(faults) > _SHOWN_FAULTS else []
        listed = "\n  - ".join([*faults[:_SHOWN_FAULTS], *more])
        raise CheckpointError(
            f"{checkpoint.source_id} cannot be kept faithfully:\n  - {listed}\n"
            "Next step: give the float16 or bfloat16 checkpoint; it can be quantised here."
        )
    return source
