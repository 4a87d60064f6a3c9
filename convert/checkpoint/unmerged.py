"""Folders that training leaves behind and that are no model yet: adapters, optimiser shards, parts.

Each has its own way to become a model, and it is not taken here: merging needs the base model and
reads pickles. What is here is told by the names of its files alone.

Sources: PEFT 0.18 ``save_pretrained`` and ``constants.py``; LLaVA ``scripts/v1_5/pretrain.sh``,
``finetune_lora.sh`` and ``scripts/merge_lora_weights.py``; DeepSpeed ``zero_to_fp32.py``;
accelerate ``merge-weights``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from llava_edge.convert.util.text_files import exists, read_object
from llava_edge.profiles.errors import CheckpointError, printable, shorten

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_ORIGINAL_PARTS = "non_lora_trainables.bin"
_PROJECTOR = "mm_projector.bin"
_UNMERGEABLE = frozenset(
    {
        "ADAPTION_PROMPT",
        "CPT",
        "MULTITASK_PROMPT_TUNING",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "P_TUNING",
    }
)
_ADAPTER_WORD = re.compile(
    r"(?:^|[._])(?:lora|vera|randlora|vblora|xlora|ia3|hada|lokr|oft|boft|fourierft|hra|bone|miss|"
    r"shira|road|c3a|trainable_tokens|prompt_encoder|prompt_embeddings|adaption|base_layer|"
    r"modules_to_save|original_module)(?:[._]|$)"
)


def is_adapter_tensor(name: str) -> bool:
    """Whether a tensor belongs to an adapter, or to a model that still carries one."""
    return _ADAPTER_WORD.search(name) is not None


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder that holds an adapter, alone or beside a model.

    Raises:
        CheckpointError: it does; with the base model, where a file names it, and how to merge.
    """
    found = [
        name
        for name in (ADAPTER_CONFIG, *_ADAPTER_WEIGHTS, _ORIGINAL_PARTS)
        if exists(folder / name)
    ]
    if found:
        raise CheckpointError(adapter_message(folder, f"found are {shorten(found)}"))


def adapter_message(folder: Path, found: str) -> str:
    """What to say of a folder with an adapter.

    Args:
        folder: may hold ``adapter_config.json``.
        found: what gave it away.
    """
    settings = read_object(folder / ADAPTER_CONFIG)
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    kind = printable(kind) if isinstance(kind, str) else "LORA"
    if isinstance(base, str) and base.strip():
        named = f"Its base model is {printable(base)}."
        base = printable(base)
    else:
        named, base = f"No file names its base model ({ADAPTER_CONFIG} does otherwise).", "BASE"
    begin = f"{folder} is an adapter ({kind}), not a model: {found}. {named} "
    if kind.upper() in _UNMERGEABLE:
        return begin + (
            f"An adapter of this kind ({kind}) stays beside the model and cannot be merged into "
            "its weights, so it is not converted. Train a LoRA, or the model itself."
        )
    if exists(folder / _ORIGINAL_PARTS):
        return begin + (
            "Merge it with the LLaVA repository's own script, which also reads "
            f"{_ORIGINAL_PARTS}: python scripts/merge_lora_weights.py --model-path {folder} "
            f"--model-base {base} --save-model-path MERGED. Then convert MERGED."
        )
    beside = any(exists(folder / name) for name in ("model.safetensors", _INDEX))
    return begin + (
        "Merge it into its base model and save that: load the base model with transformers, then "
        f"PeftModel.from_pretrained(model, {str(folder)!r}).merge_and_unload()"
        ".save_pretrained('MERGED'); copy the base model's processor and tokenizer files. Then "
        "convert MERGED."
        + (
            " There are weights of a whole model as well; if they are merged already, remove the "
            "adapter_* files from the folder."
            if beside
            else ""
        )
    )


_INDEX = "model.safetensors.index.json"


def describe_parts(folder: Path) -> str | None:
    """What a folder without weights of a whole model is, where its names tell; else None."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return None
    if parts := _some(names, r"global_step\d+|zero_to_fp32\.py|.*_optim_states\.pt"):
        return (
            f"{folder} is a DeepSpeed ZeRO checkpoint ({shorten(parts)}): its weights are spread "
            "over the processes of the training. Put them together with the script that DeepSpeed "
            f"left there: python {folder}/zero_to_fp32.py {folder} MERGED --safe_serialization; "
            "then load MERGED with transformers and save_pretrained. Pickle files are never read "
            "here."
        )
    if parts := _some(names, r"pytorch_model_fsdp_\d+|.*\.distcp|\.metadata"):
        return (
            f"{folder} is a sharded FSDP checkpoint ({shorten(parts)}). Put it together: "
            "accelerate merge-weights FOLDER MERGED, FOLDER being the one with the .distcp files; "
            "it writes safetensors. Copy config, processor and tokenizer files to it."
        )
    if exists(folder / _PROJECTOR):
        return (
            f"{folder} holds a projector alone ({_PROJECTOR}), as the first stage of LLaVA's "
            "training leaves it, and no language model. Give the result of the second stage "
            "(finetune.sh), or load it with the LLaVA repository's builder, --model-base being the "
            "language model, and save the whole."
        )
    if parts := _some(names, r".*\.gguf"):
        return (
            f"{folder} holds GGUF files ({shorten(parts)}), whose weights are quantised. Give the "
            "float16 or bfloat16 checkpoint in safetensors that they were made from."
        )
    nested = [
        name
        for name in names
        if name.startswith("checkpoint-") and exists(folder / name / "config.json")
    ]
    if nested:
        return f"{folder} holds no weights itself; {shorten(nested)} do. Give one of these folders."
    return None


def _some(names: Iterable[str], pattern: str) -> list[str]:
    return [name for name in names if re.fullmatch(pattern, name)]
