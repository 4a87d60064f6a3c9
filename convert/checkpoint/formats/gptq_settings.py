"""GptqSettings: what a configuration says about GPTQ weights, or why they are not read.

Sources: ``quantization_config`` of transformers 5.23 (``GPTQConfig``), ``quantize_config.json`` of
AutoGPTQ and GPTQModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_edge.convert.checkpoint.formats.quantized_formats import describe_method
from llava_edge.convert.checkpoint.formats.rounding import GROUP_SIZES
from llava_edge.profiles.errors import CheckpointError, printable


@dataclass(frozen=True)
class GptqSettings:
    """Bits and group size (-1 for one scale a channel) of all linear layers of the decoder."""

    bits: int
    group_size: int


def read_gptq_settings(
    config: Mapping[str, Any],
    quantize_config: Mapping[str, Any] | None = None,
    *,
    plain: bool = False,
) -> GptqSettings | None:
    """Read the settings of a quantised checkpoint; None where nothing is quantised.

    Args:
        config: ``config.json``.
        quantize_config: ``quantize_config.json``, which older tools write instead.
        plain: whether the names and types of the tensors are those of weights as they were trained.

    Raises:
        CheckpointError: the weights cannot be kept faithfully; all reasons are listed.
    """
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    found = config.get("quantization_config") or nested
    if not found and quantize_config:
        # Older files do not name the method: this file is GPTQ's own.
        found = {"quant_method": "gptq", **quantize_config}
    if not found:
        return None
    method = _method(found)
    if not isinstance(found, Mapping) or method != "gptq":
        stale = (
            " The tensors themselves are not quantised: where the model was merged after QLoRA "
            "training, the entry is left over and can be removed from config.json."
            if plain
            else ""
        )
        raise CheckpointError(
            "config.json says that the weights are already quantised "
            f"({printable(str(method))}). Read are GPTQ checkpoints only; quantising twice loses "
            "accuracy that no check could give back. "
            f"Next step, {describe_method(method)}.{stale}"
        )
    faults = _faults(found)
    if faults:
        listed = "\n  - ".join(faults)
        raise CheckpointError(
            f"the GPTQ checkpoint cannot be kept faithfully:\n  - {listed}\n"
            "Next step: give the float16 or bfloat16 checkpoint; it can be quantised here."
        )
    return GptqSettings(found["bits"], found.get("group_size", 128))


def _method(found: object) -> object:
    if not isinstance(found, Mapping):
        return found
    method = found.get("quant_method")
    # Older files of bitsandbytes do not name it either.
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        return "bitsandbytes"
    return method


def _faults(found: Mapping[str, Any]) -> list[str]:
    faults: list[str] = []
    bits, group = found.get("bits"), found.get("group_size", 128)
    if type(bits) is not int or bits not in (4, 8):
        faults.append(f"bits is {bits!r:.40}; only 4 and 8 have kernels")
    if type(group) is not int or group not in GROUP_SIZES:
        faults.append(
            f"group_size is {group!r:.40}; read are {', '.join(map(str, GROUP_SIZES))}, which the "
            "kernels have as blocks"
        )
    if found.get("sym", True) is not True:
        faults.append("sym is false; only symmetric weights are kept, whose zero is fixed")
    layout = found.get("checkpoint_format") or found.get("format") or "gptq"
    if layout != "gptq":
        faults.append(f"its format is {layout!r:.40}; the v1 layout ('gptq') is read")
    if found.get("lm_head"):
        faults.append("lm_head is true: the head is quantised as well; read is a head in fp16")
    if found.get("dynamic"):
        faults.append("dynamic gives some layers settings of their own; read is one for all")
    # desc_act alone says nothing: whether columns moved is seen in g_idx, layer by layer.
    return faults
