"""InputScales: outlier channels of the tower's activations, moved into the weights where it helps.

A linear layer gives the same numbers when its input channels are divided by ``s`` and its weight's
columns multiplied by it. One outlier channel then no longer takes the steps of all others. Factors
are powers of two, so that in float32 this is exact; behind a layer norm the norm's gain and bias
take the division, elsewhere one multiplication in front of the layer does.

Source of the idea: Xiao et al., SmoothQuant, arXiv 2211.10438. Here factors only grow from 1, and
for each layer the strength is chosen that gives the least output error on calibration rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llava_edge.convert.checkpoint.formats.rounding import SMALLEST_SCALE
from llava_edge.runtime.util.arrays import Array

_STRENGTHS = (0.0, 0.5, 0.75, 1.0)
"""Exponents of a channel's size over the median channel's."""
_LARGEST_EXPONENT = 15
FREE, AT_A_COST = 0.9, 0.7
"""Error that may be left, of the error without scales, for scales to be taken: where a norm takes
the division, and where a multiplication is added."""
_STEPS = 127.0
_LEAST_SIZE = _STEPS * SMALLEST_SCALE


@dataclass(frozen=True)
class ScaledLayer:
    """How well 8 bits do in one linear layer.

    Attributes:
        scale: float32 [K], what the input is divided by; None where nothing is gained.
        error: ||Y - Ŷ|| / ||Y|| over the rows, with the scale.
        plain_error: the same without.
    """

    scale: Array | None
    error: float
    plain_error: float


def scale_inputs(rows: Array, largest: Array, weight: Array, worthwhile: float) -> ScaledLayer:
    """Choose the scale of one layer's input.

    Args:
        rows: float32 [R, K], some rows that the layer reads.
        largest: float32 [K], each channel's largest magnitude over all rows.
        weight: float32 [N, K].
        worthwhile: ``FREE`` or ``AT_A_COST``.
    """
    x, w = torch.from_numpy(rows), torch.from_numpy(weight)
    exact = x @ w.T
    norm = float(exact.norm()) or 1.0
    found: list[tuple[float, Array]] = []
    for strength in _STRENGTHS:
        scale = _scale(largest, strength)
        if found and np.array_equal(scale, found[-1][1]):
            continue
        factor = torch.from_numpy(scale)
        rounded = _rows(x / factor) @ _columns(w * factor).T
        found.append((float((rounded - exact).norm()) / norm, scale))
    plain = found[0][0]
    error, scale = min(found, key=lambda each: each[0])
    if (scale == 1).all() or error > worthwhile * plain:
        return ScaledLayer(None, plain, plain)
    return ScaledLayer(scale, error, plain)


def _scale(largest: Array, strength: float) -> Array:
    """Powers of two, at least 1, near (size of a channel over the median) ^ strength."""
    median = float(np.median(largest[largest > 0])) if (largest > 0).any() else 1.0
    size = np.maximum(largest / median, 1.0)
    exponents = np.clip(np.round(strength * np.log2(size)), 0, _LARGEST_EXPONENT)
    return np.exp2(exponents).astype(np.float32)


def _rows(values: torch.Tensor) -> torch.Tensor:
    """Rounded as the kernel rounds activations: 127 steps up to each row's largest magnitude."""
    return _rounded(values, torch.finfo(torch.float32).tiny)


def _columns(weight: torch.Tensor) -> torch.Tensor:
    """Rounded as weights are stored: one scale an output, without the search for the best one."""
    return _rounded(weight, _LEAST_SIZE)


def _rounded(values: torch.Tensor, least: float) -> torch.Tensor:
    """Steps of 1/127 of each row's largest magnitude, which counts as no less than ``least``."""
    size = values.abs().amax(-1, keepdim=True).clamp_min(least)
    return torch.round(values / size * _STEPS) / _STEPS * size
