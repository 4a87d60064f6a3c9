"""Faults of the int8 KV cache: its graph, its scales, what lies in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llava_edge.convert.quantization import kv_cache_scales as cache_scales
from llava_edge.runtime.artifact.graph_signature import scale_names
from llava_edge.runtime.generation.decoder.kv_cache import KVCache
from llava_edge.runtime.util.arrays import Array
from tests.faults.fault import Fault
from tests.faults.models.tamper import Tampered

_Patch = pytest.MonkeyPatch
_PART = "decoder_int8_cache"


def _largest(change: Callable[[Array], Array]) -> Callable[[_Patch], None]:
    """Calibration finds other maxima, [2 (key, value), layers, kv_heads, head_dim]."""

    def plant(patch: _Patch) -> None:
        real = cache_scales._largest
        patch.setattr(cache_scales, "_largest", lambda *given: change(real(*given)))

    return plant


def _halved(largest: Array) -> Array:
    largest[:, 1] /= 2
    return largest


def _wide(largest: Array) -> Array:
    """One outlier for all channels, as one scale a tensor would have it, and room for more."""
    return np.full_like(largest, 16 * largest.max())


def _stored(change: Callable[[Array], Array]) -> Callable[[_Patch], None]:
    """What becomes of the scales once calibration has chosen them, float32 [2, ..., head_dim]."""

    def plant(patch: _Patch) -> None:
        real = cache_scales._steps
        patch.setattr(cache_scales, "_steps", lambda largest: change(real(largest)))

    return plant


def _head_wide(steps: Array) -> Array:
    steps[1, 0, 1] *= 6
    return steps


def _channel(part: int, factor: float) -> Callable[[Array], Array]:
    def change(steps: Array) -> Array:
        steps[part, -1, 0, 3] *= factor
        return steps

    return change


def _rewired(copy: Tampered) -> None:
    node = "language_model.layers.1.self_attn.attention"
    copy.swap_inputs(_PART, (node, 12), (node, 13))


def _changed_scale(copy: Tampered) -> None:
    copy.change_tensor(_PART, scale_names(1)[0], lambda scale: scale / 2)


def _channels_first(copy: Tampered) -> None:
    """Bytes of ``[1, head_dim, 1, kv_heads]`` for ``[1, kv_heads, 1, head_dim]``."""
    copy.change_tensor(_PART, scale_names(1)[0], lambda scale: scale.transpose(0, 3, 2, 1))


def _heads_reversed(copy: Tampered) -> None:
    copy.change_tensor(_PART, scale_names(1)[1], lambda scale: scale[:, ::-1])


def _per_tensor(copy: Tampered) -> None:
    node = "language_model.layers.1.self_attn.attention"
    copy.set_attributes(_PART, node, k_quant_type="PER_TENSOR")


def _another_window(copy: Tampered) -> None:
    node = "language_model.layers.0.self_attn.attention"
    copy.set_attributes(_PART, node, local_window_size=16)


def _another_weight(copy: Tampered) -> None:
    """The norm of one layer reads the gain of another, in the second graph only."""
    name = "language_model.layers.{}.post_attention_layernorm"
    copy.swap_inputs(_PART, (name.format(0), 2), (name.format(1), 2))


def _codes_off_by_one_row(patch: _Patch) -> None:
    real = KVCache.part

    def part(self: KVCache, layer: int, name: str) -> Array:
        found = real(self, layer, name)
        return np.roll(found, 1, axis=1) if found.dtype == np.int8 else found

    patch.setattr(KVCache, "part", part)


def _fault(
    id_: str, wrong: str, plant: Callable[[Any], None], stage: str = "int8_cache", **more: Any
) -> Fault:
    where, model = more.pop("where", "conversion"), more.pop("model", "int8 cache")
    return Fault(id_, "int8 cache", wrong, where, stage, plant, model=model, **more)


FAULTS = (
    _fault(
        "k and v scales swapped",
        "calibration gives keys the scales of values, and values those of keys",
        _largest(lambda largest: largest[::-1]),
    ),
    _fault(
        "halved scales", "the scales of layer 1 are half of what they must be", _largest(_halved)
    ),
    _fault("scales too wide", "all scales are 16 times the largest", _largest(_wide)),
    _fault(
        "one channel of keys too wide",
        "the scale of one channel of one layer's keys is six times as wide",
        _stored(_channel(0, 6)),
    ),
    _fault(
        "one channel of values too wide",
        "the scale of one channel of one layer's values is six times as wide",
        _stored(_channel(1, 6)),
    ),
    _fault(
        "one channel too narrow",
        "the scale of one channel of one layer's keys is a quarter of what it must be",
        _stored(_channel(0, 0.25)),
    ),
    _fault(
        "one head too wide", "the scales of one head are six times as wide", _stored(_head_wide)
    ),
    _fault("twice as wide", "all scales are twice as wide", _stored(lambda steps: 2 * steps)),
    _fault(
        "cuda: twice as wide",
        "all scales are twice as wide",
        _stored(lambda steps: 2 * steps),
        model="int8 cache cuda",
    ),
    _fault(
        "scale inputs swapped",
        "attention of layer 1 takes the scales of values for keys",
        _rewired,
        "structure",
        where="artifact",
    ),
    _fault(
        "changed scale",
        "the scales of one layer's keys are not those that were calibrated",
        _changed_scale,
        "structure",
        where="artifact",
    ),
    _fault(
        "another window",
        "the graph with an int8 cache has a window where the float one has none",
        _another_window,
        "structure",
        where="artifact",
    ),
    _fault(
        "another weight",
        "the graph with an int8 cache reads other gains",
        _another_weight,
        "structure",
        where="artifact",
    ),
    _fault(
        "codes in another row",
        "keys and values lie one position later",
        _codes_off_by_one_row,
        where="runtime",
    ),
    _fault(
        "cuda: k and v scales swapped",
        "calibration gives keys the scales of values, and values those of keys",
        _largest(lambda largest: largest[::-1]),
        model="int8 cache cuda",
    ),
    _fault(
        "cuda: halved scales",
        "the scales of layer 1 are half of what they must be",
        _largest(_halved),
        model="int8 cache cuda",
    ),
    _fault(
        "cuda: scales too wide",
        "all scales are 16 times the largest",
        _largest(_wide),
        model="int8 cache cuda",
    ),
    _fault(
        "cuda: channels first",
        "the scales of one layer's keys lie channel by channel, not head by head",
        _channels_first,
        "structure",
        where="artifact",
        model="int8 cache cuda",
    ),
    _fault(
        "cuda: heads reversed",
        "the scales of one layer's values are those of another head",
        _heads_reversed,
        "structure",
        where="artifact",
        model="int8 cache cuda",
    ),
    _fault(
        "cuda: one scale a tensor",
        "attention of layer 1 takes the scales of keys for one of the whole tensor",
        _per_tensor,
        "structure",
        where="artifact",
        model="int8 cache cuda",
    ),
    _fault(
        "cuda: codes in another row",
        "keys and values lie one position later",
        _codes_off_by_one_row,
        where="runtime",
        model="int8 cache cuda",
    ),
)
