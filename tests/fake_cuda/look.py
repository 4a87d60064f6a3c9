"""``python -m tests.fake_cuda.look ARTIFACT``: what an artifact has a GPU do.

Launches and copies of a decode step and of a batch of tiles, and memory when the artifact is loaded
and behind requests of all lengths, beside the plan. Prints one JSON object; run it by
``make fake-cuda RUN="-m tests.fake_cuda.look ARTIFACT"``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.bench.lab.gpu.round import largest_session
from llava_edge.bench.speed.cases import draw_picture
from llava_edge.profiles.boards.nvml import read_gpus
from llava_edge.profiles.errors import LlavaEdgeError
from llava_edge.profiles.memory.buffers import MAX_DRAFT_TOKENS, CacheType
from llava_edge.profiles.memory.estimate import Machine, MemoryTerms, estimate_memory
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.cli.arguments import add_cache_argument, asked_cache
from llava_edge.runtime.loading.memory_fit import largest_request
from llava_edge.runtime.loading.placement import choose_cache
from llava_edge.runtime.processing.request import PromptOptions
from tests.fake_cuda.record import FakeCuda

MIB = 1 << 20


def main(argv: list[str] | None = None) -> int:
    """Load, look, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--cuda", default="{}", help="JSON: fields of CudaOptions")
    parser.add_argument(
        "--limit", type=float, help="the provider's, as a share of the larger session's plan"
    )
    parser.add_argument("--requests", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    add_cache_argument(parser)
    options = parser.parse_args(argv)
    cuda, artifact = FakeCuda(), open_artifact(options.artifact)
    cache = asked_cache(options.cache)
    plan = planned(artifact, choose_cache(cache, artifact.manifest))
    chosen = CudaOptions(**json.loads(options.cuda))
    if options.limit:
        terms = {f"{name}_bytes": nbytes for name, nbytes in plan.as_dict().items()}
        session = largest_session({"terms": terms, "device_bytes": plan.total})
        chosen = replace(chosen, memory_limit_bytes=int(session * options.limit))
    with LlavaEdge.over(
        artifact, "cuda", cache=cache, engine="ort", prefix_reuse=False, cuda=chosen
    ) as model:
        loaded, draw = cuda.used, random.Random(options.seed)
        cuda.forget_peak()
        refused = [ask(model, draw, number) for number in range(options.requests)]
        result = {
            "degraded": [line.partition(":")[0] for line in model.degraded],
            "refused": list(filter(None, refused)),
            "loaded_mib": loaded / MIB,
            "behind_requests_mib": cuda.used / MIB,
            "most_in_requests_mib": cuda.peak / MIB,
            # The fake knows nothing of a driver's context, unless it is told a size.
            "planned_without_context_mib": plan.total / MIB,
            "step": asked_of(cuda, step(model)),
            "tiles": asked_of(cuda, tiles(model)),
        }
    print(json.dumps(result))
    return 0


def ask(model: LlavaEdge, draw: random.Random, number: int) -> str:
    """One request: none to two pictures, a few words to many, drafts or none; why it is refused."""
    sizes = [
        (draw.randint(50, 900), draw.randint(50, 900)) for _ in range(draw.choice((0, 0, 1, 2)))
    ]
    pictures = [draw_picture((number, place), *size) for place, size in enumerate(sizes)]
    words = draw.choice((5, 50, 200, 600))
    draft = draw.choice((0, MAX_DRAFT_TOKENS))
    try:
        model.generate("word " * words, pictures, max_new_tokens=6, prompt_lookup_num_tokens=draft)
    except LlavaEdgeError as error:
        # Longer than the context, or what lay in memory and passes for logits is no number.
        return str(error)
    return ""


def planned(artifact: Artifact, cache: CacheType) -> MemoryTerms:
    """The plan for this device, less the driver's context."""
    manifest = artifact.manifest
    work = largest_request(manifest, manifest.context_tokens, cache)
    machine = Machine("cuda", compute_capability=read_gpus().gpus[0].compute_capability)
    precision = manifest.precision.language_model
    terms = estimate_memory(manifest.model, precision, work, machine).device_peak
    return MemoryTerms(**{**terms.as_dict(), "driver_context": 0})


def step(model: LlavaEdge) -> Callable[[], object]:
    """A decode step behind one position."""
    decoder = model._decoder
    row = np.zeros(model.artifact.manifest.model.text.hidden_size, np.float16)
    decoder.rewind(0)
    decoder.prefill(1, lambda start, stop, out: out.fill(0))
    return lambda: decoder.step_best(row)


def tiles(model: LlavaEdge) -> Callable[[], object]:
    """The tiles of a whole picture, with all that a request does of them."""
    request = model._requests.build("What?", [draw_picture((0,), 672, 672)], PromptOptions())
    return lambda: model._engine._embedder.features(request.pixel_values)


def asked_of(cuda: FakeCuda, act: Callable[[], object]) -> dict[str, Any]:
    """Launches by kernel, bytes of copies and allocations; of the third time it is done."""
    for _ in range(3):
        with cuda.record() as record:
            act()
    kernels = record.counted()
    directions = ("host to device", "device to host", "device to device")
    return {
        "launches": kernels.total(),
        "kernels": dict(kernels.most_common()),
        "copies": {direction: record.copies(direction) for direction in directions},
        "taken": record.taken(),
    }


if __name__ == "__main__":
    sys.exit(main())
