"""Tables of conversion costs, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MIB, GIB = 1 << 20, 1 << 30


def memory_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a conversion: what was converted, peak and bound, time."""
    lines = [
        "| conversion | layers | source GiB | peak GiB | bound GiB | minutes | seconds a layer | "
        "holds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in entries.items():
        cells = [
            f"{name}, {entry['tokens_total']:,} tokens" if "tokens_total" in entry else name,
            str(entry["layers"]),
            f"{entry['checkpoint_bytes'] / GIB:.1f}",
            f"{entry['peak_bytes'] / GIB:.2f}",
            f"{entry['bound_bytes'] / GIB:.0f}",
            f"{entry['seconds'] / 60:.1f}" + (" (resumed)" if entry["resumed"] else ""),
            f"{entry['seconds_per_layer']:.0f}",
            "yes" if entry["holds"] else "NO",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def peer_table(entry: Mapping[str, Any]) -> str:
    """One line a quantiser: errors on both sets of tokens, and what its runs took."""
    lines = [
        "| quantiser | linear layers | held out | last hidden state | held out | logits | "
        "seconds | CPU seconds | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    judged = entry["judged"]
    for name, found in judged["calibration"].items():
        held_out = judged["held out"][name]
        runs = entry["runs"].get(name, ())
        cells = [
            name,
            f"{found['linears']:.5f}",
            f"{held_out['linears']:.5f}",
            f"{found['layers'][-1]:.4f}",
            f"{held_out['layers'][-1]:.4f}",
            f"{found['logits']:.4f}",
            ", ".join(f"{run['seconds']:.1f}" for run in runs),
            ", ".join(f"{run['cpu_seconds']:.1f}" for run in runs if "cpu_seconds" in run),
            ", ".join(f"{run['peak_bytes'] / MIB:,.0f}" for run in runs),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def estimate_table(estimates: Sequence[Mapping[str, Any]]) -> str:
    """One line a model that was not measured."""
    lines = [
        "| GPTQ by arithmetic | layers | column blocks | peak GiB | seconds a layer | hours |",
        "|---|---|---|---|---|---|",
    ]
    for each in estimates:
        cells = [
            each["variant"],
            str(each["layers"]),
            str(each["blocks"]),
            f"{each['peak_bytes'] / GIB:.1f}",
            f"{each['seconds_per_layer']:,.0f}",
            f"{each['hours']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
