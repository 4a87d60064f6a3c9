"""Faults of GPTQ that leave a layer no worse than rounding to nearest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llava_edge.convert.checkpoint.formats.rounding import QuantizedWeight
from llava_edge.convert.quantization.gptq import solver as gptq
from llava_edge.convert.quantization.gptq.hessian import Hessian, HessianAccumulator
from tests.faults.fault import Fault
from tests.faults.seeded.model.faults_quantizer import Change, scaled, spoiled

_Patch = pytest.MonkeyPatch


def off_by_one(share: float) -> Change:
    """So many of the codes are a step off, either way."""

    def change(weight: QuantizedWeight, generator: np.random.Generator) -> QuantizedWeight:
        codes = weight.qweight.astype(np.int16)
        hit = generator.random(codes.shape) < share
        codes[hit] += generator.choice([-1, 1], int(hit.sum())).astype(np.int16)
        return replace(weight, qweight=codes.clip(0, 2**weight.bits - 1).astype(np.uint8))

    return change


def _hessian(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        real = HessianAccumulator.finish

        def finish(self: HessianAccumulator) -> Hessian:
            found = real(self)
            return replace(found, blocks=tuple(change(block) for block in found.blocks))

        patch.setattr(HessianAccumulator, "finish", finish)

    return plant


def _identity(block: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(block), dtype=block.dtype)


def _diagonal(block: torch.Tensor) -> torch.Tensor:
    return torch.diag(block.diagonal())


def _not_passed_on(patch: _Patch) -> None:
    """Errors of columns that are done reach none of the columns to come."""
    real = gptq.factor_hessian

    def factor(*arguments: Any) -> Any:
        found = real(*arguments)
        return replace(found, lower=torch.diag(found.lower.diagonal()))

    patch.setattr(gptq, "factor_hessian", factor)


def _label(patch: _Patch) -> None:
    """Everything is rounded to nearest, and recorded as solved."""
    real = gptq._solve

    def solve(weight: torch.Tensor, hessian: Hessian, settings: Any) -> Any:
        solution = real(weight, hessian, settings)
        rounded = gptq.round_to_nearest(
            weight, bits=settings.bits, group_size=settings.group_size, name=settings.name
        )
        return replace(solution, qweight=rounded.qweight, scales=rounded.scales)

    patch.setattr(gptq, "_solve", solve)


WEIGHTS: Mapping[str, tuple[str, Change, str]] = {
    "a tenth off by one": ("a tenth of the codes is one step off", off_by_one(0.1), ""),
    "scales x 1.02": ("all scales are 2 % larger", scaled(1.02), ""),
    "scales x 0.98": ("all scales are 2 % smaller", scaled(0.98), ""),
}
"""What goes wrong with finished codes; as in ``faults_quantizer``."""
WEIGHTS_OF_INT8: Mapping[str, tuple[str, Change, str]] = {
    "scales x 1.005": ("all scales are 0.5 % larger", scaled(1.005), ""),
    "scales x 0.995": ("all scales are 0.5 % smaller", scaled(0.995), ""),
}
_SOLVER: Mapping[str, tuple[str, Callable[[Any], None]]] = {
    "identity": ("the Hessian is the identity", _hessian(_identity)),
    "diagonal": ("of the Hessian there is the diagonal alone", _hessian(_diagonal)),
    "not passed on": ("no column makes up for another", _not_passed_on),
    "rounded": ("rounding to nearest is recorded as solved", _label),
}


def _faults() -> Iterator[Fault]:
    for model in ("int4 gptq", "int8 gptq"):
        finished = {**WEIGHTS, **(WEIGHTS_OF_INT8 if model == "int8 gptq" else {})}
        named = {id_: (wrong, spoiled(change)) for id_, (wrong, change, _) in finished.items()}
        for id_, (wrong, plant) in {**named, **_SOLVER}.items():
            yield Fault(
                f"{id_}, {model}",
                "quantiser",
                wrong,
                "conversion",
                "quantized_layers",
                plant,
                model,
            )


FAULTS: tuple[Fault, ...] = tuple(_faults())
NAMED = ("identity, int4 gptq", "rounded, int8 gptq")
"""Those that a change of finished codes does not stand for."""
