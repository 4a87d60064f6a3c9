"""Report: one bench result as one HTML file that needs nothing else.

No network, no script: style sheet and drawings are inside. Light and dark follow the reader's own
setting; on a phone tables become cards; on paper everything is black on white.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from llava_edge.bench.report.charts import (
    decode_chart,
    first_token_chart,
    headline_case,
    memory_chart,
    quality_chart,
)
from llava_edge.bench.report.published import ACCURACY, BENCHMARKS, LABEL, memory_rows, speed_rows
from llava_edge.bench.report.table import (
    MIB,
    busy_note,
    case_cells,
    case_title,
    machine_line,
    rounds_note,
    row_name,
    seconds,
    share_of_bandwidth,
)
from llava_edge.bench.speed.rows import STAGES

_UNIT = re.compile(r"(\d) (ms|s|%|MiB)(?!\w)")

Rows = Sequence[Mapping[str, Any]]
Titled = Sequence[tuple[str, Mapping[str, Any]]]


def report_page(document: Mapping[str, Any]) -> str:
    """The page of one result of ``llava-edge bench``."""
    return ladder_page([("", document)])


def ladder_page(documents: Titled) -> str:
    """The page of several results, each under its title."""
    parts = []
    for title, document in documents:
        if title:
            parts.append(f"<h2>{escape(title)}</h2>")
        parts.append(_result(document))
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>llava-edge bench</title><style>{_style()}</style></head><body>",
            "<h1>What each precision costs</h1>",
            *parts,
            _paper(),
            "</body></html>\n",
        ]
    )


def _result(document: Mapping[str, Any]) -> str:
    rows = document["rows"]
    timed = [row for row in rows if "cases" in row]
    parts = [f"<p>{escape(sentence)}</p>" for sentence in _sentences(timed)]
    if any(row["weights"] == "random" for row in rows):
        parts.append(
            '<p class="warning">* <strong>Weights drawn at random.</strong> Time and memory are '
            "those of a trained model of this shape. What its answers are worth is not: nothing "
            "here about its quality carries over.</p>"
        )
    if busy := busy_note(document):
        parts.append(f'<p class="warning">{escape(busy)}</p>')
    parts.append(_rows_table(rows))
    if timed:
        parts.append('<div class="charts">')
        parts.append(_figure("Peak memory", memory_chart(timed), _memory_note(timed)))
        parts.append(_figure(f"First token: {case_title(timed)}", first_token_chart(timed)))
        parts.append(_figure("Tokens a second by context", decode_chart(timed)))
        if quality := quality_chart(timed):
            parts.append(_figure("Quality against memory", quality))
        parts.append("</div>")
        parts += ["<h3>Every prompt</h3>", _cases_table(timed)]
        parts += ["<h3>Do the figures hold together?</h3>", _checks_table(timed)]
    parts.append(
        f'<p class="machine">{escape(machine_line(document["machine"]))}. Measured '
        f"{escape(document['made'])} by <code>llava-edge bench</code>. Whiskers and brackets: "
        f"lowest and highest round. {rounds_note(timed)}</p>"
    )
    return "\n".join(parts)


def _sentences(rows: Rows) -> list[str]:
    """The result first, in words, of figures that are of one kind; a near tie is no order."""
    if len(rows) < 2:
        return []
    found = []
    memory = [row["peak_memory"] for row in rows]
    on_gpu = {peak["device_bytes"] is not None for peak in memory}
    if len(on_gpu) == 1:
        key = "device_bytes" if on_gpu.pop() else "host_bytes"
        smallest = min(rows, key=lambda row: row["peak_memory"][key])
        size = f"{smallest['peak_memory'][key] / MIB:,.0f} MiB"
        where = "the GPU's" if key == "device_bytes" else "its"
        found.append(f"Least memory: {row_name(smallest)}, {size} at {where} peak.")
    if len({(row["case"], headline_case(row)["prompt_tokens"]) for row in rows}) == 1:
        soonest = min(rows, key=lambda row: row["ttft_seconds"])
        fastest = max(rows, key=lambda row: row["decode_tokens_per_second"])
        found.append(
            f"First token soonest: {row_name(soonest)}, {seconds(soonest['ttft_seconds'])} after "
            f"{rows[0]['case']}. Most tokens a second: {row_name(fastest)}, "
            f"{fastest['decode_tokens_per_second']:,.1f}."
        )
    return [" ".join(found)] if found else []


def _rows_table(rows: Rows) -> str:
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("artifact", row_name),
        ("precision", lambda row: row["precision"]),
        ("weights", lambda row: row["weights"]),
        ("device", lambda row: row["device"]),
        ("size, MiB", lambda row: f"{row['artifact_bytes'] / MIB:,.1f}"),
        ("peak, MiB", lambda row: _bytes(row["peak_memory"])),
    ]
    if any("cases" in row for row in rows):
        columns += [
            ("load", lambda row: seconds(row["load_seconds"]["median"])),
            ("first token", lambda row: seconds(row["ttft_seconds"])),
            ("prompt, tokens/s", lambda row: f"{row['prefill_tokens_per_second']:,.0f}"),
            ("answer, tokens/s", lambda row: f"{row['decode_tokens_per_second']:,.1f}"),
            ("of bandwidth", share_of_bandwidth),
        ]
    columns += [
        ("verified", lambda row: "yes" if row["verified"] else "no"),
        ("loss (KL), nats", _loss),
    ]
    if any("questions" in (row["quality"] or {}) for row in rows):
        columns.append(("right", _right))
    return _table(
        [name for name, _ in columns], [[f(row) for _, f in columns] for row in rows], cards=True
    )


def _cases_table(rows: Rows) -> str:
    heads = ["artifact", "prompt", "tokens", "tiles", "first token", "tokens/s", "end to end"]
    shown = [stage for stage in STAGES if stage != "sampling"]
    body = []
    for row in rows:
        for case in row["cases"]:
            body.append(
                [
                    *case_cells(row, case),
                    seconds(case["end_to_end_seconds"]["median"]),
                    *(seconds(case["stages"][stage]["median"]) for stage in shown),
                ]
            )
    return _table([*heads, *shown], body)


def _checks_table(rows: Rows) -> str:
    heads = ["artifact", "stages over end to end", "outer over inner clock", "both hold"]
    heads += ["peak over prediction", "rule of memory holds"]
    body = [
        [
            row_name(row),
            f"{row['checks']['stages_over_end_to_end']:.2%}",
            f"{row['checks']['observer_over_raw_clock']:.2%}",
            "yes" if row["checks"]["holds"] else "NO",
            f"{row['predicted_memory']['measured_over_predicted']:.1%}",
            "yes" if row["predicted_memory"]["holds"] else "NO",
        ]
        for row in rows
    ]
    note = (
        "<p>Stages must explain a request within 3 %, the clock of another process agree "
        "within 2 %; memory must be at most what was predicted, and the prediction at most 5 % and "
        "64 MiB above it.</p>"
    )
    return note + _table(heads, body)


def _paper() -> str:
    memory = [
        [
            row.variant,
            row.precision,
            "not published" if row.published is None else f"{row.published}",
            f"{row.total:.1f}",
            "not measured",
        ]
        for row in memory_rows()
    ]
    speed = [
        [
            each.variant,
            f"{each.published}",
            f"{each.predicted:.0f}",
            f"{each.num_devices}",
            "not measured",
        ]
        for each in speed_rows()
    ]
    scores = []
    for each in ACCURACY:
        found = [each.score(benchmark) for benchmark in BENCHMARKS]
        cells = ["" if value is None else f"{value:.1f}" for value in found]
        scores.append([each.variant, *cells, "yes" if each.checked else "no", "not measured"])
    heads = ["model", "precision", "published, GB", "planned by us, GB", "measured, GB"]
    speeds = ["model", "published, tokens/s", "predicted by us, tokens/s", "A100s in it"]
    return "\n".join(
        [
            "<h2>The published tables</h2>",
            "<p>Nothing in these tables was measured here: the released weights were not run, and "
            "no A100 was at hand. What was measured stands above.</p>",
            "<h3>GPU memory</h3>",
            "<p>Planned: one full image and 512 tokens of text on a GPU, fp16 cache; 32 frames for "
            "the video models; decimal gigabytes.</p>",
            _table(heads, memory),
            "<h3>Tokens a second on the A100, fp16</h3>",
            "<p>Predicted by the speed model from the board's data sheet, one full image in the "
            "context; how many GPUs the published figures took is not said.</p>",
            _table([*speeds, "measured"], speed),
            f"<h3>Accuracy: {LABEL}</h3>",
            "<p>Percent, of the released weights at the precision of their release. Where the "
            "source column says no, the figure is second-hand.</p>",
            _table(["model", *BENCHMARKS, "read at its source", "measured"], scores),
        ]
    )


def _table(heads: Sequence[str], body: Sequence[Sequence[str]], *, cards: bool = False) -> str:
    """A table that scrolls by itself where it is too wide, or becomes cards on a phone."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    lines = []
    for cells in body:
        first = f'<th scope="row">{_cell(cells[0])}</th>'
        rest = "".join(
            f'<td data-label="{escape(head)}">{_cell(cell)}</td>'
            for head, cell in zip(heads[1:], cells[1:], strict=True)
        )
        lines.append(f"<tr>{first}{rest}</tr>")
    name = "cards" if cards else "scroll"
    return (
        f'<div class="{name}"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """A number and its unit stay on one line."""
    return _UNIT.sub("\\1\u00a0\\2", escape(text))


def _figure(title: str, drawing: str, note: str = "") -> str:
    below = f"<p>{escape(note)}</p>" if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}{below}</figure>"


def _memory_note(rows: Rows) -> str:
    cases = ", ".join(dict.fromkeys(row["predicted_memory"]["case"] for row in rows))
    return f"The largest prompt that was asked: {cases}; the terms of its largest phase."


def _bytes(peak: Mapping[str, Any]) -> str:
    device = peak["device_bytes"]
    host = f"{peak['host_bytes'] / MIB:,.0f}"
    return host if device is None else f"{device / MIB:,.0f} GPU, {host} host"


def _loss(row: Mapping[str, Any]) -> str:
    certificate = (row["quality"] or {}).get("certificate") or {}
    value = certificate.get("kl_divergence")
    return "not stated" if value is None else f"{value:.2g}"


def _right(row: Mapping[str, Any]) -> str:
    quality = row["quality"] or {}
    values = [quality.get(name) for name in ("exact_match", "multiple_choice")]
    return ", ".join(f"{value:.2f} %" for value in values if value is not None) or "not asked"


def _style() -> str:
    return resources.files("llava_edge.bench").joinpath("data", "report.css").read_text("utf-8")
