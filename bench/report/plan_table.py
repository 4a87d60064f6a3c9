"""``python -m llava_edge.bench.report.plan_table``: the published memory table beside our sums.

Sums are what ``llava-edge plan`` adds up for a GPU with memory to spare: one full stock image, 512
tokens of text beside it, fp16 cache; the video models with 32 frames. Decimal gigabytes, as
published. Prints Markdown; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace

from llava_edge.profiles.boards.hardware import HardwareProfile, load_profile
from llava_edge.profiles.models.variants import find_variant
from llava_edge.profiles.plan import DeploymentPlan
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.profiles.planner import plan_deployment

PRECISIONS = ("fp16", "int8", "int4")
PUBLISHED = {
    "llava-v1.6-mistral-7b": (16, 9, 6),
    "llava-v1.6-vicuna-7b": (16, 9, 6),
    "llava-v1.6-vicuna-13b": (28, 15, 9),
    "llava-v1.6-34b": (68, 36, 20),
    "llava-next-72b": (144, 76, 40),
    "llava-next-110b": (220, 116, 60),
}
"""Gigabytes for fp16, int8, int4. The published table has one row for both 7B models."""
UNPUBLISHED = ("llama3-llava-next-8b", "LLaVA-NeXT-Video-7B", "LLaVA-NeXT-Video-34B")
"""Variants that the published table leaves out."""
CONTEXT = 2928 + 512
FRAMES = 32
VIDEO_CONTEXT = FRAMES * 144 + 512
GIGABYTE = 1e9
WEIGHTS = ("decoder_weights", "lm_head", "vision_tower", "projector")


@dataclass(frozen=True)
class Row:
    """One model at one precision, in decimal gigabytes."""

    variant: str
    precision: str
    published: int | None
    total: float
    weights: float
    kv_cache: float

    @property
    def rest(self) -> float:
        """Activations, workspaces, driver context, allocator."""
        return self.total - self.weights - self.kv_cache


def rows() -> list[Row]:
    """All rows of the table."""
    board = replace(load_profile("a100"), memory_bytes=1 << 40, name="unlimited")
    sizes: dict[str, tuple[int | None, ...]] = {
        **PUBLISHED,
        **dict.fromkeys(UNPUBLISHED, (None,) * len(PRECISIONS)),
    }
    return [
        _row(board, variant, precision, published)
        for variant, known in sizes.items()
        for precision, published in zip(PRECISIONS, known, strict=True)
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(description="The published memory table beside our sums.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    table = rows()
    print("| model | precision | published | our sum | weights | cache | rest |")
    print("|---|---|---|---|---|---|---|")
    for row in table:
        print(
            f"| {row.variant} | {row.precision} | {row.published or ''} | {row.total:.1f} | "
            f"{row.weights:.1f} | {row.kv_cache:.1f} | {row.rest:.1f} |"
        )
    if options.json:
        print(json.dumps([asdict(row) for row in table]))
    return 0


def _row(board: HardwareProfile, name: str, precision: str, published: int | None) -> Row:
    variant = find_variant(name)
    is_video = variant.kind == "video"
    wishes = PlanRequest(
        variants=(variant,),
        precision=precision,
        grid="2x2",
        context_tokens=VIDEO_CONTEXT if is_video else CONTEXT,
        num_frames=FRAMES if is_video else 0,
    )
    plan: DeploymentPlan = plan_deployment(board, wishes).plan
    terms = plan.memory.terms
    return Row(
        variant=name,
        precision=precision,
        published=published,
        total=plan.memory.total_bytes / GIGABYTE,
        weights=sum(terms[name] for name in WEIGHTS) / GIGABYTE,
        kv_cache=terms["kv_cache"] / GIGABYTE,
    )


if __name__ == "__main__":
    sys.exit(main())
