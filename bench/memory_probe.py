"""``python -m llava_edge.bench.memory_probe ARTIFACT IMAGE…``: one question, and what it took.

Runs in a process of its own, because the peak of a process never goes down. Prints one JSON object:
peak and resident bytes at each step of loading and answering.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.engine_arguments import add_cache_argument, asked_cache

_SENTENCE = "Describe what is shown in this image, please. "


def main(argv: list[str] | None = None) -> int:
    """Load, ask, print."""
    parser = argparse.ArgumentParser(description="Peak memory of one question.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("images", nargs="*", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    add_cache_argument(parser)
    options = parser.parse_args(argv)
    steps = Steps()
    steps("imported", 0, 0)
    with LlavaEdge.load(
        options.artifact,
        threads=options.threads,
        cache=asked_cache(options.cache),
        prefix_reuse=False,
        progress=steps,
    ) as model:
        steps("loaded", 0, 0)
        prompt = _prompt(model, options.images, options.prompt_tokens)
        answer = model.generate(
            prompt, options.images, max_new_tokens=options.tokens, progress=steps
        )
        steps("answered", 0, 0)
    result = {
        "host_bytes": answer.peak_memory.host_bytes,
        "prompt_tokens": answer.prompt_tokens,
        "image_tokens": answer.image_tokens,
        "ttft_seconds": answer.timings.ttft_seconds,
        "steps": steps.found,
    }
    print(json.dumps(result))
    return 0


def _prompt(model: LlavaEdge, images: list[Path], num_tokens: int) -> str:
    """As many sentences as ``num_tokens`` hold, at least one."""
    one, eleven = (model.count_tokens(_SENTENCE * n, images) for n in (1, 11))
    each = (eleven - one) / 10
    return _SENTENCE * (1 + max(0, int((num_tokens - one) / each)))


class Steps:
    """Notes resident and peak bytes at each step of progress.

    Attributes:
        found: (step, resident bytes, peak bytes), in order.
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, int, int]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Note one step; each stage is noted when it begins, ends and in between."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        fields = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
        resident, peak = (int(fields[name][0]) * 1024 for name in ("VmRSS", "VmHWM"))
        self.found.append((f"{stage} {done}/{total}" if total else stage, resident, peak))


if __name__ == "__main__":
    sys.exit(main())
