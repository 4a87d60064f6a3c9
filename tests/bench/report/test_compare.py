"""Verdicts over synthetic results: a slower build is found, an unchanged one is left in peace."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from llava_edge.bench import cli
from llava_edge.bench.common.stats import compare_means, t_quantile
from llava_edge.bench.report.compare import compare, findings_table, machine_change, verdict_of
from llava_edge.bench.report.compare_notes import compare_notes
from llava_edge.bench.report.schema import read_bench
from llava_edge.profiles.errors import RequestError
from tests.bench.bench_documents import document
from tests.support.tiers import slow_but


def _worse(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"{each.artifact} {each.figure}" for each in compare(old, new) if each.is_worse]


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_an_unchanged_build_is_not_flagged_over_many_reruns(noise: float) -> None:
    old = document(0, noise=noise)
    for seed in range(1, 41):
        assert _worse(old, document(seed, noise=noise)) == []


@pytest.mark.parametrize(
    ("noise", "rounds"), slow_but([(0.13, 12)], product([0.03, 0.13], [12, 25]))
)
def test_a_drift_that_the_yardstick_does_not_see_is_no_slower_build(
    noise: float, rounds: int
) -> None:
    old = document(0, noise=noise, drift=0.4 * noise, rounds=rounds)
    for seed in range(1, 41):
        assert _worse(old, document(seed, noise=noise, drift=0.4 * noise, rounds=rounds)) == []
    # What is as much slower as on the machine that this was measured on is still found.
    for seed in range(1, 21):
        assert _worse(old, document(seed, noise=noise, drift=0.4 * noise, rounds=12, slower=2.0))


@pytest.mark.parametrize(("noise", "slower"), [(0.01, 1.1), (0.03, 1.3), (0.05, 1.6)])
def test_a_slower_build_is_flagged_every_time(noise: float, slower: float) -> None:
    old = document(0, noise=noise)
    for seed in range(1, 21):
        new = document(seed, noise=noise, slower=slower)
        assert _worse(old, new), seed
        assert _worse(new, old) == [], "a faster build is not worse"


def test_times_that_other_work_shared_the_cores_of_are_not_judged() -> None:
    old, new = document(0), document(1, slower=7.0, more_bytes=12 << 20)
    for busy in (old, new):
        before = [row["load_average"] for row in busy["rows"]]
        busy["rows"][0]["load_average"] = [[1.0, 6.5]]
        findings = compare(old, new)
        assert {each.verdict for each in findings if each.unit == "s"} == {"not judged"}
        assert verdict_of(findings) == "worse", "memory is exact all the same"
        assert verdict_of(compare(old, document(1, slower=7.0))) == (
            "not judged" if busy is old else "worse"
        )
        notes = compare_notes(old, new, findings)
        assert notes[-1].startswith("times are not judged for that")
        assert "other work shared the cores): not judged" in " ".join(
            findings_table(findings).split()
        )
        for row, loads in zip(busy["rows"], before, strict=True):
            row["load_average"] = loads
    assert verdict_of(compare(old, new)) == "worse"
    assert verdict_of(compare(old, document(1))) == "no loss shown"
    few = document(0, rounds=1)
    assert verdict_of(compare(few, few)) == "not judged"
    on_gpu = [document(0, device="cuda"), document(1, device="cuda", slower=2.0)]
    on_gpu[0]["rows"][0]["load_average"] = [[1.0, 30.0]]
    assert verdict_of(compare(*on_gpu)) == "worse", "a GPU does not care"


def test_every_figure_of_a_much_slower_build_is_named() -> None:
    findings = compare(document(0), document(1, slower=2.0))
    slower = {each.figure for each in findings if each.verdict == "slower"}
    assert slower == {"first token", "time a token", "loading"}
    assert {each.verdict for each in findings if each.figure == "peak host memory"} == {
        "no difference shown"
    }
    first = next(each for each in findings if each.figure == "first token")
    assert first.change == pytest.approx(1.0, abs=0.15)


def test_a_slower_machine_is_not_a_slower_build() -> None:
    old = document(0)
    for seed in range(1, 21):
        new = document(seed, machine_slower=1.6)
        assert _worse(old, new) == []
        assert machine_change(old, new) == pytest.approx(0.6, abs=0.1)
    # The yardstick excuses no more than the machine's own part.
    assert _worse(old, document(99, machine_slower=1.6, slower=1.6))


def test_memory_has_no_spread_worth_the_name() -> None:
    old = document(0)
    findings = compare(old, document(1, more_bytes=12 << 20))
    larger = [each for each in findings if each.verdict == "larger"]
    assert [each.figure for each in larger] == ["peak host memory"] * 3
    assert all(each.is_worse for each in larger)
    assert _worse(old, document(1, more_bytes=1 << 20)) == []


def test_a_single_round_shows_nothing() -> None:
    findings = compare(document(0, rounds=1), document(1, rounds=1, slower=3.0))
    times = [each for each in findings if each.unit == "s"]
    assert {each.verdict for each in times} == {"no difference shown"}
    assert all(each.detectable is None for each in times)


def test_what_cannot_be_compared_is_refused() -> None:
    other = document(1)
    other["machine"]["processor"] = "Another"
    with pytest.raises(RequestError, match="different machines"):
        compare(document(0), other)
    with pytest.raises(RequestError, match="share no artifact"):
        compare(document(0), document(1, precisions=("nf4",)))
    with pytest.raises(RequestError, match="7,000,000,000 parameters in the new one"):
        compare(document(0), document(1, parameters=7 * 10**9))


def test_another_gpu_is_another_machine_for_what_ran_on_one() -> None:
    old, new = document(0, device="cuda"), document(1, device="cuda")
    new["machine"]["gpus"] = [{"name": "Another"}]
    with pytest.raises(RequestError, match="gpus"):
        compare(old, new)
    new = document(1)
    new["machine"]["gpus"] = [{"name": "Another"}]
    assert _worse(document(0), new) == [], "what ran on the CPU does not care"


def test_memory_of_the_gpu_is_compared_as_well() -> None:
    old, new = (
        document(seed, device="cuda", peak_memory={"host_bytes": 1 << 30, "device_bytes": size})
        for seed, size in enumerate((3 << 30, 4 << 30))
    )
    assert _worse(old, new) == [
        f"{n} ({n}, cuda) peak GPU memory" for n in ("fp16", "int8", "int4")
    ]
    assert _worse(new, old) == []


def test_rounds_that_are_too_few_say_so_however_they_scatter() -> None:
    old, new = document(0, rounds=2, noise=0.3), document(1, rounds=2, noise=0.3, slower=3.0)
    findings = compare(old, new)
    assert {each.detectable for each in findings if each.unit == "s"} == {None}
    notes = compare_notes(old, new, findings)
    assert "9 of 9 times" in notes[0]
    assert "so few rounds show nothing" in " ".join(findings_table(findings).split())
    three = document(0, noise=0.01)
    assert compare_notes(three, three, compare(three, three)) == []


def test_what_a_reader_must_know_is_said() -> None:
    old, new = document(0), document(1, precisions=("fp16", "int8"), weights="random")
    old["rows"][0]["weights"] = old["rows"][1]["weights"] = "random"
    old["settings"], new["settings"] = {"threads": 0}, {"threads": 1}
    old["rows"][0]["cache"], new["rows"][0]["cache"] = "float32", "int8"
    new["rows"][1]["cases"].pop()
    new["rows"][1]["load_average"] = [[9.0, 9.5]]
    findings = compare(old, new)
    assert findings[0].artifact == "fp16* (fp16, cpu)"
    notes = compare_notes(old, new, findings)
    for place, said in enumerate(
        (
            "only in the old file, so not compared: int4 (int4, cpu)",
            "measured with threads 0 before, 1 now",
            "fp16* (fp16, cpu): cache 'float32' before, 'int8' now",
            "int8* (int8, cpu): not asked alike in both files, so left out, and peak "
            "memory with it: 1 image",
            "the new file: Other work shared the 4 cores",
            "times are not judged for that",
            "* weights drawn at random",
        )
    ):
        assert notes[place].startswith(said)


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    contents = {"{": "cannot be read", "[]": "no result", "{}": "no result"}
    contents["[" * 100_000] = "cannot be read"
    contents[json.dumps({**document(0), "schema_version": 1})] = "schema_version 1"
    for content, message in contents.items():
        file.write_text(content)
        with pytest.raises(RequestError, match=message):
            read_bench(file)
    untimed = document(0)
    for row in untimed["rows"]:
        del row["cases"]
    file.write_text(json.dumps(untimed))
    with pytest.raises(RequestError, match="holds no times"):
        read_bench(file)


_ROUNDS: tuple[Any, ...] = ([], [0] * 5, [1.0], "abcde", [float("nan")] * 5, [10**400] * 5, None)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (("machine", "cores"), (None, "four", 0)),
        (("settings",), (3,)),
        (("rows", 0), (3, None)),
        (("rows", 0, "artifact"), (3, None)),
        (("rows", 0, "precision"), (None,)),
        (("rows", 0, "parameters"), (None, "x")),
        (("rows", 0, "peak_memory"), (None, {}, {"host_bytes": 0})),
        (("rows", 0, "peak_memory", "device_bytes"), (0, "x", True)),
        (("rows", 0, "load_seconds", "rounds"), _ROUNDS),
        (("rows", 0, "yardstick_seconds", "rounds"), _ROUNDS),
        (("rows", 0, "load_average"), (3, [3], [["x"]])),
        (("rows", 0, "cases"), (3, [3], None)),
        (("rows", 0, "cases", 0, "name"), (None, [])),
        (("rows", 0, "cases", 0, "ttft_seconds"), (None, 3)),
        (("rows", 0, "cases", 0, "ttft_seconds", "rounds"), _ROUNDS),
        (("rows", 0, "cases", 0, "decode_tokens_per_second", "rounds"), _ROUNDS),
    ],
)
def test_a_damaged_file_is_refused(
    path: tuple[str | int, ...], values: tuple[Any, ...], tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    for value in values:
        made = document(0)
        holder: Any = made
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        file.write_text(json.dumps(made))
        with pytest.raises(RequestError, match="is damaged"):
            read_bench(file)
    file.write_text(json.dumps(document(0)))
    read_bench(file)


def test_compare_takes_two_files_and_nothing_to_measure(tmp_path: Path) -> None:
    for more in (["x"], ["--out", "y.json"], ["--html", "y.html"]):
        with pytest.raises(RequestError):
            cli.main([*more, "--compare", "a.json", "b.json"])


def test_cases_that_ask_something_else_are_left_out() -> None:
    old, new = document(0, noise=0.01), document(1, noise=0.01)
    for row in new["rows"]:
        # As after another conversion: more tokens an image, so more time, and no fault of a build.
        case = row["cases"][-1]
        case["image_tokens"] *= 2
        case["ttft_seconds"]["rounds"] = [3 * each for each in case["ttft_seconds"]["rounds"]]
    assert _worse(old, new) == []


@pytest.mark.parametrize("change", ["more cases", "longer answers"])
def test_peak_memory_is_of_all_that_was_asked(change: str) -> None:
    old, new = document(0), document(1, more_bytes=12 << 20)
    for before, row in zip(old["rows"], new["rows"], strict=True):
        if change == "more cases":
            before["cases"].pop(0)
        else:
            row["cases"][0]["answer_tokens"] = 128
    assert _worse(old, new) == [], "as with --thorough"
    findings = compare(old, new)
    assert {each.figure for each in findings} == {"first token", "time a token", "loading"}
    assert [note.rpartition(": ")[2] for note in compare_notes(old, new, findings)] == ["text"] * 3


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {}
    for name, made in (
        ("old", document(0)),
        ("same", document(1)),
        ("slow", document(2, slower=2)),
    ):
        files[name] = str(tmp_path / f"{name}.json")
        Path(files[name]).write_text(json.dumps(made))
    assert cli.main(["--compare", files["old"], files["same"]]) == 0
    assert cli.main(["--compare", files["old"], files["slow"], "--json"]) == 1
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["verdict"] == "worse"
    assert "slower" in printed.err
    assert cli.main(["--compare", files["slow"], files["old"]]) == 0


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    # Tables of Student's t.
    [(0.975, 8, 2.306), (0.9995, 8, 5.041), (0.975, 1, 12.706), (0.95, 30, 1.697)],
)
def test_quantiles_of_t(probability: float, freedom: float, expected: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(expected, abs=6e-4)


def test_welch_by_hand() -> None:
    # Means 2 and 5, variances 1 and 1, three values each: error sqrt(2/3), four degrees.
    difference = compare_means([1, 2, 3], [4, 5, 6], 0.05)
    assert difference.mean == 3
    assert difference.margin == pytest.approx(2.776 * (2 / 3) ** 0.5, abs=1e-3)
