"""``python -m llava_edge.bench.lab.micro.vision``: the tower at 8 bits beside float.

A full-size CLIP-L/14-336 (24 layers cut at the last but one, 1,024 wide, projector to 4,096) of
random weights, once as it is and once with outlier channels, is converted twice: tower in float and
at 8 bits. Both encode the same tiles in turns within one process, so that ratios hold on a machine
with other work; then batches of the int8 tower. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.bench.common.random_models import CLIP_L, write_random
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.backends.cpu_isa import needs_wide_sums
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.cosine import TileCosine
from llava_edge.runtime.vision.encoder import VisionEncoder

_FULL: Mapping[str, object] = {
    "backbone": "llama",
    "hidden_size": 4096,
    "intermediate_size": 128,
    "layers": 1,
    "heads": 32,
    "kv_heads": 8,
    **CLIP_L,
}
_PRECISIONS = ("fp16", "int8")


@dataclass(frozen=True)
class Encoded:
    """One tower's features of the tiles, and the seconds of each round."""

    features: Array
    seconds: tuple[float, ...]


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    options = _parser().parse_args(argv)
    sizes = dict(_FULL)
    if options.small:
        sizes |= {"vision_hidden_size": 256, "vision_intermediate_size": 1024, "vision_layers": 6}
        sizes |= {"vision_heads": 4, "hidden_size": 512, "heads": 4, "kv_heads": 4}
    rows = []
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for weights in ("plain", "outliers"):
            folder = Path(work) / weights
            artifacts = _artifacts(folder, sizes, outliers=weights == "outliers")
            rows.append(_compare(weights, artifacts, options))
    print(_table(rows))
    print(json.dumps({"tiles": options.tiles, "rounds": options.rounds, "rows": rows}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the tower at 8 bits beside float.")
    parser.add_argument("--tiles", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="each tower runs once a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 3, 5])
    parser.add_argument("--small", action="store_true", help="a narrow tower, to try the command")
    parser.add_argument("--work", type=Path, help="where 3 GB of models lie meanwhile")
    return parser


def _artifacts(folder: Path, sizes: Mapping[str, object], *, outliers: bool) -> dict[str, Path]:
    """Through the commands, as a user would: bench knows nothing of convert."""
    checkpoint = folder / "checkpoint"
    write_random(checkpoint, sizes, ["--outliers"] * outliers)
    program = Path(sys.executable).with_name("llava-edge")
    found = {}
    for precision in _PRECISIONS:
        found[precision] = folder / precision
        convert = [str(program), "convert", str(checkpoint), str(found[precision])]
        convert += ["--profile", "cpu-32gb", "--precision", "int8", "--quantizer", "rtn"]
        convert += ["--vision-precision", precision, "--verify", "none", "--context", "4096"]
        subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
    return found


def _compare(
    weights: str, artifacts: Mapping[str, Path], options: argparse.Namespace
) -> dict[str, Any]:
    opened = {name: open_artifact(path) for name, path in artifacts.items()}
    sessions = {name: _session(artifact, options.threads) for name, artifact in opened.items()}
    side = opened["int8"].manifest.image_processing.tile_size
    random = np.random.default_rng(0)
    tiles = random.standard_normal((options.tiles, 3, side, side)).astype(np.float32)
    encoded = _in_turns(opened, sessions, tiles, options.rounds)
    cosine = TileCosine.of(encoded["int8"].features, encoded["fp16"].features)
    facts = opened["int8"].manifest.conversion["vision"]
    rounds = zip(encoded["fp16"].seconds, encoded["int8"].seconds, strict=True)
    return {
        "weights": weights,
        "float_seconds": min(encoded["fp16"].seconds),
        "int8_seconds": min(encoded["int8"].seconds),
        "ratio": min(encoded["fp16"].seconds) / min(encoded["int8"].seconds),
        "ratio_by_round": [slow / fast for slow, fast in rounds],
        "cosine_mean": 1 - cosine.mean_loss,
        "cosine_worst_tile": 1 - cosine.worst_loss,
        "layers_in_float": sorted(facts["layers_in_float"]),
        "scaled_layers": len(facts["scaled_inputs"]),
        "load_average": os.getloadavg()[0],
        "batch_seconds": _batches(opened["int8"], sessions["int8"], tiles, options),
    }


def _session(artifact: Artifact, threads: int) -> Session:
    manifest = artifact.manifest
    wide_sums = needs_wide_sums(manifest.precision)
    options = SessionOptions(device="cpu", threads=threads, wide_sums=wide_sums)
    return Session.from_files(artifact.files, manifest.vision.file, options)


def _in_turns(
    opened: Mapping[str, Artifact],
    sessions: Mapping[str, Session],
    tiles: Array,
    rounds: int,
) -> dict[str, Encoded]:
    """Every tower once a round, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    features: dict[str, Array] = {}
    for turn in range(rounds + 1):
        for name, session in sessions.items():
            features[name], took = _encode(opened[name], session, tiles, 1)
            seconds[name] += [took] * (turn > 0)
    return {name: Encoded(features[name], tuple(seconds[name])) for name in sessions}


def _batches(
    artifact: Artifact, session: Session, tiles: Array, options: argparse.Namespace
) -> dict[str, float]:
    """Seconds by tiles at once, best of the rounds, sizes in turns."""
    sizes: Sequence[int] = [size for size in options.batches if size <= len(tiles)]
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(options.rounds + 1):
        for size in sizes:
            _, took = _encode(artifact, session, tiles, size)
            seconds[size] += [took] * (turn > 0)
    return {str(size): min(found) for size, found in seconds.items()}


def _encode(artifact: Artifact, session: Session, tiles: Array, batch: int) -> tuple[Array, float]:
    dims = artifact.manifest.model
    features = np.empty((len(tiles), dims.vision.num_patches, dims.text.hidden_size), np.float32)
    encoder = VisionEncoder(session, dims, batch, np.float32)
    start = time.perf_counter()
    encoder.encode(tiles, features)
    return features, time.perf_counter() - start


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["weights    float s  int8 s  ratio  cosine    worst     in float  scaled"]
    lines += [
        f"{row['weights']:9} {row['float_seconds']:8.2f} {row['int8_seconds']:7.2f} "
        f"{row['ratio']:6.2f}  {row['cosine_mean']:.6f}  {row['cosine_worst_tile']:.6f}  "
        f"{len(row['layers_in_float']):8} {row['scaled_layers']:7}"
        for row in rows
    ]
    for row in rows:
        batches = ", ".join(f"{n}: {took:.2f} s" for n, took in row["batch_seconds"].items())
        lines.append(f"{row['weights']}, int8, tiles at once {batches}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
