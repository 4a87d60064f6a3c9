"""``python -m llava_edge.bench.report.published``: published figures beside our predictions.

Nothing in it is measured.

Scores: haotian-liu/LLaVA, docs/MODEL_ZOO.md (the 1.6 release), and the LLaVA-NeXT blog of May 2024
for the three later models; those of the blog were not read at their source and are marked. Tokens a
second on an A100 are the figures this project set out to be compared with.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace

from llava_edge.bench.report.plan_table import GIGABYTE, Row, rows
from llava_edge.profiles.boards.hardware import load_profile
from llava_edge.profiles.memory.speed import predict_speed
from llava_edge.profiles.models.variants import find_variant

LABEL = "published, not measured here"
BENCHMARKS = ("MMMU", "MathVista", "AI2D", "ChartQA", "DocVQA", "TextVQA", "MMBench", "MM-Vet")
UNCHECKED = ("llama3-llava-next-8b", "llava-next-72b", "llava-next-110b")
"""Models whose scores were not read at their source."""

_FULL_TOKENS, _FULL_TILES = 2928, 5


@dataclass(frozen=True)
class Accuracy:
    """Scores of one model at the precision of its release, in percent; None where not published."""

    variant: str
    scores: dict[str, float]

    def score(self, benchmark: str) -> float | None:
        """Of a benchmark, or None."""
        return self.scores.get(benchmark)

    @property
    def checked(self) -> bool:
        """Whether the scores were read at their source."""
        return self.variant not in UNCHECKED


ACCURACY = (
    Accuracy(
        "llava-v1.6-vicuna-7b",
        {"MMMU": 35.8, "MathVista": 34.6, "TextVQA": 64.9, "MMBench": 67.4, "MM-Vet": 43.9},
    ),
    Accuracy(
        "llava-v1.6-mistral-7b",
        {"MMMU": 35.3, "MathVista": 37.7, "TextVQA": 65.7, "MMBench": 68.7, "MM-Vet": 47.3},
    ),
    Accuracy(
        "llava-v1.6-vicuna-13b",
        {"MMMU": 36.2, "MathVista": 35.3, "TextVQA": 67.1, "MMBench": 70.0, "MM-Vet": 48.4},
    ),
    Accuracy(
        "llava-v1.6-34b",
        {"MMMU": 51.1, "MathVista": 46.5, "TextVQA": 69.5, "MMBench": 79.3, "MM-Vet": 57.4},
    ),
    Accuracy(
        "llama3-llava-next-8b",
        {"MMMU": 41.7, "MathVista": 37.5, "AI2D": 71.6, "ChartQA": 69.5, "DocVQA": 78.2},
    ),
    Accuracy(
        "llava-next-72b",
        {"MMMU": 46.4, "MathVista": 46.6, "AI2D": 77.4, "ChartQA": 77.0, "DocVQA": 84.4},
    ),
    Accuracy(
        "llava-next-110b",
        {"MMMU": 49.1, "MathVista": 49.0, "AI2D": 80.4, "ChartQA": 79.7, "DocVQA": 85.7},
    ),
)

PUBLISHED_SPEED = {
    "llava-v1.6-mistral-7b": 52,
    "llava-v1.6-vicuna-7b": 52,
    "llava-v1.6-34b": 22,
    "llava-next-72b": 12,
}
"""Tokens a second on an A100 at fp16; the published table has one row for both 7B models."""


@dataclass(frozen=True)
class SpeedComparison:
    """Published tokens a second of a variant at fp16 on an A100, and ours by the speed model.

    Attributes:
        variant: name.
        published: tokens a second; how many devices were used is not published.
        predicted: by ``profiles.speed`` for one full image and a short question.
        num_devices: A100s of 80 GB that the prediction takes, the fewest that hold the sum.
    """

    variant: str
    published: int
    predicted: float
    num_devices: int


def main(argv: list[str] | None = None) -> int:
    """Print the tables of speed and accuracy and return the exit code."""
    argparse.ArgumentParser(description="Published figures.").parse_args(argv)
    print("| A100, fp16, tokens/s | published | predicted by us | A100s in it | measured |")
    print("|---|---|---|---|---|")
    for each in speed_rows():
        print(
            f"| {each.variant} | {each.published} | {each.predicted:.0f} | {each.num_devices} | "
            "not measured |"
        )
    print(f"\n| {LABEL} | {' | '.join(BENCHMARKS)} |")
    print("|---" * (1 + len(BENCHMARKS)) + "|")
    for model in ACCURACY:
        found = [model.score(benchmark) for benchmark in BENCHMARKS]
        cells = ["" if value is None else f"{value:.1f}" for value in found]
        name = model.variant if model.checked else f"{model.variant} *"
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


def memory_rows() -> list[Row]:
    """Planned gigabytes of all nine variants at three precisions."""
    return rows()


def speed_rows() -> list[SpeedComparison]:
    """The published figures beside the profile's prediction."""
    board = load_profile("a100")
    sums = {row.variant: row.total for row in rows() if row.precision == "fp16"}
    found = []
    for name, published in PUBLISHED_SPEED.items():
        count = 1
        while sums[name] * GIGABYTE > count * board.budget_bytes:
            count *= 2
        prediction = predict_speed(
            find_variant(name).dims,
            "fp16",
            replace(board, num_devices=count),
            media_tokens=_FULL_TOKENS,
            num_tiles=_FULL_TILES,
            num_devices=count,
        )
        assert prediction.decode_tokens_per_second is not None
        found.append(SpeedComparison(name, published, prediction.decode_tokens_per_second, count))
    return found


if __name__ == "__main__":
    sys.exit(main())
