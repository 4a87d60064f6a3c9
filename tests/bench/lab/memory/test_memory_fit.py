import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from llava_edge.bench.lab.memory import measure as memory_measure
from llava_edge.bench.lab.memory.cases import MemoryCase, draw_cases, draw_wide_cases
from llava_edge.bench.lab.memory.fit import MARGIN, MIB, fit, holds, predict, table
from llava_edge.bench.lab.memory.measure import (
    Measurement,
    MeasureSettings,
    fill_tokenizer,
    measure_cases,
)
from llava_edge.bench.lab.memory.probe import Steps
from llava_edge.convert.testing.random_spec import RandomSpec
from llava_edge.profiles.memory.constants import memory_constants
from llava_edge.profiles.memory.estimate import Machine, estimate_memory

ODD = MemoryCase(
    name="odd",
    seed=3,
    sizes={
        "image_size": 70,
        "patch_size": 14,
        "vision_hidden_size": 48,
        "vision_intermediate_size": 112,
        "vision_heads": 3,
        "hidden_size": 96,
        "intermediate_size": 160,
        "heads": 6,
        "kv_heads": 2,
        "vocab_size": 1401,
    },
    grid="2x2",
    context=2000,
    prompt_tokens=1500,
    num_images=2,
    image_height=150,
    image_width=141,
)


def made_up(case: MemoryCase, process: int, prefill_factor: float) -> Measurement:
    """A measurement as a machine with these constants would give it."""
    config = RandomSpec(**case.sizes).config(image_token_id=1)  # type: ignore[arg-type]
    unknown = Measurement(case, config, 0, 0)
    groups = memory_constants()
    groups["cpu"] = groups["cpu"].replace(process=process, prefill_factor=prefill_factor)
    work = case.workload(unknown.dims)
    estimate = estimate_memory(unknown.dims, "fp16", work, Machine("cpu"), groups)
    return replace(unknown, host_bytes=estimate.host_bytes)


@pytest.mark.parametrize(
    ("measured", "predicted", "verdict"),
    [
        pytest.param(1000, 1000, True, id="equal"),
        pytest.param(1000, 999, False, id="one byte below what was measured"),
        pytest.param(1000, 1050 + 64 * MIB, True, id="the most that is allowed"),
        pytest.param(1000, 1051 + 64 * MIB, False, id="one byte above"),
    ],
)
def test_a_prediction_holds_between_measured_and_five_percent_and_64_mib_above(
    measured: int, predicted: int, verdict: bool
) -> None:
    assert holds(measured, predicted) is verdict


def test_a_fit_finds_the_constants_that_measurements_were_made_of() -> None:
    cases = draw_cases(7)
    measurements = [made_up(case, 100 * MIB, 1.9) for case in cases]
    found = fit(measurements[::2])
    assert found["prefill_factor"] == 1.9
    assert 100 * MIB + MARGIN <= found["process"] <= 101 * MIB + MARGIN
    rows = [predict(measurement, found, is_fitted=False) for measurement in measurements]
    assert all(row.holds for row in rows)
    assert all(MARGIN <= row.predicted - row.measured <= MARGIN + 2 * MIB for row in rows)


def test_a_case_that_takes_more_than_the_others_is_still_bounded_and_the_table_says_it() -> None:
    usual = [made_up(case, 50 * MIB, 1.5) for case in draw_cases(7)[:5]]
    hungry = replace(usual[0], host_bytes=usual[0].host_bytes + 90 * MIB)
    constants = fit([*usual, hungry])
    assert predict(hungry, constants, is_fitted=True).holds
    # Bounding it makes the bound of the others loose, which is what the last column is for.
    lines = table([predict(m, constants, is_fitted=True) for m in (usual[1], hungry)]).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["NO", "yes"]


def test_cases_follow_from_the_seed_and_range_from_tiny_to_a_full_size_tower() -> None:
    cases = draw_cases(0)
    assert cases == draw_cases(0) != draw_cases(1)
    assert len({case.name for case in cases}) == 12
    assert sum(case.sizes["vision_hidden_size"] == 1024 for case in cases) >= 3
    assert {case.sizes["kv_heads"] == case.sizes["heads"] for case in cases} == {True, False}
    assert {case.num_images for case in cases} == {1, 2, 3}
    assert max(case.context for case in cases) > 10_000 > 1_000 > min(c.context for c in cases)


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measure(case: MemoryCase, folder: Path, settings: MeasureSettings) -> dict[str, Any]:
        asked.append(case.name)
        found = {
            "host_bytes": 5,
            "prompt_tokens": 2,
            "steps": [["imported", 1, 2]],
            "chunk_tokens": 512,
        }
        return {"case": case.as_dict(), "config": {}, **found}

    monkeypatch.setattr(memory_measure, "measure_case", measure)
    first, second, third = draw_cases(0)[:3]
    results = tmp_path / "measured.json"
    measure_cases([first, second], tmp_path, results, lambda _: None)
    again = measure_cases([first, second, third], tmp_path, results, lambda _: None)
    assert asked == [first.name, second.name, third.name]
    assert again[0] == Measurement(first, {}, 5, 2, (("imported", 1, 2),))
    # Another question under the same name is another measurement.
    measure_cases([replace(first, context=9)], tmp_path, results, lambda _: None)
    assert asked[3:] == [first.name]
    # So is one by other settings.
    settings = MeasureSettings(prefill_chunk=128)
    measure_cases([second], tmp_path, results, lambda _: None, settings)
    assert asked[4:] == [second.name]
    assert list(json.loads(results.read_text("utf-8"))) == [c.name for c in (first, second, third)]


def test_a_tokenizer_is_filled_to_the_vocabulary_and_keeps_its_control_tokens(
    tmp_path: Path,
) -> None:
    from llava_edge.convert.testing.random_tokenizer import train_tokenizer

    path = tmp_path / "tokenizer.json"
    train_tokenizer("llama", 400).save(str(path))
    before = Tokenizer.from_file(str(path))
    fill_tokenizer(path, 5000)
    after = Tokenizer.from_file(str(path))
    assert after.get_vocab_size(with_added_tokens=True) == 5000
    added = {i: token.content for i, token in before.get_added_tokens_decoder().items()}
    assert {i: t.content for i, t in after.get_added_tokens_decoder().items()} == added
    text = "What is shown in this image?"
    assert after.decode(after.encode(text).ids).strip() == text


def on_a_gpu(case: MemoryCase, capability: str, **changes: Any) -> Measurement:
    """A measurement of a GPU that holds what is planned for it, and 10 MiB less."""
    config = RandomSpec(**case.sizes).config(image_token_id=1)  # type: ignore[arg-type]
    found = Measurement(case, config, 1, 0, (), 0, 2048, capability)
    found = replace(found, **changes)
    machine = Machine("cuda", compute_capability=capability)
    work = case.workload(found.dims, found.chunk_tokens)
    planned = estimate_memory(found.dims, case.precision, work, machine).device_bytes
    return replace(found, device_bytes=planned - 10 * MIB)


def test_a_gpu_is_compared_with_what_is_planned_for_its_memory_and_its_kind() -> None:
    case = draw_wide_cases(0)[0]
    constants = memory_constants()["cuda"]
    rows = [
        predict(on_a_gpu(case, *asked), constants, is_fitted=False)
        for asked in (("8.0",), ("7.5",), ("9.0",))
    ]
    assert all(row.holds and row.predicted - row.measured == 10 * MIB for row in rows)
    assert len({row.predicted for row in rows}) == 3
    assert {row.phase for row in rows} == {"decode"}
    shorter = predict(on_a_gpu(case, "8.0", chunk_tokens=256), constants, is_fitted=False)
    assert shorter.predicted < rows[0].predicted - 200 * MIB


def test_wide_cases_have_released_widths_and_leave_a_dimension_of_each_kind() -> None:
    cases = draw_wide_cases(0)
    assert cases == draw_wide_cases(0) != draw_wide_cases(1)
    heads = [(case.sizes["heads"], case.sizes["kv_heads"]) for case in cases]
    assert heads == [(32, 8), (32, 32), (28, 4), (40, 40)]


def test_an_artifact_for_a_gpu_is_converted_for_one_and_asked_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []

    def call(command: list[str]) -> str:
        called.append(command)
        if "llava_edge.convert.testing.random_cli" in command:
            (tmp_path / "case" / "checkpoint").mkdir()
            (tmp_path / "case" / "checkpoint" / "config.json").write_text("{}", "utf-8")
        return '{"device_bytes": 7}\n'

    monkeypatch.setattr(memory_measure, "_call", call)
    monkeypatch.setattr(memory_measure, "fill_tokenizer", lambda *_: None)
    case = replace(ODD, cache="int8", precision="int4")
    settings = MeasureSettings("cuda", prefill_chunk=256)
    found = memory_measure.measure_case(case, tmp_path / "case", settings)
    assert found["device_bytes"] == 7
    _, convert, probe = (" ".join(command) for command in called)
    assert "--profile a100" in convert
    assert "--cache int8" in convert
    assert "--samples 1" in convert
    assert "--device cuda" in probe
    assert "--cache int8" in probe
    assert "--prefill-chunk 256" in probe


def test_steps_keep_the_most_where_the_reader_knows_no_peak() -> None:
    held = iter([(5, 5), (9, 9), (7, 7)])
    steps = Steps(lambda: next(held))
    for done in range(3):
        steps("tiles", done, 2)
    steps_found = [(name, most) for name, _, most in steps.found]
    assert steps_found == [("tiles 0/2", 5), ("tiles 1/2", 9), ("tiles 2/2", 9)]


def test_a_small_artifact_in_a_fresh_process_stays_within_its_prediction(tmp_path: Path) -> None:
    (measurement,) = measure_cases([ODD], tmp_path, tmp_path / "measured.json", lambda _: None)
    row = predict(measurement, memory_constants()["cpu"], is_fitted=False)
    assert row.holds, (row.measured, row.predicted, measurement.steps)
    assert ODD.prompt_tokens - 100 <= measurement.prompt_tokens <= ODD.context
    peaks = [peak for _, _, peak in measurement.steps]
    assert peaks == sorted(peaks)
    assert peaks[-1] <= measurement.host_bytes + MIB
    assert [path.name for path in tmp_path.iterdir()] == ["measured.json"]
