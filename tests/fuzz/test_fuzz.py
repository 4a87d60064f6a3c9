"""A part of ``make fuzz`` that takes seconds, and the watch over it put to the test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.fuzz.artifacts import SPECS, make_artifact
from tests.fuzz.families import COUNTS
from tests.fuzz.run import SEED, fuzz
from tests.support.conversion_cache import ConversionCache

SHARE = 1 / 32
CHECKPOINT_SHARE = 1 / 125
"""Each of these is a whole conversion."""


@pytest.fixture(scope="module")
def artifacts(conversion_cache: ConversionCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def build(folder: Path) -> None:
        for name in SPECS:
            make_artifact(name, folder, lambda _: None)

    made = conversion_cache.get(f"fuzzed {SPECS}", build)
    # Checkpoints are written beside them.
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("fuzz") / "artifacts"))


def test_an_input_of_every_family_is_answered_or_refused(artifacts: Path, tmp_path: Path) -> None:
    # Checkpoints have tests/convert/checkpoint/test_hostile_checkpoints.py in their place.
    families = [name for name in COUNTS if "checkpoint-" not in name]

    found = fuzz([(name, 0) for name in families], artifacts, tmp_path, SEED, processes=1)

    assert found.faults == []
    assert set(found.outcomes) == set(families)


@pytest.mark.slow
def test_fuzzed_inputs_are_answered_or_refused(artifacts: Path, tmp_path: Path) -> None:
    shares = {name: CHECKPOINT_SHARE if "checkpoint-" in name else SHARE for name in COUNTS}
    numbers = [(name, i) for name, n in COUNTS.items() for i in range(round(n * shares[name]))]

    found = fuzz(numbers, artifacts, tmp_path, SEED, processes=1)

    assert found.faults == []
    assert found.count == len(numbers) >= 200
    # Both happen, so that neither a broken corpus nor a runtime that refuses all goes unseen.
    assert found.outcomes["image"]["answered"] >= 5
    assert found.outcomes["image"]["ImageError"] >= 20
    assert found.outcomes["graph"]["ArtifactError"] >= 5
    converted = {name: found.outcomes[name] for name in shares if "checkpoint-" in name}
    assert sum(counter["answered"] for counter in converted.values()) >= 2
    assert sum(counter["CheckpointError"] for counter in converted.values()) >= 4


MISBEHAVIOUR = (
    "the process ended with -6",
    "no answer within 8 s",
    "the process ended with -9",
    "IndexError",
    "a warning: UserWarning: careful",
    "on stderr: b'a word'",
    "left open: ",
    "left behind: ",
    "; the plan has ",
    "threads left",
    "SystemExit",
)


def test_whatever_goes_wrong_is_told(artifacts: Path, tmp_path: Path) -> None:
    numbers = [("misbehaving", number) for number in range(len(MISBEHAVIOUR))]

    found = fuzz(numbers, artifacts, tmp_path, processes=1, deadline=8)

    told = {report["number"]: report["faults"] for report in found.faults}
    for number, words in enumerate(MISBEHAVIOUR):
        assert any(words in fault for fault in told[number]), (number, told.get(number))
        kept = tmp_path / "found" / f"misbehaving-{number}" / "evidence"
        assert kept.read_bytes() == b"evidence"


def test_a_changed_answer_is_told(artifacts: Path, tmp_path: Path) -> None:
    numbers = [("misbehaving", 11), *[("quality", number) for number in range(99)]]

    found = fuzz(numbers, artifacts, tmp_path, processes=1)

    assert [report["faults"] for report in found.faults] == [
        ["a sound request is answered otherwise than before"]
    ]
