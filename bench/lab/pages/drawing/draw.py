"""Drawing: questions and their pictures, written to a folder.

``python -m llava_edge.bench.lab.pages.drawing.draw --out DIR --count N --seed S``

``DIR/questions.jsonl`` has a line for each: ``image`` (a PNG in the folder), ``question``,
``answer`` (as a calibration folder has it), ``answers`` (as ``bench --quality`` reads it) and
``kind``. The pages are held out from training; with ``--training`` they are of the stream
that training takes its pages from, which is what weights should be calibrated on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llava_edge.bench.lab.pages.atomic_folder import whole_folder
from llava_edge.bench.lab.pages.drawing.sample import Sample, held_out_sample, training_sample

FILE = "questions.jsonl"


def write_questions(folder: Path, count: int, seed: int = 0, training: bool = False) -> None:
    """Write a folder of questions; it appears whole or not at all.

    Args:
        folder: must not exist.
        count: questions, each with a page of its own.
        seed: of held-out pages; for training pages, the number of the first is ``seed * count``.
        training: take pages of the stream that training uses.

    Raises:
        OutputExistsError: the folder exists.
    """
    with whole_folder(Path(folder)) as made:
        (made / "images").mkdir()
        with (made / FILE).open("w", encoding="utf-8") as lines:
            for index in range(count):
                sample = (
                    training_sample(seed * count + index, 1)
                    if training
                    else held_out_sample(seed, index)
                )
                name = f"images/{index:05}.png"
                sample.image.save(made / name)
                print(json.dumps(_entry(name, sample)), file=lines)


def _entry(name: str, sample: Sample) -> dict[str, object]:
    question = sample.questions[0]
    return {
        "image": name,
        "question": question.text,
        "answer": question.answer,
        "answers": [question.answer],
        "kind": question.kind,
    }


def main(arguments: list[str] | None = None) -> int:
    """Write a folder of questions."""
    parser = argparse.ArgumentParser(prog="python -m llava_edge.bench.lab.pages.drawing.draw")
    parser.add_argument("--out", type=Path, required=True, help="folder that does not exist yet")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", action="store_true", help="of the training stream")
    given = parser.parse_args(arguments)
    write_questions(given.out, given.count, given.seed, given.training)
    return 0


if __name__ == "__main__":
    sys.exit(main())
