"""Report charts: what of a bench result is drawn, and how it is grouped and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_edge.bench.report.svg import (
    Axis,
    Bar,
    BarGroup,
    Point,
    Series,
    bar_chart,
    legend,
    number,
    point_chart,
    series_legend,
)
from llava_edge.bench.report.table import MIB, row_name, seconds
from llava_edge.bench.speed.cases import FULL
from llava_edge.bench.speed.rows import STAGES

Rows = Sequence[Mapping[str, Any]]

_TERMS: Mapping[str, tuple[str, ...]] = {
    "language model": ("decoder_weights", "lm_head"),
    "vision tower, projector": ("vision_tower", "projector"),
    "cache, rotary tables": ("kv_cache", "rope_tables"),
    "activations, pixels, logits": (
        *("image_decoding", "pixel_values", "vision_activations", "image_features"),
        *("prompt_embeddings", "prefill_activations", "attention_workspace", "logits"),
    ),
    "while loading": ("load_transient",),
    "process, engine, slack": (
        *("engine_workspace", "driver_context", "process", "allocator_slack", "embeddings"),
    ),
}
_STAGE_NAMES = {
    "preprocess": "image processing",
    "vision": "vision",
    "packing": "packing",
    "prefill": "prompt",
    "sampling": "choosing a token",
}
_GIB = 1 << 30


def memory_chart(rows: Rows) -> str:
    """Predicted memory by term, measured memory beside it."""
    largest = max(_peak(row) for row in rows)
    size, unit = (_GIB, "GiB") if largest >= 2 * _GIB else (MIB, "MiB")
    groups, used = [], set()
    for row in rows:
        terms = row["predicted_memory"]["terms"]
        parts = []
        for place, names in enumerate(_TERMS.values()):
            total = sum(terms.get(f"{name}_bytes", 0) for name in names)
            if total:
                used.add(place)
                parts.append((f"c{place}", total / size))
        predicted = sum(value for _, value in parts)
        measured = _measured(row) / size
        bars = [
            Bar("predicted", parts, f"{number(predicted)} {unit}"),
            Bar("measured", [("measured", measured)], f"{number(measured)} {unit}"),
        ]
        groups.append(BarGroup(_heading(row), bars))
    chart = bar_chart(groups, f"peak memory, {unit}", "Predicted and measured peak memory")
    entries = [(f"c{at}", name) for at, name in enumerate(_TERMS) if at in used]
    return legend([*entries, ("measured", "measured, fresh process")]) + chart


def first_token_chart(rows: Rows) -> str:
    """Time to the first token by stage, with its spread, beside the prediction."""
    stages = [stage for stage in STAGES if stage != "decode"]
    groups = []
    for row in rows:
        case = headline_case(row)
        parts = [
            (f"c{place}", max(0.0, case["stages"][stage]["median"]))
            for place, stage in enumerate(stages)
        ]
        ttft = case["ttft_seconds"]
        bars = [Bar("measured", parts, seconds(ttft["median"]), ttft["low"], ttft["high"])]
        predicted = case["predicted"]["ttft_seconds"]
        if predicted is not None:
            bars.append(Bar("predicted", [("predicted", predicted)], seconds(predicted)))
        groups.append(BarGroup(_heading(row), bars))
    chart = bar_chart(groups, "time to the first token, s", "Time to the first token by stage")
    entries = [(f"c{at}", _STAGE_NAMES[stage]) for at, stage in enumerate(stages)]
    if any(len(group.bars) > 1 for group in groups):
        entries.append(("predicted", f"predicted from {_source_of_rates(rows)}"))
    return legend(entries) + chart


def decode_chart(rows: Rows) -> str:
    """Tokens a second by context, one line an artifact."""
    series = []
    for place, row in enumerate(rows):
        points = []
        for case in row["cases"]:
            rate = case["decode_tokens_per_second"]
            context = case["prompt_tokens"] + case["answer_tokens"] // 2
            points.append(Point(context, rate["median"], rate["low"], rate["high"]))
        series.append(Series(_heading(row), place, points))
    axes = Axis("tokens in the context (each step doubles)", True), Axis("tokens/s")
    return series_legend(series) + point_chart(series, *axes, "Tokens a second by context")


def quality_chart(rows: Rows) -> str:
    """Quality against peak memory; empty where nothing is known of quality."""
    measure, title = _quality_measure(rows)
    if measure is None:
        return ""
    series = []
    largest = max(_measured(row) for row in rows)
    size, unit = (_GIB, "GiB") if largest >= 2 * _GIB else (MIB, "MiB")
    for place, row in enumerate(rows):
        value = measure(row)
        if value is not None:
            point = Point(_measured(row) / size, value)
            series.append(Series(_heading(row), place, [point], line=False))
    # Precisions of a small model lie close together: these axes do not begin at zero.
    x, y = Axis(f"peak memory, {unit}", close_up=True), Axis(title, close_up=True)
    return series_legend(series) + point_chart(series, x, y, "Quality by memory")


def _quality_measure(rows: Rows) -> tuple[Any, str]:
    """What all rows have: right answers, else the loss that certificates state."""
    for name, title in (
        ("exact_match", "exactly right answers, %"),
        ("multiple_choice", "right letters, %"),
    ):
        if all((row["quality"] or {}).get(name) is not None for row in rows):
            return (lambda row, key=name: row["quality"][key]), title
    loss = [_certified_loss(row) for row in rows]
    if any(value is not None for value in loss):
        return _certified_loss, "loss against the checkpoint (KL), nats a token"
    return None, ""


def _certified_loss(row: Mapping[str, Any]) -> float | None:
    found: float | None = ((row["quality"] or {}).get("certificate") or {}).get("kl_divergence")
    return found


def _source_of_rates(rows: Rows) -> str:
    """Of a CPU they were measured, of a GPU its data sheet states them."""
    found = {row["rates"] for row in rows} - {"unknown"}
    if found == {"measured here"}:
        return "this machine's rates"
    return "stated rates of the board" if len(found) == 1 else "rates measured here or stated"


def headline_case(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The prompt that the figures of a row speak of."""
    found: Mapping[str, Any] = next(
        case for case in row["cases"] if case["name"] == row.get("case", FULL)
    )
    return found


def _heading(row: Mapping[str, Any]) -> str:
    name = row_name(row)
    precision: str = row["precision"]
    if precision.startswith(name.rstrip("*")):
        return precision + "*" * name.endswith("*")
    return f"{name}, {precision}"


def _measured(row: Mapping[str, Any]) -> int:
    peak = row["peak_memory"]
    found: int = peak["host_bytes"] if peak["device_bytes"] is None else peak["device_bytes"]
    return found


def _peak(row: Mapping[str, Any]) -> int:
    terms: Mapping[str, int] = row["predicted_memory"]["terms"]
    return max(_measured(row), sum(terms.values()))
