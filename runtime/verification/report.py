"""The rows of a verification, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_edge.profiles.command_line import wrapped
from llava_edge.runtime.artifact.certificate import Deviation, Question, StageResult, overall
from llava_edge.runtime.util.json_codec import to_json

_TITLES: dict[Question, str] = {
    "export": "export fidelity: the artifact against torch with the same weights",
    "loss": "quantisation loss: the artifact against the checkpoint's own weights",
}
_HEAD = ("stage", "metric", "value", "bound", "verdict")
_SIGNS = {"pass": "pass", "fail": "FAIL", "inconclusive": "open"}


def stage_table(stages: Sequence[StageResult]) -> str:
    """A table, the two questions apart; what failed or is open says where below its row."""
    lines: list[str] = []
    rows = [_cells(stage) for stage in stages]
    widths = [max(len(row[i]) for row in (_HEAD, *rows)) for i in range(len(_HEAD))]
    for question, title in _TITLES.items():
        chosen = [
            (stage, row)
            for stage, row in zip(stages, rows, strict=True)
            if stage.question == question
        ]
        if not chosen:
            continue
        lines += [title, _line(_HEAD, widths)]
        for stage, row in chosen:
            lines.append(_line(row, widths))
            if stage.detail and stage.verdict != "pass":
                lines.append(wrapped(f"    {_plain(stage.detail)}", hang=0))
    return "\n".join(lines)


def verification_json(stages: Sequence[StageResult]) -> dict[str, Any]:
    """``passed``, ``verdict`` and ``stages``, as ``llava-edge verify --json`` prints them."""
    verdict = overall(stages)
    return {"passed": verdict == "pass", "verdict": verdict, "stages": to_json(list(stages))}


def verdict_line(stages: Sequence[StageResult]) -> str:
    """One sentence: passed, failed, or not enough evidence, and at which stages."""
    verdict = overall(stages)
    if verdict == "pass":
        return "passed"
    names = ", ".join(dict.fromkeys(_plain(s.name) for s in stages if s.verdict == verdict))
    return f"failed: {names}" if verdict == "fail" else f"inconclusive: {names}"


def deviation_line(found: Deviation | None) -> str:
    """A line about the first tensor outside its bound; empty where there is none."""
    if found is None:
        return ""
    line = wrapped(
        f"First tensor outside its bound: {_plain(found.tensor)}, {found.value:.3g} of its range "
        f"(bound {found.bound:.3g}); ours {found.ours}, the reference's {found.theirs}."
    )
    return f"{line}\n"


def _cells(stage: StageResult) -> tuple[str, ...]:
    return (
        _plain(stage.name),
        _plain(stage.metric),
        _number(stage.value),
        _number(stage.bound),
        _SIGNS[stage.verdict],
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell.rjust(width) if index in (2, 3) else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"  {'  '.join(padded)}".rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _plain(text: str) -> str:
    """Without control characters: a detail may quote what stands in a file."""
    return "".join(character if character.isprintable() else "?" for character in text)
