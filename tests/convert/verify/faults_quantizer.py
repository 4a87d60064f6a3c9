"""Faults inside the quantiser while it converts: digests are made of what it wrote, and agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llava_edge.convert import gptq, layer_solver, quantization, rounding, vision_int8
from llava_edge.convert import hessian as hessian_module
from llava_edge.convert.hessian_factor import HessianFactor
from llava_edge.convert.quantized_source import RtnSource
from llava_edge.convert.rounding import QuantizedWeight

_Patch = pytest.MonkeyPatch
_Array = NDArray[Any]
_Change = Callable[[QuantizedWeight, np.random.Generator], QuantizedWeight]

_ONE = "mlp.up_proj"


def _spoiled(change: _Change, only: str = "") -> Callable[[_Patch], None]:
    """What the quantiser hands on is changed, in all layers or those whose name has ``only``."""

    def plant(patch: _Patch) -> None:
        generator = np.random.default_rng(7)
        solve, rounded = layer_solver.quantize_weight, RtnSource.linear

        def changed(weight: QuantizedWeight, name: str) -> QuantizedWeight:
            return change(weight, generator) if only in name else weight

        def solved(*arguments: Any, name: str, **options: Any) -> QuantizedWeight:
            return changed(solve(*arguments, name=name, **options), name)

        def linear(self: RtnSource, name: str) -> QuantizedWeight:
            return changed(rounded(self, name), name)

        patch.setattr(layer_solver, "quantize_weight", solved)
        patch.setattr(quantization.RtnSource, "linear", linear)

    return plant


def _coded(
    weight: QuantizedWeight, values: NDArray[np.float32], *, bits: int | None = None
) -> QuantizedWeight:
    """Other values by the scales that are there, in codes of so many bits."""
    scales = weight.scales.astype(np.float32).repeat(weight.columns_per_group, axis=1)
    half = 1 << ((bits or weight.bits) - 1)
    codes = np.clip(np.rint(values / scales), -half, half - 1) + weight.zero
    return replace(weight, qweight=codes.astype(np.uint8))


def _random_codes(share: float) -> _Change:
    def change(weight: QuantizedWeight, generator: np.random.Generator) -> QuantizedWeight:
        codes = weight.qweight.copy()
        hit = generator.random(codes.shape) < share
        codes[hit] = generator.integers(0, 2**weight.bits, int(hit.sum()))
        return replace(weight, qweight=codes)

    return change


def _rows_exchanged(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
    codes, scales = weight.qweight.copy(), weight.scales.copy()
    codes[[3, 8]], scales[[3, 8]] = codes[[8, 3]], scales[[8, 3]]
    return replace(weight, qweight=codes, scales=scales)


def _columns_exchanged(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
    codes = weight.qweight.copy()
    codes[:, [3, 8]] = codes[:, [8, 3]]
    return replace(weight, qweight=codes)


def _scaled(factor: float, rows: slice = slice(None)) -> _Change:
    def change(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
        scales = weight.scales.copy()
        scales[rows] = scales[rows] * np.float16(factor)
        return replace(weight, scales=scales)

    return change


def _noise(share: float, rows: slice = slice(None)) -> _Change:
    """Noise of a share of each row's size, rounded to codes again."""

    def change(weight: QuantizedWeight, generator: np.random.Generator) -> QuantizedWeight:
        values = weight.dequantize()
        sizes = np.sqrt((values**2).mean(axis=1, keepdims=True))
        noisy = values.copy()
        noisy[rows] += (share * sizes * generator.standard_normal(values.shape))[rows]
        return _coded(weight, noisy.astype(np.float32))

    return change


def _last_group_zero(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
    codes = weight.qweight.copy()
    codes[:, -min(weight.columns_per_group, 16) :] = weight.zero
    return replace(weight, qweight=codes)


def _last_rows_zero(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
    codes = weight.qweight.copy()
    codes[-2:] = weight.zero
    return replace(weight, qweight=codes)


def _negated(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
    codes = weight.qweight.copy()
    codes[5] = np.clip(2 * weight.zero - codes[5].astype(np.int16), 0, 2**weight.bits - 1)
    return replace(weight, qweight=codes)


def _low_bit_lost(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
    return replace(weight, qweight=weight.qweight & np.uint8(0xFE))


def _one_scale_a_row(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
    values, scales = weight.dequantize(), weight.scales.copy()
    scales[:] = scales.max(axis=1, keepdims=True)
    return _coded(replace(weight, scales=scales), values)


def _one_scale_a_tensor(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
    values, scales = weight.dequantize(), weight.scales.copy()
    scales[:] = scales.max()
    return _coded(replace(weight, scales=scales), values)


def _groups_shifted(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
    return replace(weight, scales=np.roll(weight.scales, 1, axis=1))


def _scales_of_the_next_row(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
    return replace(weight, scales=np.roll(weight.scales, 1, axis=0))


def _range(bits: int) -> Callable[[_Patch], None]:
    """Codes and scales of fewer bits in the field of the usual ones."""

    def plant(patch: _Patch) -> None:
        scales, codes = rounding.find_scales, rounding.nearest_codes
        for module in (rounding, gptq):
            patch.setattr(
                module, "find_scales", lambda v, w, _bits, **how: scales(v, w, bits, **how)
            )
            patch.setattr(module, "nearest_codes", lambda v, s, _bits: codes(v, s, bits))

    return plant


def _wide_steps(patch: _Patch) -> None:
    """Twice the step: half of the range is used."""
    find = rounding.find_scales
    for module in (rounding, gptq):
        patch.setattr(module, "find_scales", lambda *a, **how: 2 * find(*a, **how))


def _cut_off(patch: _Patch) -> None:
    def nearest(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
        half = 2 ** (bits - 1)
        return torch.div(values, scale).floor_().clamp_(-half, half - 1)

    for module in (rounding, gptq):
        patch.setattr(module, "nearest_codes", nearest)


def _zero_one_less(patch: _Patch) -> None:
    def unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
        return (codes + float(2 ** (bits - 1) - 1)).clamp(min=0).to(torch.uint8)

    for module in (rounding, gptq):
        patch.setattr(module, "unsigned", unsigned)


def _factor(change: Callable[[HessianFactor], HessianFactor]) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        real = gptq.factor_hessian
        patch.setattr(gptq, "factor_hessian", lambda *a: change(real(*a)))
        # Rows that rounding to nearest does better are not put back either.
        keep = gptq._keep_better
        patch.setattr(
            gptq, "_keep_better", lambda w, h, r, s, how: keep(w, h, r, s, _careless(how))
        )

    return plant


def _careless(settings: Any) -> Any:
    return replace(settings, never_worse=False)


def _compensation_turned(factor: HessianFactor) -> HessianFactor:
    diagonal = torch.diag(factor.lower.diagonal())
    return replace(factor, lower=2 * diagonal - factor.lower)


def _order_forgotten(factor: HessianFactor) -> HessianFactor:
    return replace(factor, sequence=torch.arange(len(factor.sequence)))


def _compensation_doubled(factor: HessianFactor) -> HessianFactor:
    diagonal = torch.diag(factor.lower.diagonal())
    return replace(factor, lower=2 * factor.lower - diagonal)


def _inputs_shifted(patch: _Patch) -> None:
    """The Hessian is of inputs that stand one column further on."""
    real = hessian_module.HessianAccumulator.add

    def add(self: Any, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        real(self, rows.roll(1, dims=1), weights)

    patch.setattr(hessian_module.HessianAccumulator, "add", add)


def _head(change: _Change) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        generator = np.random.default_rng(7)
        real = quantization.quantize_head
        patch.setattr(
            quantization, "quantize_head", lambda *a, **k: change(real(*a, **k), generator)
        )

    return plant


def _tower(change: _Change) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        generator = np.random.default_rng(7)
        real = vision_int8.round_to_nearest
        patch.setattr(
            vision_int8, "round_to_nearest", lambda *a, **k: change(real(*a, **k), generator)
        )

    return plant


_EVERYWHERE: dict[str, tuple[str, Callable[[_Patch], None]]] = {
    "random codes": ("5 % of all codes are random", _spoiled(_random_codes(0.05))),
    "few random codes": ("1 % of all codes are random", _spoiled(_random_codes(0.01))),
    "rows exchanged": ("two rows of every layer change places", _spoiled(_rows_exchanged)),
    "columns exchanged": ("two columns of every layer change places", _spoiled(_columns_exchanged)),
    "scales x 1.5": ("all scales are half as large again", _spoiled(_scaled(1.5))),
    "scales x 1.2": ("all scales are a fifth larger", _spoiled(_scaled(1.2))),
    "noise": ("40 % noise on one layer", _spoiled(_noise(0.4), _ONE)),
    "noisy row": ("40 % noise on one row of one layer", _spoiled(_noise(0.4, slice(4, 5)), _ONE)),
    "row scale": (
        "one row of one layer is half as large again",
        _spoiled(_scaled(1.5, slice(4, 5)), _ONE),
    ),
    "last columns zero": ("the last columns of a layer are zero", _spoiled(_last_group_zero, _ONE)),
    "last rows zero": ("the last two rows of a layer are zero", _spoiled(_last_rows_zero, _ONE)),
    "row negated": ("one row of one layer has the other sign", _spoiled(_negated, _ONE)),
    "low bit lost": ("the lowest bit of all codes is zero", _spoiled(_low_bit_lost)),
    "one scale a row": ("groups of a row share the largest scale", _spoiled(_one_scale_a_row)),
    "one scale a tensor": ("all rows share the largest scale", _spoiled(_one_scale_a_tensor)),
    "groups shifted": ("a group has the scale of the one before", _spoiled(_groups_shifted)),
    "rows shifted": ("a row has the scales of the one before", _spoiled(_scales_of_the_next_row)),
    "two bits": ("codes of 2 bits everywhere", _range(2)),
    "three bits": ("codes of 3 bits everywhere", _range(3)),
    "wide steps": ("all steps are twice as wide as they need be", _wide_steps),
    "cut off": ("codes are cut off, not rounded", _cut_off),
    "zero point": ("codes count from one less", _zero_one_less),
}
_SOLVER: dict[str, tuple[str, Callable[[_Patch], None]]] = {
    "compensation turned": ("columns to come move the wrong way", _factor(_compensation_turned)),
    "compensation doubled": ("columns to come move twice as far", _factor(_compensation_doubled)),
    "order forgotten": ("columns are solved by the factor of others", _factor(_order_forgotten)),
    "inputs shifted": ("the Hessian is that of the next column", _inputs_shifted),
}
