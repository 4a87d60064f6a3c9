"""Golden prompts on this machine: sound ones pass, and each fault shows at the stage it is of."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.certificate import StageResult, overall
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.verification import self_test as on_device_module
from llava_edge.runtime.verification.golden.probes import GoldenProbe
from llava_edge.runtime.verification.self_test import run_self_test

STAGES = [
    "prompt",
    "preprocessing",
    "tile_features",
    "prefill_logits",
    "decode_logits",
    "greedy",
]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("odd", backbone="mistral")


@pytest.fixture(scope="module")
def plain(checkpoint: Path, make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(checkpoint)


@pytest.fixture(scope="module")
def manifest(plain: Path) -> Manifest:
    return open_artifact(plain).manifest


@pytest.fixture(scope="module")
def probes(
    checkpoint: Path, manifest: Manifest, reference_probes: Callable[..., tuple[GoldenProbe, ...]]
) -> tuple[GoldenProbe, ...]:
    return reference_probes(checkpoint, manifest)


@pytest.fixture(scope="module")
def golden(
    plain: Path,
    probes: tuple[GoldenProbe, ...],
    manifest: Manifest,
    with_golden: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return with_golden(plain, tmp_path_factory.mktemp("golden") / "artifact", probes, manifest)


@pytest.fixture(scope="module")
def model(golden: Path) -> Iterator[LlavaEdge]:
    with LlavaEdge.load(golden, threads=1) as loaded:
        yield loaded


def verdicts(rows: list[StageResult]) -> dict[str, str]:
    return {row.name: row.verdict for row in rows}


def test_sound_prompts_pass_every_stage(model: LlavaEdge) -> None:
    said: list[tuple[str, int, int]] = []

    rows = run_self_test(model, lambda *report: said.append(report))

    assert verdicts(rows) == dict.fromkeys(STAGES, "pass")
    assert [row.name for row in rows] == STAGES
    assert overall(rows) == "pass"
    assert rows[2].value is not None
    assert 0 < rows[2].value < 1e-5
    assert "82 positions" in rows[5].detail
    assert said == [("golden prompts", index, 2) for index in range(3)]


def test_it_runs_what_answers_questions(model: LlavaEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault planted in the path of ordinary requests is seen."""
    real = model._decoder.step
    monkeypatch.setattr(model._decoder, "step", lambda row: real(-row))

    rows = run_self_test(model)

    failed = {name for name, verdict in verdicts(rows).items() if verdict == "fail"}
    assert failed == {"decode_logits", "greedy"}


def change(name: str, at: Any, by: float) -> Callable[[GoldenProbe], GoldenProbe]:
    """The reference says something else at one place."""

    def changed(probe: GoldenProbe) -> GoldenProbe:
        array = getattr(probe, name).copy()
        array[at] += by
        return dataclasses.replace(probe, **{name: array})

    return changed


def other_pixels(probe: GoldenProbe) -> GoldenProbe:
    return dataclasses.replace(probe, pixel_sha256=hashlib.sha256(b"others").hexdigest())


def other_tokens(probe: GoldenProbe) -> GoldenProbe:
    """The best two change places; the margin stays."""
    return dataclasses.replace(probe, top_ids=probe.top_ids[:, ::-1].copy())


@pytest.mark.parametrize(
    ("fault", "stage", "detail"),
    [
        (change("ids", 2, 1), "prompt", "at position 2"),
        (lambda p: dataclasses.replace(p, ids=p.ids[:-1]), "prompt", "ids for"),
        (other_pixels, "preprocessing", "picture 1 has other pixels"),
        (change("features", (3, 5), 0.5), "tile_features", "largest at picture 1, row"),
        (change("logits", (0, 4), 0.5), "prefill_logits", "picture 1, position 0, id"),
        (change("logits", (7, 4), 0.5), "decode_logits", "picture 1, position 7, id"),
        (other_tokens, "greedy", "picture 1, position"),
    ],
)
def test_each_difference_fails_its_stage_and_says_where(
    model: LlavaEdge,
    probes: tuple[GoldenProbe, ...],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[GoldenProbe], GoldenProbe],
    stage: str,
    detail: str,
) -> None:
    planted = (probes[0], fault(probes[1]))
    monkeypatch.setattr(on_device_module, "read_golden", lambda path, manifest: planted)

    rows = {row.name: row for row in run_self_test(model)}

    assert [name for name, row in rows.items() if row.verdict == "fail"] == [stage]
    assert detail in rows[stage].detail


def test_logits_that_are_no_numbers_fail(model: LlavaEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    real = model._decoder.step

    def broken(row: Any) -> Any:
        logits = real(row).copy()
        logits[:] = np.nan
        return logits

    monkeypatch.setattr(model._decoder, "step", broken)

    rows = {row.name: row for row in run_self_test(model)}

    assert rows["decode_logits"].verdict == "fail"
    assert "the value is nan" in rows["decode_logits"].detail


def test_a_prompt_that_is_refused_fails_its_stage_and_not_the_check(
    model: LlavaEdge, probes: tuple[GoldenProbe, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tuple(dataclasses.replace(probe, prompt="<image> <image>") for probe in probes)
    monkeypatch.setattr(on_device_module, "read_golden", lambda path, manifest: planted)

    rows = {row.name: row for row in run_self_test(model)}

    assert rows["prompt"].verdict == "fail"
    assert "picture 0 is refused" in rows["prompt"].detail
    assert {rows[name].verdict for name in STAGES[1:]} == {"inconclusive"}


def test_a_context_too_small_for_the_prompts_proves_nothing(golden: Path) -> None:
    with LlavaEdge.load(golden, threads=1, context_tokens=40) as small:
        rows = run_self_test(small)

    assert set(verdicts(rows).values()) == {"inconclusive"}
    assert "loaded are 40" in rows[0].detail


def test_too_few_positions_are_not_enough_evidence(
    model: LlavaEdge, probes: tuple[GoldenProbe, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_device_module, "read_golden", lambda path, manifest: probes[:1])

    rows = verdicts(run_self_test(model))

    assert rows == {**dict.fromkeys(STAGES, "pass"), "greedy": "inconclusive"}


def test_an_artifact_without_golden_prompts_says_what_to_do(plain: Path) -> None:
    with (
        LlavaEdge.load(plain, threads=1) as bare,
        pytest.raises(ArtifactError, match=r"golden\.safetensors.*--against"),
    ):
        run_self_test(bare)
