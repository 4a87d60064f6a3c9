"""Verification within a conversion: what passes takes its place, what fails is kept aside."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.convert.onnx import vision as vision_graph
from llava_edge.convert.pipeline import Conversion, convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.convert.verification import against
from llava_edge.profiles.errors import ArtifactError, VerificationError
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.cli.main import main
from llava_edge.runtime.util.opened_file import OpenedFile
from llava_edge.runtime.util.progress import no_progress
from llava_edge.runtime.verification.golden.probes import GOLDEN_FILE, read_golden
from tests.faults.models.checkpoint_changes import CHANGES
from tests.support.tiers import slow_but


@pytest.fixture
def request_of(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> Callable[..., ConvertRequest]:
    # A random head has so many near ties that the evidence may fall short at int4.
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("odd", backbone="mistral"), folder)
    CHANGES["decided"](folder)

    def make(precision: str = "fp16", **changes: Any) -> ConvertRequest:
        request = ConvertRequest(
            checkpoint=str(folder),
            out=tmp_path / "artifact",
            wishes=PlanRequest(precision=precision),
            quantization=QuantizationRequest(quantizer="rtn"),
        )
        return replace(request, **changes)

    return make


def converted(request: ConvertRequest) -> tuple[Conversion, list[str]]:
    said: list[str] = []
    return convert_checkpoint(request, no_progress, said.append), said


@pytest.mark.parametrize("precision", slow_but(["fp16"], ["fp16", "int4"]))
def test_a_conversion_is_verified_and_says_how_long_that_takes(
    request_of: Callable[..., ConvertRequest], precision: str
) -> None:
    conversion, said = converted(request_of(precision))

    artifact = open_artifact(conversion.folder, require_verified=True)
    assert artifact.verified
    assert conversion.certificate.mode == "quick"
    assert GOLDEN_FILE in artifact.manifest.files
    assert (conversion.folder / GOLDEN_FILE).stat().st_size < 400_000
    assert any(line.startswith("verifying (quick): about ") for line in said)
    assert "It passed." in (conversion.folder / "README.md").read_text()
    with LlavaEdge.load(conversion.folder, require_verified=True) as model:
        assert model.generate("What is it?", max_new_tokens=2).token_ids


def test_left_out_verification_is_said_and_does_not_count(
    request_of: Callable[..., ConvertRequest],
) -> None:
    conversion, _ = converted(request_of(verify="none"))

    document = json.loads((conversion.folder / "certificate.json").read_text())
    assert document["mode"] == "none"
    assert not document["passed"]
    assert GOLDEN_FILE not in conversion.manifest.files
    with pytest.raises(ArtifactError, match="left out"):
        open_artifact(conversion.folder, require_verified=True)


def test_a_failed_artifact_is_kept_aside_with_its_report(
    request_of: Callable[..., ConvertRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_graph, "QUICK_GELU_ALPHA", 1.6)
    request = request_of()

    with pytest.raises(VerificationError, match="tile_features") as caught:
        converted(request)

    assert request.out is not None
    failed = request.out.with_name("artifact.failed")
    assert not request.out.exists()
    report = json.loads((failed / "failure.json").read_text())
    assert report["verdict"] == "fail"
    assert report["first_deviation"]["tensor"].startswith("vision_tower.encoder.layers.0")
    assert str(failed) in str(caught.value)
    assert "vision_tower.encoder.layers.0" in str(caught.value)


def test_the_command_verifies_again_and_writes_the_certificate(
    request_of: Callable[..., ConvertRequest],
    capsys: pytest.CaptureFixture[str],
) -> None:
    request = request_of("int8", verify="none")
    conversion, _ = converted(request)
    checkpoint = request.checkpoint

    code = main(
        [
            "verify",
            str(conversion.folder),
            "--against",
            str(checkpoint),
            "--verify",
            "quick",
            "--json",
        ]
    )

    assert code == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out.splitlines()[-1])
    assert document["passed"]
    assert document["verdict"] == "pass"
    assert {"name", "metric", "value", "bound", "verdict"} <= set(document["stages"][0])
    assert "export fidelity" in shown.err
    assert open_artifact(conversion.folder, require_verified=True).verified


def test_the_verdict_is_shown_where_the_certificate_cannot_be_written(
    request_of: Callable[..., ConvertRequest],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = request_of()
    conversion, _ = converted(request)

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(against, "verify_artifact", lambda *args: conversion.certificate)
    monkeypatch.setattr(against, "write_atomic", refuse)
    code = main(["verify", str(conversion.folder), "--against", str(request.checkpoint)])

    assert code == 1
    shown = capsys.readouterr().err
    assert "export fidelity" in shown
    assert "README.md: the file system is read-only" in shown
    assert "TRACEBACK" not in shown


def test_another_checkpoint_is_refused_by_digest(
    request_of: Callable[..., ConvertRequest],
    make_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    conversion, _ = converted(request_of(verify="none"))
    other = make_checkpoint("odd", backbone="mistral", layers=2)

    assert main(["verify", str(conversion.folder), "--against", str(other)]) == 2
    assert "Give the same checkpoint" in capsys.readouterr().err


def test_a_verified_artifact_passes_on_the_device_that_made_it(
    request_of: Callable[..., ConvertRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    conversion, _ = converted(request_of("int8"))

    assert main(["verify", str(conversion.folder), "--on-device", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["passed"]
    here = [stage["metric"] for stage in document["stages"] if stage["name"] == "loop"]
    issued = [row.metric for row in conversion.certificate.stages if row.name == "loop"]
    assert sorted([*here, "differing_golden_cases"]) == sorted(issued)
    assert len(here) == 8


def test_golden_features_are_those_that_the_artifact_computes(
    request_of: Callable[..., ConvertRequest],
) -> None:
    conversion, _ = converted(request_of())
    probes = read_golden(OpenedFile(conversion.folder / GOLDEN_FILE), conversion.manifest)

    assert [probe.name for probe in probes] == ["text", "grid 1x2"]
    assert all(np.isfinite(probe.logits).all() for probe in probes)
    assert len(probes[1].feature_rows) > 0
