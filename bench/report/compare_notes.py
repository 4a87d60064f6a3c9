"""Compare notes: what a reader must know of two results before believing their comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_edge.bench.report.compare import Finding, common_cases, rows_by_name
from llava_edge.bench.report.table import busy_note

_ROW_SETTINGS = ("engine", "cache", "vision_precision", "context_tokens")
_RUN_SETTINGS = ("threads", "allow_slow", "strict_device", "prefill_chunk", "cuda")
"""Of ``settings``; the others choose what is asked or how often, which rounds and cases show."""


def compare_notes(
    old: Mapping[str, Any], new: Mapping[str, Any], findings: Sequence[Finding]
) -> list[str]:
    """Sentences, none where there is nothing to say.

    Args:
        old: as ``read_bench`` returns it.
        new: the same.
        findings: what ``compare`` found in both.
    """
    before, after = rows_by_name(old), rows_by_name(new)
    notes = []
    for names, others, which in ((before, after, "old"), (after, before, "new")):
        if lone := [name for name in names if name not in others]:
            notes.append(f"only in the {which} file, so not compared: {', '.join(lone)}")
    settings = [document.get("settings", {}) for document in (old, new)]
    notes += _differing("measured with", _RUN_SETTINGS, *settings)
    for name in before:
        if name in after:
            was, now = before[name], after[name]
            notes += _differing(f"{name}:", _ROW_SETTINGS, was, now)
            same = {case["name"] for case, _ in common_cases(was, now)}
            asked = dict.fromkeys(case["name"] for case in (*was["cases"], *now["cases"]))
            if left := [each for each in asked if each not in same]:
                notes.append(
                    f"{name}: not asked alike in both files, so left out, and peak memory with "
                    f"it: {', '.join(left)}"
                )
    times = [each for each in findings if each.unit == "s" and each.verdict != "not judged"]
    if blind := [each for each in times if each.detectable is None]:
        notes.append(
            f"{len(blind)} of {len(times)} times were taken in too few rounds, for how they "
            "scatter, to show even a change of ten times. Measure both with --rounds 10 or more "
            "while nothing else runs"
        )
    for document, which in ((old, "old"), (new, "new")):
        if busy := busy_note(document):
            notes.append(f"the {which} file: {busy}")
    if any(each.verdict == "not judged" for each in findings):
        notes.append("times are not judged for that: measure both while nothing else runs")
    if any(row["weights"] == "random" for row in (*before.values(), *after.values())):
        notes.append("* weights drawn at random")
    return notes


def _differing(
    what: str, names: Sequence[str], old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[str]:
    return [
        f"{what} {name.replace('_', ' ')} {old.get(name)!r} before, {new.get(name)!r} now"
        for name in names
        if old.get(name) != new.get(name)
    ]
