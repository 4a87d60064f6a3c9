from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.artifact_plan import lasting_plan, plan_artifact, variant_name
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.profiles.boards.hardware import HardwareProfile, load_profile
from llava_edge.profiles.errors import BudgetError, CheckpointError
from llava_edge.profiles.models.variants import read_folder
from llava_edge.profiles.plan import DeploymentPlan
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.profiles.planner import plan_deployment
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.util.progress import no_progress


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("odd")


def request_for(profile: HardwareProfile | None = None, **wishes: object) -> ConvertRequest:
    return ConvertRequest(
        checkpoint="unused",
        profile=profile or load_profile("cpu-16gb"),
        wishes=PlanRequest(**{"precision": "fp16", **wishes}),  # type: ignore[arg-type]
        verify="none",
    )


def test_convert_takes_exactly_what_plan_chooses(folder: Path) -> None:
    planned = plan_artifact(request_for(), open_checkpoint(folder))

    wishes = PlanRequest(variants=(read_folder(folder),), precision="fp16")
    assert planned.plan == plan_deployment(load_profile("cpu-16gb"), wishes).plan
    assert DeploymentPlan.from_json(planned.plan.to_json()) == planned.plan
    lasting = DeploymentPlan.from_json(lasting_plan(planned.plan))
    assert lasting.memory.terms == planned.plan.memory.terms
    assert lasting.memory.shortfall_bytes == 0
    assert lasting == replace(planned.plan, memory=lasting.memory, rejected=())


def test_the_runtime_takes_the_chunk_that_the_plan_counted_with(
    folder: Path, tmp_path: Path
) -> None:
    board = load_profile("jetson-orin-nx-16gb")
    request = replace(request_for(board), checkpoint=str(folder), out=tmp_path / "artifact")
    made = convert_checkpoint(request, no_progress, print).folder

    with LlavaEdge.load(made, threads=1, allow_slow=True) as model:
        assert board.prefill_chunk == 512
        assert model._decoder.chunk_tokens == 512


def test_the_checkpoints_own_order_of_candidates_is_kept(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)

    full = plan_artifact(request_for(), checkpoint).grid.pinpoints
    low = plan_artifact(request_for(grid="1x2"), checkpoint).grid.pinpoints

    assert full == checkpoint.dims.image_grid_pinpoints
    assert low == tuple(point for point in full if point in {(70, 140), (140, 70)})


def test_candidates_beyond_the_checkpoints_are_said_to_be_untrained(folder: Path) -> None:
    planned = plan_artifact(request_for(grid="3x3"), open_checkpoint(folder))

    assert planned.grid.beyond_stock
    assert any("not trained" in note for note in planned.notes)
    assert not plan_artifact(request_for(), open_checkpoint(folder)).grid.beyond_stock


def test_what_does_not_fit_is_refused_with_the_shortfall_and_the_nearest(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    whole = plan_artifact(
        request_for(context_tokens=2048, grid="2x2"), checkpoint
    ).plan.memory.total_bytes
    board = replace(load_profile("cpu-16gb"), memory_bytes=whole - 1, system_reserve_bytes=0)

    with pytest.raises(BudgetError, match=r" 1 B less\. Nearest that fits: odd at fp16"):
        plan_artifact(request_for(board, context_tokens=2048, grid="2x2"), checkpoint)


def test_a_video_model_is_planned_with_frames(make_checkpoint: Callable[..., Path]) -> None:
    video = open_checkpoint(make_checkpoint("tiny", model_type="llava_next_video"))

    terms = [
        plan_artifact(request_for(context_tokens=4096, **wishes), video).plan.memory.terms
        for wishes in ({}, {"num_frames": 8}, {"num_frames": 16})
    ]

    assert terms[0] == terms[1]
    side = video.dims.vision.image_size
    assert terms[2]["pixel_values"] - terms[1]["pixel_values"] == 8 * 3 * side**2 * 4


def test_an_odd_number_of_patches_cannot_be_pooled(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="5 patches a side; pooling by 2 needs an even"):
        make_checkpoint("odd", model_type="llava_next_video")


@pytest.mark.parametrize(
    ("source_id", "name"),
    [
        ("llava-hf/llava-v1.6-mistral-7b-hf", "llava-v1.6-mistral-7b"),
        ("my folder/", "my-folder"),
        ("…", "-"),
        ("", "checkpoint"),
    ],
)
def test_the_variant_is_named_after_its_source(source_id: str, name: str) -> None:
    assert variant_name(source_id) == name
