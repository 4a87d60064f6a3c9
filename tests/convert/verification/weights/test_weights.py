"""Weights of an artifact against its checkpoint: clean ones pass, one wrong tensor shows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_edge.convert.checkpoint.formats.rounding import PER_CHANNEL
from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.checkpoint.quantized.digested_source import DigestedSource
from llava_edge.convert.checkpoint.quantized.source import RtnSource, quantize_head
from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.convert.verification.weights.stage import weights_stage
from llava_edge.convert.verification.weights.tensor_mapping import linear_layers
from llava_edge.profiles.boards.hardware import load_profile
from llava_edge.profiles.memory.formats import head_group_size
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.artifact.certificate import StageResult
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import no_progress
from tests.convert.verification.structure.test_structure import RARE, as_original
from tests.faults.models.tamper import Tampered
from tests.support.tiers import slow_but
from tests.support.verification_fixtures import BACKBONES, FORMS, SIZES

Opened = Callable[[Path, Path], tuple[Artifact, Checkpoint]]
Fault = Callable[[Tampered], None]
LAYER = "language_model.layers"
TOWER = "vision_tower"


def rows_of(opened: Opened, artifact: Path, checkpoint: Path) -> list[StageResult]:
    rows = weights_stage(*opened(artifact, checkpoint))
    for row in rows:
        print(row.metric, row.value, row.bound, row.detail)
    return rows


def failed(rows: list[StageResult]) -> dict[str, StageResult]:
    return {row.metric: row for row in rows if row.verdict != "pass"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_form_of_every_backbone_passes(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    backbone: str,
    form: str,
) -> None:
    checkpoint = make_checkpoint("odd", **SIZES, **BACKBONES[backbone])

    rows = rows_of(opened, make_form(checkpoint, form), checkpoint)

    assert not failed(rows)
    quantised = form.startswith("int")
    assert [row.metric for row in rows] == [
        "differing_tensors",
        *(["differing_codes"] if quantised else []),
    ]


@pytest.mark.parametrize("changes", RARE.values(), ids=RARE)
def test_rare_settings_pass(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    changes: dict[str, object],
) -> None:
    checkpoint = make_checkpoint("odd", **changes)

    assert not failed(rows_of(opened, make_form(checkpoint, "fp16"), checkpoint))


@pytest.mark.parametrize("form", slow_but(["int4"], ["fp16", "int4"]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checkpoints_in_other_float_types_pass(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    tmp_path: Path,
    dtype: torch.dtype,
    form: str,
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(make_checkpoint("odd", **SIZES), folder)
    tensors = load_file(folder / "model.safetensors")
    # Digits that fp16 does not have, so that rounding matters.
    wide = {name: (tensor.float() * 1.0001).to(dtype) for name, tensor in tensors.items()}
    save_file(wide, folder / "model.safetensors", {"format": "pt"})

    assert not failed(rows_of(opened, make_form(folder, form), folder))


def test_a_checkpoint_in_the_original_layout_passes(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    tmp_path: Path,
) -> None:
    folder = as_original(make_checkpoint("odd"), tmp_path / "original")

    assert not failed(rows_of(opened, make_form(folder, "fp16"), folder))


@pytest.mark.parametrize(
    ("precision", "isa"), [("int4", "vnni"), ("int8", "vnni"), ("int8", "none")]
)
def test_codes_of_the_solver_stay_within_the_bounds_where_channels_stand_out(
    make_checkpoint: Callable[..., Path],
    opened: Opened,
    tmp_path: Path,
    precision: str,
    isa: str,
) -> None:
    folder = tmp_path / "outliers"
    shutil.copytree(make_checkpoint("odd", **SIZES), folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if ".layers." in name and name.endswith("proj.weight") and "language" in name:
            tensor[:, torch.randperm(tensor.shape[1], generator=generator)[:2]] *= 20
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    request = ConvertRequest(
        checkpoint=str(folder),
        out=tmp_path / "artifact",
        profile=replace(load_profile("cpu-16gb"), int8_isa=isa),  # type: ignore[arg-type]
        wishes=PlanRequest(precision=precision, context_tokens=640),
        quantization=QuantizationRequest(num_samples=8),
        verify="none",
    )

    artifact = convert_checkpoint(request, no_progress, lambda _: None).folder

    assert not failed(rows_of(opened, artifact, folder))


def test_progress_ends_with_all_bytes(
    make_checkpoint: Callable[..., Path], make_form: Callable[[Path, str], Path], opened: Opened
) -> None:
    checkpoint = make_checkpoint("odd", **SIZES, **BACKBONES["qwen2-bias"])
    artifact, source = opened(make_form(checkpoint, "int4"), checkpoint)
    seen: list[tuple[int, int]] = []

    weights_stage(artifact, source, lambda _, done, total: seen.append((done, total)))

    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {seen[-1][0]}


def tensor(part: str, name: str, change: Callable[[Array], Array]) -> Fault:
    return lambda copy: copy.change_tensor(part, name, change)  # type: ignore[arg-type]


def swapped(part: str, first: str, second: str) -> Fault:
    return lambda copy: copy.swap_tensors(part, first, second)  # type: ignore[arg-type]


def columns(*order: slice) -> Callable[[Array], Array]:
    """Parts of the last axis in another order."""
    return lambda values: np.concatenate([values[..., part] for part in order], axis=-1)


def flip(values: Array) -> Array:
    """One bit of one number."""
    values.view(np.uint8).reshape(-1)[77] ^= 1
    return values


def no_bias(copy: Tampered) -> None:
    """The tensor is gone and nothing reads it."""
    name = f"{TOWER}.encoder.layers.0.mlp.fc1.bias"
    graph = copy.model("vision").graph
    (add,) = (node for node in graph.node if name in node.input)
    copy.bypass("vision", add.name)
    (stored,) = (t for t in graph.initializer if t.name == name)
    graph.initializer.remove(stored)


def unknown_tensor(copy: Tampered) -> None:
    gain = copy.tensor("decoder", "language_model.norm.weight")
    copy.set_constant("decoder", "language_model.norm", 3, gain)


FLOATS: dict[str, tuple[Fault, str]] = {
    "query and key swapped": (
        tensor(
            "decoder",
            f"{LAYER}.1.self_attn.q_proj.weight",
            columns(slice(128, 256), slice(0, 128), slice(256, None)),
        ),
        "decoder, language_model.layers.1.self_attn.q_proj.weight: 16",
    ),
    "order of key heads": (
        tensor(
            "decoder",
            f"{LAYER}.1.self_attn.q_proj.weight",
            columns(slice(0, 128), slice(160, 192), slice(128, 160), slice(192, None)),
        ),
        "q_proj.weight (language_model.layers.1.self_attn.k_proj.weight)",
    ),
    "gate and up swapped": (
        swapped("decoder", f"{LAYER}.0.mlp.gate_proj.weight", f"{LAYER}.0.mlp.up_proj.weight"),
        "layers.0.mlp.gate_proj.weight: ",
    ),
    "layers swapped": (
        swapped("decoder", f"{LAYER}.0.mlp.down_proj.weight", f"{LAYER}.2.mlp.down_proj.weight"),
        "layers.2.mlp.down_proj.weight: ",
    ),
    "head rows shifted": (
        tensor("decoder", "lm_head.weight", lambda head: np.roll(head, 1, axis=1)),
        "decoder, lm_head.weight: ",
    ),
    "one bit of one weight": (
        tensor(
            "decoder",
            f"{LAYER}.0.mlp.up_proj.weight",
            flip,
        ),
        "up_proj.weight: 1 of 49152 values differ",
    ),
    "a norm's gain": (
        tensor("decoder", f"{LAYER}.1.input_layernorm.weight", np.ones_like),
        "layers.1.input_layernorm.weight: ",
    ),
    "a bias of zeros": (
        tensor("decoder", f"{LAYER}.1.self_attn.q_proj.bias", np.zeros_like),
        "q_proj.bias (language_model.layers.1.self_attn.k_proj.bias)",
    ),
    "a bias with its sign": (
        tensor("vision", f"{TOWER}.encoder.layers.1.mlp.fc2.bias", np.negative),
        "layers.1.mlp.fc2.bias: 48 of 48",
    ),
    "a bias missing": (no_bias, "layers.0.mlp.fc1.bias of the checkpoint is nowhere"),
    "class embedding": (
        tensor("vision", f"{TOWER}.embeddings.class_embedding", np.zeros_like),
        "class_embedding: 48 of 48",
    ),
    "position embedding reversed": (
        tensor("vision", f"{TOWER}.embeddings.position_embedding.weight", lambda old: old[::-1]),
        "position_embedding.weight: ",
    ),
    "colours of the kernel": (
        tensor(
            "vision",
            f"{TOWER}.embeddings.patch_embedding.weight",
            lambda old: old.reshape(3, -1, old.shape[1])[::-1],
        ),
        "patch_embedding.weight: ",
    ),
    "projector transposed": (
        tensor("vision", "multi_modal_projector.linear_2.weight", np.transpose),
        "vision, multi_modal_projector.linear_2.weight: ",
    ),
    "embedding rows shifted": (
        lambda copy: copy.change_embeddings("embed_tokens", lambda old: np.roll(old, 1, axis=0)),
        "embeddings.safetensors, embed_tokens: 401 of 401 rows differ",
    ),
    "newline zeroed": (
        lambda copy: copy.change_embeddings("image_newline", np.zeros_like),
        "embeddings.safetensors, image_newline: 128 of 128",
    ),
    "a tensor of nothing": (unknown_tensor, "the checkpoint has no such tensor"),
}


@pytest.mark.parametrize("form", ["fp16", "fp16 cuda"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_wrong_tensor_is_found_and_named(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    tmp_path: Path,
    name: str,
    form: str,
) -> None:
    fault, sentence = FLOATS[name]
    checkpoint = make_checkpoint("odd", **SIZES, **BACKBONES["qwen2-bias"])
    copy = Tampered(make_form(checkpoint, form), tmp_path / "copy")
    fault(copy)

    found = failed(rows_of(opened, copy.seal(), checkpoint))

    assert list(found) == ["differing_tensors"]
    assert sentence in found["differing_tensors"].detail


def halves_swapped(codes: Array) -> Array:
    return (codes << 4) | (codes >> 4)


def four_bits_up(codes: Array) -> Array:
    low, high = np.minimum((codes & 15) + 1, 15), np.minimum((codes >> 4) + 1, 15)
    return low | (high << 4)


UP = f"{LAYER}.1.mlp.up_proj"
DOWN = f"{LAYER}.1.mlp.down_proj"
CODES: dict[str, tuple[str, Fault]] = {
    "nibble order": ("int4", tensor("decoder", f"{UP}.weight", halves_swapped)),
    "zero point": ("int4", tensor("decoder", f"{UP}.weight", four_bits_up)),
    "zero point at 8 bits": (
        "int8 nbits",
        tensor("decoder", f"{UP}.weight", lambda old: np.minimum(old, 254) + 1),
    ),
    "zero point of signed codes": (
        "int8 integer",
        tensor("decoder", f"{UP}.weight", lambda old: np.minimum(old, 126) + 1),
    ),
    "scales of the group before": (
        "int4",
        tensor("decoder", f"{DOWN}.scales", lambda old: np.roll(old, 1, axis=1)),
    ),
    "scales of the row before": (
        "int4 cuda",
        tensor("decoder", f"{DOWN}.scales", lambda old: np.roll(old, 1, axis=0)),
    ),
    "scales of the row before, integer": (
        "int8 integer",
        tensor("decoder", f"{DOWN}.scales", lambda old: np.roll(old, 1)),
    ),
    "all scales a tenth too large": (
        "int8 nbits",
        tensor("decoder", f"{DOWN}.scales", lambda old: old * 1.1),
    ),
    "gate and up swapped": (
        "int4",
        swapped("decoder", f"{UP}.weight", f"{LAYER}.1.mlp.gate_proj.weight"),
    ),
    "head rows shifted": (
        "int4",
        tensor("decoder", "lm_head.weight", lambda old: np.roll(old, 1, axis=0)),
    ),
    "one code of the head": ("int4", tensor("decoder", "lm_head.weight", flip)),
    "one bit of one scale": ("int8 integer", tensor("decoder", f"{DOWN}.scales", flip)),
    "one code of the tower": (
        "int8 integer",
        tensor("vision", "vision_tower.encoder.layers.0.mlp.fc1.weight", flip),
    ),
}


@pytest.mark.parametrize("name", CODES)
def test_wrong_codes_and_scales_are_found_without_a_digest(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    tmp_path: Path,
    name: str,
) -> None:
    form, fault = CODES[name]
    checkpoint = make_checkpoint("odd", **SIZES, **BACKBONES["mistral-gqa"])
    copy = Tampered(make_form(checkpoint, form), tmp_path / "copy")
    fault(copy)
    del copy.manifest["conversion"]["weights_sha256"]

    found = failed(rows_of(opened, copy.seal(), checkpoint))

    assert list(found) == ["differing_codes"]
    assert "are not those of rounding to nearest" in found["differing_codes"].detail


@pytest.mark.parametrize(("recorded", "is_found"), [(0, True), (1, True), (2, False)])
def test_columns_that_vanished_are_found_unless_the_solver_recorded_them(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    tmp_path: Path,
    recorded: int,
    is_found: bool,
) -> None:
    def without_two(codes: Array) -> Array:
        changed = codes.copy()
        changed[[3, 70]] = 0
        return changed

    checkpoint = make_checkpoint("odd", **SIZES, **BACKBONES["mistral-gqa"])
    copy = Tampered(make_form(checkpoint, "int8 integer"), tmp_path / "copy")
    copy.change_tensor("decoder", f"{UP}.weight", without_two)
    # As a solver or a converter at fault would leave it: digests of what it wrote.
    del copy.manifest["conversion"]["weights_sha256"]
    report = {"report": {"dead_columns": recorded}}
    copy.manifest["conversion"]["layers"] = [{"layer": 1, "linears": {"mlp.up_proj": report}}]
    copy.manifest["conversion"]["quantizer"] = "gptq"

    found = failed(rows_of(opened, copy.seal(), checkpoint))

    assert ("differing_codes" in found) is is_found
    if is_found:
        assert f"{UP}: 2 columns are zero" in found["differing_codes"].detail


def digests(checkpoint: Path, form: str) -> dict[str, str]:
    """What a conversion in this form would have noted."""
    source, per_channel = open_checkpoint(checkpoint), form == "int8 integer"
    bits = int(form[3])
    digested = DigestedSource(RtnSource(source, bits, PER_CHANNEL if per_channel else 128))
    for name in linear_layers(source)[:-1]:
        digested.linear(name)
    group = head_group_size(source.dims.text, form[:4], "cuda" if "cuda" in form else "cpu")
    digested.head(lambda: quantize_head(source, group_size=group))()
    return digested.digests


EXACT: dict[str, tuple[Fault | None, str]] = {
    "nothing": (None, ""),
    "one bit of one code": (tensor("decoder", f"{UP}.weight", flip), f"{UP}: codes or scales"),
    "one bit of one scale": (tensor("decoder", f"{UP}.scales", flip), f"{UP}: "),
    "one bit of the key's codes": (
        tensor("decoder", f"{LAYER}.0.self_attn.q_proj.weight", lambda old: old ^ 1),
        f"{LAYER}.0.self_attn.k_proj: codes or scales",
    ),
    "one bit of the head": (tensor("decoder", "lm_head.weight", flip), "lm_head: codes or scales"),
    "no digest of a layer": (
        lambda copy: copy.manifest["conversion"]["weights_sha256"].pop(UP),
        f"{UP}: the manifest has no digest of it",
    ),
}


@pytest.mark.parametrize("form", ["int4", "int4 cuda", "int8 integer", "int8 nbits"])
@pytest.mark.parametrize("name", EXACT)
def test_a_single_bit_is_found_by_the_digests(
    make_checkpoint: Callable[..., Path],
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    tmp_path: Path,
    name: str,
    form: str,
) -> None:
    fault, sentence = EXACT[name]
    checkpoint = make_checkpoint("odd", **SIZES, **BACKBONES["mistral-gqa"])
    copy = Tampered(make_form(checkpoint, form), tmp_path / "copy")
    copy.manifest["conversion"]["weights_sha256"] |= digests(checkpoint, form)
    if fault is not None:
        fault(copy)

    rows = rows_of(opened, copy.seal(), checkpoint)

    found = failed(rows)
    assert list(found) == (["differing_codes"] if sentence else [])
    if sentence:
        assert sentence in found["differing_codes"].detail
    else:
        (row,) = (row for row in rows if row.metric == "differing_codes")
        # Of the decoder 22, and of three blocks of the tower and the projector 20.
        count = 42 if copy.manifest["precision"]["vision_tower"] == "int8" else 22
        assert row.detail == f"{count} quantised weights by their digests"


@pytest.fixture(scope="module")
def gptq_pair(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """An artifact of a GPTQ checkpoint, and that checkpoint."""
    folder = tmp_path_factory.mktemp("gptq")
    checkpoint = make_checkpoint("odd", **SIZES, **BACKBONES["qwen2-bias"])
    profile, wishes = load_profile("cpu-16gb"), PlanRequest(precision="int4", context_tokens=640)
    rtn = QuantizationRequest(quantizer="rtn")
    first = ConvertRequest(
        str(checkpoint), folder / "first", profile, wishes, rtn, emit_hf=True, verify="none"
    )
    emitted = folder / "emitted"
    shutil.copytree(convert_checkpoint(first, no_progress, lambda _: None).folder / "gptq", emitted)
    second = ConvertRequest(str(emitted), folder / "second", profile, wishes, rtn, verify="none")
    return convert_checkpoint(second, no_progress, lambda _: None).folder, emitted


def test_an_artifact_of_a_gptq_checkpoint_holds_its_values(
    gptq_pair: tuple[Path, Path], opened: Opened
) -> None:
    assert not failed(rows_of(opened, *gptq_pair))


@pytest.mark.parametrize(
    ("end", "change"),
    [
        (".qweight", lambda old: old ^ 1),
        (".qzeros", lambda old: old ^ 1),
        (".scales", lambda old: old * 2),
        (".g_idx", lambda old: old.flip(0)),
    ],
    ids=["codes", "zero points", "scales", "column order"],
)
def test_another_gptq_checkpoint_is_told_apart(
    gptq_pair: tuple[Path, Path],
    tmp_path: Path,
    end: str,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(gptq_pair[1], folder)
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith(f"layers.1.mlp.down_proj{end}"))
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    artifact = open_artifact(gptq_pair[0], verify_digests=False)
    found = failed(weights_stage(artifact, open_checkpoint(folder)))

    assert list(found) == ["differing_codes"]
    assert "language_model.layers.1.mlp.down_proj: " in found["differing_codes"].detail
    assert "values are not the GPTQ checkpoint's" in found["differing_codes"].detail
