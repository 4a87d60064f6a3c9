"""Faults in weights of realistic scale: a wide model, outlier channels, gains from 0.3 to 1.5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tests.faults.fault import Fault
from tests.faults.models.fault_models import Model
from tests.faults.seeded.faults import FAULTS

_SIZES = {
    "image_size": 336,
    "patch_size": 14,
    "vision_hidden_size": 256,
    "vision_intermediate_size": 1024,
    "vision_layers": 5,
    "vision_heads": 4,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "layers": 4,
    "heads": 16,
    "kv_heads": 4,
    "vocab_size": 8192,
    "max_positions": 8192,
}


def _model(
    backbone: str, precision: str = "fp16", board: str = "cpu-16gb", **changes: object
) -> Model:
    return Model(
        backbone,
        "odd",
        precision,
        board,
        context_tokens=4096,
        changes={**_SIZES, **changes},
        alters="realistic",
    )


REALISTIC_MODELS: Mapping[str, Model] = {
    "qwen2": _model("qwen2"),
    "qwen2 cuda": _model("qwen2", board="a100"),
    "mistral": _model("mistral"),
    "long": _model("llama", rope_factor=4.0),
    "int8": _model("mistral", "int8"),
    # One layer: sums cut in 16 bits are written out pair by pair, which takes its time.
    "int8 saturating": replace(_model("mistral", "int4", layers=1), vision="int8"),
    "int4": _model("mistral", "int4"),
}

_CHOSEN = (
    "bilinear",
    "thumbnail last",
    "no unpadding",
    "layer -1",
    "gelu for quick_gelu",
    "positions reversed",
    "tanh gelu",
    "rope base",
    "interleaved rotary",
    "norm epsilon",
    "window on",
    "bias dropped",
    "gain plus one",
    "residual dropped",
    "head rows shifted",
    "nibble order",
    "zero point -1",
    "neighbouring group",
    "next row's scale",
    "int8 saturation",
    "cache off by one",
    "position after an image",
)


def realistic_faults() -> tuple[Fault, ...]:
    """Some of the faults; those that need a size of the small models are not among them."""
    return tuple(fault for fault in FAULTS if fault.id in _CHOSEN)
