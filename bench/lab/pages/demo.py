"""``make demo``: the small trained model from its checkpoint to answers, at every precision.

Draws held-out pages, converts the checkpoint that ships with the project at fp16, int8 and int4,
asks every artifact and transformers the same questions, saves a contact sheet and prints what each
precision costs and gives. Exits 1 where an answer at fp16 differs from transformers'.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from llava_edge.bench.lab.pages.commands import ask, convert, write_calibration
from llava_edge.bench.lab.pages.contact_sheet import COLUMNS, Panel, contact_sheet
from llava_edge.bench.lab.pages.drawing.draw import FILE, write_questions
from llava_edge.bench.lab.pages.drawing.sample import Sample
from llava_edge.bench.lab.pages.evaluate import Evaluator, held_out
from llava_edge.bench.lab.pages.training.checkpoint import SHIPPED

FOLDER = Path("artifacts/demo")
PRECISIONS = ("fp16", "int8", "int4")
NUM_QUESTIONS, SEED = 150, 2


def main() -> int:
    """Run the demo and return its exit code."""
    started = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    _say(f"1. {NUM_QUESTIONS} questions about drawn pages, none seen in training")
    write_questions(FOLDER / "questions", NUM_QUESTIONS, SEED)
    write_calibration(FOLDER / "calibration")
    artifacts = {precision: FOLDER / precision for precision in PRECISIONS}
    for precision, artifact in artifacts.items():
        _say(f"2. llava-edge convert --precision {precision}")
        options = () if precision == "fp16" else ("--calibration", str(FOLDER / "calibration"))
        convert(SHIPPED, artifact, precision, options)
    _say("3. llava-edge bench --quality")
    rows, answers = ask(artifacts, FOLDER / "questions" / FILE, FOLDER / "answers.jsonl")
    _say("4. transformers on the same questions, float32")
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    samples = held_out(NUM_QUESTIONS, SEED)
    reference = Evaluator(SHIPPED).answers(samples)
    sheet = FOLDER / "contact-sheet.png"
    contact_sheet(_panels(samples, answers)).save(sheet)
    print(f"\n{_table(rows)}\n")
    wanted = [sample.questions[0].answer for sample in samples]
    right = sum(said == truth for said, truth in zip(reference, wanted, strict=True))
    same = sum(a == b for a, b in zip(reference, answers[PRECISIONS[0]], strict=True))
    print(
        f"transformers: {100 * right / len(wanted):.1f} % right; the same answer as "
        f"{PRECISIONS[0]} here to {same} of {len(wanted)} questions\n"
        f"pictures, questions and answers: {sheet}\n"
        f"artifacts: {', '.join(map(str, artifacts.values()))}\n"
        f"{time.monotonic() - started:.0f} seconds"
    )
    return 0 if same == len(wanted) else 1


def _panels(samples: list[Sample], answers: dict[str, list[str]]) -> list[Panel]:
    """The first question of each kind."""
    shown: dict[str, Panel] = {}
    for place, sample in enumerate(samples):
        question = sample.questions[0]
        said = {name: answers[name][place] for name in PRECISIONS}
        shown.setdefault(question.kind, Panel(sample.image, question.text, question.answer, said))
    # Whole rows look better than a last one with a single picture.
    return list(shown.values())[: len(shown) // COLUMNS * COLUMNS]


def _table(rows: Mapping[str, dict[str, Any]]) -> str:
    lines = ["precision               size MiB   peak MiB   first token ms   tokens/s   right %"]
    for row in rows.values():
        lines.append(
            f"{row['precision']:21} {row['artifact_bytes'] / 2**20:10.1f} "
            f"{row['peak_memory']['host_bytes'] / 2**20:10.0f} "
            f"{1000 * row['ttft_seconds']:16.0f} {row['decode_tokens_per_second']:10.0f} "
            f"{row['quality']['exact_match']:9.1f}"
        )
    return "\n".join(lines)


def _say(step: str) -> None:
    print(step, flush=True)


if __name__ == "__main__":
    sys.exit(main())
