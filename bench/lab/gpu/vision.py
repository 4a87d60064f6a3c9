"""``python -m llava_edge.bench.lab.gpu.vision ARTIFACT``: tiles at a time, and where features go.

Seconds a tile for batches of several sizes, with features copied to the host as answers have them,
and what the copies there and back take alone. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.backends.onnxruntime import Buffer, Session, SessionOptions
from llava_edge.runtime.vision.encoder import VisionEncoder

_BATCHES = (1, 2, 5, 10)
_TILES = 10
"""Two full images."""
_ROUNDS = 3


def main(argv: list[str] | None = None) -> int:
    """Measure in turns, print."""
    parser = argparse.ArgumentParser(description="Tiles at a time, and copies of features.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiles", type=int, default=_TILES)
    options = parser.parse_args(argv)
    artifact = open_artifact(options.artifact)
    dims = artifact.manifest.model
    path = artifact.path(artifact.manifest.vision.file)
    session = Session(path, SessionOptions(device=options.device))
    side = dims.vision.image_size
    draw = np.random.default_rng(0)
    pixels = draw.normal(0, 1, (options.tiles, 3, side, side)).astype(np.float32)
    shape = (options.tiles, dims.vision.num_patches, dims.text.hidden_size)
    out = np.empty(shape, np.float16)
    encoders = {
        batch: VisionEncoder(session, dims, batch, np.float16)
        for batch in _BATCHES
        if batch <= options.tiles
    }
    seconds: dict[int, list[float]] = {batch: [] for batch in encoders}
    for turn in range(_ROUNDS + 1):
        for batch, encoder in encoders.items():
            taken = _seconds(partial(encoder.encode, pixels, out))
            # The first turn chooses kernels.
            if turn:
                seconds[batch].append(taken / options.tiles)
    held = Buffer(shape, np.float16, options.device)
    found: dict[str, Any] = {
        "device": options.device,
        "off_device": list(session.off_device),
        "tiles": options.tiles,
        "seconds_a_tile": {str(batch): min(taken) for batch, taken in seconds.items()},
        "feature_bytes": held.nbytes,
        "to_host_seconds": min(_seconds(lambda: np.copyto(out, held.read())) for _ in range(3)),
        "to_device_seconds": min(_seconds(lambda: held.write(out)) for _ in range(3)),
    }
    print(json.dumps(found))
    return 0


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
