"""Artifacts of earlier schema versions still verify against their checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_edge.convert.checkpoint.formats.rounding import PER_CHANNEL
from llava_edge.convert.quantization import plan as quantization
from llava_edge.convert.verification.quantized.graph_weights import TWO_TERMS, GraphWeights
from llava_edge.runtime.artifact.certificate import StageResult
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.checksummed_json import seal
from tests.faults.models.fault_models import Made, Model
from tests.support.tiers import slow_but

SIZES = {"hidden_size": 128, "intermediate_size": 384, "heads": 4, "kv_heads": 2, "layers": 2}
"""All columns are multiples of 128, so that groups are as large."""


@pytest.mark.parametrize(("version", "verdict"), [(3, "pass"), (4, "fail")])
def test_a_block_of_int8_was_a_group_up_to_version_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, verdict: str
) -> None:
    monkeypatch.setattr(quantization, "largest_block", lambda *_: 128)
    model = Model("mistral", precision="int8", int8_isa="none", vision="fp16", changes=SIZES)
    made = Made(tmp_path, model)
    path = made.artifact / "manifest.json"
    document = json.loads(path.read_text("utf-8"))
    path.write_bytes(seal({**document, "schema_version": version}))

    certificate = made.verify(made.artifact)

    assert open_artifact(made.artifact).manifest.schema_version == version
    assert {row.name for row in failing(certificate.stages)} <= {"structure"}
    assert certificate.verdict == verdict, failing(certificate.stages)


@pytest.mark.parametrize(
    ("group", "rounds"), slow_but([(32, None)], [(32, None), (PER_CHANNEL, TWO_TERMS)])
)
def test_a_head_with_one_scale_a_row_verifies_as_one_in_groups_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, rounds: int | None
) -> None:
    if group == PER_CHANNEL:
        monkeypatch.setattr(quantization, "head_group_size", lambda *_: group)
    made = Made(tmp_path, Model("mistral", precision="int8", vision="fp16", changes=SIZES))

    certificate = made.verify(made.artifact)

    weights = GraphWeights.open(open_artifact(made.artifact))
    assert weights.rounding("lm_head") == rounds
    assert weights.rounding("language_model.layers.1.mlp.down_proj") == TWO_TERMS
    assert certificate.verdict == "pass", failing(certificate.stages)


def failing(rows: tuple[StageResult, ...]) -> list[StageResult]:
    """Those that fail."""
    return [row for row in rows if row.verdict == "fail"]
