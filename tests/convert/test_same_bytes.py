"""The same conversion gives the same bytes of the manifest and of every file that it lists."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_edge.convert import pipeline
from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.profiles.boards.hardware import load_profile
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.artifact.conversion_record import read_conversion
from llava_edge.runtime.artifact.manifest_validation import MANIFEST, UNLISTED
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.progress import no_progress
from tests.support.tiers import slow_but

KILLED = -signal.SIGKILL

PLACES: dict[str, tuple[dict[str, Any], list[tuple[str, int]]]] = {
    # While a file is written; between two parts; while the finished folder is verified.
    "fp16": (
        {"precision": "fp16", "verify": "quick"},
        [("vision", 2), ("verify tile_features", 1)],
    ),
    # While the tower is looked at; before a layer, within a layer and after one.
    "int8 gptq": (
        {"precision": "int8"},
        [("look at tiles", 2), ("quantise", 1), ("quantise", 4), ("quantise", 5)],
    ),
    "int4 gptq": ({"precision": "int4"}, [("quantise", 7)]),
    "int4 rtn": ({"precision": "int4", "quantizer": "rtn"}, [("embeddings", 1), ("decoder", 4)]),
}


def contents(out: Path) -> dict[str, bytes]:
    """The manifest and every file that it lists."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in UNLISTED - {MANIFEST}
    }


def run(jobs: list[Any]) -> list[int]:
    command = [sys.executable, "-m", "tests.convert.killed_conversion"]
    root = Path(__file__).parents[2]
    given = json.dumps(jobs)
    done = subprocess.run(command, input=given, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", slow_but(["int4 rtn"], PLACES))
def test_conversions_that_were_killed_at_any_place_end_with_the_same_bytes(
    make_checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    checkpoint = str(make_checkpoint("odd", backbone="mistral", layers=2))
    options, places = PLACES[name]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    jobs: list[Any] = [[checkpoint, str(whole), options, None]]
    jobs += [[checkpoint, str(killed), options, place] for place in [*places, None]]

    assert run(jobs) == [0 if place is None else KILLED for *_, place in jobs]

    assert contents(killed) == contents(whole)
    assert read_conversion(killed).runs == 1 + len(places)
    assert read_conversion(whole).runs == 1
    open_artifact(killed, hash_everything=True)


def request_of(checkpoint: Path, out: Path, **changes: Any) -> ConvertRequest:
    request = ConvertRequest(
        checkpoint=str(checkpoint),
        out=out,
        wishes=PlanRequest(precision="fp16", context_tokens=640),
        verify="none",
    )
    return replace(request, **changes)


def convert(request: ConvertRequest) -> None:
    convert_checkpoint(request, no_progress, lambda _: None)


def test_memory_that_is_free_on_a_detected_board_is_not_in_the_manifest(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("odd", backbone="mistral", layers=2)
    board = replace(load_profile("cpu-16gb"), name="this-machine")
    busier = replace(board, system_reserve_bytes=board.system_reserve_bytes + 123_456_789)

    convert(request_of(checkpoint, tmp_path / "a", profile=board))
    convert(request_of(checkpoint, tmp_path / "b", profile=busier))

    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    seen = [read_conversion(tmp_path / name).board["budget_bytes"] for name in "ab"]
    assert seen[0] - seen[1] == 123_456_789


def test_a_resumed_conversion_computes_with_the_threads_that_it_began_with(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from llava_edge.convert.writing.artifact_builder import PartBuilders

    seen: list[int] = []
    build = PartBuilders.embeddings

    def stopped(self: PartBuilders, folder: Path) -> None:
        raise KeyboardInterrupt

    def watched(self: PartBuilders, folder: Path) -> None:
        seen.append(torch.get_num_threads())
        build(self, folder)

    request = request_of(make_checkpoint("odd", backbone="mistral", layers=2), tmp_path / "a")
    monkeypatch.setattr(pipeline.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(PartBuilders, "embeddings", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(request)
    monkeypatch.undo()
    monkeypatch.setattr(PartBuilders, "embeddings", watched)

    convert(request)

    assert seen == [3]
    assert read_conversion(tmp_path / "a").threads == 3


def test_where_a_calibration_folder_lies_is_not_in_the_manifest(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("odd", backbone="mistral", layers=2)
    lines = [
        {"question": "What is it?", "answer": "A square.", "image": name}
        for name in ("a.png", "gone.png", "text.png", "folder")
    ]
    for place in ("here", "elsewhere"):
        samples = tmp_path / place / "samples"
        (samples / "folder").mkdir(parents=True)
        (samples / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (samples / "text.png").write_text("no picture")
        Image.new("RGB", (40, 60), "navy").save(samples / "a.png")
        quantization = QuantizationRequest("gptq", samples)
        int4 = PlanRequest(precision="int4", context_tokens=640)
        out = tmp_path / f"{place} artifact"
        convert(request_of(checkpoint, out, wishes=int4, quantization=quantization))

    manifest = (tmp_path / "here artifact" / MANIFEST).read_text()
    assert contents(tmp_path / "here artifact") == contents(tmp_path / "elsewhere artifact")
    assert "image 'gone.png' cannot be read" in manifest
    assert str(tmp_path) not in manifest


def test_a_resumed_conversion_keeps_its_context_where_other_memory_is_free(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_edge.convert.writing.artifact_builder import PartBuilders

    checkpoint = make_checkpoint("odd", backbone="mistral", layers=2)
    wishes = PlanRequest(precision="fp16")
    board = replace(load_profile("cpu-16gb"), name="this-machine")
    whole = request_of(checkpoint, tmp_path / "a", profile=board, wishes=wishes)
    convert(whole)
    manifest = open_artifact(tmp_path / "a").manifest
    needed = int(manifest.plan["memory"]["total_bytes"])
    # So little is free later that the context which it began with would not be planned.
    held = board.memory_bytes - needed + (64 << 10)
    later = replace(board, system_reserve_bytes=held, host_reserve_bytes=held)
    begun = replace(whole, out=tmp_path / "b")

    def stopped(self: PartBuilders, folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartBuilders, "tokenizer", stopped)
        with pytest.raises(KeyboardInterrupt):
            convert(begun)
    said: list[str] = []

    convert_checkpoint(replace(begun, profile=later), no_progress, said.append)

    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert any(f"keeps {manifest.context_tokens} tokens of context" in s for s in said)
