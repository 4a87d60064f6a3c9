"""What only the manifest or the golden prompts say wrongly is found as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_edge.convert.checkpoint import open_checkpoint
from llava_edge.convert.verify.verifier import VerifyOptions, open_reference, verify_artifact
from llava_edge.runtime.artifact import open_artifact
from llava_edge.runtime.golden import GOLDEN_FILE, golden_bytes, read_golden
from llava_edge.runtime.opened_file import OpenedFile
from llava_edge.runtime.progress import no_progress
from tests.convert.verify.tamper import Tampered


def _reversed_candidates(manifest: dict[str, Any]) -> None:
    manifest["image_processing"]["image_grid_pinpoints"].reverse()


def _lost_candidate(manifest: dict[str, Any]) -> None:
    del manifest["image_processing"]["image_grid_pinpoints"][0]


def _other_order(manifest: dict[str, Any]) -> None:
    manifest["image_processing"]["reference"] = "original"


def _half_the_words(manifest: dict[str, Any]) -> None:
    manifest["tokens"]["num_text_tokens"] //= 2


def _no_prompt(manifest: dict[str, Any]) -> None:
    manifest["prompt"] = None


def _no_bos(manifest: dict[str, Any]) -> None:
    manifest["tokens"]["bos"] = None


@pytest.fixture(scope="module")
def sound(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"), verify="quick")


@pytest.fixture
def failing(make_checkpoint: Callable[..., Path]) -> Callable[[Path], list[str]]:
    """Names of the stages that an artifact fails."""

    def verify(artifact: Path) -> list[str]:
        opened = open_artifact(artifact, read_certificate_too=False)
        checkpoint = open_checkpoint(make_checkpoint("odd", backbone="mistral"))
        reference = open_reference(opened, checkpoint)
        options = VerifyOptions(threads=1)
        certificate = verify_artifact(opened, checkpoint, options, no_progress, reference)
        return [stage.name for stage in certificate.stages if stage.verdict == "fail"]

    return verify


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        (_reversed_candidates, "structure"),
        (_lost_candidate, "structure"),
        (_other_order, "structure"),
        (_half_the_words, "structure"),
        (_no_prompt, "prompt"),
        (_no_bos, "prompt"),
    ],
)
def test_a_wrong_fact_of_the_manifest_is_found(
    sound: Path,
    failing: Callable[[Path], list[str]],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    stage: str,
) -> None:
    tampered = Tampered(sound, tmp_path / "artifact")
    change(tampered.manifest)

    assert stage in failing(tampered.seal())


def test_golden_prompts_that_say_something_else_are_found(
    sound: Path, failing: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    tampered = Tampered(sound, tmp_path / "artifact")
    path = tmp_path / "artifact" / GOLDEN_FILE
    manifest = open_artifact(sound).manifest
    probes = [
        replace(probe, logits=np.flip(probe.logits, axis=1).copy())
        for probe in read_golden(OpenedFile(path), manifest)
    ]
    path.write_bytes(golden_bytes(probes, manifest))

    assert failing(tampered.seal()) == ["golden"]
