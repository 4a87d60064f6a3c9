"""A small model with what trained ones have and drawn ones lack, for two quantisers.

    python peer_model.py SOURCE LLAVA LLAMA SEED

Reads the random checkpoint SOURCE and writes it to LLAVA with its language model changed, and the
language model alone, the very same float16 weights, to LLAMA as a transformers checkpoint. Runs in
the environment of the peer, without this project's packages.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_PREFIX = "language_model."
_LOUD_SHARE = 0.01
_LOUD = 8.0


def plant(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Change the tensors of a language model.

    - Embeddings lie mostly in few directions: singular values fall as 1 / sqrt(rank).
    - One channel in a hundred of the residual stream, and of what ``down_proj`` reads, is 8 times
      as loud as the others.
    - Norm gains and the inputs of linear layers vary from channel to channel (log-normal, 0.4).
    - One weight in a thousand is 5 times as large.
    """
    draw = torch.Generator().manual_seed(seed)
    hidden = next(t.shape[1] for name, t in tensors.items() if "embed_tokens" in name)
    loud = torch.randperm(hidden, generator=draw)[: round(hidden * _LOUD_SHARE)]
    turn, _ = torch.linalg.qr(torch.randn(hidden, hidden, generator=draw))
    spectrum = torch.arange(1, hidden + 1).rsqrt()
    spectrum /= spectrum.square().mean().sqrt()
    changed: dict[str, torch.Tensor] = {}
    for name, stored in sorted(tensors.items()):
        values = stored.float()
        if "embed_tokens" in name:
            values = (values * spectrum) @ turn
            values[:, loud] *= _LOUD
        elif "layernorm" in name:
            values = values * _spread(values.numel(), draw)
        elif "_proj" in name:
            values = values * _spread(values.shape[1], draw)
            large = torch.rand(values.shape, generator=draw) < 0.001
            values[large] *= 5.0
            if "up_proj" in name:
                rows = torch.randperm(len(values), generator=draw)
                values[rows[: round(len(values) * _LOUD_SHARE)]] *= _LOUD
            # As large as before, so that signals keep their size.
            values *= stored.float().norm() / values.norm()
        changed[name] = values.half().contiguous()
    return changed


def _spread(count: int, draw: torch.Generator) -> torch.Tensor:
    return torch.exp(0.4 * torch.randn(count, generator=draw))


def main() -> int:
    """Write both checkpoints."""
    source, llava, llama = map(Path, sys.argv[1:4])
    shutil.copytree(source, llava)
    tensors = load_file(source / "model.safetensors")
    text = {name: tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    changed = plant(text, int(sys.argv[4]))
    save_file({**tensors, **changed}, llava / "model.safetensors", {"format": "pt"})
    llama.mkdir()
    alone = {name.removeprefix(_PREFIX): tensor for name, tensor in changed.items()}
    save_file(alone, llama / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text("utf-8"))["text_config"]
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    (llama / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, llama / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
