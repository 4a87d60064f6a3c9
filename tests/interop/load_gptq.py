"""Load GPTQ checkpoints with transformers, optimum and GPTQModel and compare their logits.

Runs in an environment of its own, without this project's packages; ``check_gptq.py`` calls it::

    python load_gptq.py FOLDER…

Each folder holds ``gptq/``, a checkpoint, and ``expected.safetensors``: inputs of the whole model,
image included, and ``logits`` of torch in float32 with the dequantised weights and an fp16 head.
Prints one JSON object a folder; exit 1 if a gap is above its bound.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# GPTQModel derives its workers from the number of cores and refuses to start with fewer than three.
os.cpu_count = lambda: 8  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

RUNS = {
    # Whatever kernel is chosen by default, in fp16; measured 0.010 with 4 bits, 0.0022 with 8.
    "default": (torch.float16, None, 2e-2),
    # Weights dequantised to fp16, products in float32; measured 0.0007.
    "exact": (torch.float32, "torch", 2e-3),
}
"""Type, backend and largest logit gap as a share of the range."""


SAFE = {"trust_remote_code": False, "local_files_only": True}


def check(folder: Path, dtype: torch.dtype, backend: str | None, bound: float) -> dict[str, Any]:
    """Load a checkpoint and compare."""
    expected = load_file(folder / "expected.safetensors")
    theirs = expected.pop("logits")
    config = json.loads((folder / "gptq" / "config.json").read_text())["quantization_config"]
    chosen = {}
    if backend is not None:
        chosen["quantization_config"] = transformers.GPTQConfig(config["bits"], backend=backend)
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        folder / "gptq", dtype=dtype, use_safetensors=True, **chosen, **SAFE
    ).eval()
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in expected.items()}
    with torch.no_grad():
        ours = model(**inputs).logits[0].float()
    gaps = (ours - theirs).abs().amax(-1) / (theirs.amax(-1) - theirs.amin(-1))
    gap = float(gaps.max())
    decoder = 7 * model.config.text_config.num_hidden_layers
    outside = [name for name in layers if "language_model.layers." not in name]
    return {
        "folder": folder.name,
        "kernels": sorted({type(module).__name__ for module in layers.values()}),
        "gap": gap,
        "bound": bound,
        "passed": gap <= bound and len(layers) == decoder and not outside,
        "quantized_layers": len(layers),
        "processor": type(
            transformers.AutoProcessor.from_pretrained(folder / "gptq", **SAFE)
        ).__name__,
    }


def main() -> int:
    """Check every folder in every way."""
    passed = True
    for folder in map(Path, sys.argv[1:]):
        for name, (dtype, backend, bound) in RUNS.items():
            result = {"run": name, **check(folder, dtype, backend, bound)}
            print(json.dumps(result), flush=True)
            passed = passed and result["passed"]
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
