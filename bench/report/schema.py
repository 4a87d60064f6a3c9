"""Bench file: what ``llava-edge bench --out`` wrote, read again and checked before it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_edge.profiles.errors import RequestError, plain_reason, shorten

SCHEMA_VERSION = 2
"""Of what ``bench --json`` prints; grows when a key changes its meaning."""

_TEXTS = ("artifact", "variant", "precision", "weights", "device")
_COUNTS = ("image_tokens", "answer_tokens", "num_images", "tiles_per_image")


def read_bench(path: Path) -> dict[str, Any]:
    """A result with times.

    Raises:
        RequestError: it cannot be read, is none, is of another schema, holds no times, or lacks
            something that a comparison takes; every fault is listed.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"--compare {path} cannot be read: {plain_reason(error)}") from error
    rows = document.get("rows") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not isinstance(document.get("machine"), dict):
        raise RequestError(f"--compare {path} is no result of llava-edge bench --out.")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise RequestError(
            f"--compare {path} has schema_version {document.get('schema_version')!r:.40}; this "
            f"build reads {SCHEMA_VERSION}. Measure again with one build for both files."
        )
    if not any("cases" in row for row in rows if isinstance(row, dict)):
        raise RequestError(
            f"--compare {path} holds no times. Measure again without --only quality."
        )
    faults: list[str] = []
    if not _is_number(document["machine"].get("cores")):
        faults.append("machine.cores is no number above 0")
    if not isinstance(document.get("settings", {}), dict):
        faults.append("settings is no object")
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            faults.append(f"rows[{place}] is no object")
        elif "cases" in row:
            _check_row(f"rows[{place}]", row, faults)
    if faults:
        raise RequestError(
            f"--compare {path} is damaged: {shorten(faults, 5)}. Measure again with --out."
        )
    found: dict[str, Any] = document
    return found


def _check_row(where: str, row: Mapping[str, Any], faults: list[str]) -> None:
    for name in _TEXTS:
        if not isinstance(row.get(name), str):
            faults.append(f"{where}.{name} is no text")
    if not _is_number(row.get("parameters")):
        faults.append(f"{where}.parameters is no number above 0")
    peak = row.get("peak_memory")
    if not isinstance(peak, dict) or not _is_number(peak.get("host_bytes")):
        faults.append(f"{where}.peak_memory.host_bytes is no number above 0")
    elif peak.get("device_bytes") is not None and not _is_number(peak["device_bytes"]):
        faults.append(f"{where}.peak_memory.device_bytes is neither null nor a number above 0")
    first = row.get("load_seconds")
    rounds = len(first["rounds"]) if isinstance(first, dict) and _has_rounds(first) else None
    for name in ("load_seconds", "yardstick_seconds"):
        _check_rounds(f"{where}.{name}", row.get(name), rounds, faults)
    loads = row.get("load_average", [])
    if not isinstance(loads, list) or not all(_is_pair(each) for each in loads):
        faults.append(f"{where}.load_average is no list of pairs of numbers")
    cases = row["cases"]
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        faults.append(f"{where}.cases is no list of objects")
        return
    for place, case in enumerate(cases):
        inside = f"{where}.cases[{place}]"
        if not isinstance(case.get("name"), str):
            faults.append(f"{inside}.name is no text")
        faults += [f"{inside}.{name} is missing" for name in _COUNTS if name not in case]
        for name in ("ttft_seconds", "decode_tokens_per_second"):
            _check_rounds(f"{inside}.{name}", case.get(name), rounds, faults)


def _check_rounds(where: str, found: Any, rounds: int | None, faults: list[str]) -> None:
    """A spread whose rounds are as many as those of the row, each finite and above 0."""
    if not isinstance(found, dict) or not _has_rounds(found):
        faults.append(f"{where}.rounds is no list of numbers above 0")
    elif rounds is not None and len(found["rounds"]) != rounds:
        faults.append(f"{where} has {len(found['rounds'])} rounds, load_seconds {rounds}")


def _has_rounds(found: Mapping[str, Any]) -> bool:
    values = found.get("rounds")
    return isinstance(values, list) and bool(values) and all(_is_number(each) for each in values)


def _is_pair(value: Any) -> bool:
    """Of loads of the machine, which may be 0."""
    return isinstance(value, list) and all(each == 0 or _is_number(each) for each in value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # A whole number of a file may be larger than any float.
    return 0 < value < math.inf and value < 1e300
