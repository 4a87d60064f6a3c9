"""Random models that the bench measures: released sizes, written by the project's command.

Bench knows nothing of convert and calls it as a user would.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_edge.bench.common.subprocess_runner import run_fresh

CLIP_L: Mapping[str, int] = {
    "vision_hidden_size": 1024,
    "vision_intermediate_size": 4096,
    "vision_layers": 24,
    "vision_heads": 16,
}
"""CLIP ViT-L, the tower of all released models; tiles of 336 and patches of 14 are the default."""

DECODER_1B: Mapping[str, int | str] = {
    "backbone": "mistral",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layers": 16,
    "heads": 32,
    "kv_heads": 8,
    "vocab_size": 32064,
}
"""1.1 B parameters; with ``CLIP_L`` 1.4 B."""


def write_random(folder: Path, sizes: Mapping[str, object], options: Sequence[str] = ()) -> None:
    """Write a checkpoint of random weights.

    Args:
        folder: must not exist.
        sizes: fields of the random checkpoint's specification.
        options: further ones of the command, such as ``--seed 3``.

    Raises:
        subprocess.CalledProcessError: it failed, and said why on stderr.
    """
    run_fresh([*random_command(folder, sizes), *options])


def random_command(folder: Path, sizes: Mapping[str, object]) -> list[str]:
    """The command that writes such a checkpoint."""
    changes = [f"--set={name}={value}" for name, value in sizes.items()]
    writer = [sys.executable, "-m", "llava_edge.convert.testing.random_cli", "tiny", str(folder)]
    return [*writer, *changes]
