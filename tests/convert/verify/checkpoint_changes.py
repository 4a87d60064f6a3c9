"""Changes of a checkpoint that was just written: what no preset of a random one has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.quantization import QuantizationRequest
from llava_edge.convert.request import ConvertRequest
from llava_edge.profiles.planner import PlanRequest
from llava_edge.runtime.progress import no_progress

Tensors = dict[str, torch.Tensor]

_DEFAULT = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ 'A chat between a curious person and an assistant. ' }}{%- endif -%}"
)


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Change the tensors of a checkpoint in one file."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, path, {"format": "pt"})
    return folder


def _system_turn(folder: Path) -> Path:
    """A template with a system turn of its own."""
    path = folder / "chat_template.jinja"
    path.write_text(_DEFAULT + path.read_text("utf-8"), "utf-8")
    return folder


def _gptq(folder: Path) -> Path:
    """The same model as a GPTQ checkpoint."""
    request = ConvertRequest(
        checkpoint=str(folder),
        out=folder.parent / "emitted",
        wishes=PlanRequest(precision="int4", context_tokens=1024),
        quantization=QuantizationRequest(quantizer="rtn"),
        emit_hf=True,
        verify="none",
    )
    return convert_checkpoint(request, no_progress, lambda _: None).folder / "gptq"


def _act_order(folder: Path) -> Path:
    """A GPTQ checkpoint whose columns belong to groups in an order of their own."""

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if name.endswith(".g_idx"):
                order = np.random.default_rng(len(name)).permutation(len(tensor))
                tensors[name] = tensor[torch.from_numpy(order)]
        return tensors

    return rewrite(_gptq(folder), change)


def _bf16(folder: Path) -> Path:
    """Weights as bfloat16."""

    def change(tensors: Tensors) -> Tensors:
        return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}

    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    config["torch_dtype"] = "bfloat16"
    path.write_text(json.dumps(config), "utf-8")
    return rewrite(folder, change)


def _loud(folder: Path) -> Path:
    """Neighbouring inputs that are loud together, with weights that are large together."""

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight") and "language_model" in name:
                tensor[2:4] = 6.0
            if name.endswith(("q_proj.weight", "gate_proj.weight")) and "language" in name:
                tensor[:, 2] = tensor[:, 3] = tensor.abs().amax(1) * torch.sign(tensor[:, 2])
        return tensors

    return rewrite(folder, change)


CHANGES: Mapping[str, Callable[[Path], Path]] = {
    "system turn": _system_turn,
    "gptq": _gptq,
    "act-order": _act_order,
    "bf16": _bf16,
    "loud": _loud,
}
