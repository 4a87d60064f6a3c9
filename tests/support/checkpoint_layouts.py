"""Checkpoints under other names of their tensors, written from one in the hub's layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

ORIGINAL = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower.vision_tower."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("image_newline", "model.image_newline"),
)


def renamed(folder: Path, target: Path, pairs: tuple[tuple[str, str], ...]) -> Path:
    """Copy a checkpoint; the first pair whose name begins a tensor's renames it."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")

    def rename(name: str) -> str:
        for old, new in pairs:
            if name.startswith(old):
                return new + name[len(old) :]
        raise AssertionError(name)

    save_file(
        {rename(name): array for name, array in tensors.items()}, target / "model.safetensors"
    )
    return target


def as_original(folder: Path, target: Path) -> Path:
    """Copy a checkpoint as the original training code would have saved it."""
    renamed(folder, target, ORIGINAL)
    config = json.loads((target / "config.json").read_text())
    changes = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "a/tower",
        "vision_config": config["vision_config"],
    }
    (target / "config.json").write_text(json.dumps({**config["text_config"], **changes}))
    return target
