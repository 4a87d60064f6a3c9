"""Quantised artifacts end to end: through the command's own pipeline, answered by the runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.pipeline import Conversion, convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import BodyFormat, QuantizationRequest
from llava_edge.profiles.boards.hardware import HardwareProfile, load_profile
from llava_edge.profiles.errors import CheckpointError, RequestError
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import read_manifest
from llava_edge.runtime.util.progress import no_progress


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("odd", backbone="mistral")


BLOCKS = replace(load_profile("cpu-16gb"), int8_isa="none")
"""A board whose int8 route every machine computes rightly, that of the tests included."""


def convert(
    checkpoint: Path,
    out: Path,
    precision: str,
    profile: HardwareProfile = BLOCKS,
    **quantization: object,
) -> Conversion:
    request = ConvertRequest(
        checkpoint=str(checkpoint),
        out=out,
        profile=profile,
        wishes=PlanRequest(precision=precision),
        quantization=QuantizationRequest(**{"num_samples": 6, **quantization}),  # type: ignore[arg-type]
        verify="none",
    )
    return convert_checkpoint(request, no_progress, print)


def logits(artifact: Path, picture: Image.Image) -> np.ndarray:
    with LlavaEdge.load(artifact, threads=1) as model:
        return model.teacher_forced_logits("What is this?", [picture], [5, 6, 7])


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.05), ("int4", 0.5)])
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_quantised_artifact_answers_near_the_fp16_one(
    checkpoint: Path,
    make_artifact: Callable[..., Path],
    picture: Image.Image,
    tmp_path: Path,
    quantizer: str,
    precision: str,
    bound: float,
) -> None:
    conversion = convert(checkpoint, tmp_path / "artifact", precision, quantizer=quantizer)

    exact = logits(make_artifact(checkpoint), picture)
    ours = logits(conversion.folder, picture)
    gap = np.abs(ours - exact).max() / np.ptp(exact)
    # Random weights have no redundancy: these bounds catch a wrong layout, not a loss of quality.
    assert 0 < gap <= bound
    manifest = conversion.manifest
    assert manifest.precision.language_model == precision
    assert manifest.precision.lm_head == "int8"
    assert manifest.conversion["quantizer"] == quantizer
    assert not (tmp_path / "artifact.partial").exists()


def test_a_quantised_artifact_is_smaller_and_says_how_it_was_made(
    checkpoint: Path, make_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    conversion = convert(checkpoint, tmp_path / "artifact", "int4")

    size = (conversion.folder / "decoder" / "weights.bin").stat().st_size
    assert size < 0.5 * (make_artifact(checkpoint) / "decoder" / "weights.bin").stat().st_size
    facts = conversion.manifest.conversion
    assert facts["bits"] == 4
    assert "drawn" in str(facts).lower()


def test_samples_that_cannot_be_used_are_named_in_the_manifest(
    checkpoint: Path, tmp_path: Path, picture: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "questions"
    folder.mkdir()
    picture.save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:200])
    lines: list[dict[str, str]] = [
        {"image": "good.png", "question": "What?", "answer": "That."},
        {"image": "cut.png", "question": "What?", "answer": "That."},
        {"question": "Which words?", "answer": "These."},
    ]
    (folder / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))

    facts = convert(checkpoint, tmp_path / "out", "int4", calibration=folder).manifest.conversion

    samples = facts["samples"]
    assert (samples["num_samples"], samples["num_text_only"]) == (2, 1)
    assert [each["sample"] for each in samples["left_out"]] == ["a.jsonl:2"]
    assert "cut.png" in samples["left_out"][0]["reason"]
    assert "a.jsonl:2 is left out" in caplog.text


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_weight_that_is_not_finite_ends_a_conversion_by_its_name(
    checkpoint: Path, tmp_path: Path, quantizer: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})

    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        convert(broken, tmp_path / "out", "int4", quantizer=quantizer)

    assert not (tmp_path / "out").exists()


def test_a_gptq_checkpoint_is_emitted_beside_the_graphs(checkpoint: Path, tmp_path: Path) -> None:
    request = ConvertRequest(
        checkpoint=str(checkpoint),
        out=tmp_path / "artifact",
        profile=BLOCKS,
        wishes=PlanRequest(precision="int4"),
        quantization=QuantizationRequest("rtn"),
        emit_hf=True,
        verify="none",
    )

    conversion = convert_checkpoint(request, no_progress, print)

    settings = json.loads((conversion.folder / "gptq" / "quantize_config.json").read_text())
    assert (settings["bits"], settings["group_size"], settings["sym"]) == (4, 32, True)
    # The emitted checkpoint is a source as well: the same codes, so the same bytes.
    again = replace(
        request,
        checkpoint=str(conversion.folder / "gptq"),
        out=tmp_path / "again",
        wishes=PlanRequest(),
        emit_hf=False,
    )
    second = convert_checkpoint(again, no_progress, print)
    assert second.manifest.precision.language_model == "int4"
    weights = [folder / "decoder/weights.bin" for folder in (conversion.folder, second.folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(RequestError, match="take --precision int4"):
        convert_checkpoint(
            replace(again, out=tmp_path / "x", wishes=PlanRequest(precision="fp16")),
            no_progress,
            print,
        )
    listed = [name for name in read_manifest(conversion.folder)[0].files if "gptq/" in name]
    assert "gptq/config.json" in listed
    fp16 = replace(request, out=tmp_path / "fp16", wishes=PlanRequest(precision="fp16"))
    with pytest.raises(RequestError, match="at fp16"):
        convert_checkpoint(fp16, no_progress, print)


def test_the_integer_route_is_right_on_this_processor_whatever_it_has(
    checkpoint: Path,
    make_artifact: Callable[..., Path],
    picture: Image.Image,
    tmp_path: Path,
) -> None:
    board = load_profile("cpu-16gb")
    assert board.int8_isa == "vnni"
    folder = convert(checkpoint, tmp_path / "artifact", "int8", board, quantizer="rtn").folder

    exact = logits(make_artifact(checkpoint), picture)
    assert np.abs(logits(folder, picture) - exact).max() <= 0.05 * np.ptp(exact)


def test_the_format_of_the_body_is_the_one_the_plan_counts_with(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    board = load_profile("cpu-16gb")

    assert BodyFormat.of(opened, "fp16", board) is None
    fast = replace(board, int8_isa="vnni")
    slow = replace(board, int8_isa="none")
    assert BodyFormat.of(opened, "int8", fast) == BodyFormat(8, -1, "two-term")
    # 96, 160 and 96 columns: 32 is the largest of 128, 64, 32 that divides them all.
    assert BodyFormat.of(opened, "int8", slow) == BodyFormat(8, 32, "nbits")
    assert BodyFormat.of(opened, "int4", fast) == BodyFormat(4, 32, "nbits")
