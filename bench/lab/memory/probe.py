"""``python -m llava_edge.bench.lab.memory.probe ARTIFACT IMAGE…``: one question, and what it took.

Runs in a process of its own, because the peak of a process never goes down. Prints one JSON object:
bytes held and the most so far at each step of loading and answering, of the host or of the device.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llava_edge.profiles.boards.nvml import process_bytes, read_gpus
from llava_edge.profiles.errors import EngineError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.cli.arguments import add_cache_argument, asked_cache

_SENTENCE = "Describe what is shown in this image, please. "


def main(argv: list[str] | None = None) -> int:
    """Load, ask, print."""
    parser = argparse.ArgumentParser(description="Peak memory of one question.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("images", nargs="*", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prefill-chunk", type=int, default=0)
    add_cache_argument(parser)
    options = parser.parse_args(argv)
    on_gpu = options.device == "cuda"
    steps = Steps(device_bytes if on_gpu else resident_bytes)
    steps("imported", 0, 0)
    artifact = open_artifact(options.artifact)
    chunk = options.prefill_chunk or artifact.manifest.prefill_chunk
    artifact = replace(artifact, manifest=replace(artifact.manifest, prefill_chunk=chunk))
    with LlavaEdge.over(
        artifact,
        options.device,
        threads=options.threads,
        cache=asked_cache(options.cache),
        engine="ort",
        prefix_reuse=False,
        strict_device=on_gpu,
        progress=steps,
    ) as model:
        steps("loaded", 0, 0)
        prompt = _prompt(model, options.images, options.prompt_tokens)
        answer = model.generate(
            prompt,
            options.images,
            max_new_tokens=options.tokens,
            progress=steps,
        )
        steps("answered", 0, 0)
    result = {
        "host_bytes": answer.peak_memory.host_bytes,
        "prompt_tokens": answer.prompt_tokens,
        "image_tokens": answer.image_tokens,
        "ttft_seconds": answer.timings.ttft_seconds,
        "chunk_tokens": chunk,
        "steps": steps.found,
    }
    if on_gpu:
        result["device_bytes"] = steps.found[-1][2]
        if not result["device_bytes"]:
            raise EngineError("the driver does not say what this process holds on the GPU")
        result["compute_capability"] = read_gpus().gpus[0].compute_capability
    print(json.dumps(result))
    return 0


def resident_bytes() -> tuple[int, int]:
    """Resident bytes of this process, and their peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    resident, peak = (int(fields[name][0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return resident, peak


def device_bytes() -> tuple[int, int]:
    """Bytes of this process on the device, twice: the driver keeps no peak.

    None is needed: weights come in pieces of their own size, and what the largest runs took when
    the artifact was loaded stays with the provider's arenas.
    """
    held = process_bytes(os.getpid())
    return (held, held) if held is not None else (0, 0)


def _prompt(model: LlavaEdge, images: list[Path], num_tokens: int) -> str:
    """As many sentences as ``num_tokens`` hold, at least one."""
    one, eleven = (model.count_tokens(_SENTENCE * n, images) for n in (1, 11))
    each = (eleven - one) / 10
    return _SENTENCE * (1 + max(0, int((num_tokens - one) / each)))


class Steps:
    """Notes held and most bytes at each step of progress.

    Args:
        read: bytes held now, and the most that were.

    Attributes:
        found: (step, bytes held, most so far), in order.
    """

    def __init__(self, read: Callable[[], tuple[int, int]]) -> None:
        self._read = read
        self.found: list[tuple[str, int, int]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Note one step; each stage is noted when it begins, ends and in between."""
        held, most = self._read()
        most = max(most, self.found[-1][2] if self.found else 0)
        self.found.append((f"{stage} {done}/{total}" if total else stage, held, most))


if __name__ == "__main__":
    sys.exit(main())
