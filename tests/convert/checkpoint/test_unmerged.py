"""What training leaves behind and is no model yet is named, with the way to a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llava_edge.convert.checkpoint.hub.files import needed_files
from llava_edge.convert.checkpoint.layouts import hub_name
from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.profiles.errors import CheckpointError, HubError
from tests.support.saved_layouts import config, shapes, write

BASE = "llava-hf/llava-v1.6-mistral-7b-hf"
LORA = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


def adapter(folder: Path, *, bare: bool = True, pickled: bool = False, **settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "base_model_name_or_path": BASE, "r": 8, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    if pickled:
        (folder / "adapter_model.bin").write_bytes(b"PK")
    else:
        save_file({LORA: np.zeros((8, 64), np.float32)}, folder / "adapter_model.safetensors")
    if not bare:
        (folder / "config.json").write_text(json.dumps(config("llava_next", "untied")))


def original_lora(folder: Path) -> None:
    adapter(folder, bare=False)
    (folder / "non_lora_trainables.bin").write_bytes(b"PK")


def beside_a_model(folder: Path) -> None:
    model(folder)
    adapter(folder)


def model(folder: Path) -> Path:
    names = {name: hub_name(name) for name in shapes("llava_next")}
    return write(folder, config("llava_next", "untied"), names)


def carrying(name: str) -> Callable[[Path], None]:
    """A whole model saved before its adapter was merged."""

    def make(folder: Path) -> None:
        model(folder)
        save_file({name: np.zeros((8, 64), np.float32)}, folder / "more.safetensors")
        (folder / "model.safetensors").rename(folder / "most.safetensors")

    return make


def parts(*names: str, named_config: bool = False) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir()
        if named_config:
            (folder / "config.json").write_text(json.dumps(config("llava_next", "untied")))
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"PK")

    return make


FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "PEFT": (adapter, ("is an adapter (LORA)", BASE, "merge_and_unload")),
    "PEFT as pickle": (lambda f: adapter(f, pickled=True), ("is an adapter", BASE)),
    "with config.json": (lambda f: adapter(f, bare=False), ("is an adapter", BASE)),
    "DoRA": (lambda f: adapter(f, use_dora=True), ("is an adapter (LORA)", "merge_and_unload")),
    "LoHa": (lambda f: adapter(f, peft_type="LOHA"), ("is an adapter (LOHA)", "merge_and_unload")),
    "prompt tuning": (
        lambda f: adapter(f, peft_type="PROMPT_TUNING"),
        ("(PROMPT_TUNING)", "cannot be merged"),
    ),
    "base that is no text": (
        lambda f: adapter(f, base_model_name_or_path=["\n"], peft_type=None),
        ("No file names its base model",),
    ),
    "base that a terminal obeys": (
        lambda f: adapter(f, base_model_name_or_path="a\x1b[2Jb"),
        (r"a\x1b[2Jb",),
    ),
    "the original's": (
        original_lora,
        ("non_lora_trainables.bin", f"--model-base {BASE}", "merge_lora_weights.py"),
    ),
    "beside a model": (beside_a_model, ("if they are merged already, remove the adapter_* files",)),
    "lora tensors": (carrying(LORA), ("is an adapter", "lora_A")),
    "base layers": (
        carrying("language_model.model.layers.0.mlp.up_proj.base_layer.weight"),
        ("is an adapter", "base_layer"),
    ),
    "modules to save": (
        carrying("multi_modal_projector.modules_to_save.default.linear_1.weight"),
        ("is an adapter", "modules_to_save"),
    ),
    "DoRA tensors": (
        carrying("language_model.model.layers.0.mlp.up_proj.lora_magnitude_vector.default.weight"),
        ("is an adapter", "lora_magnitude_vector"),
    ),
    "ZeRO": (
        parts("global_step100/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py"),
        ("DeepSpeed ZeRO", "global_step100", "zero_to_fp32.py"),
    ),
    "ZeRO with config.json": (
        parts("global_step7/zero_pp_rank_0_optim_states.pt", "x.bin", named_config=True),
        ("DeepSpeed ZeRO", "global_step7"),
    ),
    "FSDP": (
        parts("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"),
        ("sharded FSDP", "accelerate merge-weights"),
    ),
    "FSDP with config.json": (parts("__0_0.distcp", named_config=True), ("sharded FSDP",)),
    "projector alone": (
        parts("mm_projector.bin", named_config=True),
        ("holds a projector alone", "second stage"),
    ),
    "projector alone, no config": (parts("mm_projector.bin"), ("holds a projector alone",)),
    "GGUF": (parts("ggml-model-q4_k.gguf"), ("holds GGUF files",)),
    "folder of runs": (
        parts("checkpoint-100/config.json", "trainer_state.json"),
        ("holds no weights itself; checkpoint-100",),
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_no_model_yet_is_named_with_the_way_to_one(
    tmp_path: Path, kind: str
) -> None:
    make, named = FOLDERS[kind]
    make(tmp_path / "folder")

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "folder")
    for part in named:
        assert part in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_what_training_leaves_beside_a_whole_model_does_not_matter(tmp_path: Path) -> None:
    folder = model(tmp_path / "folder")
    parts("global_step9/x.pt")(tmp_path / "other")
    os.rename(tmp_path / "other" / "global_step9", folder / "global_step9")
    for name in ("trainer_state.json", "training_args.bin", "optimizer.pt", "zero_to_fp32.py"):
        (folder / name).write_bytes(b"PK")

    assert open_checkpoint(folder).layout == "hub"


def test_an_adapter_on_the_hub_is_named_before_anything_is_fetched() -> None:
    names = ("adapter_config.json", "adapter_model.safetensors", "README.md")
    siblings = [SimpleNamespace(rfilename=name, size=1, lfs=None, blob_id="a") for name in names]

    with pytest.raises(HubError, match="me/mine is an adapter, not a model"):
        needed_files("me/mine", siblings)
