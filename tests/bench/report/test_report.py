"""The report as a file: whole, self-contained, labelled; how it looks is for eyes."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llava_edge.bench.common.artifact_facts import short_names
from llava_edge.bench.common.atomic_write import atomic_write, check_writable
from llava_edge.bench.report.compare import compare, findings_table
from llava_edge.bench.report.html import ladder_page, report_page
from llava_edge.bench.report.published import ACCURACY, BENCHMARKS, LABEL, memory_rows, speed_rows
from llava_edge.bench.report.svg import (
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
    tick_texts,
)
from llava_edge.bench.report.table import bench_table
from llava_edge.profiles.errors import OutputExistsError, RequestError
from llava_edge.profiles.models.variants import load_variants
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


def test_names_that_are_no_utf8_are_written_all_the_same(tmp_path: Path) -> None:
    page = report_page(document(0, precisions=("fp16",), artifact="a/\udcff"))
    # The file's own name is as long as it may be.
    file = tmp_path / ("x" * 255)
    atomic_write(file, page)
    assert "\\udcff" in file.read_text("utf-8")
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / ("x" * 256), tmp_path / "file" / "y", tmp_path, tmp_path / "new" / "y"):
        with pytest.raises(RequestError, match="--out"):
            check_writable(path, "--out", force=True)
    check_writable(tmp_path / "y", "--out", force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_there_names_force_only_where_it_helps(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError, match="or --force"):
        check_writable(tmp_path / "file", "--out", force=False)
    with pytest.raises(OutputExistsError, match=r"another name for --answers\.$"):
        check_writable(tmp_path / "file", "--answers", force=None)


def test_folders_called_alike_are_told_apart() -> None:
    names = short_names(("/x/7b/int4", "/x/1b/int4", "/x/fp16"))
    assert list(names.values()) == ["7b/int4", "1b/int4", "fp16"]
    assert short_names(("/x/int4", "/x/int4/."))["/x/int4/."] == "/x/int4/."
    assert short_names((".",)) == {".": Path.cwd().name}
    made = document(0)
    for row, name in zip(made["rows"], names.values(), strict=True):
        row["name"] = name
    texts = [text for _, text in _read(report_page(made)).texts]
    assert "7b/int4" in texts
    assert "1b/int4" in texts


def test_only_figures_of_one_kind_are_ranked() -> None:
    made = document(0)
    first, *others = made["rows"]
    assert "Least memory: fp16, 100 MiB at its peak." in report_page(made)
    for row in made["rows"]:
        row["peak_memory"] = {"host_bytes": 1 << 30, "device_bytes": 3 << 30}
        row["predicted_memory"]["device_bytes"] = 3 << 30
    others[1]["peak_memory"]["device_bytes"] = 2 << 30
    assert "Least memory: int4, 2,048 MiB at the GPU" in report_page(made)
    first["peak_memory"]["device_bytes"] = None
    assert "Least memory" not in report_page(made), "the weights of some lie on a GPU"
    assert "First token: 1 image on the artifact" in report_page(made)
    assert "First token soonest" in report_page(made)
    first["case"] = "text"
    assert "First token: fp16: text; int8: 1 image" in report_page(made)
    assert "rates: fp16: text; int8: 1 image" in bench_table(made)
    assert "First token soonest" not in report_page(made), "prompts differ"


def test_where_predictions_come_from_is_said() -> None:
    made = document(0)
    for place, said in (
        (None, "this machine's rates"),
        (0, "rates measured here or stated"),
        (1, "rates measured here or stated"),
        (2, "stated rates of the board"),
    ):
        if place is not None:
            made["rows"][place]["rates"] = "stated by the board's profile"
        texts = [text.strip() for _, text in _read(report_page(made)).texts]
        assert f"predicted from {said}" in texts
    made["rows"][0]["roofline_fraction"] = None
    for text in (report_page(made), bench_table(made)):
        assert "unknown" in text


def test_a_single_round_has_no_spread() -> None:
    for made, said in ((document(0), False), (document(0, rounds=1), True)):
        assert ("One round only" in report_page(made)) is said
        assert ("One round only" in bench_table(made)) is said


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
    heading = "a folder of the longest name that anybody gives to one, int4"
    drawing = bar_chart([BarGroup(heading, bars)], "GiB", "x")
    assert "…" in drawing
    assert "to one, int4<" in drawing, "what differs stands at the end"
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
    assert tick_texts([0, 0.1, 0.2, 3 * 0.1]) == ["0.0", "0.1", "0.2", "0.3"]
    assert tick_texts([99.65, 99.675, 99.7]) == ["99.650", "99.675", "99.700"]
    assert tick_texts([1024.0, 2048.0]) == ["1,024", "2,048"]
    assert tick_texts([2e-9, 3e-9]) == ["2e-09", "3e-09"]
    assert tick_texts([0]) == ["0"]
    assert [number(value) for value in (0.05, 1.0, 2.5, 1500.0)] == ["0.05", "1", "2.5", "1,500"]


def test_tables_for_a_terminal_fit_80_columns_and_count_no_bytes() -> None:
    made = document(0, rounds=1)
    for place, row in enumerate(made["rows"]):
        row["name"] = f"llava-v1.6-mistral-7b-int4-a100-{place}"
        row["precision"] = "fp16 (computes fp32)"
        row["weights"] = "random"
        row["load_average"] = [[9.0, 9.5]]
        scores = dict.fromkeys(("exact_match", "anls", "relaxed_accuracy", "multiple_choice"), 98.6)
        row["quality"] = {"questions": 1000, "refused": [], **scores}
    text = bench_table(made)
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"\d{6,}", text.replace("0123456789ab", ""))
    for head in ("first token", "tok/s", "peak MiB", "multiple choice", "loss (KL)"):
        assert head in text
    # A further block of a table has the names again.
    assert text.count("mistral-7b-int4-a100-2*") > 4


def test_findings_fit_80_columns() -> None:
    findings = compare(document(0), document(1, slower=2.0))
    assert max(map(len, findings_table(findings).splitlines())) <= 80
