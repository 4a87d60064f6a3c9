"""Artifacts of earlier schema versions still verify against their checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_edge.convert import quantization
from llava_edge.runtime.artifact import open_artifact
from llava_edge.runtime.certificate import StageResult
from llava_edge.runtime.sealed_json import seal
from tests.convert.verify.fault_models import Made, Model

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


def failing(rows: tuple[StageResult, ...]) -> list[StageResult]:
    """Those that fail."""
    return [row for row in rows if row.verdict == "fail"]
