"""plant_outliers: outlier channels in the tower of a random checkpoint, as in trained towers.

A few channels become 20 to 60 times as large where a linear layer reads them, and that layer's
weights for them as much smaller, so that the model says nearly what it said before: outliers of
trained models are no chaos either. Behind layer norms (gain, bias and columns) this is exact up to
rounding; in front of ``fc2`` the activation stands between, whose outlier channels become
straighter.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llava_edge.profiles.errors import RequestError

_SHARE = 170
"""One channel in as many, and two at least."""
SMALLEST, LARGEST = 20.0, 60.0


def plant_outliers(folder: Path, seed: int = 0) -> int:
    """Change a checkpoint of one file in place.

    Args:
        folder: as ``write_random_checkpoint`` left it.
        seed: of channels and sizes.

    Returns:
        How many channels were made loud.

    Raises:
        RequestError: the checkpoint is not one file, or has no tower.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise RequestError(f"{path} is not there; outliers are planted in checkpoints of one file")
    tensors = load_file(path)
    random = np.random.default_rng(seed)
    planted = 0
    for name in sorted(tensors):
        block, dot, end = name.rpartition(".layer_norm1.weight")
        if not dot or end or "vision" not in name:
            continue
        attention = [f"{block}.self_attn.{part}_proj.weight" for part in "qkv"]
        for outputs, readers in (
            ([f"{block}.layer_norm1.{part}" for part in ("weight", "bias")], attention),
            (
                [f"{block}.layer_norm2.{part}" for part in ("weight", "bias")],
                [f"{block}.mlp.fc1.weight"],
            ),
            (
                [f"{block}.mlp.fc1.{part}" for part in ("weight", "bias")],
                [f"{block}.mlp.fc2.weight"],
            ),
        ):
            width = len(tensors[outputs[0]])
            loud = random.choice(width, max(2, width // _SHARE), replace=False)
            factors = random.uniform(SMALLEST, LARGEST, len(loud)).astype(np.float32)
            for each in outputs:
                _scale_rows(tensors[each], loud, factors)
            for each in readers:
                _scale_rows(tensors[each].T, loud, 1 / factors)
            planted += len(loud)
    if not planted:
        raise RequestError(f"{path} holds no block of a tower to plant outliers in")
    save_file(tensors, path, {"format": "pt"})
    return planted


def _scale_rows(values: np.ndarray, rows: np.ndarray, factors: np.ndarray) -> None:
    shape = (-1, *(1,) * (values.ndim - 1))
    scaled = values[rows].astype(np.float32) * factors.reshape(shape)
    values[rows] = scaled.astype(values.dtype)
