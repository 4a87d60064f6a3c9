"""Stages share one tokenizer of an artifact for as long as its file stays what it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava_edge.convert.verification.tokenizer.artifact import artifact_tokenizer
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.open import open_artifact
from tests.faults.models.fault_models import FaultModels


def test_an_artifact_is_read_once_and_another_opening_of_it_anew(models: FaultModels) -> None:
    folder = models["qwen2"].artifact
    one, other = (open_artifact(folder, verify_digests=False) for _ in range(2))
    assert artifact_tokenizer(one) is artifact_tokenizer(one)
    assert artifact_tokenizer(one) is not artifact_tokenizer(other)


def test_other_ids_of_the_manifest_are_judged_by_themselves(models: FaultModels) -> None:
    artifact = open_artifact(models["qwen2"].artifact, verify_digests=False)
    artifact_tokenizer(artifact)
    manifest = artifact.manifest
    tokens = replace(manifest.tokens, image=manifest.tokens.num_text_tokens + 1000)
    with pytest.raises(ArtifactError, match="image id"):
        artifact_tokenizer(replace(artifact, manifest=replace(manifest, tokens=tokens)))
