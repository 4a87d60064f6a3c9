"""The half of ``llava-edge bench`` that measures and compares, once the arguments were checked."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any, TextIO

from llava_edge.bench.common.artifact_facts import artifact_facts, certified_quality, short_names
from llava_edge.bench.common.atomic_write import atomic_write
from llava_edge.bench.common.machine import Rates, machine_card, machine_profile, measure_rates
from llava_edge.bench.quality import QualityTask, kept_answers, measure_alone
from llava_edge.bench.report.compare import compare, findings_table, machine_change, verdict_of
from llava_edge.bench.report.compare_notes import compare_notes
from llava_edge.bench.report.html import report_page
from llava_edge.bench.report.schema import SCHEMA_VERSION
from llava_edge.bench.report.table import bench_table
from llava_edge.bench.speed.cases import affordable_cases, speed_cases
from llava_edge.bench.speed.rows import SpeedRow, predicted_seconds
from llava_edge.bench.speed.run import FEWEST_ROUNDS, SpeedSettings, run_speed
from llava_edge.profiles.boards.detect import read_machine
from llava_edge.profiles.command_line import wrapped
from llava_edge.profiles.errors import (
    LlavaEdgeError,
    OutputError,
    OutputExistsError,
    RequestError,
    plain_reason,
)
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.cli.arguments import asked_cache
from llava_edge.runtime.quality.questions import QualityQuestion, read_quality_questions
from llava_edge.runtime.util.progress import ProgressLine

_MOST_SHOWN = 10
_BUDGET_SECONDS = 120.0
_ROUNDS, _THOROUGH_ROUNDS = 25, 9
"""At most so many in the usual time; more show smaller differences, and a drift of the machine."""


def measure(options: argparse.Namespace, opened: Mapping[str, Artifact]) -> int:
    """Measure, print, write, and return the exit code.

    Args:
        options: of the command.
        opened: artifacts by the name that the user gave.

    Raises:
        LlavaEdgeError: the questions cannot be read, or nothing could be measured.
    """
    questions = read_quality_questions(options.quality, options.limit) if options.quality else ()
    rates = measure_rates() if options.only != "quality" else None
    rows = {name: _unmeasured(name, artifact) for name, artifact in opened.items()}
    failed: dict[str, LlavaEdgeError] = {}
    with _opened(options.answers) as kept:
        try:
            if rates is not None:
                rates = _measure_speed(opened, options, rates, rows, failed)
            if questions:
                _measure_quality(opened, options, questions, rows, kept, failed)
        finally:
            # What was measured is kept even where another artifact fails or somebody interrupts.
            document = _document(rows, options, rates, failed)
            if document["rows"]:
                _write(document, options)
    if failed:
        if not document["rows"]:
            raise next(iter(failed.values()))
        for name, error in failed.items():
            print(wrapped(f"{name} could not be measured: {error}"), file=sys.stderr)
        return max(error.exit_code for error in failed.values())
    refused = [len(row["quality"]["refused"]) for row in rows.values() if questions]
    return 1 if len(questions) in refused else 0


def _write(document: Mapping[str, Any], options: argparse.Namespace) -> None:
    print(bench_table(document), file=sys.stderr)
    failed: list[OutputError] = []
    texts = {}
    if options.out:
        texts[options.out] = json.dumps(document, indent=1) + "\n"
    if options.html:
        texts[options.html] = report_page(document)
    for path, text in texts.items():
        try:
            atomic_write(path, text)
        except OutputError as error:
            failed.append(error)
    # Hours of work are not lost with a full disk.
    if options.json or failed:
        print(json.dumps(document))
    if failed:
        raise OutputError(
            f"{' '.join(map(str, failed))} The document stands on stdout instead; make room and "
            "keep it."
        )


def compare_and_print(options: argparse.Namespace, old: dict[str, Any], new: dict[str, Any]) -> int:
    """Compare two documents of ``--out``, print, and return the exit code: 1 where one is worse."""
    findings = compare(old, new)
    machine = machine_change(old, new)
    worse = [each for each in findings if each.is_worse]
    notes = compare_notes(old, new, findings)
    print("\n".join([findings_table(findings), "", *map(wrapped, notes)]).rstrip(), file=sys.stderr)
    verdict = verdict_of(findings)
    summary = (
        f"{verdict}: {len(worse)} of {len(findings)} figures became worse; a fixed piece of work "
        f"took the machine {machine:+.1%}"
    )
    print(f"\n{wrapped(summary)}", file=sys.stderr)
    if options.json:
        listed = [asdict(each) for each in findings]
        result = {"verdict": verdict, "machine_change": machine, "findings": listed}
        print(json.dumps({**result, "notes": notes}))
    return 1 if worse else 0


def _unmeasured(name: str, artifact: Artifact) -> dict[str, Any]:
    certificate = certified_quality(artifact.certificate)
    quality = None if certificate is None else {"certificate": certificate}
    return {**artifact_facts(name, artifact), "quality": quality}


def _measure_speed(
    opened: Mapping[str, Artifact],
    options: argparse.Namespace,
    rates: Rates,
    rows: dict[str, dict[str, Any]],
    failed: dict[str, LlavaEdgeError],
) -> Rates:
    """Fill the rows; the machine's rates, looked at again before every round and at the end."""
    looks = [rates]
    settings = _settings(options)
    if settings.budget_seconds is not None:
        cases = _affordable(opened, rates, settings.budget_seconds, settings.device)
        settings = replace(settings, cases=cases)
    progress = ProgressLine()
    found = run_speed(
        tuple(opened),
        settings,
        progress,
        before_round=lambda: looks.append(measure_rates()),
        on_failure=failed.__setitem__,
    )
    progress.clear()
    rates = reduce(Rates.best, looks, measure_rates())
    for name, rounds in found.items():
        measured = SpeedRow(name, opened[name], rounds, rates).to_json()
        rows[name] = {**measured, "quality": rows[name]["quality"]}
    return rates


def _affordable(
    opened: Mapping[str, Artifact], rates: Rates, budget_seconds: float, device: str
) -> tuple[str, ...]:
    """The same cases for all artifacts, as many as the fewest rounds will have time for."""
    seconds: dict[str, float] = {}
    for artifact in opened.values():
        chosen_device = device if device != "auto" else artifact.manifest.target
        profile, _ = machine_profile(chosen_device, rates)
        for case in speed_cases(artifact.manifest):
            took = FEWEST_ROUNDS * predicted_seconds(artifact.manifest, case, profile)
            seconds[case.name] = seconds.get(case.name, 0.0) + took
    chosen = affordable_cases(seconds, budget_seconds)
    if left := [name for name in seconds if name not in chosen]:
        said = f"left out for time (--thorough takes it): {'; '.join(left)}"
        print(wrapped(said), file=sys.stderr)
    return chosen


def _measure_quality(
    opened: Mapping[str, Artifact],
    options: argparse.Namespace,
    questions: tuple[QualityQuestion, ...],
    rows: dict[str, dict[str, Any]],
    kept: TextIO,
    failed: dict[str, LlavaEdgeError],
) -> None:
    loading = ("device", "threads", "allow_slow", "engine", "trust_engines", "strict_device")
    chosen = {name: getattr(options, name) for name in loading}
    chosen["cache"] = asked_cache(options.cache)
    task = QualityTask(questions, options.grid, options.max_new_tokens, chosen)
    for name in opened:
        if name in failed:
            continue
        try:
            row, result = measure_alone(name, task)
        except LlavaEdgeError as error:
            failed[name] = error
            continue
        quality = {**(rows[name]["quality"] or {}), **result.summary()}
        # Figures of the speed run stand where there are any: these are of whatever was asked.
        rows[name] = {**row, **rows[name], "quality": quality}
        try:
            for entry in kept_answers(name, questions, result):
                print(json.dumps(entry), file=kept)
            kept.flush()
        except OSError as error:
            failed[name] = OutputError(f"its answers could not be kept: {plain_reason(error)}")
        for message in result.refused[:_MOST_SHOWN]:
            print(message, file=sys.stderr)
        if len(result.refused) > _MOST_SHOWN:
            print(f"and {len(result.refused) - _MOST_SHOWN} more", file=sys.stderr)


def _settings(options: argparse.Namespace) -> SpeedSettings:
    usual = _THOROUGH_ROUNDS if options.thorough else _ROUNDS
    unlimited = options.thorough or options.rounds is not None
    return SpeedSettings(
        rounds=options.rounds or usual,
        budget_seconds=None if unlimited else _BUDGET_SECONDS,
        thorough=options.thorough,
        device=options.device,
        cache=options.cache,
        threads=options.threads,
        allow_slow=options.allow_slow,
        engine=options.engine,
        trust_engines=options.trust_engines,
        strict_device=options.strict_device,
    )


def _document(
    rows: Mapping[str, dict[str, Any]],
    options: argparse.Namespace,
    rates: Rates | None,
    failed: Mapping[str, LlavaEdgeError],
) -> dict[str, Any]:
    """What ``--json`` prints; rows that nothing was measured of are left out."""
    names = short_names(tuple(rows))
    found = {
        "schema_version": SCHEMA_VERSION,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_card(read_machine(), rates),
        "settings": asdict(_settings(options)),
        "rows": [{"name": names[folder], **row} for folder, row in rows.items() if "device" in row],
        "failed": {
            folder: {"type": type(error).__name__, "message": str(error)}
            for folder, error in failed.items()
        },
    }
    shortened: dict[str, Any] = _shortened(found)
    return shortened


def _shortened(value: Any) -> Any:
    """The same with six digits a number, which is more than any of them is good for.

    What is no number becomes None.
    """
    if isinstance(value, float):
        # JSON has no word for what a certificate may say of a broken model.
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _shortened(each) for key, each in value.items()}
    return [_shortened(each) for each in value] if isinstance(value, (list, tuple)) else value


def _opened(path: Path | None) -> TextIO:
    """The new file for answers, or one that keeps nothing."""
    try:
        return open(os.devnull, "w") if path is None else open(path, "x", encoding="utf-8")
    except FileExistsError as error:
        raise OutputExistsError(f"{path} exists. Choose another name for --answers.") from error
    except OSError as error:
        raise RequestError(f"--answers {path} cannot be written: {error.strerror}") from error
