"""QuantizedSource: where a decoder's integer codes come from, linear layer by linear layer.

A working folder of solved layers is one (``quantized_store``), the checkpoint itself rounded to
nearest on the way is another (``RtnSource``), a GPTQ checkpoint can be a third.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from llava_edge.convert.checkpoint.formats.packing import choose_group_size
from llava_edge.convert.checkpoint.formats.rounding import (
    QuantizationReport,
    QuantizedWeight,
    ScaleRule,
    check_settings,
    round_to_nearest,
)
from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.profiles.errors import CheckpointError
from llava_edge.profiles.models.model_dims import TextDims

HEAD = "lm_head"
HEAD_BITS = 8
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Linear layers of one decoder layer, in the order in which they are solved."""

_ELEMENTS_AT_A_TIME = 1 << 25


class QuantizedSource(Protocol):
    """Codes and scales of the decoder's linear layers, by canonical name."""

    @property
    def bits(self) -> int:
        """4 or 8."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale; -1 for one scale a row."""

    def linear(self, name: str) -> QuantizedWeight:
        """Load one weight.

        Args:
            name: canonical prefix, such as ``language_model.layers.3.self_attn.q_proj``.

        Raises:
            CheckpointError: there is no such layer.
        """


@dataclass(frozen=True)
class RtnSource:
    """Rounds a checkpoint to nearest while it is read; nothing is stored.

    Attributes:
        checkpoint: where weights are read from, row range by row range.
        bits: 4 or 8.
        group_size: 128, 64, 32, or -1; one that divides every layer (``body_group_size``).
        reduce_range: 8-bit codes within 7 bits, see ``round_to_nearest``.
        scale: how scales are chosen, see ``round_to_nearest``.
    """

    checkpoint: Checkpoint
    bits: int
    group_size: int
    reduce_range: bool = False
    scale: ScaleRule = "mse"

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group_size, self.reduce_range)

    def linear(self, name: str) -> QuantizedWeight:
        """Read and round one weight; see ``QuantizedSource.linear``."""
        return round_tensor(
            self.checkpoint,
            f"{name}.weight",
            bits=self.bits,
            group_size=self.group_size,
            reduce_range=self.reduce_range,
            scale=self.scale,
        )


def linear_name(layer: int, linear: str) -> str:
    """Canonical prefix of one of ``LINEARS`` in one layer."""
    return f"language_model.layers.{layer}.{linear}"


def body_group_size(text: TextDims) -> int:
    """The largest group that divides the inputs of every linear layer of the decoder."""
    return choose_group_size([text.hidden_size, text.query_size, text.intermediate_size])


def quantize_head(checkpoint: Checkpoint, *, group_size: int | None = None) -> QuantizedWeight:
    """The language model's head, rounded to nearest at 8 bits.

    Args:
        checkpoint: where it is read from; a shared embedding table is the head where it is tied.
        group_size: None for the largest of 128, 64, 32, -1 that divides its inputs.
    """
    if group_size is None:
        group_size = choose_group_size([checkpoint.dims.text.hidden_size])
    return round_tensor(checkpoint, f"{HEAD}.weight", bits=HEAD_BITS, group_size=group_size)


def round_tensor(
    checkpoint: Checkpoint,
    name: str,
    *,
    bits: int,
    group_size: int,
    reduce_range: bool = False,
    scale: ScaleRule = "mse",
) -> QuantizedWeight:
    """Round a matrix of a checkpoint to nearest, some rows at a time; the rows stand alone.

    Args:
        checkpoint: where it is read from.
        name: canonical name of the tensor, ``.weight`` included.
        bits: 4 or 8.
        group_size: 128, 64, 32, or -1.
        reduce_range: see ``round_to_nearest``.
        scale: see ``round_to_nearest``.

    Raises:
        RequestError: a setting is outside its set.
        CheckpointError: the tensor is missing, not finite, or its columns are no multiple of the
            group.
    """
    if name not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.folder} holds no tensor {name!r}")
    num_rows, num_columns = _matrix_shape(checkpoint, name)
    step = max(1, _ELEMENTS_AT_A_TIME // num_columns)
    parts: list[QuantizedWeight] = []
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        where = f"tensor {name}"
        if num_rows > step:
            where += f" (rows {first} to {last}, counted from {first})"
        parts.append(
            round_to_nearest(
                torch.from_numpy(checkpoint.read(name, slice(first, last))),
                bits=bits,
                group_size=group_size,
                scale=scale,
                reduce_range=reduce_range,
                name=where,
            )
        )
    return parts[0] if len(parts) == 1 else _stacked(parts)


def _matrix_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    shape = checkpoint.tensors[name].shape
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(shape)}; quantisation takes a non-empty matrix"
        )
    return shape[0], shape[1]


def _stacked(parts: list[QuantizedWeight]) -> QuantizedWeight:
    sizes = [part.qweight.size for part in parts]
    errors = [part.report.mse or 0.0 for part in parts]
    mse = math.fsum(e * s for e, s in zip(errors, sizes, strict=True)) / sum(sizes)
    return QuantizedWeight(
        np.concatenate([part.qweight for part in parts]),
        np.concatenate([part.scales for part in parts]),
        parts[0].bits,
        parts[0].group_size,
        QuantizationReport(mse=mse),
    )
