"""Faults in reading files are found on a device as well, by what travels in the artifact."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llava_edge.convert.verification.verifier import golden_probes, open_reference
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.certificate import overall
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.processing.images import loading as images
from llava_edge.runtime.util.checksummed_json import seal
from llava_edge.runtime.verification import self_test_policy
from llava_edge.runtime.verification.golden.probes import (
    GOLDEN_FILE,
    golden_bytes,
    read_golden_media,
)
from llava_edge.runtime.verification.host import describe_host
from llava_edge.runtime.verification.self_test import run_self_test
from tests.faults.fault import Fault
from tests.faults.models.fault_models import MODELS, FaultModels, Model
from tests.faults.seeded.media import faults_clips, faults_media
from tests.support.tiers import one_of_each, slow_but

FAULTS = (*faults_media.FAULTS, *faults_clips.FAULTS)
CUDA = {
    f"cuda {precision}": Model(
        "llama", precision=precision, board="a100", alters="decided", changes={"layers": 2}
    )
    for precision in ("fp16", "int8", "int4")
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], LlavaEdge]]:
    """``loaded(model)``: an artifact with golden probes, by the name of its model."""
    models = FaultModels(tmp_path_factory.mktemp("media"), {**MODELS, **CUDA})
    opened: list[LlavaEdge] = []

    @cache
    def load(name: str) -> LlavaEdge:
        made = models[name]
        artifact = open_artifact(made.artifact, verify_digests=False)
        reference = open_reference(artifact, made.checkpoint)
        probes, _ = golden_probes(artifact, reference)
        data = golden_bytes(probes, artifact.manifest, media=reference.media.golden)
        _add(made.artifact, data)
        opened.append(LlavaEdge.load(made.artifact, device="cpu", threads=1, allow_slow=True))
        return opened[-1]

    yield load
    for model in opened:
        model.close()


def _add(folder: Path, data: bytes) -> None:
    (folder / GOLDEN_FILE).write_bytes(data)
    document = json.loads((folder / "manifest.json").read_text("utf-8"))
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    document["files"][GOLDEN_FILE] = entry
    (folder / "manifest.json").write_bytes(seal(document))


@pytest.mark.parametrize(
    "fault",
    one_of_each(lambda fault: (fault.part, fault.stage, fault.where, fault.model), FAULTS),
    ids=lambda fault: fault.id,
)
def test_a_fault_of_files_is_found_on_a_device(
    fault: Fault, loaded: Callable[[str], LlavaEdge]
) -> None:
    model = loaded(fault.model)
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        rows = {row.name: row for row in run_self_test(model)}

    # What stands where in a prompt has no stage of its own here.
    stage = "prompt" if fault.stage == "packing" else fault.stage
    assert rows[stage].verdict == "fail", rows


@pytest.mark.parametrize(
    "name",
    slow_but(["qwen2", "int8", "video", "cuda int4"], ["qwen2", "int8", "int4", "video", *CUDA]),
)
def test_sound_artifacts_pass_on_a_device_with_all_their_files(
    name: str, loaded: Callable[[str], LlavaEdge]
) -> None:
    rows = run_self_test(loaded(name))

    assert overall(rows) == "pass", rows
    (pixels,) = (row for row in rows if row.name == "preprocessing")
    assert "files, SHA-256" in pixels.detail


@pytest.mark.parametrize("name", CUDA)
def test_files_are_held_to_the_same_pixels_in_every_form(
    name: str, loaded: Callable[[str], LlavaEdge]
) -> None:
    model = loaded(name)
    for fault in FAULTS[:2]:
        with pytest.MonkeyPatch.context() as patch:
            fault.plant(patch)
            rows = {row.name: row for row in run_self_test(model)}
        assert rows["preprocessing"].verdict == "fail"


def test_where_nothing_is_kept_of_the_last_picture_no_gap_is_measured(
    loaded: Callable[[str], LlavaEdge],
) -> None:
    model = loaded("qwen2")
    manifest = model.artifact.manifest
    media = read_golden_media(model.artifact.files[GOLDEN_FILE], manifest)
    chat = next(chat for chat in media.chats if len(chat.positions))
    chat = dataclasses.replace(chat, positions=chat.positions[:1], rows=chat.rows[:1])

    with model._open_files() as reader:
        whole = reader.look(chat, model._embed_rows, len(chat.ids))
        seen = reader.look(chat, model._embed_rows, 1)

    assert whole.gap is not None
    assert seen.gap is None
    assert (seen.ids, seen.pixels, seen.packing) == ("", "", "")


def test_at_load_no_format_is_opened_that_the_caller_leaves_out(
    loaded: Callable[[str], LlavaEdge], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("qwen2")
    here = describe_host("cpu")
    opened: set[str] = set()
    real = images.recognise

    def note(data: bytes) -> Any:
        kind = real(data)
        opened.add("" if kind is None else str(kind.format))
        return kind

    monkeypatch.setattr(images, "recognise", note)
    monkeypatch.setattr(self_test_policy, "keep_result", lambda *result: None)
    self_test_policy._run_once(model, here, "elsewhere")
    assert opened
    assert "TIFF" not in opened

    run_self_test(model)
    assert "TIFF" in opened
