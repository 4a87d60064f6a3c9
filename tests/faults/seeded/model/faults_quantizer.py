"""Faults inside the quantiser while it converts: digests are made of what it wrote, and agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llava_edge.convert.checkpoint.formats import rounding
from llava_edge.convert.checkpoint.formats.rounding import QuantizedWeight
from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.quantized.source import RtnSource
from llava_edge.convert.quantization import plan as quantization
from llava_edge.convert.quantization.gptq import hessian as hessian_module
from llava_edge.convert.quantization.gptq import layer as gptq_layer
from llava_edge.convert.quantization.gptq import solver as gptq
from llava_edge.convert.quantization.gptq.hessian_factor import HessianFactor
from llava_edge.convert.quantization.vision import int8 as vision_int8
from llava_edge.runtime.util.arrays import Array
from tests.faults.fault import Fault

_Patch = pytest.MonkeyPatch
Change = Callable[[QuantizedWeight, np.random.Generator], QuantizedWeight]

_ONE = "mlp.up_proj"


def spoiled(change: Change, only: str = "") -> Callable[[_Patch], None]:
    """What the quantiser hands on is changed, in all layers or those whose name has ``only``."""

    def plant(patch: _Patch) -> None:
        generator = np.random.default_rng(7)
        solve, rounded = gptq_layer.quantize_weight, RtnSource.linear

        def changed(weight: QuantizedWeight, name: str) -> QuantizedWeight:
            return change(weight, generator) if only in name else weight

        def solved(*arguments: Any, name: str, **options: Any) -> QuantizedWeight:
            return changed(solve(*arguments, name=name, **options), name)

        def linear(self: RtnSource, name: str) -> QuantizedWeight:
            return changed(rounded(self, name), name)

        patch.setattr(gptq_layer, "quantize_weight", solved)
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


def _random_codes(share: float) -> Change:
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


def scaled(factor: float, rows: slice = slice(None)) -> Change:
    def change(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
        scales = weight.scales.copy()
        scales[rows] = scales[rows] * np.float16(factor)
        return replace(weight, scales=scales)

    return change


def _noise(share: float, rows: slice = slice(None)) -> Change:
    """Noise of a share of each row's size, rounded to codes again."""

    def change(weight: QuantizedWeight, generator: np.random.Generator) -> QuantizedWeight:
        values = weight.dequantize()
        sizes = np.sqrt((values**2).mean(axis=1, keepdims=True))
        noisy = values.copy()
        noisy[rows] += (share * sizes * generator.standard_normal(values.shape))[rows]
        return _coded(weight, noisy.astype(np.float32))

    return change


def _last_columns_zero(weight: QuantizedWeight, _: np.random.Generator) -> QuantizedWeight:
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


def _inputs_shifted(patch: _Patch) -> None:
    """The Hessian is of inputs that stand one column further on."""
    real = hessian_module.HessianAccumulator.add

    def add(self: Any, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        real(self, rows.roll(1, dims=1), weights)

    patch.setattr(hessian_module.HessianAccumulator, "add", add)


def _head(change: Change) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        generator = np.random.default_rng(7)
        real = quantization.quantize_head
        patch.setattr(
            quantization, "quantize_head", lambda *a, **k: change(real(*a, **k), generator)
        )

    return plant


def _tower(change: Change) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        generator = np.random.default_rng(7)
        real = vision_int8.round_to_nearest
        patch.setattr(
            vision_int8, "round_to_nearest", lambda *a, **k: change(real(*a, **k), generator)
        )

    return plant


def _read(name: str, change: Callable[[Array], Array]) -> Callable[[_Patch], None]:
    """The converter reads another tensor than the checkpoint has."""

    def plant(patch: _Patch) -> None:
        real = Checkpoint.read

        def read(self: Checkpoint, wanted: str, rows: slice | None = None) -> Array:
            if wanted != name:
                return real(self, wanted, rows)
            return np.ascontiguousarray(change(real(self, wanted).copy())[rows or slice(None)])

        patch.setattr(Checkpoint, "read", read)

    return plant


def _swapped_rows(values: Array) -> Array:
    values[[3, 8]] = values[[8, 3]]
    return values


def _short_floats(values: Array) -> Array:
    """As bfloat16 on the way."""
    return torch.from_numpy(values).to(torch.bfloat16).to(torch.float16).numpy()


def _small_to_zero(values: Array) -> Array:
    values[np.abs(values) < 1e-3] = 0
    return values


def _one_row_noisy(values: Array) -> Array:
    noise = np.random.default_rng(7).standard_normal(values.shape[1]) * values[4].std() * 0.4
    values[4] = values[4] + noise.astype(values.dtype)
    return values


WEIGHTS: Mapping[str, tuple[str, Change, str]] = {
    "random codes": ("5 % of all codes are random", _random_codes(0.05), ""),
    "few random codes": ("1 % of all codes are random", _random_codes(0.01), ""),
    "rows exchanged": ("two rows of every layer change places", _rows_exchanged, ""),
    "columns exchanged": ("two columns of every layer change places", _columns_exchanged, ""),
    "scales x 1.5": ("all scales are half as large again", scaled(1.5), ""),
    "scales x 1.2": ("all scales are a fifth larger", scaled(1.2), ""),
    "noise": ("40 % noise on one layer", _noise(0.4), _ONE),
    "little noise": ("15 % noise on one layer", _noise(0.15), _ONE),
    "noisy row": ("40 % noise on one row of one layer", _noise(0.4, slice(4, 5)), _ONE),
    "row scale": ("one row of one layer is half as large again", scaled(1.5, slice(4, 5)), _ONE),
    "last columns zero": ("the last columns of a layer are zero", _last_columns_zero, _ONE),
    "last rows zero": ("the last two rows of a layer are zero", _last_rows_zero, _ONE),
    "row negated": ("one row of one layer has the other sign", _negated, _ONE),
    "low bit lost": ("the lowest bit of all codes is zero", _low_bit_lost, ""),
    "one scale a row": ("groups of a row share the largest scale", _one_scale_a_row, ""),
    "one scale a tensor": ("all rows share the largest scale", _one_scale_a_tensor, ""),
    "groups shifted": ("a group has the scale of the one before", _groups_shifted, ""),
    "rows shifted": ("a row has the scales of the one before", _scales_of_the_next_row, ""),
}
"""What goes wrong with finished codes: the sentence, the change, and in which layers alone."""

_ARITHMETIC: dict[str, tuple[str, Callable[[_Patch], None]]] = {
    "two bits": ("codes of 2 bits everywhere", _range(2)),
    "three bits": ("codes of 3 bits everywhere", _range(3)),
    "wide steps": ("all steps are twice as wide as they need be", _wide_steps),
    "solver cuts off": ("codes are cut off, not rounded", _cut_off),
    "solver's zero point": ("codes count from one less", _zero_one_less),
}
_SOLVER: dict[str, tuple[str, Callable[[_Patch], None]]] = {
    "compensation turned": ("columns to come move the wrong way", _factor(_compensation_turned)),
    "inputs shifted": ("the Hessian is that of the next column", _inputs_shifted),
}
_ROUNDED = {
    "head rows exchanged": ("two rows of the head change places", _head(_rows_exchanged)),
    "head low bit": ("the lowest bit of the head's codes is zero", _head(_low_bit_lost)),
    "head scale": ("one row of the head is a fifth larger", _head(scaled(1.2, slice(9, 10)))),
    # More of them, and calibration leaves the whole tower in float.
    "tower codes": ("one in 2,000 of the tower's codes is random", _tower(_random_codes(5e-4))),
    "tower scale": (
        "one channel of the tower has another scale",
        _tower(scaled(1.1, slice(2, 3))),
    ),
}
_UP = f"language_model.layers.0.{_ONE}.weight"
_FLOATS = {
    "float rows exchanged": ("two rows of a weight change places", _read(_UP, _swapped_rows)),
    "short floats": ("a weight passes through bfloat16", _read(_UP, _short_floats)),
    "small to zero": ("small weights become zero", _read(_UP, _small_to_zero)),
    "float noise": ("one row of a weight is noisy", _read(_UP, _one_row_noisy)),
    "other sign": ("a weight has the other sign", _read(_UP, lambda values: -values)),
}
_NO_GROUPS = ("one scale a row", "groups shifted")
"""No fault where a row has one scale."""
_HEAD_TOO = "the head is rounded to nearest, and is wrong as well"
_EARLIER = {
    **dict.fromkeys(_ARITHMETIC, _HEAD_TOO),
    "last columns zero": "columns that vanished are named with the codes",
}


def _fault(id_: str, wrong: str, plant: Callable[[Any], None], model: str, stage: str) -> Fault:
    earlier = _EARLIER.get(id_, "") if stage == "quantized_layers" else ""
    return Fault(
        f"{id_}, {model}", "quantiser", wrong, "conversion", stage, plant, model, earlier=earlier
    )


def _faults() -> Iterator[Fault]:
    finished = {
        id_: (wrong, spoiled(change, only)) for id_, (wrong, change, only) in WEIGHTS.items()
    }
    for model in ("int4 gptq", "int8 gptq", "int4", "int8"):
        solved = model.endswith("gptq")
        stage = "quantized_layers" if solved else "weights"
        named = {**finished, **_ARITHMETIC, **(_SOLVER if solved else _ROUNDED)}
        for id_, (wrong, plant) in named.items():
            if id_ in _NO_GROUPS and model.startswith("int8"):
                continue
            if id_.startswith("tower") and model == "int4":
                continue
            yield _fault(id_, wrong, plant, model, stage)
    for id_, (wrong, plant) in _FLOATS.items():
        fault = _fault(id_, wrong, plant, "qwen2", "weights")
        yield replace(fault, tensor="language_model.layers.0")


FAULTS: tuple[Fault, ...] = tuple(_faults())
"""All are planted while a checkpoint is converted; ``make faults`` prints what finds them."""

NAMED = tuple(
    f"{id_}, int4 gptq"
    for id_ in ("random codes", "rows exchanged", "scales x 1.5", "noise", "two bits")
)
"""Found by nothing but stored logits while bounds were constants."""
