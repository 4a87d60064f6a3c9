"""``make demo``: the small trained model from its checkpoint to answers, at every precision.

Draws held-out pages, converts the checkpoint that ships with the project at fp16, int8 and int4,
asks every artifact and transformers the same questions, saves a contact sheet and prints what each
precision costs and gives. What the commands say goes into a log. Exits 1 where an answer at fp16
differs from transformers'.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import transformers

from llava_edge.bench.lab.pages.commands import ask, convert, write_calibration
from llava_edge.bench.lab.pages.contact_sheet import COLUMNS, Panel, contact_sheet
from llava_edge.bench.lab.pages.demo_text import one_question, places, step, table
from llava_edge.bench.lab.pages.drawing.draw import FILE, write_questions
from llava_edge.bench.lab.pages.drawing.sample import Sample
from llava_edge.bench.lab.pages.drawing.text_page import READING_KINDS
from llava_edge.bench.lab.pages.evaluate import Evaluator, held_out
from llava_edge.bench.lab.pages.training.checkpoint import SHIPPED

FOLDER = Path("artifacts/demo")
PRECISIONS = ("fp16", "int8", "int4")
NUM_QUESTIONS, SEED = 150, 2
_QUESTIONS, _PAGES = FOLDER / "questions", FOLDER / "calibration"
_ANSWERS, _LOG, _SHEET = FOLDER / "answers.jsonl", FOLDER / "log.txt", FOLDER / "contact-sheet.png"


def main() -> int:
    """Run the demo and return its exit code."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with open(_LOG, "w", encoding="utf-8") as log:
            return _run(log)
    except subprocess.CalledProcessError as error:
        print(f"\n{_LOG.read_text('utf-8', 'replace')}\nerror: {error}", file=sys.stderr)
        return 1


def _run(log: TextIO) -> int:
    started = time.monotonic()
    print("A small trained LLaVA-NeXT model: from its checkpoint to answers.\n", flush=True)
    with step(f"draw pages and {NUM_QUESTIONS} questions, none seen in training"):
        write_questions(_QUESTIONS, NUM_QUESTIONS, SEED)
        write_calibration(_PAGES)
    for precision in PRECISIONS:
        options = () if precision == "fp16" else ("--calibration", str(_PAGES))
        with step(f"convert to {precision}"):
            convert(SHIPPED, FOLDER / precision, precision, options, log)
    rows: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[str]] = {}
    for precision in PRECISIONS:
        with step(f"ask {precision}"):
            _ask(precision, rows, answers, log)
    with step("ask transformers (the checkpoint in float32)"):
        samples = held_out(NUM_QUESTIONS, SEED)
        answers["transformers"] = Evaluator(SHIPPED).answers(samples)
    contact_sheet(_panels(samples, answers)).save(_SHEET)
    truths = [sample.questions[0].answer for sample in samples]
    right = {
        name: sum(said == truth for said, truth in zip(given, truths, strict=True))
        for name, given in answers.items()
    }
    first = PRECISIONS[0]
    same = sum(a == b for a, b in zip(answers["transformers"], answers[first], strict=True))
    print(f"  {'':60}{time.monotonic() - started:8.1f} s\n")
    print(f"{table(rows, right, len(truths))}\n")
    print(f"  {first} gives the answer of transformers to {same} of {len(truths)} questions.\n")
    print(f"{_example(samples, answers)}\n")
    print(places(FOLDER, _PLACES))
    return 0 if same == len(truths) else 1


_PLACES = {
    ", ".join(PRECISIONS): "artifacts, for llava-edge run",
    _SHEET.name: "a question of each kind: picture, answers and truth",
    f"{_QUESTIONS.name}/": "pictures and questions",
    _ANSWERS.name: "every answer",
    _LOG.name: "what the commands said",
}


def _ask(
    precision: str,
    rows: dict[str, dict[str, Any]],
    answers: dict[str, list[str]],
    log: TextIO,
) -> None:
    """Ask one artifact; its answers go to the end of the file of all."""
    own = FOLDER / f"answers-{precision}.jsonl"
    found, said = ask({precision: FOLDER / precision}, _QUESTIONS / FILE, own, log=log)
    rows |= found
    answers |= said
    with open(_ANSWERS, "a", encoding="utf-8") as file:
        file.write(own.read_text("utf-8"))
    own.unlink()


def _example(samples: list[Sample], answers: dict[str, list[str]]) -> str:
    """The first question that has to be read from the picture."""
    kinds = [sample.questions[0].kind for sample in samples]
    place = next(place for place, kind in enumerate(kinds) if kind in READING_KINDS)
    question = samples[place].questions[0]
    said = {name: given[place] for name, given in answers.items()}
    picture = Path(_QUESTIONS.name, "images", f"{place:05}.png")
    return one_question(picture, question.text, question.answer, said)


def _panels(samples: list[Sample], answers: dict[str, list[str]]) -> list[Panel]:
    """The first question of each kind."""
    shown: dict[str, Panel] = {}
    for place, sample in enumerate(samples):
        question = sample.questions[0]
        said = {name: answers[name][place] for name in PRECISIONS}
        shown.setdefault(question.kind, Panel(sample.image, question.text, question.answer, said))
    # Whole rows look better than a last one with a single picture.
    return list(shown.values())[: len(shown) // COLUMNS * COLUMNS]


if __name__ == "__main__":
    sys.exit(main())
