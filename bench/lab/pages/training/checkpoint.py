"""Checkpoint: the trained model as a folder in Hugging Face layout.

``python -m llava_edge.bench.lab.pages.training.checkpoint --state DIR/state.safetensors --out
FOLDER`` writes the weights of a training run in float16, with configuration, tokenizer, template
and processor; the folder loads in transformers, and ``llava-edge convert`` takes it, like any
released model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from llava_edge.bench.lab.pages.atomic_folder import whole_folder
from llava_edge.bench.lab.pages.drawing.geometry import PATCH_SIZE, PROCESSING, TILE_SIZE
from llava_edge.bench.lab.pages.training.spec import Spec
from llava_edge.bench.lab.pages.training.tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    IMAGE,
    PAD,
    UNK,
    train_tokenizer,
)

SHIPPED = Path(__file__).parents[1] / "llava-next-pages"
"""The trained model, as it lies in the repository."""

_HUB_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.", ""),
)
"""Names in memory and in files of the hub, longest first."""


def write_checkpoint(folder: Path, spec: Spec, weights: Mapping[str, Tensor]) -> None:
    """Write the whole checkpoint; it appears whole or not at all.

    Args:
        folder: must not exist.
        spec: sizes.
        weights: by name in transformers' memory; written as float16.

    Raises:
        OutputExistsError: the folder exists.
    """
    tokenizer = train_tokenizer()
    with whole_folder(Path(folder)) as made:
        for name, content in _texts(spec, tokenizer).items():
            (made / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        (made / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
        tokenizer.save(str(made / "tokenizer.json"))
        half = {
            _hub_name(name): tensor.detach().to("cpu", torch.float16).contiguous()
            for name, tensor in sorted(weights.items())
        }
        save_file(half, made / "model.safetensors", metadata={"format": "pt"})
        # It writes for its owner alone; the other files are for everyone.
        (made / "model.safetensors").chmod(0o644)


def read_weights(state: Path) -> dict[str, Tensor]:
    """What ships of a training state, by name in transformers' memory."""
    prefix = "model.llava."
    with safe_open(state, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name[len(prefix) :]: file.get_tensor(name) for name in names}


def _hub_name(name: str) -> str:
    for inner, stored in _HUB_NAMES:
        if name.startswith(inner):
            return stored + name[len(inner) :]
    raise ValueError(f"no weight of a LLaVA-NeXT is called {name}")


def _texts(spec: Spec, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    config = spec.config(tokenizer)
    text = config["text_config"]
    processor = "LlavaNextProcessor"
    return {
        "config.json": config,
        "generation_config.json": {
            key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
        "preprocessor_config.json": {
            "image_processor_type": "LlavaNextImageProcessor",
            "processor_class": processor,
            "crop_size": {"height": TILE_SIZE, "width": TILE_SIZE},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_grid_pinpoints": config["image_grid_pinpoints"],
            "image_mean": list(PROCESSING.image_mean),
            "image_std": list(PROCESSING.image_std),
            "resample": 3,
            "rescale_factor": PROCESSING.rescale_factor,
            "size": {"shortest_edge": TILE_SIZE},
        },
        "processor_config.json": {
            "processor_class": processor,
            "image_token": IMAGE,
            "num_additional_image_tokens": 1,
            "patch_size": PATCH_SIZE,
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": processor,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "unk_token": UNK,
            "clean_up_tokenization_spaces": False,
            "model_max_length": spec.max_positions,
            "padding_side": "left",
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the checkpoint of a training state."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_edge.bench.lab.pages.training.checkpoint"
    )
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    write_checkpoint(given.out, Spec(), read_weights(given.state))
    return 0


if __name__ == "__main__":
    sys.exit(main())
