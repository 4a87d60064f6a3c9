"""Layers cut out of an artifact's graph compute what they compute within it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_edge.convert.verification.reference.answer import Positions
from llava_edge.convert.verification.runner.artifact_runner import ArtifactRunner
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.arrays import Array


@pytest.fixture
def subject_of(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> Callable[..., ArtifactRunner]:
    def make(memory_bytes: int | None, backbone: str = "qwen2", **wishes: object) -> ArtifactRunner:
        artifact = make_artifact(make_checkpoint("odd", backbone=backbone), **wishes)
        return ArtifactRunner(open_artifact(artifact), memory_bytes, threads=1)

    return make


def rows_of(subject: ArtifactRunner, count: int) -> Array:
    random = np.random.default_rng(3)
    return random.normal(0, 0.5, (count, subject.dims.text.hidden_size)).astype(subject.dtype)


@pytest.mark.parametrize("backbone", ["llama", "mistral", "qwen2"])
def test_groups_of_layers_give_the_logits_of_the_whole(
    subject_of: Callable[..., ArtifactRunner], backbone: str
) -> None:
    positions = Positions.of(21, 6, largest_chunk=512)
    with subject_of(None, backbone) as whole, subject_of(1, backbone) as groups:
        assert whole.is_whole
        assert list(groups.groups()) == [(0, 1), (1, 2), (2, 3)]
        rows = rows_of(whole, positions.total)

        together = whole.logits(rows, positions)
        apart = groups.logits(rows, positions)

    np.testing.assert_allclose(apart, together, rtol=0, atol=1e-5 * np.ptp(together))


def test_the_head_alone_gives_the_logits_of_the_last_group(
    subject_of: Callable[..., ArtifactRunner],
) -> None:
    positions = Positions.of(9, 3, largest_chunk=512)
    with subject_of(None) as subject:
        rows = rows_of(subject, positions.total)
        wanted = subject.logits(rows, positions)
        for layer in range(subject.dims.text.num_hidden_layers):
            rows = subject.layer(layer, rows, positions)

        logits = subject.head(rows[positions.keep_from :])

    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5 * np.ptp(wanted))


def test_inner_values_of_every_layer_have_names_and_shapes(
    subject_of: Callable[..., ArtifactRunner],
) -> None:
    with subject_of(None) as subject:
        text = subject.dims.text
        last = text.num_hidden_layers - 1
        for layer in range(text.num_hidden_layers):
            values = subject.graph.layer_values(layer)
            prefix = f"language_model.layers.{layer}"
            assert f"{prefix}.self_attn.qkv" in values
            assert ("lm_head" in values) is (layer == last)
            subject.graph.slice(layer, layer + 1, list(values.values())).open(subject.options)


def test_a_prompt_is_cut_so_that_its_kept_rows_lie_in_the_last_chunk() -> None:
    for num_prompt in range(1, 400):
        positions = Positions.of(num_prompt, 5, largest_chunk=64)

        start = (num_prompt - 1) // positions.chunk * positions.chunk
        assert start <= positions.keep_from < num_prompt
        assert positions.chunk <= 64
        assert len(positions.kept) == positions.num_prefill + 5


@pytest.mark.parametrize("profile", ["cpu-16gb", "a100"])
def test_a_tower_in_halves_gives_the_features_of_the_whole(
    subject_of: Callable[..., ArtifactRunner], profile: str
) -> None:
    with subject_of(None, profile=profile) as whole, subject_of(1, profile=profile) as halves:
        vision = whole.dims.vision
        shape = (2, 3, vision.image_size, vision.image_size)
        pixels = np.random.default_rng(5).normal(0, 1, shape).astype(np.float32)
        features = [
            np.empty((2, vision.num_patches, whole.dims.text.hidden_size), whole.dtype)
            for _ in range(2)
        ]
        for subject, out in zip((whole, halves), features, strict=True):
            subject.encoder().encode(pixels, out)

    assert type(whole.encoder()) is not type(halves.encoder())
    np.testing.assert_allclose(features[1], features[0], rtol=0, atol=2e-3 * np.ptp(features[0]))
