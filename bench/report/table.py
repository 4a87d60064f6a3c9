"""Bench table: rows of ``bench --json`` for a terminal, the fewest columns that decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_edge.bench.speed.cases import FULL
from llava_edge.profiles.command_line import COLUMNS, wrapped

MIB = 1 << 20
_QUALITY = ("exact_match", "anls", "relaxed_accuracy", "multiple_choice")


def bench_table(document: Mapping[str, Any]) -> str:
    """Everything that was measured, as text within 80 columns."""
    rows = document["rows"]
    parts = [wrapped(machine_line(document["machine"]))]
    timed = [row for row in rows if "cases" in row]
    if timed:
        parts += [_speed(timed), _cases(timed), _checks(timed)]
        if note := rounds_note(timed):
            parts.append(wrapped(note))
    asked = [row for row in rows if "questions" in (row["quality"] or {})]
    if asked:
        parts.append(_quality(asked))
    if busy := busy_note(document):
        parts.append(wrapped(busy))
    if any(row["weights"] == "random" for row in rows):
        parts.append(
            wrapped(
                "* Weights drawn at random: time and memory are those of a trained model of this "
                "shape, what its answers are worth is not."
            )
        )
    return "\n\n".join(parts)


def machine_line(machine: Mapping[str, Any]) -> str:
    """Processor, rates, versions."""
    rates = ""
    if "bandwidth_bytes_per_second" in machine:
        rates = (
            f", reads {machine['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s and multiplies "
            f"{machine['float32_operations_per_second'] / 1e9:.0f} GFLOP/s in float32 (measured)"
        )
    gpus = "".join(f", {gpu['name']}" for gpu in machine.get("gpus", ()))
    load = machine.get("load_average")
    busy = "" if load is None else f", load average {load:.1f}"
    return (
        f"{machine['processor']}, {machine.get('usable_cores', machine['cores'])} cores{gpus}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB{rates}, ONNX Runtime "
        f"{machine.get('onnxruntime', 'unknown')}, commit {machine.get('commit') or 'unknown'}"
        f"{busy}"
    )


def busy_note(document: Mapping[str, Any]) -> str:
    """A sentence where other work shared the cores while times were taken; else empty."""
    machine = document["machine"]
    cores = machine.get("usable_cores", machine["cores"])
    pairs = [pair for row in document["rows"] for pair in row.get("load_average", ())]
    loads = [each for pair in pairs for each in pair]
    # Our own threads are part of the load; they are no more than there are cores.
    if not loads or max(loads) <= 1.5 * cores:
        return ""
    return (
        f"Other work shared the {cores} cores (load average up to {max(loads):.1f}): times are "
        "upper bounds, rates lower ones, and the order of close figures may be chance. Memory is "
        "exact."
    )


def row_name(row: Mapping[str, Any]) -> str:
    """Short name of the artifact, with a star where its weights are random."""
    # Results of before rows had names have the folder alone.
    name: str = row.get("name") or Path(row["artifact"]).name or row["artifact"]
    return name + ("*" if row["weights"] == "random" else "")


def columns(cells: Sequence[Sequence[str]]) -> str:
    """Text in columns, numbers to the right.

    What does not fit into 80 columns follows in a further block, under the first column again.
    """
    places = range(len(cells[0]))
    widths = [max(len(line[at]) for line in cells) for at in places]
    numeric = [at > 0 and any(line[at][:1].isdigit() for line in cells[1:]) for at in places]
    blocks: list[list[int]] = [[]]
    for at in places[1:]:
        filled = widths[0] + sum(2 + widths[each] for each in (*blocks[-1], at))
        if blocks[-1] and filled >= COLUMNS:
            blocks.append([])
        blocks[-1].append(at)
    return "\n\n".join(
        "\n".join(
            "  ".join(
                line[at].rjust(widths[at]) if numeric[at] else line[at].ljust(widths[at])
                for at in (0, *block)
            ).rstrip()
            for line in cells
        )
        for block in blocks
    )


def seconds(value: float) -> str:
    """Three digits, in the unit that suits."""
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def share_of_bandwidth(row: Mapping[str, Any]) -> str:
    """What decoding reached of the rate at which memory is read."""
    share = row["roofline_fraction"]
    return "unknown" if share is None else f"{share:.0%}"


def ranged(found: Mapping[str, Any], shown: Any = seconds, to: str = " to ") -> str:
    """Median, and lowest to highest of the rounds."""
    low, high = shown(found["low"]), shown(found["high"])
    if low.partition(" ")[2] == high.partition(" ")[2]:
        low = low.partition(" ")[0]
    return f"{shown(found['median'])} ({low}{to}{high})"


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            *("artifact", "precision", "size MiB", "peak MiB", "predicted", "load"),
            *("first token", "prompt tok/s", "tok/s", "of bandwidth", "loss (KL)"),
        ]
    ]
    for row in rows:
        peak, predicted = row["peak_memory"], row["predicted_memory"]
        on_gpu = peak["device_bytes"] is not None
        key = "device_bytes" if on_gpu else "host_bytes"
        loss = ((row["quality"] or {}).get("certificate") or {}).get("kl_divergence")
        cells.append(
            [
                row_name(row),
                row["precision"],
                f"{row['artifact_bytes'] / MIB:,.1f}",
                f"{peak[key] / MIB:,.0f}" + (" (GPU)" if on_gpu else ""),
                f"{predicted[key] / MIB:,.0f}",
                seconds(row["load_seconds"]["median"]),
                seconds(row["ttft_seconds"]),
                f"{row['prefill_tokens_per_second']:,.0f}",
                f"{row['decode_tokens_per_second']:,.1f}",
                share_of_bandwidth(row),
                "" if loss is None else f"{loss:.3g}",
            ]
        )
    head = f"Time to first token and rates: {case_title(rows)}."
    return f"{wrapped(head)}\n{columns(cells)}"


def case_title(rows: Sequence[Mapping[str, Any]]) -> str:
    """The prompt that the figures of these rows speak of, which a small context may choose."""
    cases = {row_name(row): row["case"] for row in rows}
    if len(set(cases.values())) > 1:
        return "; ".join(f"{name}: {case}" for name, case in cases.items())
    case: str = rows[0]["case"]
    return f"{case} on the artifact's own grid" if case == FULL else case


def rounds_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence where nothing was repeated; else empty."""
    if all(len(row["load_seconds"]["rounds"]) > 1 for row in rows):
        return ""
    return "One round only: lowest and highest are that round's, and say nothing of the spread."


def case_cells(row: Mapping[str, Any], case: Mapping[str, Any]) -> list[str]:
    """Artifact, prompt, its tokens and tiles, time to first token and rate, as text."""
    return [
        row_name(row),
        case["name"],
        f"{case['prompt_tokens']:,}",
        str(case["num_images"] * case["tiles_per_image"]),
        ranged(case["ttft_seconds"]),
        ranged(case["decode_tokens_per_second"], lambda rate: f"{rate:,.1f}"),
    ]


def _cases(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [["prompt", "tokens", "first token", "tok/s", "rounds"]]
    for row in rows:
        # The name may be long; its cases stand below it.
        cells.append([row_name(row), "", "", "", ""])
        for case in row["cases"]:
            first = ranged(case["ttft_seconds"], to="-")
            rate = ranged(case["decode_tokens_per_second"], lambda each: f"{each:,.1f}", "-")
            tokens, rounds = f"{case['prompt_tokens']:,}", str(len(case["repeats"]))
            cells.append([f"  {case['name']}", tokens, first, rate, rounds])
    return columns(cells)


def _checks(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        check, memory = row["checks"], row["predicted_memory"]
        line = (
            f"{row_name(row)}: stages make {check['stages_over_end_to_end']:.1%} of a request, an "
            f"outside clock counts {check['observer_over_raw_clock']:.2%} of the inner one"
            f"{'' if check['holds'] else ' (NOT within 3 % and 2 %)'}; peak memory is "
            f"{memory['measured_over_predicted']:.0%} of the prediction"
            f"{'' if memory['holds'] else ' (NOT within the rule)'}"
        )
        lines.append(wrapped(line))
    return "\n".join(lines)


def _quality(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [n for n in _QUALITY if any(row["quality"][n] is not None for row in rows)]
    heads = ["artifact", "precision", "questions", "refused"]
    cells = [[*heads, *(name.replace("_", " ") for name in names)]]
    for row in rows:
        quality = row["quality"]
        shares = ["" if quality[name] is None else f"{quality[name]:.2f} %" for name in names]
        counts = [str(quality["questions"]), str(len(quality["refused"]))]
        cells.append([row_name(row), row["precision"], *counts, *shares])
    return columns(cells)
