"""Changes of a checkpoint that was just written: what no preset of a random one has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.util.progress import no_progress
from tests.faults.models.tokenizer_checkpoints import TOKENIZERS
from tests.support.checkpoint_layouts import as_original

Tensors = dict[str, torch.Tensor]

_LOUD = 8.0

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


def _two_stops(folder: Path) -> Path:
    """A second control token ends an answer."""
    path = folder / "generation_config.json"
    document = json.loads(path.read_text("utf-8"))
    added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    taken = {document["eos_token_id"], document.get("bos_token_id")}
    other = next(t["id"] for t in added if t["special"] and t["id"] not in taken)
    document["eos_token_id"] = [document["eos_token_id"], other]
    path.write_text(json.dumps(document), "utf-8")
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


def _quiet_values(folder: Path) -> Path:
    """Values a quarter as loud, and an output projection that makes up for it: the same answers."""

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if "language_model" in name and ".v_proj." in name:
                tensor /= 4
            if "language_model" in name and name.endswith("o_proj.weight"):
                tensor *= 4
        return tensors

    return rewrite(folder, change)


def _original(folder: Path) -> Path:
    return as_original(folder, folder.with_name(f"{folder.name}-original"))


def _decided(folder: Path) -> Path:
    """A head with rows of unequal length: its best two are further apart, as in a trained model."""

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if "lm_head" in name:
                generator = torch.Generator().manual_seed(3)
                lengths = torch.randn(len(tensor), 1, generator=generator)
                tensor *= torch.exp(0.5 * lengths).to(tensor.dtype)
        return tensors

    return rewrite(folder, change)


def _realistic(folder: Path) -> Path:
    """Gains far from one, and channels of the residual stream that are loud everywhere."""

    def change(tensors: Tensors) -> Tensors:
        generator = torch.Generator().manual_seed(11)
        for name, tensor in tensors.items():
            if "norm" in name and name.endswith("weight") and "language_model" in name:
                spread = torch.rand(tensor.shape, generator=generator)
                tensor.copy_((0.3 * 5.0**spread).to(tensor.dtype))
        width = tensors["image_newline"].shape[0]
        loud = torch.randperm(width, generator=generator)[: width // 128]
        for name, tensor in tensors.items():
            if name.endswith(("input_layernorm.weight", "down_proj.weight")):
                tensor[loud] *= 6.0
        return tensors

    return rewrite(folder, change)


def _rigged(folder: Path, words: int) -> Path:
    """Answers are some words and the stop token, whatever was asked; 0 words for none at all.

    Channel 0 of the residual stream is the same everywhere: no layer writes to it, and the head
    reads the first choice from it. Channel 1 speaks at the word alone, where the head then stops.
    """
    stop = int(json.loads((folder / "generation_config.json").read_text("utf-8"))["eos_token_id"])
    word = 7

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")) and "language_model" in name:
                tensor[:2] = 0
            if name.endswith("linear_2.weight"):
                tensor[:2] = 0
            if name.endswith(("linear_2.bias", "image_newline")):
                tensor[0], tensor[1] = _LOUD, 0
            if name.endswith("embed_tokens.weight"):
                tensor[:, 0], tensor[:, 1] = _LOUD, 0
                tensor[word, 1] = _LOUD
            if name.endswith("model.norm.weight"):
                tensor[:2] = 1
            if name.endswith("lm_head.weight"):
                tensor[:, :2] = 0
                tensor[word if words else stop, 0] += 3
                tensor[stop, 1] += 6
        return tensors

    return rewrite(folder, change)


CHANGES: Mapping[str, Callable[[Path], Path]] = {
    "two stops": _two_stops,
    "system turn": _system_turn,
    "gptq": _gptq,
    "act-order": _act_order,
    "bf16": _bf16,
    "loud": _loud,
    "loud, decided": lambda folder: _decided(_loud(folder)),
    "quiet values": _quiet_values,
    "original": _original,
    "decided": _decided,
    "realistic": _realistic,
    "no word": partial(_rigged, words=0),
    "one word": partial(_rigged, words=1),
    "original bytes": lambda folder: _original(TOKENIZERS["byte fallback"](folder)),
    **{f"tokenizer {name}": change for name, change in TOKENIZERS.items()},
}
