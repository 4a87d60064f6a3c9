"""``python -m llava_edge.bench.lab.gpu.card --device cuda``: the device and its bandwidth.

The roofline is what this device reaches with plain copies inside its memory, bytes read and bytes
written counted both; on the CPU it is the read rate of the machine card. The last line of stdout is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from llava_edge.bench.common.machine import commit, measure_rates
from llava_edge.bench.common.results_store import machine
from llava_edge.profiles.boards.nvml import read_gpus
from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.backends.onnxruntime import ENGINE_VERSION, Buffer, available_devices

_BYTES = 1 << 30
_COPIES, _PASSES = 10, 5
_PACKAGES = (
    *("onnxruntime", "onnxruntime-gpu", "torch", "transformers", "numpy", "tokenizers", "onnx"),
    *("nvidia-cuda-runtime", "nvidia-cublas", "nvidia-cudnn-cu13"),
)


def main(argv: list[str] | None = None) -> int:
    """Print the card."""
    parser = argparse.ArgumentParser(description="The device and its bandwidth.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--bytes", type=int, default=_BYTES, help="of one copy")
    options = parser.parse_args(argv)
    report = read_gpus()
    card: dict[str, Any] = {
        "machine": machine(),
        "commit": commit(),
        "device": options.device,
        "gpus": [
            {"name": gpu.name, "memory_bytes": gpu.total_bytes, "compute": gpu.compute_capability}
            for gpu in report.gpus
        ],
        "driver": report.driver,
        "python": platform.python_version(),
        "onnxruntime": ENGINE_VERSION,
        "devices": list(available_devices()),
        "packages": {name: found for name in _PACKAGES if (found := _installed(name))},
    }
    if options.device == "cuda":
        card["bandwidth_bytes_per_second"] = copy_rate(CudaRuntime.open(), options.bytes)
        card["bandwidth"] = "copies within device memory, read and write counted"
    else:
        card["bandwidth_bytes_per_second"] = measure_rates().bandwidth_bytes_per_second
        card["bandwidth"] = "reads by all cores"
    print(json.dumps(card))
    return 0


def copy_rate(cuda: CudaRuntime, nbytes: int) -> float:
    """Bytes a second that copies within the device's memory move, read and written; best pass."""
    source, target = (Buffer((nbytes,), np.uint8, "cuda") for _ in range(2))
    best = float("inf")
    for _ in range(_PASSES):
        start = time.perf_counter()
        for _ in range(_COPIES):
            cuda.move(target.address, source.address, nbytes)
        cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * nbytes * _COPIES / best


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
