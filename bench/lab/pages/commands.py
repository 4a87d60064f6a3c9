"""The project's commands on the small model, as a user would run them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from llava_edge.bench.common.subprocess_runner import program, run_fresh
from llava_edge.bench.lab.pages.drawing.draw import write_questions

PROFILE = "cpu-16gb"
NUM_CALIBRATION, CALIBRATION_SEED = 48, 9000
"""Calibration takes pages of the training stream, behind the ones that the training run used."""


def convert(
    checkpoint: Path,
    artifact: Path,
    precision: str,
    options: Sequence[str] = (),
    log: TextIO | None = None,
) -> None:
    """Run ``llava-edge convert``; ``log`` receives what it says on stderr.

    Raises:
        subprocess.CalledProcessError: it failed, and said why on stderr.
    """
    chosen = ["--profile", PROFILE, "--precision", precision, *options]
    command = [program("llava-edge"), "convert", str(checkpoint), str(artifact), *chosen]
    run_fresh(command, log=log)


def write_calibration(folder: Path) -> None:
    """Write the pages that ``convert --calibration`` takes."""
    write_questions(folder, NUM_CALIBRATION, CALIBRATION_SEED, training=True)


def ask(
    artifacts: Mapping[str, Path],
    questions: Path,
    kept: Path,
    options: Sequence[str] = (),
    log: TextIO | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """Run ``llava-edge bench --quality``.

    Args:
        artifacts: by a name of one's own.
        questions: the JSONL file.
        kept: file for the answers; must not exist.
        options: of the command.
        log: receives what it says on stderr; this process's own stderr unless given.

    Returns:
        Rows of its JSON and the answers in the order of the questions, both by name; a question
        that was refused has an empty answer.

    Raises:
        subprocess.CalledProcessError: it failed, and said why on stderr.
    """
    command = [program("llava-edge"), "bench", *map(str, artifacts.values()), "--json"]
    command += ["--only", "quality"]
    command += ["--quality", str(questions), "--answers", str(kept), *options]
    found = run_fresh(command, log=log).result()["rows"]
    rows = dict(zip(artifacts, found, strict=True))
    names = {str(artifact): name for name, artifact in artifacts.items()}
    answers: dict[str, list[str]] = {name: [] for name in artifacts}
    for line in kept.read_text("utf-8").splitlines():
        entry = json.loads(line)
        answers[names[entry["artifact"]]].append(entry["prediction"] or "")
    return rows, answers
