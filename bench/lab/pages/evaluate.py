"""Evaluation: exact match on held-out questions, by kind, through transformers in float32.

``python -m llava_edge.bench.lab.pages.evaluate CHECKPOINT --count 2000`` prints a table and, as its
last line, one JSON object. ``--fault`` spoils an AnyRes step, ``--grid base`` shows the thumbnail
alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_edge.bench.lab.chat_prompt import chat_prompts
from llava_edge.bench.lab.pages.ablation import FAULTS, Fault, spoiled
from llava_edge.bench.lab.pages.drawing.geometry import PATCHES
from llava_edge.bench.lab.pages.drawing.page import Question
from llava_edge.bench.lab.pages.drawing.sample import Sample, held_out_sample
from llava_edge.bench.lab.pages.drawing.text_page import READING_KINDS
from llava_edge.bench.lab.reference_loader import load_model, load_processor

_BATCH = 50
_MOST_TOKENS = 48


@dataclass(frozen=True)
class Result:
    """Right and asked, by kind of question."""

    right: Counter[str]
    asked: Counter[str]

    @classmethod
    def of(cls, questions: Sequence[Question], answers: Sequence[str]) -> Result:
        """Count answers, in the order of their questions."""
        right: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        for question, text in zip(questions, answers, strict=True):
            asked[question.kind] += 1
            right[question.kind] += text == question.answer
        return cls(right, asked)

    def share(self, kinds: Sequence[str] | None = None) -> float:
        """Exact match over these kinds, or over all; 0 where none was asked."""
        chosen = self.asked.keys() if kinds is None else kinds
        asked = sum(self.asked[kind] for kind in chosen)
        return sum(self.right[kind] for kind in chosen) / asked if asked else 0.0

    def summary(self) -> dict[str, Any]:
        """Shares in percent: all, reading, and each kind."""
        return {
            "questions": sum(self.asked.values()),
            "exact_match": round(100 * self.share(), 2),
            "reading": round(100 * self.share(READING_KINDS), 2),
            "kinds": {kind: round(100 * self.share([kind]), 2) for kind in sorted(self.asked)},
        }


class Evaluator:
    """A checkpoint in transformers, float32.

    Attributes:
        model: the ``LlavaNextForConditionalGeneration``.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._processor: Any = load_processor(checkpoint)
        self.model: Any = load_model(checkpoint, torch.float32)

    def answers(
        self, samples: Sequence[Sample], fault: Fault | None = None, base: bool = False
    ) -> list[str]:
        """Greedy answers to the first question of each sample."""
        found: list[str] = [""] * len(samples)
        # By length, so that short answers do not wait for long ones.
        order = sorted(range(len(samples)), key=lambda at: len(samples[at].questions[0].answer))
        for first in range(0, len(order), _BATCH):
            places = order[first : first + _BATCH]
            texts = self._answer([samples[place] for place in places], fault, base)
            for place, text in zip(places, texts, strict=True):
                found[place] = text
        return found

    def evaluate(
        self, samples: Sequence[Sample], fault: Fault | None = None, base: bool = False
    ) -> Result:
        """Exact match over the first question of each sample."""
        questions = [sample.questions[0] for sample in samples]
        return Result.of(questions, self.answers(samples, fault, base))

    def _answer(self, samples: Sequence[Sample], fault: Fault | None, base: bool) -> list[str]:
        prompts = chat_prompts(self._processor, [sample.questions[0].text for sample in samples])
        with spoiled(fault), torch.no_grad():
            inputs = self._processor(
                images=[sample.image for sample in samples],
                text=prompts,
                padding=True,
                return_tensors="pt",
            )
            if base:
                inputs = self._thumbnails(inputs, prompts)
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=_MOST_TOKENS)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self._processor.batch_decode(new, skip_special_tokens=True)
        return texts

    def _thumbnails(self, inputs: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Inputs with one tile an image and one newline behind it, as the grid ``base`` has."""
        mark: str = self._processor.image_token
        tokenizer: Any = self._processor.tokenizer
        texts = [prompt.replace(mark, mark * (PATCHES + 1)) for prompt in prompts]
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
        model = self.model.model
        features = model.multi_modal_projector(
            model.vision_tower(
                inputs["pixel_values"][:, 0], output_hidden_states=True
            ).hidden_states[-2][:, 1:]
        )
        newline = model.image_newline.expand(len(features), 1, -1)
        packed = torch.cat([features, newline], dim=1)
        embeds = model.get_input_embeddings()(encoded["input_ids"])
        at = encoded["input_ids"] == tokenizer.convert_tokens_to_ids(mark)
        embeds = embeds.masked_scatter(at[..., None], packed)
        return {**encoded, "inputs_embeds": embeds}


def held_out(count: int, seed: int) -> list[Sample]:
    """The first held-out samples of a seed."""
    return [held_out_sample(seed, index) for index in range(count)]


def main(arguments: list[str] | None = None) -> int:
    """Evaluate a checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m llava_edge.bench.lab.pages.evaluate")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--grid", choices=("base",))
    given = parser.parse_args(arguments)
    result = Evaluator(given.checkpoint).evaluate(
        held_out(given.count, given.seed), given.fault, given.grid == "base"
    )
    summary = result.summary()
    for kind, share in summary["kinds"].items():
        print(f"{kind:18} {share:6.2f} of {result.asked[kind]}", file=sys.stderr)
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
