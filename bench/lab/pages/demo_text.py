"""What ``make demo`` prints: steps with their times, one table, one question with its answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_edge.profiles.command_line import wrapped
from llava_edge.profiles.sizes import format_bytes

_LABEL = 60


@contextlib.contextmanager
def step(label: str) -> Iterator[None]:
    """Print a step when it starts, and its time on the same line when it ends."""
    print(f"  {label:{_LABEL}}", end="", flush=True)
    started = time.monotonic()
    try:
        yield
    except BaseException:
        print("  failed", flush=True)
        raise
    print(f"{time.monotonic() - started:8.1f} s", flush=True)


def table(rows: Mapping[str, dict[str, Any]], right: Mapping[str, int], num_questions: int) -> str:
    """Size, memory, speed and right answers of each precision.

    Args:
        rows: of ``llava-edge bench --json``, by precision.
        right: number of right answers, by who gave them; names without a row have that alone.
        num_questions: that were asked.
    """
    lines = [f"  {'':14}{'size':>10}{'memory':>12}{'first token':>13}{'tokens/s':>10}{'right':>16}"]
    for name, count in right.items():
        row = rows.get(name)
        cells = " " * 45
        if row is not None:
            cells = (
                f"{format_bytes(row['artifact_bytes']):>10}"
                f"{format_bytes(row['peak_memory']['host_bytes']):>12}"
                f"{1000 * row['ttft_seconds']:>10.0f} ms"
                f"{row['decode_tokens_per_second']:>10.0f}"
            )
        share = f"{count} ({100 * count / num_questions:.1f} %)"
        lines.append(f"  {name:14}{cells}{share:>16}")
    return "\n".join(lines)


def one_question(picture: Path, question: str, truth: str, answers: Mapping[str, str]) -> str:
    """A question, and each different answer once with all who gave it."""
    by_answer: dict[str, list[str]] = {}
    for name, answer in answers.items():
        by_answer.setdefault(answer, []).append(name)
    lines = [f"  {question}  ({picture})"]
    for answer, names in by_answer.items():
        verdict = "right" if answer == truth else f"wrong, it is {truth}"
        lines.append(f"    {', '.join(names)}: {answer or '(nothing)'} - {verdict}")
    return "\n".join(wrapped(line) for line in lines)


def places(folder: Path, found: Mapping[str, str]) -> str:
    """What lies in a folder, which is named once."""
    width = max(map(len, found)) + 2
    lines = [f"  {name:{width}}{text}" for name, text in found.items()]
    return "\n".join([f"In {folder}:", *(wrapped(line, hang=width) for line in lines)])
