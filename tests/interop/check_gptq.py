"""Emit GPTQ checkpoints and let transformers, optimum and GPTQModel load them.

    .venv/bin/python tests/interop/check_gptq.py .venv-interop/bin/python

The second interpreter's environment: torch 2.13.0, transformers 5.23.0, optimum 2.3.0, gptqmodel
7.6.0, numpy 2.2.6, pillow. Exit status is that of ``load_gptq.py``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.checkpoint.quantized.source import (
    LINEARS,
    QuantizedSource,
    RtnSource,
    linear_name,
)
from llava_edge.convert.quantization.export_hf import check_emit_hf, write_hf_gptq
from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
from llava_edge.convert.testing.random_spec import preset
from llava_edge.convert.verification.reference.model import ReferenceModel

SIZES = {"hidden_size": 128, "intermediate_size": 384, "heads": 4, "vocab_size": 416, "layers": 2}
CASES = {
    "llama-int4": ({"backbone": "llama", "kv_heads": 4}, 4, 128),
    "mistral-int8": ({"backbone": "mistral", "kv_heads": 2}, 8, 128),
    "qwen2-int4-g32": ({"backbone": "qwen2", "kv_heads": 2}, 4, 32),
    "qwen2-int8-channel": ({"backbone": "qwen2", "kv_heads": 2}, 8, -1),
}


def emit(folder: Path, changes: dict[str, Any], bits: int, group_size: int) -> None:
    """Write one checkpoint and what torch computes with its weights."""
    write_random_checkpoint(folder / "source", preset("odd", **{**SIZES, **changes}), seed=5)
    checkpoint = open_checkpoint(folder / "source")
    source = RtnSource(checkpoint, bits, group_size)
    check_emit_hf(checkpoint, f"int{bits}")
    (folder / "gptq").mkdir()
    write_hf_gptq(folder / "gptq", checkpoint, source, max_shard_bytes=300_000)
    save_file(expected(checkpoint, source), folder / "expected.safetensors")


def expected(checkpoint: Checkpoint, source: QuantizedSource) -> dict[str, torch.Tensor]:
    """Inputs with an image, and the logits of torch with the dequantised weights."""
    reference = ReferenceModel(checkpoint.folder)
    with torch.no_grad():
        for index, layer in enumerate(reference.model.model.language_model.layers):
            for name in LINEARS:
                weight = source.linear(linear_name(index, name)).dequantize()
                layer.get_submodule(name).weight.copy_(torch.from_numpy(weight))
    picture = Image.linear_gradient("L").resize((150, 100)).convert("RGB")
    inputs = dict(reference.prepare(reference.render("What is in the picture?", 1), [picture]))
    logits = reference.logits(inputs)
    return {**{k: v.contiguous() for k, v in inputs.items()}, "logits": logits.contiguous()}


def main() -> int:
    """Emit everything, then load it with the interpreter that was given."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / case for case in CASES]
        for folder, case in zip(folders, CASES.values(), strict=True):
            folder.mkdir()
            emit(folder, *case)
        program = Path(__file__).with_name("load_gptq.py")
        command = [sys.argv[1], str(program), *map(str, folders)]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
