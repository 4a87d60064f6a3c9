"""The fit of the speed model: shares that made times are found again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.bench.common.results_store import Ledger
from llava_edge.bench.lab import speed_fit
from llava_edge.bench.lab.speed_fit import fit, non_negative, samples
from llava_edge.bench.speed.cases import speed_cases
from llava_edge.profiles.memory.constants import speed_constants
from llava_edge.runtime.artifact.open import open_artifact
from tests.bench.bench_documents import MACHINE

TRUE = {
    **{"vision": 0.37, "matmul_fp16": 0.61, "attention": 0.11},
    **{"bandwidth": 0.83, "attention_decode": 0.05, "step": 0.0011},
}


@pytest.fixture(scope="module")
def artifacts(
    make_artifact: Callable[..., Path], make_checkpoint: Callable[..., Path]
) -> list[Path]:
    # Of one model alone, what grows with the context could be the cache's bytes or attention.
    checkpoints = (make_checkpoint("odd", max_positions=4096, layers=n) for n in (2, 5))
    return [make_artifact(checkpoint, context_tokens=2048) for checkpoint in checkpoints]


@pytest.fixture
def document(artifacts: list[Path]) -> dict[str, Any]:
    """A result whose times are exactly those of ``TRUE``."""
    rows = []
    for artifact in artifacts:
        cases = []
        for case in speed_cases(open_artifact(artifact).manifest):
            stages = {name: {"median": 1.0} for name in speed_fit.STAGES}
            tokens = case.text_tokens + 60 * case.num_images * case.tiles_per_image
            counts = {"prompt_tokens": tokens, "answer_tokens": 32}
            cases.append({**case.__dict__, **counts, "stages": stages})
        row = {"artifact": str(artifact), "device": "cpu", "cache": "float32", "cases": cases}
        rows.append(row)
    found = {"machine": {**MACHINE, "int8_isa": "vnni"}, "rows": rows}
    by_stage: dict[str, list[float]] = {name: [] for name in speed_fit.STAGES}
    for sample in samples("large", found):
        by_stage[sample.stage].append(sample.predicted(TRUE))
    for row in rows:
        for case in row["cases"]:
            for name in ("prefill", "decode", *(("vision",) if case["num_images"] else ())):
                scale = case["answer_tokens"] - 1 if name == "decode" else 1
                case["stages"][name]["median"] = by_stage[name].pop(0) * scale
    assert not any(by_stage.values())
    return found


def test_shares_that_made_the_times_are_found(document: dict[str, Any]) -> None:
    found = fit(samples("large", document), {})
    assert found == pytest.approx(TRUE, rel=1e-6)
    changed = {**TRUE, "attention": 0.9, "step": 1.0}
    few = fit(samples("large", document), changed, ("attention", "step"))
    assert few == pytest.approx({name: TRUE[name] for name in ("attention", "step")}, rel=1e-6)


def test_prompts_without_pictures_say_nothing_of_the_tower(document: dict[str, Any]) -> None:
    assert {sample.what for sample in samples("large", document) if sample.stage == "vision"} == {
        f"fp16 {case['name']}" for case in document["rows"][0]["cases"] if case["num_images"]
    }
    for row in document["rows"]:
        row["device"] = "cuda"
    assert samples("large", document) == []


def test_nothing_is_less_than_zero() -> None:
    matrix = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert non_negative(matrix, np.array([2.0, 3.0, 4.0])) == pytest.approx([1, 1])
    assert non_negative(matrix, np.array([3.0, 2.0, 1.0])) == pytest.approx([2, 0])
    assert non_negative(matrix, np.array([-1.0, -1.0, -1.0])) == [0, 0]


def test_the_command_prints_both(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    ledger = Ledger(file)
    ledger.put("large", {"bench": document})
    ledger.put("pages", {"bench": {}})
    assert speed_fit.main(["--results", str(file)]) == 0
    text = capsys.readouterr().out
    shipped = speed_constants()["cpu"]["bandwidth"]
    assert f"| bandwidth | {shipped:.3g} | 0.83 |" in text
    assert text.count("| large |") == 28
    with pytest.raises(SystemExit):
        speed_fit.main(["--results", str(file), "--free", "colour"])
    assert "unknown are colour" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        speed_fit.main(["--results", str(file), "--fit", "huge"])
    assert "holds no times on a CPU of huge; it holds large" in capsys.readouterr().err
