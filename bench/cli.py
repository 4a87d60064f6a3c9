"""``llava-edge bench ARTIFACT… --quality DATA.jsonl``: artifacts on the same questions.

Each artifact answers in a process of its own, so that its peak memory is its own. The table goes to
stderr. With ``--json`` the last line of stdout is one object with a row an artifact; with
``--answers FILE`` every answer is kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from llava_edge.bench.quality_questions import QualityQuestion, read_quality_questions
from llava_edge.bench.quality_run import QualityResult, measure_quality
from llava_edge.profiles.errors import EngineError, OutputExistsError, RequestError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact import open_artifact
from llava_edge.runtime.host_memory import peak_host_bytes
from llava_edge.runtime.progress import ProgressLine

_MOST_SHOWN = 10
_COLUMNS = ("exact_match", "anls", "relaxed_accuracy", "multiple_choice")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    questions = read_quality_questions(options.quality, options.limit)
    for artifact in options.artifact:
        # What cannot be opened is said before an hour is spent on the others.
        open_artifact(artifact, verify_digests=False)
    rows: list[dict[str, Any]] = []
    task = _Task(questions, options.grid, options.max_new_tokens, options.threads)
    with _opened(options.answers) as kept:
        try:
            for artifact in options.artifact:
                row, result = _measure_alone(artifact, task)
                rows.append(row)
                for entry in _answers(artifact, questions, result):
                    print(json.dumps(entry), file=kept)
                kept.flush()
                for message in result.refused[:_MOST_SHOWN]:
                    print(message, file=sys.stderr)
                if len(result.refused) > _MOST_SHOWN:
                    print(f"and {len(result.refused) - _MOST_SHOWN} more", file=sys.stderr)
        finally:
            # What was measured is shown even where a later artifact fails.
            if rows:
                print(_table(rows), file=sys.stderr)
    if options.json:
        print(json.dumps({"rows": rows}))
    all_refused = any(len(row["quality"]["refused"]) == len(questions) for row in rows)
    return 1 if all_refused else 0


def _opened(path: Path | None) -> TextIO:
    """The new file for answers, or one that keeps nothing."""
    try:
        return open(os.devnull, "w") if path is None else open(path, "x", encoding="utf-8")
    except FileExistsError as error:
        raise OutputExistsError(f"{path} exists. Choose another name for --answers.") from error
    except OSError as error:
        raise RequestError(f"--answers {path} cannot be written: {error.strerror}") from error


def _measure_alone(artifact: str, task: _Task) -> tuple[dict[str, Any], QualityResult]:
    # Spawned, as a forked child would count this process's memory in its own peak.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as alone:
        try:
            return alone.submit(_measure, artifact, task).result()
        except BrokenProcessPool as error:
            raise EngineError(
                f"the process that ran {artifact} ended without a word, as when memory runs out. "
                "Close other programs, or ask with a lower --grid."
            ) from error
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


@dataclass(frozen=True)
class _Task:
    """What every artifact is asked, and how."""

    questions: tuple[QualityQuestion, ...]
    grid: str | None
    max_new_tokens: int
    threads: int


def _measure(artifact: str, task: _Task) -> tuple[dict[str, Any], QualityResult]:
    progress = ProgressLine()
    with LlavaEdge.load(
        artifact, threads=task.threads, prefix_reuse=False, progress=progress
    ) as model:
        result = measure_quality(model, task.questions, task.grid, task.max_new_tokens, progress)
        progress.clear()
        return _row(artifact, model, result), result


def _row(artifact: str, model: LlavaEdge, result: QualityResult) -> dict[str, Any]:
    return {
        "artifact": artifact,
        "precision": model.artifact.manifest.precision.language_model,
        "device": model.device,
        "artifact_bytes": sum(entry.bytes for entry in model.artifact.manifest.files.values()),
        "peak_memory": {"host_bytes": peak_host_bytes(), "device_bytes": None},
        "ttft_seconds": result.ttft_seconds,
        "decode_tokens_per_second": result.decode_tokens_per_second,
        "quality": result.summary(),
    }


def _answers(
    artifact: str, questions: tuple[QualityQuestion, ...], result: QualityResult
) -> list[dict[str, Any]]:
    return [
        {
            "artifact": artifact,
            "question": question.question,
            "answers": list(question.answers),
            "kind": question.kind,
            "prediction": prediction,
        }
        for question, prediction in zip(questions, result.predictions, strict=True)
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    columns = [name for name in _COLUMNS if any(row["quality"][name] is not None for row in rows)]
    names = [name.replace("_", " ") for name in columns]
    heads = ["artifact", "precision", "questions", "refused", *names]
    cells = [heads]
    for row in rows:
        quality = row["quality"]
        shares = ["" if quality[name] is None else f"{quality[name]:.2f} %" for name in columns]
        counts = [str(quality["questions"]), str(len(quality["refused"]))]
        cells.append([row["artifact"], row["precision"], *counts, *shares])
    widths = [max(len(line[at]) for line in cells) for at in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-edge bench", description="Measure artifacts.")
    parser.add_argument("artifact", nargs="+", help="folder that llava-edge convert wrote")
    parser.add_argument(
        "--quality",
        type=Path,
        required=True,
        metavar="DATA.jsonl",
        help="lines of image, question, answers, and choices where there are any",
    )
    parser.add_argument("--limit", type=_count, help="ask the first so many questions")
    parser.add_argument("--grid", help="lower the AnyRes grid, for instance base or 1x2")
    parser.add_argument("--max-new-tokens", type=_count, default=64)
    parser.add_argument("--threads", type=int, default=0, help="0: one a physical core")
    parser.add_argument("--answers", type=Path, help="keep every answer in this new file")
    parser.add_argument("--json", action="store_true", help="one JSON object as last stdout line")
    return parser
