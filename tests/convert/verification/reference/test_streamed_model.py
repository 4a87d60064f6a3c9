"""The streamed reference gives the numbers of the model loaded whole, bit for bit."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.verification.reference.model import ReferenceModel
from llava_edge.convert.verification.reference.streamed_model import ReferenceInputs, StreamedModel
from llava_edge.profiles.errors import CheckpointError

BACKBONES = ("llama", "mistral", "qwen2")


def inputs_of(
    reference: ReferenceModel, sizes: list[tuple[int, int]]
) -> tuple[ReferenceInputs, Any]:
    images = [Image.linear_gradient("L").resize(size).convert("RGB") for size in sizes]
    made = reference.prepare(reference.render("What is it?", len(images)), images)
    tiles: list[torch.Tensor] = []
    for index, image in enumerate(images):
        alone = reference.processor.image_processor(images=[image], return_tensors="pt")
        assert torch.equal(
            alone["pixel_values"][0], made["pixel_values"][index][: alone["pixel_values"].shape[1]]
        )
        tiles.append(alone["pixel_values"][0])
    listed = tuple((image.height, image.width) for image in images)
    return ReferenceInputs(made["input_ids"][0], tuple(tiles), listed), made


def rows_of(checkpoint: Checkpoint, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, checkpoint.dims.text.hidden_size, generator=generator)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_are_those_of_the_model_loaded_whole(
    make_checkpoint: Callable[..., Path], backbone: str
) -> None:
    folder = make_checkpoint("odd", backbone=backbone)
    checkpoint, reference = open_checkpoint(folder), ReferenceModel(folder)
    inputs, made = inputs_of(reference, [(200, 90), (60, 150)])
    model = StreamedModel(checkpoint, checkpoint.dims.image_grid_pinpoints)

    _, embeddings = model.embed(inputs)
    logits = model.decode(embeddings, range(len(inputs.ids)))

    assert torch.equal(logits, reference.logits(made))


def test_no_weight_stays_in_memory(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("odd", backbone="qwen2")
    checkpoint, reference = open_checkpoint(folder), ReferenceModel(folder)
    inputs, _ = inputs_of(reference, [(200, 90)])
    model = StreamedModel(checkpoint, checkpoint.dims.image_grid_pinpoints)

    _, embeddings = model.embed(inputs)
    model.decode(embeddings, [0])

    left = [
        f"{name}.{own}"
        for name in ("vision_tower", "multi_modal_projector", "language_model.layers")
        for own, parameter in model.module(name).named_parameters()
        if not parameter.is_meta
    ]
    assert left == []


def test_one_layer_alone_gives_what_it_gives_among_the_others(
    make_checkpoint: Callable[..., Path],
) -> None:
    # A window from the second layer on: which mask a layer gets depends on its place.
    folder = make_checkpoint(
        "odd", backbone="qwen2", sliding_window=8, max_window_layers=1, layers=3
    )
    checkpoint = open_checkpoint(folder)
    model = StreamedModel(checkpoint, checkpoint.dims.image_grid_pinpoints)
    rows = rows_of(checkpoint, 40)
    seen: dict[str, torch.Tensor] = {}
    names = [f"language_model.layers.{layer}" for layer in range(3)] + ["language_model.norm"]

    with model.observed(names, lambda name, first, _: seen.update({name: first[0].clone()})):
        model.hidden(rows)

    for layer in range(3):
        alone = model.layer(layer, seen[names[layer]])
        assert torch.equal(alone, seen[names[layer + 1]])


def test_a_tensor_that_is_missing_is_named(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(make_checkpoint("odd"))
    name = "language_model.layers.1.mlp.up_proj.weight"
    left = {key: ref for key, ref in checkpoint.tensors.items() if key != name}
    model = StreamedModel(
        dataclasses.replace(checkpoint, tensors=left), checkpoint.dims.image_grid_pinpoints
    )

    with pytest.raises(CheckpointError, match=name):
        model.hidden(torch.zeros(3, checkpoint.dims.text.hidden_size))


def test_bfloat16_weights_are_rounded_only_where_the_artifact_rounds_them(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "bf16"
    shutil.copytree(make_checkpoint("odd"), folder)
    tensors = load_file(folder / "model.safetensors")
    # 2^-20 is no fp16 number of full precision, and bfloat16 holds it exactly.
    wide = {name: (t.float() * 1.0009765625e-4).to(torch.bfloat16) for name, t in tensors.items()}
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    pinpoints = checkpoint.dims.image_grid_pinpoints
    rows = rows_of(checkpoint, 4)

    own = StreamedModel(checkpoint, pinpoints, as_stored=False).head(rows)
    stored = StreamedModel(checkpoint, pinpoints).head(rows)

    head = wide[next(name for name in wide if "lm_head" in name)]
    assert torch.equal(own, rows @ head.float().T)
    assert torch.equal(stored, rows @ head.to(torch.float16).float().T)
    assert not torch.equal(own, stored)
