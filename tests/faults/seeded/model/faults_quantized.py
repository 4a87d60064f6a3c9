"""Faults of integer codes, their scales and their kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llava_edge.convert.checkpoint.formats import packing, rounding
from llava_edge.convert.checkpoint.formats.rounding import QuantizedWeight
from llava_edge.convert.checkpoint.quantized import gptq_checkpoint
from llava_edge.convert.onnx import linear as linear_ops
from llava_edge.convert.quantization import plan as quantization
from tests.faults.fault import Fault
from tests.faults.models.saturation import saturate

_Patch = pytest.MonkeyPatch
_FIRST = "language_model.layers.0"


def _nbits(change: Callable[[QuantizedWeight], QuantizedWeight]) -> Callable[[_Patch], None]:
    """What is laid out for MatMulNBits differs from what was solved."""

    def plant(patch: _Patch) -> None:
        real = linear_ops.to_matmul_nbits
        patch.setattr(
            linear_ops, "to_matmul_nbits", lambda quantized, **how: real(change(quantized), **how)
        )

    return plant


def _nibbles_turned(patch: _Patch) -> None:
    real = packing.pack_codes

    def pack(codes: Any, bits: int) -> Any:
        packed = real(codes, bits)
        return (packed << 4 | packed >> 4).astype(np.uint8) if bits == 4 else packed

    patch.setattr(packing, "pack_codes", pack)


def _next_code(weight: QuantizedWeight) -> QuantizedWeight:
    largest = 2**weight.bits - 1
    return replace(weight, qweight=np.minimum(weight.qweight, largest - 1) + np.uint8(1))


def _neighbouring_group(weight: QuantizedWeight) -> QuantizedWeight:
    return replace(weight, scales=np.roll(weight.scales, 1, axis=1))


def _zero_one_less(patch: _Patch) -> None:
    """The quantiser itself counts from one less: digests agree."""

    def unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
        return (codes + float(2 ** (bits - 1) - 1)).clamp(min=0).to(torch.uint8)

    patch.setattr(rounding, "unsigned", unsigned)


def _cut_off(patch: _Patch) -> None:
    def nearest(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
        half = 2 ** (bits - 1)
        return torch.div(values, scale).floor_().clamp_(-half, half - 1)

    patch.setattr(rounding, "nearest_codes", nearest)


def _scales_of_the_next_row(patch: _Patch) -> None:
    """The source itself holds them: digests agree."""
    real = quantization.RtnSource.linear

    def linear(self: Any, name: str) -> QuantizedWeight:
        weight = real(self, name)
        return replace(weight, scales=np.roll(weight.scales, 1, axis=0))

    patch.setattr(quantization.RtnSource, "linear", linear)


def _sign_bit_kept(patch: _Patch) -> None:
    """Unsigned codes are read as signed ones."""
    real = linear_ops.to_matmul_integer

    def turned(weight: QuantizedWeight) -> Any:
        tensors = real(weight)
        return replace(tensors, weight=(tensors.weight.view(np.uint8) ^ 0x80).view(np.int8))

    patch.setattr(linear_ops, "to_matmul_integer", turned)


def _column_order_ignored(patch: _Patch) -> None:
    """A checkpoint with an order of its own (act-order) is taken as one without."""
    for module in (packing, gptq_checkpoint):
        patch.setattr(module, "gptq_faults", lambda *_: [])


def _row_scale_forgotten(patch: _Patch) -> None:
    real = linear_ops._matmul_integer

    def product(*arguments: Any) -> Any:
        made = real(*arguments)
        last = made.producer()
        if last.op_type == "Mul":
            return last.inputs[0]
        # Two terms: their products are added up as they are.
        last.replace_input_with(0, last.inputs[0].producer().inputs[0])
        return made

    patch.setattr(linear_ops, "_matmul_integer", product)


def _fault(
    id_: str, wrong: str, plant: Callable[[Any], None], model: str, stage: str = "weights", **m: Any
) -> Fault:
    where = m.pop("where", "conversion")
    return Fault(id_, "quantisation", wrong, where, stage, plant, model=model, **m)


FAULTS = (
    _fault("nibble order", "the high nibble comes first", _nibbles_turned, "int4"),
    _fault("zero point +1", "codes are one too large in the graph", _nbits(_next_code), "int4"),
    _fault("zero point -1", "the quantiser counts from one less", _zero_one_less, "int4"),
    _fault("cut off", "codes are cut off, not rounded", _cut_off, "int4"),
    _fault(
        "neighbouring group",
        "a group has the scale of the one before",
        _nbits(_neighbouring_group),
        "int4",
    ),
    _fault(
        "next row's scale",
        "the quantiser gives a row the scale of another",
        _scales_of_the_next_row,
        "int8",
    ),
    _fault(
        "g_idx ignored", "columns in act-order take scales in turn", _column_order_ignored, "gptq"
    ),
    _fault("sign bit", "unsigned codes are read as signed ones", _sign_bit_kept, "int8"),
    _fault(
        "row scale forgotten",
        "what rows were divided by is not multiplied again",
        _row_scale_forgotten,
        "int8",
        "structure",
        tensor=f"{_FIRST}.self_attn.qkv",
    ),
    _fault(
        "int8 saturation",
        "the kernel of the tower adds two products in 16 bits",
        saturate,
        "int8 saturating",
        "tile_features",
        where="runtime",
        tensor="vision_tower.encoder.layers.0.self_attn",
    ),
)
