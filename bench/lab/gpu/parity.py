"""``python -m llava_edge.bench.lab.gpu.parity MODEL ARTIFACT REFERENCE.npz``: does it say the same?

Greedy ids beside those of transformers in float16 on the same device, and logits with its ids taken
as the answer. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.bench.lab.gpu.models import GPU_MODELS, GpuModel
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.cli.arguments import add_cache_argument, asked_cache
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.tolerances import bounds_for

_SHOWN = 4


def main(argv: list[str] | None = None) -> int:
    """Ask, compare, print."""
    parser = argparse.ArgumentParser(description="An artifact beside transformers' answers.")
    parser.add_argument("model", choices=GPU_MODELS)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cuda", default="{}", help="JSON: fields of CudaOptions")
    add_cache_argument(parser)
    options = parser.parse_args(argv)
    cuda = CudaOptions(**json.loads(options.cuda))
    with (
        LlavaEdge.load(
            options.artifact,
            options.device,
            allow_slow=options.device == "cpu",
            cuda=cuda,
            cache=asked_cache(options.cache),
        ) as model,
        np.load(options.reference, allow_pickle=False) as kept,
    ):
        print(json.dumps(compare(model, GPU_MODELS[options.model], kept)))
    return 0


def compare(model: LlavaEdge, asked: GpuModel, kept: Any) -> dict[str, Any]:
    """Ask everything that the reference was asked.

    Args:
        model: loaded.
        asked: whose questions they are.
        kept: arrays of ``gpu_reference answers``, by name.

    Returns:
        Counts, the largest gap of logits as a share of their range beside the bound of
        verification (with what an int8 cache may add, where the model has one), the share of
        positions with the same largest logit, and the first differences; by how much the reference
        itself preferred its token there tells a near tie from a fault.
    """
    same, gap, agreed, positions = 0, 0.0, 0, 0
    differing: list[dict[str, Any]] = []
    questions = asked.questions()
    for number, (image, question) in enumerate(questions):
        wanted, rows = kept[f"ids {number}"].tolist(), kept[f"logits {number}"]
        said = list(model.generate(question, [image], max_new_tokens=asked.answer_tokens).token_ids)
        same += said == wanted
        if said != wanted:
            differing.append({"prompt": number, **_first_difference(said, wanted, rows)})
        ours = model.teacher_forced_logits(question, [image], wanted[:-1])
        ranges = np.ptp(rows, axis=1)
        gap = max(gap, float((np.abs(ours - rows).max(axis=1) / ranges).max()))
        agreed += int((ours.argmax(axis=1) == rows.argmax(axis=1)).sum())
        positions += len(rows)
    manifest = model.artifact.manifest
    int8_cache = model.cache == "int8"
    bounds = bounds_for(manifest.target, manifest.precision, int8_cache=int8_cache)
    return {
        "prompts": len(questions),
        "same": same,
        "positions": positions,
        "same_largest_logit": agreed / positions,
        "logits_gap": gap,
        "logits_bound": bounds.answer_gap("decode_logits"),
        "differing": differing[:_SHOWN],
        "device": model.device,
        "cache": model.cache,
        "engine": model.engine,
        "off_device": list(model.off_device),
    }


def _first_difference(said: list[int], wanted: list[int], rows: Array) -> dict[str, Any]:
    pairs = zip(said, wanted, strict=False)
    at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(said), len(wanted)))
    if at >= len(rows):
        return {"position": at}
    best = np.sort(rows[at])[-2:]
    return {"position": at, "margin_of_range": float((best[1] - best[0]) / np.ptp(rows[at]))}


if __name__ == "__main__":
    sys.exit(main())
