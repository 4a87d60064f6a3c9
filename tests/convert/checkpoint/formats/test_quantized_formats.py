"""Quantised sources are told by name, with what can be given instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_edge.convert.checkpoint.layouts import hub_name
from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.profiles.errors import CheckpointError
from tests.support.saved_layouts import config, shapes, write

LAYER = "language_model.model.layers.0.mlp.up_proj."
NAMES = {
    "weight.absmax": "bitsandbytes 4-bit",
    "weight.quant_map": "bitsandbytes 4-bit",
    "weight.quant_state.bitsandbytes__nf4": "bitsandbytes 4-bit",
    "SCB": "bitsandbytes 8-bit",
    "weight_format": "bitsandbytes 8-bit",
    "weight_scale": "compressed-tensors",
    "weight_packed": "compressed-tensors",
    "input_scale": "compressed-tensors",
    "weight_scale_inv": "fp8 in blocks",
    "qzeros": "AWQ",
    "g_idx": "GPTQ without its settings",
    "weight._data": "quanto",
    "W_q": "HQQ",
    "weight_scales": "EETQ",
    "codebooks": "AQLM",
    "biases": "MLX",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = {name: hub_name(name) for name in shapes("llava_next")}
    return write(tmp_path / "checkpoint", config("llava_next", "untied"), names)


def put(folder: Path, tensors: dict[str, Any]) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **changes}))


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_told_by_the_names_of_its_tensors(folder: Path, name: str) -> None:
    put(folder, {LAYER + name: np.zeros(3, np.uint8)})

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert f"the checkpoint is quantised: {NAMES[name]}; " in str(caught.value)
    assert "give the float16 or bfloat16 checkpoint" in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_weights_of_eight_bits_are_told_by_their_type(folder: Path, dtype: Any) -> None:
    put(folder, {f"{LAYER}weight": np.zeros((32, 32), dtype)})

    with pytest.raises(CheckpointError, match="quantised: fp8 or 8-bit weights; give"):
        open_checkpoint(folder)


SETTINGS = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "dequantize()"),
    "old bitsandbytes": ({"load_in_8bit": True}, "(bitsandbytes)"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "give the float16"),
    "fp8": ({"quant_method": "fp8"}, "give the float16"),
    "one of tomorrow": ({"quant_method": "new\x1b[2J"}, r"(new\x1b[2J)"),
    "no object": ("awq", "(awq)"),
    "no method": ({"bits": 4}, "(None)"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_of_another_quantiser_are_refused_with_a_next_step(
    folder: Path, kind: str
) -> None:
    settings, named = SETTINGS[kind]
    put(folder, {f"{LAYER}SCB": np.zeros(3, np.float32)})
    configure(folder, quantization_config=settings)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "already quantised" in str(caught.value)
    assert named in str(caught.value)
    assert "left over" not in str(caught.value)


def test_settings_left_over_by_a_merge_are_told_apart(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})

    with pytest.raises(CheckpointError, match="entry is left over and can be removed"):
        open_checkpoint(folder)


def test_gptq_settings_over_plain_weights_are_told_apart(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})

    with pytest.raises(CheckpointError, match="remove quantization_config"):
        open_checkpoint(folder)
