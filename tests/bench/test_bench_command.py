"""``llava-edge bench`` over real artifacts of random weights, small enough to take seconds."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge.bench import cli, measuring
from llava_edge.bench.common import atomic_write
from llava_edge.bench.common import machine as machine_card
from llava_edge.bench.common.artifact_facts import precision_label, weights_label
from llava_edge.bench.common.machine import Rates, commit, measure_rates
from llava_edge.bench.common.subprocess_runner import run_fresh
from llava_edge.bench.speed import rows as speed_rows
from llava_edge.bench.speed import run as speed_run
from llava_edge.bench.speed.cases import FULL, TEXT, affordable_cases, draw_picture, speed_cases
from llava_edge.bench.speed.rows import SpeedRow
from llava_edge.bench.speed.run import DeviceWatch, SpeedRound, SpeedSettings, run_speed
from llava_edge.profiles.boards.nvml import Gpu, GpuReport
from llava_edge.profiles.errors import (
    EngineError,
    LlavaEdgeError,
    OutputError,
    OutputExistsError,
    RequestError,
)
from llava_edge.runtime.artifact.open import open_artifact

DESIGN_KEYS = {
    *("artifact", "precision", "device", "peak_memory", "predicted_memory", "ttft_seconds"),
    *("prefill_tokens_per_second", "decode_tokens_per_second", "quality", "roofline_fraction"),
}
"""What others may rely on in a row."""


@pytest.fixture(scope="module")
def artifact(make_artifact: Callable[..., Path], make_checkpoint: Callable[..., Path]) -> Path:
    checkpoint = make_checkpoint("odd", max_positions=4096)
    return make_artifact(checkpoint, context_tokens=2048)


@pytest.fixture(scope="module")
def measured(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    out, html = folder / "out.json", folder / "out.html"
    command = [str(artifact), "--rounds", "2", "--out", str(out), "--html", str(html)]
    assert cli.main(command) == 0
    document: dict[str, Any] = json.loads(out.read_text())
    return {**document, "html": html.read_text()}


def test_a_row_has_the_promised_keys(measured: dict[str, Any]) -> None:
    (row,) = measured["rows"]
    assert row.keys() >= DESIGN_KEYS
    assert row["precision"] == "fp16 (computes fp32)"
    assert row["case"] == FULL
    assert row["roofline_fraction"] > 0
    assert measured["machine"]["bandwidth_bytes_per_second"] > 1e8
    names = [case["name"] for case in row["cases"]]
    assert names == [TEXT, f"{FULL}, base", f"{FULL}, 1x2", FULL, "3 images"]
    for case in row["cases"]:
        assert case["answer_tokens"] == 32, "an answer must not end early"
        rate = case["decode_tokens_per_second"]
        assert rate["low"] <= rate["median"] <= rate["high"]
        assert len(rate["rounds"]) == 2


def test_random_weights_are_labelled_everywhere(
    measured: dict[str, Any], artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured["rows"][0]["weights"] == "random"
    assert "Weights drawn at random" in measured["html"]
    assert cli.main([str(artifact), "--rounds", "1", "--only", "speed"]) == 0
    assert "Weights drawn at random" in capsys.readouterr().err
    opened = open_artifact(artifact)
    conversion = {**opened.manifest.conversion, "random_weights": False}
    trained = replace(opened.manifest, conversion=conversion)
    assert weights_label(trained) == f"from {opened.manifest.source.id}"
    del conversion["random_weights"]
    assert weights_label(replace(opened.manifest, conversion=conversion)) == "not said"


def test_measured_memory_is_within_the_prediction(measured: dict[str, Any]) -> None:
    (row,) = measured["rows"]
    assert row["peak_memory"]["host_bytes"] <= row["predicted_memory"]["host_bytes"]
    assert row["predicted_memory"]["holds"]
    terms = row["predicted_memory"]["terms"]
    assert sum(terms.values()) == row["predicted_memory"]["host_bytes"]


def test_stages_explain_a_request_and_clocks_agree(measured: dict[str, Any]) -> None:
    (row,) = measured["rows"]
    # Wider than what a report calls well: this machine may be busy with other tests.
    assert row["checks"]["stages_over_end_to_end"] == pytest.approx(1, abs=0.2)
    assert row["checks"]["observer_over_raw_clock"] == pytest.approx(1, abs=0.1)
    case = next(case for case in row["cases"] if case["name"] == FULL)
    for stage in ("preprocess", "vision", "packing", "prefill", "decode"):
        assert case["stages"][stage]["low"] > 0, stage


def test_nothing_is_overwritten_unasked(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text("kept")
    with pytest.raises(OutputExistsError, match="--out"):
        cli.main([str(artifact), "--out", str(out)])
    assert out.read_text() == "kept"


def test_what_cannot_be_opened_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(LlavaEdgeError):
        cli.main([str(tmp_path / "nothing")])
    for command in (
        [],
        ["x", "--only", "quality"],
        ["x", "--only", "speed", "--quality", "data.jsonl"],
        ["x", "--answers", "new.jsonl"],
        ["x", "--out", "same", "--html", "./same"],
    ):
        with pytest.raises(RequestError):
            cli.main(command)


@pytest.mark.parametrize("number", ["0", "-1", "x", "\u00b2", "9" * 5000])
def test_what_is_no_count_is_said(number: str) -> None:
    with pytest.raises(RequestError, match="is no whole number of at least 1"):
        cli.main(["x", "--rounds", number])


def test_it_needs_neither_psutil_nor_matplotlib() -> None:
    blocked = "import sys; sys.modules.update(psutil=None, matplotlib=None); "
    code = blocked + "from llava_edge.bench import cli; cli.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--compare" in done.stdout


def test_artifacts_take_turns_forwards_and_backwards() -> None:
    order: list[tuple[str, int]] = []

    def measure(artifact: str, number: int, settings: SpeedSettings) -> SpeedRound:
        order.append((artifact, number))
        return SpeedRound({}, 0.0, 0)

    found = run_speed(("a", "b"), SpeedSettings(rounds=3), measure=measure)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert {name: len(rounds) for name, rounds in found.items()} == {"a": 3, "b": 3}
    order.clear()
    # A budget that is spent from the start still buys two rounds, so that there is a spread.
    run_speed(("a",), SpeedSettings(rounds=5, budget_seconds=0.0), measure=measure)
    assert len(order) == 2


def test_an_artifact_that_fails_says_why(artifact: Path) -> None:
    settings = SpeedSettings(rounds=1, device="cuda")
    with pytest.raises(EngineError, match="cpu target"):
        run_speed((str(artifact),), settings)


def test_one_that_fails_takes_nothing_from_the_others(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    other = tmp_path / "other"
    shutil.copytree(artifact, other)
    usual = speed_run.measure_round

    def measure(name: str, number: int, settings: SpeedSettings) -> SpeedRound:
        if name == str(other) and number == 1:
            raise EngineError("it broke")
        return usual(name, number, settings)

    monkeypatch.setattr(speed_run, "measure_round", measure)
    out = tmp_path / "out.json"
    command = [str(artifact), str(other), "--rounds", "2", "--only", "speed"]
    assert cli.main([*command, "--out", str(out), "--json"]) == EngineError.exit_code
    document = json.loads(out.read_text())
    (row,) = document["rows"]
    assert row["artifact"] == str(artifact)
    assert len(row["load_seconds"]["rounds"]) == 2
    assert document["failed"] == {str(other): {"type": "EngineError", "message": "it broke"}}
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1]) == document
    assert f"{other} could not be measured: it broke" in " ".join(said.err.split())


def test_what_was_measured_is_kept_where_somebody_interrupts(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "measure_alone", interrupted)
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out.json"
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    questions.write_text('{"image": "a.png", "question": "What?", "answers": ["a"]}\n')
    command = [str(artifact), "--rounds", "1", "--quality", str(questions), "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        cli.main(command)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["cases"]


def test_rates_are_looked_at_before_every_round() -> None:
    events: list[str] = []

    def measure(artifact: str, number: int, settings: SpeedSettings) -> SpeedRound:
        events.append(artifact)
        return SpeedRound({}, 0.0, 0)

    settings = SpeedSettings(rounds=2)
    run_speed(("a", "b"), settings, measure=measure, before_round=lambda: events.append("look"))
    assert events == ["look", "a", "b", "look", "b", "a"]


def test_the_best_rates_of_all_looks_count_and_what_is_no_number_is_null(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter([Rates(1e9, 3e10), Rates(4e9, 1e10), Rates(2e9, 2e10), Rates(3e9, 1e10)])
    certificate = {"kl_divergence": float("inf"), "argmax_agreement": float("nan")}
    monkeypatch.setattr(measuring, "measure_rates", lambda: next(looks))
    monkeypatch.setattr(measuring, "certified_quality", lambda _: certificate)
    assert cli.main([str(artifact), "--rounds", "2", "--only", "speed", "--json"]) == 0

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    document = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=refuse)
    machine = document["machine"]
    assert machine["bandwidth_bytes_per_second"] == 4e9
    assert machine["float32_operations_per_second"] == 3e10
    assert next(looks, None) is None, "before, before each of two rounds, and behind"
    quality = document["rows"][0]["quality"]
    assert quality == {"certificate": {"kl_divergence": None, "argmax_agreement": None}}


def test_pictures_and_words_differ_from_request_to_request() -> None:
    first, second = (draw_picture((0, number), 40, 60) for number in (1, 2))
    assert first != second
    assert draw_picture((0, 1), 40, 60) == first


def test_cases_fit_a_small_context(artifact: Path) -> None:
    manifest = open_artifact(artifact).manifest
    cases = speed_cases(replace(manifest, context_tokens=300))
    assert [case.name for case in cases] == [TEXT, f"{FULL}, base"]
    tight = speed_cases(replace(manifest, context_tokens=140))
    assert [case.name for case in tight] == [TEXT]
    thorough = speed_cases(manifest, thorough=True)
    assert {case.new_tokens for case in thorough} == {128}
    lengths = [case.text_tokens for case in thorough if not case.num_images]
    assert max(lengths) > 0.8 * manifest.context_tokens - 128


def test_models_that_take_long_are_asked_less() -> None:
    seconds = {TEXT: 1.0, f"{FULL}, base": 4.0, f"{FULL}, 1x2": 10.0, FULL: 20.0, "3 images": 30.0}
    assert affordable_cases(seconds, 65.0) == tuple(seconds)
    assert affordable_cases(seconds, 64.0) == (TEXT, f"{FULL}, base", FULL)
    assert affordable_cases(seconds, 24.0) == (TEXT, FULL)
    assert affordable_cases(seconds, 1.0) == (TEXT, FULL), "what a row speaks of is asked anyway"


def test_only_the_cases_that_were_named_are_asked(artifact: Path) -> None:
    settings = SpeedSettings(rounds=1, cases=(TEXT, FULL))
    (found,) = run_speed((str(artifact),), settings)[str(artifact)]
    assert [case["name"] for case in found.found["cases"]] == [TEXT, FULL]


def test_device_memory_is_the_rise_while_it_ran() -> None:
    free = [8, 8, 5, 6]

    def read() -> GpuReport:
        return GpuReport((Gpu("GPU", 10 << 30, free.pop(0) << 30, "8.6"),), None)

    watch = DeviceWatch(read)
    for _ in range(3):
        watch.look()
    assert watch.highest == 3 << 30
    nothing = DeviceWatch(lambda: GpuReport((), None))
    nothing.look()
    assert nothing.highest is None


def test_a_row_of_a_gpu_speaks_of_its_memory(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_rows, "machine_profile", lambda device, rates: (None, "unknown"))
    opened = open_artifact(artifact)
    opened = replace(opened, manifest=replace(opened.manifest, target="cuda"))
    found = _found([_probed(case) for case in speed_cases(opened.manifest)], device="cuda")
    rounds = [SpeedRound(found, 1.0, 100 << 20, device_bytes=50 << 20)]
    row = SpeedRow("x", opened, rounds, Rates(1e10, 1e11)).to_json()
    slow = SpeedRow("x", opened, [replace(rounds[0], device_bytes=None)], Rates(1e10, 1e11))
    without = slow.to_json()["predicted_memory"]
    assert sum(without["terms"].values()) == without["host_bytes"], "no GPU was measured"
    assert row["peak_memory"] == {"host_bytes": 100 << 20, "device_bytes": 50 << 20}
    predicted = row["predicted_memory"]
    assert predicted["measured_over_predicted"] == (50 << 20) / predicted["device_bytes"]
    assert predicted["terms"]["driver_context_bytes"] > 0
    on_cpu = [replace(rounds[0], found={**found, "device": "cpu"}, device_bytes=None)]
    here = SpeedRow("x", opened, on_cpu, Rates(1e10, 1e11)).to_json()["predicted_memory"]
    assert here["host_bytes"] > without["host_bytes"], "what would lie on a GPU lies here"
    assert "driver_context_bytes" not in here["terms"]
    assert sum(here["terms"].values()) == here["host_bytes"]
    assert here["device_bytes"] == without["device_bytes"], "what a GPU would hold"
    assert (row["roofline_fraction"], row["rates"]) == (None, "unknown")
    case = row["cases"][-1]
    assert case["stages"]["sampling"]["median"] == pytest.approx(0.01)
    assert case["explained"]["median"] == pytest.approx(1.0)
    assert case["decode_tokens_per_second"]["median"] == pytest.approx(31 / 0.39)
    assert row["checks"]["holds"]


@pytest.mark.parametrize(
    ("end_to_end", "perf", "observed", "holds"),
    [
        pytest.param(1.02, 1.0, 1.0, True, id="two percent unexplained"),
        pytest.param(1.04, 1.0, 1.0, False, id="four percent unexplained"),
        pytest.param(1.0, 1.0, 1.03, False, id="the outer clock is three percent apart"),
        pytest.param(1.0, 0.97, 1.0, False, id="the inner clock is three percent apart"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.009])
def test_figures_that_do_not_hold_together_are_found(
    artifact: Path, end_to_end: float, perf: float, observed: float, holds: bool, scale: float
) -> None:
    opened = open_artifact(artifact)
    cases = [_probed(case) for case in speed_cases(opened.manifest)]
    for case in cases:
        (request,) = case["requests"]
        request["end_to_end_seconds"] = end_to_end
        # Of requests that take nine milliseconds as of those that take a second.
        case["requests"] = [{name: value * scale for name, value in request.items()}]
    found = _found(cases, device="cpu", perf=perf)
    rounds = [SpeedRound(found, observed, 100 << 20)]
    assert SpeedRow("x", opened, rounds, Rates(1e10, 1e11)).to_json()["checks"]["holds"] is holds


def _found(cases: list[dict[str, Any]], device: str, perf: float = 1.0) -> dict[str, Any]:
    return {
        "device": device,
        "engine": "ort",
        "context_tokens": 2048,
        "cache": "float32",
        "load_seconds": 1.0,
        "inside": {"perf_seconds": perf, "raw_seconds": 1.0},
        "yardstick_seconds": [0.1, 0.1],
        "cases": cases,
    }


def _probed(case: Any) -> dict[str, Any]:
    request = {
        "end_to_end_seconds": 1.0,
        "preprocess_seconds": 0.1,
        "vision_seconds": 0.2,
        "packing_seconds": 0.1,
        "prefill_seconds": 0.2,
        "ttft_seconds": 0.61,
        "decode_seconds": 0.39,
    }
    counts = {"prompt_tokens": 100, "image_tokens": 50, "answer_tokens": 32, "degraded": []}
    return {**case.__dict__, **counts, "requests": [request]}


def test_the_lines_of_a_process_are_timed_as_they_come() -> None:
    code = "import time; print(1, flush=True); time.sleep(0.3); print(2, flush=True)"
    spent = run_fresh([sys.executable, "-c", code])
    assert spent.stdout == "1\n2\n"
    assert spent.arrivals[1] - spent.arrivals[0] >= 0.25
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_fresh([sys.executable, "-c", "print('why'); raise SystemExit(3)"])
    assert caught.value.output == "why\n"


def test_the_commit_is_that_of_the_sources(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.invalid"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert commit(tmp_path) is None, "outside a checkout"
    git("init")
    source, results = tmp_path / "common" / "machine.py", tmp_path / "results" / "bench.json"
    source.parent.mkdir()
    results.parent.mkdir()
    results.write_text("{}")
    git("add", "results")
    git("commit", "-m", "x")
    source.write_text("1")
    assert commit(tmp_path) is None, "a checkout of something else, as around site-packages"
    git("add", ".")
    git("commit", "-m", "x")
    clean = commit(tmp_path)
    assert clean is not None
    assert re.fullmatch(r"[0-9a-f]{12}", clean)
    results.write_text('{"pages": 1}')
    assert commit(tmp_path) == clean, "what the ladder writes would have it measure again"
    found = set()
    for text in ("2", "3"):
        source.write_text(text)
        found.add(commit(tmp_path))
    assert len(found) == 2, "two states that differ from the commit are not one"
    assert all(name is not None and name.startswith(f"{clean}-dirty-") for name in found)


def test_a_small_share_of_the_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_card, "usable_cores", lambda: 64)
    taken = 0
    ones = np.ones

    def counted(words: int, kind: Any) -> Any:
        nonlocal taken
        taken += words * 8
        return ones(words, kind)

    monkeypatch.setattr(np, "ones", counted)
    assert measure_rates(64 << 20).bandwidth_bytes_per_second > 1e7
    assert 8 << 20 < taken <= 16 << 20


def test_the_better_of_two_looks_counts() -> None:
    rates = measure_rates()
    assert rates.best(Rates(1.0, 1e18)) == Rates(rates.bandwidth_bytes_per_second, 1e18)


def test_quantised_weights_are_called_by_their_name(artifact: Path) -> None:
    manifest = open_artifact(artifact).manifest
    int4 = replace(manifest.precision, language_model="int4")
    assert precision_label(replace(manifest, precision=int4)) == "int4"
    half = replace(manifest.precision, computes="float16")
    assert precision_label(replace(manifest, precision=half)) == "fp16"


def test_the_schema_is_documented(measured: dict[str, Any]) -> None:
    text = (Path(cli.__file__).parent / "README.md").read_text("utf-8")
    known = set(re.findall(r"`([a-z0-9_<>-]+)`", text))
    row = measured["rows"][0]
    case = row["cases"][0]
    keys = {*measured, *measured["machine"], *row, *case, *row["checks"], *row["predicted_memory"]}
    assert keys - {"html"} <= known


def test_what_was_measured_stands_on_stdout_where_a_file_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_write.os, "replace", full)
    monkeypatch.setattr(measuring, "bench_table", lambda document: "")
    monkeypatch.setattr(measuring, "report_page", lambda document: "<html>")
    options = argparse.Namespace(out=tmp_path / "a.json", html=tmp_path / "a.html", json=False)
    with pytest.raises(OutputError, match=r"a\.json could not be written: No space left") as caught:
        measuring._write({"rows": [1]}, options)
    assert "a.html could not be written" in str(caught.value)
    assert "Errno" not in str(caught.value)
    assert json.loads(capsys.readouterr().out) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == []
