"""What each release of transformers writes: small checkpoints, and the names it gave their tensors.

``tests/interop/check_layouts.py`` finds the names, ``tests/data/saved_layouts.json`` keeps them::

    canonical   all canonical names, in one order
    names       lists of stored names in that order, null where the tensor is not stored
    configs     every config.json that was written
    releases    release -> form -> [index of the config, index of the names, how it loads]

A form is the kind of model, how it is tied, and how it was saved: ``llava_next-tied-sharded``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from llava_edge.convert.checkpoint.expected_tensors import expected_tensors
from llava_edge.convert.checkpoint.layouts import hub_name
from llava_edge.convert.testing.random_spec import RandomSpec
from llava_edge.profiles.models.model_dims import ModelDims

DATA = Path(__file__).parents[1] / "data" / "saved_layouts.json"
MODELS = ("llava", "llava_next", "llava_next_video")
TIES = {"untied": (False, False), "tied": (True, True), "tied_in_text": (False, True)}
"""``tie_word_embeddings`` at the top of config.json and in text_config."""


def config(model_type: str, tie: str) -> dict[str, Any]:
    """``config.json`` of a model that is as small as one can be."""
    spec = RandomSpec(
        model_type=model_type,
        image_size=28,
        vision_hidden_size=32,
        vision_intermediate_size=32,
        vision_layers=2,
        vision_heads=2,
        hidden_size=32,
        intermediate_size=32,
        layers=1,
        heads=2,
        kv_heads=1,
        vocab_size=64,
        max_positions=64,
    )
    top, inner = TIES[tie]
    made = spec.config(image_token_id=62, video_token_id=63) | {"tie_word_embeddings": top}
    made["torch_dtype"] = "float32"
    made["text_config"]["tie_word_embeddings"] = inner
    made["text_config"] |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return made


def shapes(model_type: str) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of such a model, whatever is tied."""
    expected = expected_tensors(ModelDims.from_config(config(model_type, "untied")))
    return {**expected.required, **expected.optional}


CANONICAL = tuple(shapes("llava_next"))
NUMBERS: Mapping[str, int] = {name: number for number, name in enumerate(CANONICAL, start=1)}
"""What each tensor is filled with, so that it is known under every name."""


def write(folder: Path, document: Mapping[str, Any], names: Mapping[str, str]) -> Path:
    """Write a checkpoint.

    Args:
        folder: is made.
        document: its config.json.
        names: canonical names to the ones that are stored.
    """
    sizes = shapes(document["model_type"])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(document))
    tensors = {
        stored: np.full(sizes[name], NUMBERS[name], np.float32) for name, stored in names.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_all(folder: Path) -> None:
    """Every kind of model, tied in every way, under the names of the hub."""
    for model_type in MODELS:
        for tie in TIES:
            names = {
                name: hub_name(name)
                for name in shapes(model_type)
                if name != "lm_head.weight" or tie == "untied"
            }
            write(folder / f"{model_type}-{tie}", config(model_type, tie), names)
