"""Write ``tests/data/schema_4`` anew: ``python -m tests.data.make_schema_4``.

A version is made again until it is released, so that keys which are added under it are in it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from llava_edge.runtime.cli.main import main

OUT = Path(__file__).parent / "schema_4"
SIZES = (
    *("image_size=56", "vision_hidden_size=32", "vision_intermediate_size=48", "vision_layers=2"),
    *("vision_heads=2", "hidden_size=32", "intermediate_size=48", "layers=2", "heads=2"),
    *("kv_heads=1", "vocab_size=320", "max_positions=1024"),
)


def write(out: Path = OUT) -> None:
    """Convert the checkpoint of the earlier versions, verified, with an int8 KV cache."""
    from llava_edge.convert.testing.random_cli import main as write_random

    with tempfile.TemporaryDirectory() as place:
        toy, made = Path(place, "toy"), Path(place, "made")
        sets = [word for size in SIZES for word in ("--set", size)]
        assert write_random(["tiny", str(toy), *sets]) == 0
        board = ("--profile", "cpu-16gb", "--precision", "fp16", "--context", "768")
        assert main(["convert", str(toy), str(made), *board, "--cache", "int8"]) == 0
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)


if __name__ == "__main__":
    write()
