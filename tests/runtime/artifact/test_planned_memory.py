"""Planned memory of an artifact: by how its weights lie, not by what machine reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llava_edge.profiles.boards.hardware import Int8Isa
from llava_edge.profiles.memory.estimate import Machine, Workload, estimate_memory
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.memory_estimate import planned_memory, stored_isa
from llava_edge.runtime.artifact.open import open_artifact


@pytest.fixture(scope="module")
def manifest(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Manifest:
    return open_artifact(make_artifact(make_checkpoint("odd"), context_tokens=2048)).manifest


@pytest.mark.parametrize(("route", "isa"), [("integer", "vnni"), ("nbits", "none")])
def test_int8_weights_count_as_they_were_stored(
    manifest: Manifest, route: str, isa: Int8Isa
) -> None:
    stored = replace(manifest.precision, language_model="int8", int8_route=route, lm_head="int8")
    manifest = replace(manifest, precision=stored)
    work = Workload(2048, tiles_per_image=5)
    machine = Machine("cpu", int8_isa=isa)
    expected = estimate_memory(manifest.model, "int8", work, machine, vision=None)
    assert stored_isa(manifest) == isa
    found = planned_memory(manifest, work).host["decode"]
    assert found.decoder_weights == expected.host["decode"].decoder_weights
    assert found.lm_head == expected.host["decode"].lm_head


def test_a_scale_a_group_takes_more_than_one_a_row(manifest: Manifest) -> None:
    def weights(route: str) -> int:
        stored = replace(manifest.precision, language_model="int8", int8_route=route)
        changed = replace(manifest, precision=stored)
        return planned_memory(changed, Workload(2048)).host["decode"].decoder_weights

    assert weights("nbits") > weights("integer")


def test_a_tower_of_codes_lies_alike_beside_groups(manifest: Manifest) -> None:
    """As when a GPTQ checkpoint with groups is converted on a CPU with int8 instructions."""

    def tower(route: str) -> int:
        stored = replace(
            manifest.precision, language_model="int8", int8_route=route, vision_tower="int8"
        )
        changed = replace(manifest, precision=stored)
        return planned_memory(changed, Workload(2048)).host["decode"].vision_tower

    assert tower("nbits") == tower("integer")


@pytest.mark.parametrize("name", ["fp16", "int4"])
def test_other_weights_lie_alike_everywhere(manifest: Manifest, name: str) -> None:
    stored = replace(manifest.precision, language_model=name, int8_route="nbits")
    assert stored_isa(replace(manifest, precision=stored)) == "vnni"
