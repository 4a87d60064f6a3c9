"""Tables of the check on a GPU, Markdown: what the README shows, and what decides choices."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_edge.bench.lab.gpu.models import GpuModel
from llava_edge.bench.lab.gpu.steps import CARD, CHOICES, CONTEXTS, INT8_CACHE, LIMITS, REFERENCE
from llava_edge.bench.lab.memory.fit import holds
from llava_edge.bench.speed.cases import FULL, TEXT

_GIB = 1 << 30
_LONG = tuple(f"{TEXT} {length:,}" for length in CONTEXTS)

Entries = Mapping[str, Any]


def gpu_tables(models: Sequence[GpuModel], precisions: Sequence[str], entries: Entries) -> str:
    """All that is measured of these models."""
    parts = [_card(entries.get(CARD))]
    for model in models:
        parts += _tables_of(model, precisions, entries)
    return "\n\n".join(part for part in parts if part)


def _card(entry: Mapping[str, Any] | None) -> str:
    if entry is None or "error" in entry:
        return ""
    gpus = ", ".join(gpu["name"] for gpu in entry["gpus"]) or "no GPU"
    packages = ", ".join(f"{name} {number}" for name, number in entry["packages"].items())
    rate = entry["bandwidth_bytes_per_second"] / 1e9
    return (
        f"{entry['device']}: {gpus}, driver {entry['driver']}, {rate:,.0f} GB/s "
        f"({entry['bandwidth']}); Python {entry['python']}, {packages}"
    )


def _tables_of(model: GpuModel, precisions: Sequence[str], entries: Entries) -> Iterator[str]:
    heads = ["language model", "same answers", "logits gap / bound", "peak GiB", "plan GiB"]
    heads += ["holds", "TTFT s: text", "1 image", "3 images"]
    heads += [f"tokens/s at {length:,}" for length in CONTEXTS]
    heads += ["of bandwidth", f"times {REFERENCE}", "times fp16"]
    named = {precision: _rounds(entries, f"{model.name} {precision}") for precision in precisions}
    reference = _rounds(entries, f"{model.name} {REFERENCE}")
    rows = []
    if reference:
        rows.append(_row(f"{REFERENCE} fp16", reference, None, {}, {}))
    over = {REFERENCE: reference, "fp16": named.get("fp16", [])}
    for precision, own in named.items():
        for name, rounds, parity in _caches(model, precision, own, entries):
            if rounds or parity:
                rows.append(_row(name, rounds, rounds[0] if rounds else None, parity, over))
    if rows:
        yield f"### {model.name}\n\n" + _markdown(heads, rows)
    limits = [
        [precision, name, f"{entry['limit_bytes'] / _GIB:.2f}", _said(entry)]
        for precision in precisions
        for name in LIMITS
        if (entry := _measured(entries, f"{model.name} {precision} {name}"))
    ]
    if limits:
        yield _markdown(["language model", "provider's limit", "GiB", "what happens"], limits)
    yield from _choices(model, precisions, named, entries)
    yield from _kernels(_measured(entries, f"{model.name} kernels"))
    vision = _measured(entries, f"{model.name} vision batches")
    if vision:
        rows = [[size, f"{1e3 * s:.2f}"] for size, s in vision["seconds_a_tile"].items()]
        rows.append(["features to host and back, all", f"{1e3 * _copies(vision):.2f}"])
        yield _markdown(["tiles at a time", "ms a tile"], rows)


def _caches(
    model: GpuModel, precision: str, own: Sequence[Entries], entries: Entries
) -> Iterator[tuple[str, Sequence[Entries], Entries]]:
    """What a row is called, its rounds and its parity: with the float16 cache and an int8 one."""
    yield precision, own, _measured(entries, f"{model.name} {precision} parity")
    name = f"{model.name} {precision} {INT8_CACHE}"
    rounds = [entry] if (entry := _measured(entries, name)) else []
    yield f"{precision}, {INT8_CACHE}", rounds, _measured(entries, f"{name}, parity")


def _choices(
    model: GpuModel,
    precisions: Sequence[str],
    named: Mapping[str, Sequence[Entries]],
    entries: Entries,
) -> Iterator[str]:
    rows = []
    for precision in precisions:
        made = {"as it is": named[precision][0]} if named[precision] else {}
        made |= {
            choice: entry
            for choice in (*CHOICES, INT8_CACHE)
            if (entry := _measured(entries, f"{model.name} {precision} {choice}"))
        }
        for choice, entry in made.items() if len(made) > 1 else ():
            each = [entry]
            row = [precision, choice, _seconds(each, TEXT), _seconds(each, FULL)]
            row += [_rate(each, name) for name in _LONG]
            rows.append([*row, _gib(entry["peak_memory"])])
    if rows:
        heads = ["language model", "choice", "TTFT s: text", "1 image"]
        heads += [f"tokens/s at {length:,}" for length in CONTEXTS]
        yield _markdown([*heads, "peak GiB"], rows)


def _kernels(entry: Entries) -> Iterator[str]:
    if not entry:
        return
    heights = sorted({product["rows"] for product in entry["products"]})
    layouts = list(dict.fromkeys(product["layout"] for product in entry["products"]))
    layers = list(dict.fromkeys(product["layer"] for product in entry["products"]))
    times = {(p["layout"], p["layer"], p["rows"]): p["seconds"] for p in entry["products"]}
    rows = [
        [layer, layout, *(f"{1e6 * times[layout, layer, height]:,.1f}" for height in heights)]
        for layer in layers
        for layout in layouts
    ]
    yield _markdown(["layer", "weights", *(f"µs, {height} rows" for height in heights)], rows)


def _row(
    name: str,
    rounds: Sequence[Entries],
    planned: Entries | None,
    parity: Entries,
    over: Mapping[str, Sequence[Entries]],
) -> list[str]:
    said = f"{parity['same']} of {parity['prompts']}" if parity else ""
    gap = f"{parity['logits_gap']:.1e} / {parity['logits_bound']:.1e}" if parity else ""
    peak = max((_peak(entry["peak_memory"]) for entry in rounds), default=0)
    plan, fits = "", ""
    # The plan for the cuda target speaks of a GPU.
    if planned is not None and planned["peak_memory"]["device_bytes"] is not None:
        counted = planned["predicted_memory"]["device_bytes"]
        plan, fits = f"{counted / _GIB:.2f}", "yes" if holds(peak, counted) else "NO"
    cells = [name, said, gap, f"{peak / _GIB:.2f}" if peak else "", plan, fits]
    cells += [_seconds(rounds, case) for case in (TEXT, FULL, "3 images")]
    cells += [_rate(rounds, case) for case in _LONG]
    cells.append(_figure(rounds, _LONG[0], "roofline_fraction", "{:.0%}"))
    for other in (REFERENCE, "fp16"):
        ours = _median(rounds, _LONG[0], "decode_tokens_per_second")
        theirs = _median(over.get(other, ()), _LONG[0], "decode_tokens_per_second")
        cells.append(f"{ours / theirs:.2f}" if ours and theirs else "")
    return cells


def _rounds(entries: Entries, name: str) -> list[Entries]:
    found = (_measured(entries, f"{name} round {number}") for number in (0, 1))
    return [entry for entry in found if entry]


def _measured(entries: Entries, name: str) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = entries.get(name) or {}
    return {} if "error" in entry else entry


def _said(entry: Entries) -> str:
    if entry.get("device") == "cpu":
        return "not on the CPU provider, which takes no limit"
    if not entry["answered"]:
        return f"refused: {entry['said']:.80}"
    degraded = {word for case in entry["cases"] for word in case["degraded"]}
    return f"answers{', lowered: ' + ', '.join(sorted(degraded)) if degraded else ''}"


def _copies(vision: Entries) -> float:
    total: float = vision["to_host_seconds"] + vision["to_device_seconds"]
    return total


def _peak(memory: Entries) -> int:
    device = memory["device_bytes"]
    return int(memory["host_bytes"] if device is None else device)


def _gib(memory: Entries) -> str:
    return f"{_peak(memory) / _GIB:.2f}"


def _median(rounds: Sequence[Entries], case: str, figure: str) -> float | None:
    """Over rounds; ``3 images`` stands for it on whatever grid it was asked."""
    several = f"{case}, " if case != FULL else None
    values = [
        found.get(figure)
        for entry in rounds
        for found in entry["cases"]
        if found["name"] == case or (several and found["name"].startswith(several))
    ]
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _figure(rounds: Sequence[Entries], case: str, figure: str, form: str) -> str:
    value = _median(rounds, case, figure)
    return "" if value is None else form.format(value)


def _seconds(rounds: Sequence[Entries], case: str) -> str:
    return _figure(rounds, case, "ttft_seconds", "{:.3f}")


def _rate(rounds: Sequence[Entries], case: str) -> str:
    return _figure(rounds, case, "decode_tokens_per_second", "{:,.1f}")


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
