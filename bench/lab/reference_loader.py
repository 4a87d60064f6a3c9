"""The one place where the bench reads a checkpoint with transformers.

Its own checkpoints have no code, but the folder is the caller's: remote code, other weights than
safetensors and the network are ruled out, classes are named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

SAFE: Mapping[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""Arguments of every ``from_pretrained``."""


def load_processor(folder: Path) -> Any:
    """Transformers' processor of a LLaVA-NeXT checkpoint."""
    loader: Any = transformers.LlavaNextProcessor
    return loader.from_pretrained(folder, **SAFE)


def load_model(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """Transformers' LLaVA-NeXT model of a checkpoint, for inference.

    Args:
        folder: the checkpoint.
        dtype: of weights and arithmetic.
        options: further arguments of transformers, such as its attention.
    """
    loader: Any = transformers.LlavaNextForConditionalGeneration
    return loader.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, **options, **SAFE
    ).eval()
