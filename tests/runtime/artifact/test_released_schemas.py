"""Artifacts that older tools wrote open, answer, and say what they said then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.certificate import overall
from llava_edge.runtime.artifact.open import READERS, open_artifact
from llava_edge.runtime.verification.self_test import run_self_test

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_there_is_one_of_every_schema_version_that_is_read() -> None:
    kept = {path.name for path in DATA.glob("schema_*")}
    assert kept == {f"schema_{version}" for version in READERS}


@pytest.mark.parametrize("version", sorted(READERS))
def test_it_opens_and_answers_as_it_did(version: int) -> None:
    folder = DATA / f"schema_{version}"
    manifest = open_artifact(folder, hash_everything=True).manifest
    assert manifest.schema_version == version
    picture = np.zeros((60, 100, 3), np.uint8)

    for cache in manifest.decoders:
        with LlavaEdge.load(folder, threads=1, cache=cache) as model:
            answer = model.generate("What is this?", [picture], max_new_tokens=4)
            rows = run_self_test(model)

        assert len(answer.token_ids) == 4
        assert answer.image_tokens > 0
        # What the reference said when it was made, by today's runtime.
        assert overall(rows) == "pass", rows


@pytest.mark.parametrize("version", sorted(READERS))
def test_it_is_small(version: int) -> None:
    files = [path for path in (DATA / f"schema_{version}").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 450_000
