"""``python -m llava_edge.bench.plan_table``: the published memory table beside our sums.

Sums are what ``llava-edge plan`` adds up for a GPU with memory to spare: one full stock image, 512
tokens of text beside it, fp16 cache. Decimal gigabytes, as published. Prints Markdown; nothing is
measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace

from llava_edge.profiles.hardware import HardwareProfile, load_profile
from llava_edge.profiles.plan import DeploymentPlan
from llava_edge.profiles.planner import PlanRequest, plan_deployment
from llava_edge.profiles.variants import find_variant

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
CONTEXT = 2928 + 512
GIGABYTE = 1e9
WEIGHTS = ("decoder_weights", "lm_head", "vision_tower", "projector")


@dataclass(frozen=True)
class Row:
    """One model at one precision, in decimal gigabytes."""

    variant: str
    precision: str
    published: int
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
    return [
        _row(board, variant, precision, published)
        for variant, sizes in PUBLISHED.items()
        for precision, published in zip(PRECISIONS, sizes, strict=True)
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
            f"| {row.variant} | {row.precision} | {row.published} | {row.total:.1f} | "
            f"{row.weights:.1f} | {row.kv_cache:.1f} | {row.rest:.1f} |"
        )
    if options.json:
        print(json.dumps([asdict(row) for row in table]))
    return 0


def _row(board: HardwareProfile, variant: str, precision: str, published: int) -> Row:
    wishes = PlanRequest(
        variants=(find_variant(variant),),
        precision=precision,
        grid="2x2",
        context_tokens=CONTEXT,
    )
    plan: DeploymentPlan = plan_deployment(board, wishes).plan
    terms = plan.memory.terms
    return Row(
        variant=variant,
        precision=precision,
        published=published,
        total=plan.memory.total_bytes / GIGABYTE,
        weights=sum(terms[name] for name in WEIGHTS) / GIGABYTE,
        kv_cache=terms["kv_cache"] / GIGABYTE,
    )


if __name__ == "__main__":
    sys.exit(main())
