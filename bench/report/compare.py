"""``llava-edge bench --compare OLD NEW``: is the new build slower, and how sure is that?

Every round of both files gives one value of each figure: the mean, over all cases, of the logarithm
of its times. Two samples of such values are compared by Welch's t, with what the rounds of a run
have in common counted as well (``DRIFT``). A difference is called slower or faster where it exceeds
both what chance explains, at one in a thousand for all figures of the files together, and
``LEAST``. It must do so twice: as it is, and over the yardstick, a fixed piece of work that each
round times as well, so that a machine that is slower today is not taken for a slower build.
Anything else is "no difference shown", which says what could have been shown, not that there is
none. Times on a CPU that other work shared in either file are not judged at all: threads that wait
for each other lose several times what the yardstick does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llava_edge.bench.common.stats import compare_means
from llava_edge.bench.report.table import busy_note, row_name, seconds
from llava_edge.profiles.command_line import wrapped
from llava_edge.profiles.errors import RequestError

Verdict = Literal["slower", "faster", "larger", "smaller", "no difference shown", "not judged"]

CHANCE = 0.001
LEAST = 0.05
DRIFT = 0.4
"""Runs of one build differ by more than their rounds say: the means of five by 0.2 to 0.5 of what
rounds scatter by. So no number of rounds makes a small difference one that is shown."""
LEAST_BYTES, LEAST_SHARE = 4 << 20, 0.02
"""Peaks of one artifact differ by less from process to process."""
MOST_SHOWABLE = 10.0
"""Rounds that could show no change below eleven times as long show nothing worth the name."""

_MACHINE = ("processor", "cores", "memory_bytes", "usable_cores")
_TIMES: Mapping[str, Callable[[Mapping[str, Any]], Sequence[float]]] = {
    "first token": lambda case: case["ttft_seconds"]["rounds"],
    "time a token": lambda case: [
        1 / max(rate, 1e-9) for rate in case["decode_tokens_per_second"]["rounds"]
    ],
}


@dataclass(frozen=True)
class Finding:
    """One figure of one artifact in both files.

    Attributes:
        artifact: name, with a star where its weights are random.
        figure: what is compared; less is better.
        old: geometric mean over cases and rounds, in ``unit``.
        new: the same of the other file.
        unit: ``s`` or ``bytes``.
        change: share by which the new one is larger.
        detectable: the smallest change that these rounds could have shown; None where they are too
            few to show any up to ``MOST_SHOWABLE``, and where nothing is judged.
        verdict: see above.
    """

    artifact: str
    figure: str
    old: float
    new: float
    unit: str
    change: float
    detectable: float | None
    verdict: Verdict

    @property
    def is_worse(self) -> bool:
        """Slower or larger."""
        return self.verdict in ("slower", "larger")


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Finding]:
    """Compare what both documents hold.

    Args:
        old: as ``read_bench`` returns it.
        new: the same.

    Raises:
        RequestError: they are of different machines, share no artifact, or hold different models
            under one name.
    """
    before, after = rows_by_name(old), rows_by_name(new)
    names = [name for name in before if name in after]
    if not names:
        raise RequestError(
            f"The files share no artifact: {', '.join(before)} and {', '.join(after)}. "
            "Artifacts are matched by the name of their folder, precision and device."
        )
    pairs = [(name, before[name], after[name]) for name in names]
    on_gpu = any(row["device"] != "cpu" for _, *rows in pairs for row in rows)
    _same_machine(old["machine"], new["machine"], (*_MACHINE, *(("gpus",) if on_gpu else ())))
    for pair in pairs:
        _same_model(*pair)
    chance = CHANCE / (len(pairs) * (len(_TIMES) + 1))
    is_busy = any(busy_note(document) for document in (old, new))
    return [
        _unjudged(finding)
        if is_busy and finding.unit == "s" and now["device"] == "cpu"
        else finding
        for name, was, now in pairs
        for finding in (*_times(name, was, now, chance), *_memory(name, was, now))
    ]


def verdict_of(findings: Sequence[Finding]) -> str:
    """``worse``, ``no loss shown``, or ``not judged`` where no time was or could be judged."""
    if any(each.is_worse for each in findings):
        return "worse"
    times = [each for each in findings if each.unit == "s"]
    return "no loss shown" if any(each.detectable for each in times) else "not judged"


def machine_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> float:
    """By which share the yardstick took longer in the new file."""
    before, now = (
        statistics.median(
            value
            for row in document["rows"]
            if "cases" in row
            for value in row["yardstick_seconds"]["rounds"]
        )
        for document in (old, new)
    )
    return float(now / before - 1)


def findings_table(findings: Sequence[Finding]) -> str:
    """For people."""
    lines = []
    for each in findings:
        old, new = (_shown(value, each.unit) for value in (each.old, each.new))
        if each.verdict == "not judged":
            sure = "other work shared the cores"
        elif each.detectable is None:
            sure = "so few rounds show nothing"
        else:
            sure = f"{each.detectable:.0%} could be shown"
        line = f"{each.artifact}, {each.figure}: {old} before, {new} now"
        lines.append(wrapped(f"{line} ({each.change:+.1%}; {sure}): {each.verdict}"))
    return "\n".join(lines)


def _unjudged(finding: Finding) -> Finding:
    return replace(finding, detectable=None, verdict="not judged")


def _same_machine(old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> None:
    differing = [
        f"{key} {old.get(key)!r} and {new.get(key)!r}"
        for key in keys
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise RequestError(
            f"The files were measured on different machines ({'; '.join(differing)}), so nothing "
            "follows for the build. Measure both on one machine."
        )


def _same_model(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Folders of different models are often called alike, as int4 is."""
    what = [f"{row['variant']} of {row['parameters']:,} parameters" for row in (old, new)]
    if what[0] != what[1]:
        raise RequestError(
            f"{name} is {what[0]} in the old file and {what[1]} in the new one, so nothing follows "
            "for the build. Compare results of one model."
        )


def rows_by_name(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Rows with times, by what they are matched by."""
    rows = [row for row in document["rows"] if "cases" in row]
    short = [_key(row, row_name(row)) for row in rows]
    if len(set(short)) < len(rows):
        short = [_key(row, row["artifact"] + "*" * (row["weights"] == "random")) for row in rows]
    return dict(zip(short, rows, strict=True))


def _key(row: Mapping[str, Any], name: str) -> str:
    return f"{name} ({row['precision']}, {row['device']})"


def _times(
    name: str, old: Mapping[str, Any], new: Mapping[str, Any], chance: float
) -> list[Finding]:
    pairs = common_cases(old, new)
    yard = [[math.log(v) for v in row["yardstick_seconds"]["rounds"]] for row in (old, new)]
    found = []
    for figure, times in _TIMES.items():
        if pairs:
            was = _log_means([times(case) for case, _ in pairs])
            now = _log_means([times(case) for _, case in pairs])
            found.append(_judge(name, figure, (was, now), yard, chance))
    loads = [[math.log(value) for value in row["load_seconds"]["rounds"]] for row in (old, new)]
    found.append(_judge(name, "loading", loads, yard, chance))
    return found


def common_cases(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Cases of both, as long as they ask the same."""
    after = {case["name"]: case for case in new["cases"]}
    same = ("image_tokens", "answer_tokens", "num_images", "tiles_per_image")
    return [
        (case, after[case["name"]])
        for case in old["cases"]
        if case["name"] in after and all(case[k] == after[case["name"]][k] for k in same)
    ]


def _log_means(by_case: Sequence[Sequence[float]]) -> list[float]:
    """One value a round: the mean of the logarithms over cases."""
    return [
        statistics.fmean(math.log(max(value, 1e-9)) for value in values)
        for values in zip(*by_case, strict=True)
    ]


def _judge(
    name: str,
    figure: str,
    logs: Sequence[Sequence[float]],
    yard: Sequence[Sequence[float]],
    chance: float,
) -> Finding:
    """Logarithms by round, before and now, beside those of the yardstick."""
    old, new = logs
    difference = compare_means(old, new, chance, DRIFT)
    was, now = (
        [value - unit for value, unit in zip(*pair, strict=True)]
        for pair in zip(logs, yard, strict=True)
    )
    both = (difference, compare_means(was, now, chance, DRIFT))
    verdict: Verdict = "no difference shown"
    if all(each.mean > max(each.margin, math.log1p(LEAST)) for each in both):
        verdict = "slower"
    if all(-each.mean > max(each.margin, math.log1p(LEAST)) for each in both):
        verdict = "faster"
    margin = max(each.margin for each in both)
    return Finding(
        artifact=name,
        figure=figure,
        old=math.exp(statistics.fmean(old)),
        new=math.exp(statistics.fmean(new)),
        unit="s",
        change=math.expm1(difference.mean),
        detectable=(
            max(LEAST, math.expm1(margin)) if margin <= math.log1p(MOST_SHOWABLE) else None
        ),
        verdict=verdict,
    )


def _memory(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Finding]:
    """Peaks of the host and, where both ran on one, of the GPU.

    A process's peak is that of all it was asked; none where the two were not asked the same.
    """
    found: list[Finding] = []
    if not len(common_cases(old, new)) == len(old["cases"]) == len(new["cases"]):
        return found
    for figure, key in (("peak host memory", "host_bytes"), ("peak GPU memory", "device_bytes")):
        was, now = (row["peak_memory"].get(key) for row in (old, new))
        if was is None or now is None:
            continue
        least = max(LEAST_BYTES, LEAST_SHARE * was)
        verdict: Verdict = "no difference shown"
        if abs(now - was) > least:
            verdict = "larger" if now > was else "smaller"
        change, detectable = now / was - 1, least / was
        found.append(Finding(name, figure, was, now, "bytes", change, detectable, verdict))
    return found


def _shown(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    return seconds(value)
