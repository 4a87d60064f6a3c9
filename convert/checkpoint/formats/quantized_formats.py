"""Formats of quantised weights that are not read, told by the names that they give their tensors.

Sources: the state dicts that bitsandbytes 0.45, compressed-tensors 0.9, AutoAWQ, GPTQModel, quanto,
HQQ, EETQ, AQLM, MLX and the fp8 quantisers of transformers 5.23 write.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_ORIGINAL = "give the float16 or bfloat16 checkpoint that it was made from"
_DEQUANTIZE = (
    "give the float16 or bfloat16 checkpoint that it was made from; where there is none, load this "
    "one with transformers, call model.dequantize() and save_pretrained"
)


@dataclass(frozen=True)
class QuantizedFormat:
    """One format.

    Attributes:
        label: what it is called in messages.
        methods: ``quant_method`` of its ``quantization_config``.
        endings: what names of its tensors end with, those that no other format has first.
        step: what a user can do.
    """

    label: str
    methods: tuple[str, ...]
    endings: tuple[str, ...]
    step: str = _ORIGINAL


FORMATS = (
    QuantizedFormat("bitsandbytes 8-bit", (), (".SCB", ".weight_format"), _DEQUANTIZE),
    QuantizedFormat(
        "bitsandbytes 4-bit",
        ("bitsandbytes",),
        (
            ".absmax",
            ".quant_map",
            ".nested_absmax",
            ".nested_quant_map",
            ".quant_state.bitsandbytes__nf4",
            ".quant_state.bitsandbytes__fp4",
        ),
        _DEQUANTIZE,
    ),
    QuantizedFormat(
        "fp8 in blocks", ("fp8", "fbgemm_fp8"), (".weight_scale_inv", ".activation_scale")
    ),
    QuantizedFormat(
        "compressed-tensors",
        ("compressed-tensors",),
        (
            ".weight_packed",
            ".weight_shape",
            ".weight_zero_point",
            ".weight_global_scale",
            ".weight_scale",
            ".input_scale",
        ),
    ),
    QuantizedFormat("quanto", ("quanto",), ("._data", "._scale", "._shift"), _DEQUANTIZE),
    QuantizedFormat("HQQ", ("hqq",), (".W_q", ".W_q.packed"), _DEQUANTIZE),
    QuantizedFormat("EETQ", ("eetq",), (".weight_scales",)),
    QuantizedFormat("AQLM", ("aqlm", "vptq"), (".codebooks", ".codes", ".centroids")),
    QuantizedFormat(
        "GPTQ without its settings",
        ("gptq",),
        (".g_idx",),
        "copy quantize_config.json from its repository, or " + _ORIGINAL,
    ),
    QuantizedFormat("AWQ", ("awq",), (".qweight", ".qzeros")),
    QuantizedFormat("MLX", (), (".scales", ".biases")),
    QuantizedFormat("MXFP4", ("mxfp4",), ("_blocks", "_scales")),
)

_EIGHT_BITS = "fp8 or 8-bit weights"


def find_format(names: Iterable[str], dtypes: Iterable[str]) -> str | None:
    """Name a format and its next step by what a plain checkpoint does not have.

    Args:
        names: tensor names that the model does not have.
        dtypes: safetensors types of the tensors that it has.
    """
    listed = list(names)
    for form in FORMATS:
        if any(name.endswith(form.endings) for name in listed):
            return f"{form.label}; {form.step}"
    if any(dtype.startswith("F8_") or dtype in {"I8", "U8"} for dtype in dtypes):
        return f"{_EIGHT_BITS}; {_ORIGINAL}"
    return None


def describe_method(method: object) -> str:
    """Next step for a ``quant_method`` of ``config.json``."""
    named = [form for form in FORMATS if method in form.methods]
    return named[0].step if named else _ORIGINAL
