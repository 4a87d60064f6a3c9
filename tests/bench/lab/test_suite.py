"""The ladder: what it counts as measured already, and that its titles are true."""

from pathlib import Path
from typing import Any

import pytest

from llava_edge.bench.common.machine import commit
from llava_edge.bench.common.results_store import Ledger, machine
from llava_edge.bench.lab import suite
from llava_edge.convert.testing.random_spec import preset
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.profiles.models.parameters import total_parameters
from tests.bench.bench_documents import document


def _entry(rung: suite.Rung) -> dict[str, Any]:
    made = document(0)
    made["machine"]["commit"] = commit()
    return {"rung": rung.digest, "machine": machine(), "bench": made}


def test_only_this_machine_commit_and_form_count_as_measured() -> None:
    rung = suite.RUNGS[1]
    assert suite.is_current(_entry(rung), rung)
    assert not suite.is_current(None, rung)
    assert not suite.is_current({**_entry(rung), "rung": "another"}, rung)
    assert not suite.is_current({**_entry(rung), "machine": {"processor": "another"}}, rung)
    other = _entry(rung)
    other["bench"]["machine"]["commit"] = "feedfeedfeed"
    assert not suite.is_current(other, rung)


@pytest.mark.parametrize(("name", "millions"), [("mid", 140), ("large", 1400)])
def test_titles_state_the_size(name: str, millions: int) -> None:
    rung = next(rung for rung in suite.RUNGS if rung.name == name)
    dims = ModelDims.from_config(preset("tiny", **rung.sizes).config(5))
    assert total_parameters(dims) / 1e6 == pytest.approx(millions, rel=0.05)


def test_what_is_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(rung: suite.Rung, options: Any) -> dict[str, Any]:
        measured.append(rung.name)
        return {name: value for name, value in _entry(rung).items() if name != "machine"}

    monkeypatch.setattr(suite, "_measure", measure)
    command = ["--work", str(tmp_path), "--results", str(tmp_path / "bench.json")]
    assert suite.main([*command, "--only", "pages"]) == 0
    assert suite.main(command) == 0
    assert measured == ["pages", "mid", "large"], "pages was there already"
    assert suite.main([*command, "--again", "--only", "mid"]) == 0
    assert measured[3:] == ["mid"]
    assert (tmp_path / "report.html").exists()
    assert set(Ledger(tmp_path / "bench.json").entries) == {"pages", "mid", "large"}


def test_a_table_of_a_machine_whose_rates_are_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = _entry(suite.RUNGS[0])
    for row in entry["bench"]["rows"]:
        row["roofline_fraction"] = None
    file = tmp_path / "bench.json"
    Ledger(file).put("pages", entry)
    assert suite.main(["--results", str(file), "--markdown"]) == 0
    assert capsys.readouterr().out.count("| unknown |") == 3
