"""Which artifacts carry an engine, what is written beside it, and what is said where none is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.pipeline import Conversion, convert_checkpoint
from llava_edge.convert.planning.artifact_plan import plan_artifact
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.profiles.boards.hardware import load_profile
from llava_edge.profiles.errors import DependencyError, EngineError
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.artifact.hashing import hash_file
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.backends.engine_cache import shipped_engines
from llava_edge.runtime.util.progress import no_progress

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("odd")


def request(checkpoint: Path, board: str, out: Path | None = None, **wishes: Any) -> ConvertRequest:
    return ConvertRequest(
        checkpoint=str(checkpoint),
        out=out,
        profile=load_profile(board),
        wishes=PlanRequest(precision="fp16", context_tokens=1024, **wishes),
        verify="none",
    )


def convert(asked: ConvertRequest) -> tuple[Conversion, list[str]]:
    said: list[str] = []
    return convert_checkpoint(asked, no_progress, said.append), said


def test_a_board_of_the_matrix_gets_an_engine_bound_to_graph_library_and_gpu(
    checkpoint: Path, tmp_path: Path
) -> None:
    conversion, _ = convert(request(checkpoint, "rtx-4090", tmp_path / "artifact", grid="1x2"))

    artifact = open_artifact(conversion.folder)
    (engine,) = shipped_engines(artifact)
    facts = engine.facts
    assert conversion.manifest.plan["engine"] == "tensorrt-rtx"
    assert engine.path.name == "vision-tensorrt-rtx-sm89.engine"
    assert (facts.library, facts.compute_capability, facts.device) == ("tensorrt-rtx", "8.9", None)
    assert facts.library_version == sys.modules["tensorrt_rtx"].__version__
    assert (facts.max_tiles, facts.unproven) == (3, False)
    vision = sorted(artifact.folder.glob("vision/*"))
    assert facts.graph == {f"vision/{path.name}": hash_file(path) for path in vision}
    assert facts.file.sha256 == hash_file(engine.path)
    assert "vision-tensorrt-rtx-sm89.engine" in (artifact.folder / "README.md").read_text()


def test_the_a100_gets_one_only_when_it_is_asked_for_and_marked(
    checkpoint: Path, tmp_path: Path
) -> None:
    usual, _ = convert(request(checkpoint, "a100", tmp_path / "usual"))
    asked, said = convert(request(checkpoint, "a100", tmp_path / "asked", engine="tensorrt-rtx"))

    assert shipped_engines(open_artifact(usual.folder)) == []
    assert usual.manifest.plan["engine"] == "ort"
    (engine,) = shipped_engines(open_artifact(asked.folder))
    assert engine.facts.compute_capability == "8.0"
    assert engine.facts.unproven
    assert any("outside NVIDIA's support matrix" in line for line in said)


def test_without_the_library_an_artifact_does_without_unless_it_was_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)

    conversion, said = convert(request(checkpoint, "rtx-4090", tmp_path / "artifact"))

    assert conversion.manifest.plan["engine"] == "ort"
    assert not (conversion.folder / "engines").exists()
    assert sum("tensorrt-rtx is not installed. Install it with: pip" in line for line in said) == 1
    named = request(checkpoint, "rtx-4090", tmp_path / "named", engine="tensorrt-rtx")
    with pytest.raises(DependencyError, match=r"^tensorrt-rtx is not installed\. Install it with"):
        convert(named)
    assert not (tmp_path / "named").exists()


def test_boards_without_a_target_are_told_to_build_on_the_device(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)

    orin = plan_artifact(request(checkpoint, "jetson-orin-nano-8gb", engine="tensorrt"), opened)

    assert orin.engine is None
    assert any("on the device run llava-edge build-engine" in note for note in orin.notes)


def test_an_interrupted_conversion_takes_its_engine_over(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(checkpoint, "rtx-4090", tmp_path / "artifact")
    from llava_edge.convert import pipeline
    from llava_edge.convert.writing import artifact_parts

    def fail(*_: Any) -> None:
        raise EngineError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_card", fail)
        with pytest.raises(EngineError, match="stopped here"):
            convert(asked)
    monkeypatch.setattr(artifact_parts, "write_vision_engine", fail)

    conversion, _ = convert(asked)

    assert len(shipped_engines(open_artifact(conversion.folder))) == 1


def test_another_library_version_is_another_request(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_checkpoint(checkpoint)
    first = plan_artifact(request(checkpoint, "rtx-4090"), opened).engine
    monkeypatch.setattr("tensorrt_rtx.__version__", "1.8.0.1")
    second = plan_artifact(request(checkpoint, "rtx-4090"), opened).engine
    third = plan_artifact(request(checkpoint, "rtx-5090"), opened).engine

    assert first is not None
    assert second is not None
    assert third is not None
    assert replace(second, library=first.library).key == first.key
    assert len({json.dumps(target.key) for target in (first, second, third)}) == 3
