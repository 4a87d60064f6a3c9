"""``python -m llava_edge.bench.lab.micro.prefix_reuse``: time to first token of a second question.

A random model of about 1.4 billion parameters with a full-size tower (CLIP-L/336) is written,
converted and asked, round by round: a first question about a new picture; a second one about the
same picture, which goes on in the KV cache; then, when another request took the KV cache, a third,
for which the vision cache still has the tiles. All of a round run within one minute or few, so
other work on the machine weighs on each alike. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_edge.bench.common.random_models import CLIP_L, DECODER_1B, write_random
from llava_edge.runtime import Answer, LlavaEdge

_SMALL = {"hidden_size": 128, "intermediate_size": 256, "layers": 2, "heads": 4, "kv_heads": 4}
_SMALL |= {"vision_hidden_size": 64, "vision_intermediate_size": 128, "vision_layers": 3}
_SMALL |= {"vision_heads": 4}
_TILE_CACHE_BYTES = 1 << 30
_FIRST, _SECOND = "What is shown in this picture?", "How many people are in it, and where?"


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    options = _parser().parse_args(argv)
    sizes = {**DECODER_1B, **CLIP_L, **(_SMALL if options.small else {})}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        artifact = _artifact(Path(work), sizes, options.precision)
        rounds = _measure(artifact, options)
    result = {
        "precision": options.precision,
        "threads": options.threads,
        "image": [options.width, options.height],
        "second_over_first": [row["second"]["ttft"] / row["first"]["ttft"] for row in rounds],
        "cached_tiles_over_first": [row["third"]["ttft"] / row["first"]["ttft"] for row in rounds],
        "load_average": os.getloadavg()[0],
        "rounds": rounds,
    }
    print(_table(result))
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure a second question about one picture.")
    parser.add_argument("--precision", choices=("fp16", "int8", "int4"), default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=600)
    parser.add_argument("--height", type=int, default=400)
    parser.add_argument("--small", action="store_true", help="a narrow model, to try the command")
    parser.add_argument("--work", type=Path, help="where 5 GB of models lie meanwhile")
    return parser


def _artifact(folder: Path, sizes: Mapping[str, object], precision: str) -> Path:
    """Through the commands, as a user would: bench knows nothing of convert."""
    checkpoint, artifact = folder / "checkpoint", folder / "artifact"
    write_random(checkpoint, sizes)
    program = Path(sys.executable).with_name("llava-edge")
    convert = [str(program), "convert", str(checkpoint), str(artifact), "--profile", "cpu-32gb"]
    convert += ["--precision", precision, "--verify", "none", "--context", "4096"]
    if precision != "fp16":
        convert += ["--quantizer", "rtn"]
    subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
    return artifact


def _measure(artifact: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    rounds = []
    with LlavaEdge.load(
        artifact, threads=options.threads, vision_cache_bytes=_TILE_CACHE_BYTES
    ) as model:
        model.generate("Warm up.", [_picture(0, options)], grid="base", max_new_tokens=2)
        for number in range(1, options.rounds + 1):
            picture = _picture(number, options)

            def ask(question: str, picture: Image.Image = picture) -> dict[str, Any]:
                return _row(model.generate(question, [picture], max_new_tokens=2))

            first, second = ask(_FIRST), ask(_SECOND)
            model.generate("Another request takes the KV cache.", max_new_tokens=1)
            rounds.append({"first": first, "second": second, "third": ask(_SECOND)})
    return rounds


def _picture(seed: int, options: argparse.Namespace) -> Image.Image:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (options.height, options.width, 3), np.uint8)
    return Image.fromarray(pixels)


def _row(answer: Answer) -> dict[str, Any]:
    timings = answer.timings
    return {
        "ttft": timings.ttft_seconds,
        "preprocess": timings.preprocess_seconds,
        "vision": timings.vision_seconds,
        "prefill": timings.prefill_seconds,
        "prompt_tokens": answer.prompt_tokens,
        "image_tokens": answer.image_tokens,
        "reused_tokens": answer.reused_tokens,
    }


def _table(result: Mapping[str, Any]) -> str:
    lines = [
        "question                     ttft s  pixels  vision  prefill  prompt  reused  of first"
    ]
    names = {
        "first": "first",
        "second": "second, same picture",
        "third": "KV cache taken, tiles known",
    }
    for row in result["rounds"]:
        for key, name in names.items():
            found = row[key]
            lines.append(
                f"{name:27} {found['ttft']:7.2f} {found['preprocess']:7.3f} {found['vision']:7.2f} "
                f"{found['prefill']:8.2f} {found['prompt_tokens']:7} {found['reused_tokens']:7} "
                f"{found['ttft'] / row['first']['ttft']:9.1%}"
            )
    for key in ("second_over_first", "cached_tiles_over_first"):
        lines.append(f"{key.replace('_', ' ')}: median {statistics.median(result[key]):.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
