import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from llava_edge.bench import memory_measure
from llava_edge.bench.memory_cases import MemoryCase, draw_cases
from llava_edge.bench.memory_fit import MARGIN, MIB, fit, holds, predict, table
from llava_edge.bench.memory_measure import Measurement, fill_tokenizer, measure_cases
from llava_edge.convert.random_spec import RandomSpec
from llava_edge.profiles.constants import memory_constants
from llava_edge.profiles.memory import Machine, estimate_memory

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

    def measure(case: MemoryCase, folder: Path, threads: int) -> dict[str, Any]:
        asked.append(case.name)
        found = {"host_bytes": 5, "prompt_tokens": 2, "steps": [["imported", 1, 2]]}
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
    assert list(json.loads(results.read_text("utf-8"))) == [c.name for c in (first, second, third)]


def test_a_tokenizer_is_filled_to_the_vocabulary_and_keeps_its_control_tokens(
    tmp_path: Path,
) -> None:
    from llava_edge.convert.random_tokenizer import train_tokenizer

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


def test_a_small_artifact_in_a_fresh_process_stays_within_its_prediction(tmp_path: Path) -> None:
    (measurement,) = measure_cases([ODD], tmp_path, tmp_path / "measured.json", lambda _: None)
    row = predict(measurement, memory_constants()["cpu"], is_fitted=False)
    assert row.holds, (row.measured, row.predicted, measurement.steps)
    assert ODD.prompt_tokens - 100 <= measurement.prompt_tokens <= ODD.context
    peaks = [peak for _, _, peak in measurement.steps]
    assert peaks == sorted(peaks)
    assert peaks[-1] <= measurement.host_bytes + MIB
    assert [path.name for path in tmp_path.iterdir()] == ["measured.json"]
