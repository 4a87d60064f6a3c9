"""What loading says and does where an artifact was verified elsewhere."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_edge.convert.output.artifact_writer import write_certificate
from llava_edge.profiles.errors import EngineError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.certificate import Certificate, StageResult
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.checksummed_json import seal
from llava_edge.runtime.util.json_codec import to_json
from llava_edge.runtime.verification import self_test_policy
from llava_edge.runtime.verification.golden.probes import GoldenProbe
from llava_edge.runtime.verification.host import describe_host
from llava_edge.runtime.verification.self_test_cache import keep_result, read_result

Issue = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llava-edge" / "on-device"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[LlavaEdge]:
    """Models whose golden prompts were really run."""
    models: list[LlavaEdge] = []
    real = self_test_policy.run_self_test

    def spy(model: LlavaEdge, **given: Any) -> list[StageResult]:
        models.append(model)
        return real(model, **given)

    monkeypatch.setattr(self_test_policy, "run_self_test", spy)
    return models


@pytest.fixture(scope="module")
def artifacts(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    reference_probes: Callable[..., tuple[GoldenProbe, ...]],
    with_golden: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """One whose layers stay in float32, as made and with golden prompts."""
    checkpoint = make_checkpoint("odd", backbone="mistral")
    bare = make_artifact(checkpoint)
    manifest = open_artifact(bare).manifest
    probes = reference_probes(checkpoint, manifest)
    out = tmp_path_factory.mktemp("golden") / "artifact"
    return {"bare": bare, "golden": with_golden(bare, out, probes, manifest)}


@pytest.fixture
def issue(
    artifacts: dict[str, Path], tmp_path: Path, make_certificate: Callable[..., Certificate]
) -> Issue:
    """``issue(which, int8=True, **host)``: a copy with a certificate of another host.

    ``int8`` has the manifest say that int8 kernels compute: which kernels run then does not matter
    to who decides whether to look.
    """
    import shutil

    def write(which: str, int8: bool = True, **host: str) -> Path:
        folder = tmp_path / "artifact"
        shutil.copytree(artifacts[which], folder)
        if int8:
            document = json.loads((folder / "manifest.json").read_text())
            document["precision"]["int8_route"] = "nbits"
            (folder / "manifest.json").write_bytes(seal(document))
        write_certificate(folder, to_json(make_certificate(host=host)))
        return folder

    return write


def load(folder: Path, **options: Any) -> None:
    LlavaEdge.load(folder, threads=1, **options).close()


def test_verified_here_nothing_is_said_and_nothing_is_run(
    issue: Issue, runs: list[LlavaEdge], caplog: pytest.LogCaptureFixture
) -> None:
    load(issue("golden"), require_verified=True)

    assert caplog.text == ""
    assert runs == []


def test_other_int8_instructions_run_the_golden_prompts_once(
    issue: Issue, runs: list[LlavaEdge], caplog: pytest.LogCaptureFixture
) -> None:
    folder = issue("golden", int8_isa="another")
    here = describe_host("cpu").int8_isa

    load(folder)
    assert f"with the int8 instructions another and runs with {here}" in caplog.text
    assert "Its golden prompts were run here and pass" in caplog.text
    assert len(runs) == 1
    caplog.clear()
    load(folder)

    assert caplog.text == ""
    assert len(runs) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"cpu": "another"},
        {"int8_isa": "another"},
        {"onnxruntime": "0.0"},
        {"provider": "another"},
        {"machine": "another"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_result_counts_for_one_machine_and_engine(
    issue: Issue,
    runs: list[LlavaEdge],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
) -> None:
    folder = issue("golden", int8_isa="that of the certificate")
    load(folder)
    here = dataclasses.replace(describe_host("cpu"), **changes)
    if "provider" in changes:
        here = dataclasses.replace(describe_host("cpu"), machine="a second")
    monkeypatch.setattr(self_test_policy, "describe_host", lambda device, engine: here)

    load(folder)

    assert len(runs) == 2


def test_a_result_counts_for_one_version_of_the_tool(
    issue: Issue, runs: list[LlavaEdge], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = issue("golden", int8_isa="another")
    load(folder)
    monkeypatch.setattr(
        "llava_edge.runtime.verification.self_test_cache.own_version", lambda: "99.0"
    )

    load(folder)

    assert len(runs) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"verdict": "pass"}', b"\xff" * 9, None])
def test_a_damaged_result_costs_one_more_run(
    issue: Issue, runs: list[LlavaEdge], own_cache: Path, damage: bytes | None
) -> None:
    folder = issue("golden", int8_isa="another")
    load(folder)
    (file,) = own_cache.iterdir()
    whole = json.loads(file.read_text())
    # None: whole, but of another manifest.
    other = json.dumps({**whole, "manifest_sha256": "0" * 64}).encode()
    file.write_bytes(other if damage is None else damage)

    load(folder)

    assert len(runs) == 2
    assert json.loads(file.read_text())["manifest_sha256"] == whole["manifest_sha256"]


def test_a_cache_that_cannot_be_written_costs_a_run_each_time(
    issue: Issue, runs: list[LlavaEdge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = issue("golden", int8_isa="another")

    load(folder)
    load(folder)

    assert len(runs) == 2


def test_a_machine_on_which_they_fail_is_refused_each_time_and_the_stage_named(
    issue: Issue, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = issue("golden", int8_isa="another")
    failed = StageResult("decode_logits", "max_gap_of_range", 0.08, 1e-4, "fail", detail="there")
    closed: list[LlavaEdge] = []
    close = LlavaEdge.close
    monkeypatch.setattr(LlavaEdge, "close", lambda self: (closed.append(self), close(self)))
    monkeypatch.setattr(self_test_policy, "run_self_test", lambda model, **_: [failed])

    for _ in range(2):
        with pytest.raises(EngineError, match=r"fail here: stage decode_logits.*0\.08.*there"):
            load(folder)
    assert len(closed) == 2

    # Looked at again, and sound this time: no old verdict stands in the way.
    monkeypatch.undo()
    sound = dataclasses.replace(failed, value=0.0, verdict="pass")
    monkeypatch.setattr(self_test_policy, "run_self_test", lambda model, **_: [sound])
    load(folder)


def test_what_stays_open_is_told_once(
    issue: Issue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = issue("golden", int8_isa="another")
    rows = [
        StageResult("prompt", "differing_prompts", 0.0, 0.0, "pass"),
        StageResult("greedy", "differing_tokens", 0.0, 0.0, "inconclusive", detail="4 positions"),
    ]
    monkeypatch.setattr(self_test_policy, "run_self_test", lambda model, **_: rows)

    load(folder)
    assert "none fails, open is stage greedy" in caplog.text
    caplog.clear()
    load(folder)

    assert caplog.text == ""


def test_a_context_too_small_for_the_prompts_is_not_remembered(
    issue: Issue, runs: list[LlavaEdge], caplog: pytest.LogCaptureFixture
) -> None:
    folder = issue("golden", int8_isa="another")

    load(folder, context_tokens=40)
    assert "open is stage prompt" in caplog.text
    load(folder)

    assert len(runs) == 2
    assert "Its golden prompts were run here and pass" in caplog.text


def test_without_int8_kernels_other_instructions_are_none_of_its_business(
    issue: Issue, runs: list[LlavaEdge], caplog: pytest.LogCaptureFixture
) -> None:
    load(issue("golden", int8=False, int8_isa="another"))

    assert caplog.text == ""
    assert runs == []


def test_without_golden_prompts_there_is_a_warning_every_time(
    issue: Issue, caplog: pytest.LogCaptureFixture
) -> None:
    folder = issue("bare", int8_isa="another")
    for _ in range(2):
        caplog.clear()
        load(folder)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "holds no golden prompts" in caplog.text


def test_another_provider_is_a_warning_until_the_machine_was_checked(
    issue: Issue, runs: list[LlavaEdge], caplog: pytest.LogCaptureFixture
) -> None:
    folder = issue("golden", provider="CUDAExecutionProvider")

    load(folder)
    assert "on CUDAExecutionProvider and runs on CPUExecutionProvider" in caplog.text
    assert "--on-device" in caplog.text
    assert runs == []
    caplog.clear()
    digest = open_artifact(folder).manifest_sha256
    passed = (StageResult("prompt", "differing_prompts", 0.0, 0.0, "pass"),)
    keep_result(digest, describe_host("cpu"), passed)
    load(folder)

    assert caplog.text == ""


@pytest.mark.parametrize("certificate", ["missing", "failed"])
def test_an_unverified_artifact_says_only_that(
    issue: Issue,
    runs: list[LlavaEdge],
    make_certificate: Callable[..., Certificate],
    caplog: pytest.LogCaptureFixture,
    certificate: str,
) -> None:
    folder = issue("golden", int8_isa="another")
    (folder / "certificate.json").unlink()
    if certificate == "failed":
        failed = make_certificate(host={"int8_isa": "another"}, passed=False, verdict="fail")
        write_certificate(folder, to_json(failed))
    with caplog.at_level(logging.WARNING):
        load(folder)

    assert len(caplog.records) == 1
    assert "is not verified" in caplog.text
    assert runs == []


def test_nothing_is_written_into_the_artifact(issue: Issue) -> None:
    folder = issue("golden", int8_isa="another")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}

    load(folder)

    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_a_kept_result_comes_back(own_cache: Path) -> None:
    host = describe_host("cpu")
    assert read_result("1" * 64, host) is None
    row = StageResult("greedy", "differing_tokens", None, 0.0, "inconclusive")

    kept, path = keep_result("1" * 64, host, (row,))

    assert kept.verdict == "inconclusive"
    assert path.parent == own_cache
    assert read_result("1" * 64, host) == kept
    assert read_result("2" * 64, host) is None


def test_machines_that_share_a_home_keep_their_results_side_by_side() -> None:
    first = describe_host("cpu")
    second = dataclasses.replace(first, cpu="another")
    row = StageResult("prompt", "differing_prompts", 0.0, 0.0, "pass")

    kept = [keep_result("1" * 64, host, (row,))[0] for host in (first, second)]

    assert [read_result("1" * 64, host) for host in (first, second)] == kept
