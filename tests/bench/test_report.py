"""The report as a file: whole, self-contained, labelled; how it looks is for eyes."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from llava_edge.bench.published import ACCURACY, BENCHMARKS, LABEL, memory_rows, speed_rows
from llava_edge.bench.report import ladder_page, report_page
from llava_edge.bench.svg_chart import (
    WIDTH,
    Axis,
    Bar,
    BarGroup,
    Point,
    Series,
    bar_chart,
    nice_ticks,
    number,
    point_chart,
)
from llava_edge.profiles.variants import load_variants
from tests.bench.bench_documents import document

_VOID = {"meta"}


class _Reader(HTMLParser):
    """Text by element, and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [], "an element was not closed"
    return reader


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    page = report_page(document(0))
    reader = _read(page)
    assert not re.search(r"https?://|<script|@import|url\(", page)
    assert {name for name, _ in reader.attributes}.isdisjoint({"src", "href", "style"})
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page


def test_every_axis_has_its_unit() -> None:
    texts = [text for tag, text in _read(report_page(document(0))).texts if tag == "text"]
    for unit in (
        "peak memory, MiB",
        "time to the first token, s",
        "tokens/s",
        "tokens in the context (each step doubles)",
        "loss against the checkpoint (KL), nats a token",
    ):
        assert unit in texts


def test_names_of_files_are_text() -> None:
    made = document(0, precisions=("fp16",), artifact="a/<b>&'\"x")
    page = report_page(made)
    _read(page)
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;" in page


def test_random_weights_are_labelled() -> None:
    assert "Weights drawn at random" in report_page(document(0, weights="random"))
    assert "Weights drawn at random" not in report_page(document(0))


def test_a_failed_check_and_a_busy_machine_are_said() -> None:
    made = document(0)
    assert "NO" not in {text for _, text in _read(report_page(made)).texts}
    made["rows"][0]["checks"]["holds"] = False
    made["rows"][1]["load_average"] = [[9.0, 9.5]]
    page = report_page(made)
    assert "NO" in {text for _, text in _read(page).texts}
    assert "Other work shared the 4 cores" in page


@pytest.mark.parametrize("quality", [None, {"certificate": {"kl_divergence": 0.1}}])
def test_rows_without_times_still_make_a_page(quality: Any) -> None:
    made = document(0, quality=quality)
    for row in made["rows"]:
        for name in ("cases", "load_seconds", "load_average"):
            del row[name]
    _read(report_page(made))


def test_several_results_share_one_page() -> None:
    page = ladder_page([("Small", document(0)), ("Large", document(1))])
    texts = [text for tag, text in _read(page).texts if tag == "h2"]
    assert texts == ["Small", "Large", "The published tables"]


def test_published_figures_are_never_taken_for_measured_ones() -> None:
    texts = [text for _, text in _read(report_page(document(0))).texts]
    assert f"Accuracy: {LABEL}" in texts
    rows = len(memory_rows()) + len(speed_rows()) + len(ACCURACY)
    assert texts.count("not measured") == rows
    variants = {v.name for v in load_variants() if v.kind != "llava-1.5"}
    assert {row.variant for row in memory_rows()} == variants
    assert len(memory_rows()) == 27
    assert {each.published for each in speed_rows()} == {52, 22, 12}
    assert set(BENCHMARKS) == {name for each in ACCURACY for name in each.scores}
    # Weights of the 72B at fp16 are more than one board of 80 GB holds.
    assert {e.variant: e.num_devices for e in speed_rows()}["llava-next-72b"] > 1


def test_bars_and_labels_stay_inside_the_drawing() -> None:
    bars = [Bar("measured", [("c0", 3.0), ("c1", 1e3)], "1,003 GiB", 900.0, 1100.0)]
    drawing = bar_chart([BarGroup("a rather long heading", bars)], "GiB", "x")
    for x, width in re.findall(r'x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawing):
        assert float(x) + float(width) <= WIDTH
    for name, x, anchor, text in re.findall(
        r'<text class="(\w+)" x="([-\d.]+)" y="[\d.]+" text-anchor="(\w+)">([^<]*)<', drawing
    ):
        wide = 6.6 * len(text) * (1.1 if name == "heading" else 1)
        start = float(x) - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
        assert start >= -1, text
        assert start + wide <= WIDTH + 8, text


@pytest.mark.parametrize("value", [0.0, 1e-12, 0.5, 3e9])
@pytest.mark.parametrize("axis", [Axis("x"), Axis("x", True), Axis("x", close_up=True)])
def test_any_value_can_be_drawn(value: float, axis: Axis) -> None:
    series = [Series("one", 0, [Point(value, value, value, value)])]
    drawing = point_chart(series, axis, Axis("y", close_up=axis.close_up), "x")
    numbers = [float(x) for x in re.findall(r'c[xy]="([-\d.]+)"', drawing)]
    assert numbers
    assert all(-1 <= number <= WIDTH for number in numbers)


def test_ticks_are_round_and_enough() -> None:
    assert nice_ticks(100, 4) == [0, 25, 50, 75, 100]
    assert nice_ticks(7, 4) == [0, 2, 4, 6]
    assert [number(value) for value in (0.05, 1.0, 2.5, 1500.0)] == ["0.05", "1", "2.5", "1,500"]
