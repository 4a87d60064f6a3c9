"""GPTQModel on a text-only model, in a fresh process of its own environment.

    python peer_quantize.py MODEL TOKENS OUT OPTIONS

TOKENS is a JSON list of lists of ids, OPTIONS a JSON object: ``dtype`` to load the model in, all
else for its QuantizeConfig. Prints a JSON object as the last line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# GPTQModel derives its workers from the number of cores and refuses to start with fewer than three.
os.cpu_count = lambda: 8

import gptqmodel  # noqa: E402
import torch  # noqa: E402


def main() -> int:
    """Quantise and save."""
    model_folder, tokens, out, text = sys.argv[1:5]
    options = json.loads(text)
    dtype = getattr(torch, options.pop("dtype"))
    config = gptqmodel.QuantizeConfig(**options)
    model = gptqmodel.GPTQModel.load(model_folder, config, device="cpu", dtype=dtype)
    samples = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        for ids in json.loads(Path(tokens).read_text("utf-8"))
    ]
    model.quantize(samples, batch_size=1)
    model.save(out)
    print(json.dumps({"gptqmodel": gptqmodel.__version__, "threads": torch.get_num_threads()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
