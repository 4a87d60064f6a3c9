"""ArtifactPlan: the plan of one conversion, from the same search that ``llava-edge plan`` runs.

Convert exports exactly what the plan chose, or what was pinned if that fits; otherwise it refuses
with the shortfall and the nearest that fits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.quantized.gptq_checkpoint import open_gptq
from llava_edge.convert.onnx.engine_plan import EngineTarget, plan_engine
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.profiles.errors import BudgetError, RequestError
from llava_edge.profiles.models.grids import GridChoice, asked_grid, asked_pinpoints
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.profiles.models.parameters import total_parameters
from llava_edge.profiles.models.variants import Variant, find_variant, kind_of, load_variants
from llava_edge.profiles.plan import DeploymentPlan
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.profiles.planner import DEFAULT_FRAMES, nearest_advice, plan_deployment
from llava_edge.profiles.sizes import format_bytes
from llava_edge.runtime.artifact.manifest import Reference
from llava_edge.runtime.util.progress import Notify


@dataclass(frozen=True)
class ArtifactPlan:
    """What will be exported.

    ``grid`` holds the candidates in the order that decides ties under ``reference``; ``engine`` is
    what the artifact carries for the tower besides its graph; ``num_frames`` are the frames that
    the plan counted with, 0 for a model without video.
    """

    plan: DeploymentPlan
    grid: GridChoice
    reference: Reference
    notes: tuple[str, ...]
    engine: EngineTarget | None = None
    num_frames: int = 0


def plan_artifact(request: ConvertRequest, checkpoint: Checkpoint) -> ArtifactPlan:
    """Plan one checkpoint for one board.

    Raises:
        BudgetError: what was asked does not fit; names the shortfall and what would.
        RequestError: the request is malformed, or asks for what is not exported yet.
        DependencyError: ``--engine`` names a library that is not installed.
    """
    wishes = replace(request.wishes, variants=(as_variant(checkpoint),))
    if checkpoint.dims.takes_video and not wishes.num_frames:
        wishes = replace(wishes, num_frames=DEFAULT_FRAMES)
    if checkpoint.gptq is not None:
        # What is quantised already stays as it is; another precision is refused by name.
        wishes = replace(wishes, precision=wishes.precision or f"int{checkpoint.gptq.bits}")
        open_gptq(checkpoint, str(wishes.precision))
    plan, notes = choose(request, wishes)
    reference = request.reference or ("original" if checkpoint.layout == "original" else "hf")
    plan, engine, more = plan_engine(
        plan, request.profile, wishes.engine, takes_video=checkpoint.dims.takes_video
    )
    grid = _grid(checkpoint.dims, request, plan)
    return ArtifactPlan(plan, grid, reference, (*notes, *more), engine, wishes.num_frames)


def default_output(planned: ArtifactPlan) -> Path:
    """``artifacts/<variant>-<precision>-<profile>``."""
    plan = planned.plan
    return Path("artifacts") / f"{plan.variant}-{plan.precision}-{plan.profile}"


def choose_hub_id(request: ConvertRequest, say: Notify) -> str:
    """Hub id of the variant that the planner chooses where no checkpoint was named.

    Raises:
        BudgetError: nothing fits.
        RequestError: what fits was not released on the hub.
    """
    plan, _ = choose(request, request.wishes)
    hub_id = find_variant(plan.variant).hub_id
    if hub_id is None:
        raise RequestError(
            f"{plan.variant} was chosen and has no hub id. Give CHECKPOINT, a folder or a hub id."
        )
    say(f"{request.profile.name} takes {plan.variant} at {plan.precision}, grid {plan.grid}")
    return hub_id


def refuse_misfit_by_id(request: ConvertRequest, repo_id: str) -> None:
    """Refuse a released variant that cannot fit, before it is downloaded.

    Raises:
        BudgetError: it does not fit.
    """
    for variant in load_variants():
        if repo_id in (variant.hub_id, variant.original_id):
            choose(request, replace(request.wishes, variants=(variant,)))


def lasting_plan(plan: DeploymentPlan) -> dict[str, Any]:
    """A plan as the manifest has it: without what the board had free when it was made."""
    document = plan.to_json()
    del document["rejected"]
    for memory in (document["memory"], document["memory"].get("host", {})):
        memory.pop("budget_bytes", None)
    return document


def seen_of_board(plan: DeploymentPlan) -> dict[str, Any]:
    """The rest of a plan, which differs from run to run on a board that is looked at."""
    seen = {"budget_bytes": plan.memory.budget_bytes, "rejected": plan.to_json()["rejected"]}
    if plan.memory.host_budget_bytes is not None:
        seen["host_budget_bytes"] = plan.memory.host_budget_bytes
    return seen


def choose(request: ConvertRequest, wishes: PlanRequest) -> tuple[DeploymentPlan, tuple[str, ...]]:
    """The plan for some candidates, and what is worth knowing about it.

    Raises:
        BudgetError: nothing that was asked fits.
        RequestError: the plan needs something that is not exported yet.
    """
    result = plan_deployment(request.profile, wishes)
    plan = result.plan
    if not plan.fits:
        raise BudgetError(_misfit(request, wishes, plan))
    if plan.distributed:
        raise RequestError(
            f"{plan.variant} at {plan.precision} needs several devices of {request.profile.name}: "
            f"{plan.engine}. An artifact runs on one; serve the checkpoint with that engine, or "
            "ask for a lower --precision or a smaller model."
        )
    return plan, result.notes


def as_variant(checkpoint: Checkpoint) -> Variant:
    """An opened checkpoint as a candidate of the planner."""
    parameters = total_parameters(checkpoint.dims)
    return Variant(
        name=variant_name(checkpoint.source_id),
        kind=kind_of(checkpoint.dims),
        dims=checkpoint.dims,
        parameters=parameters,
        hub_id=None,
        original_id=None,
        checkpoint_dtype="float16",
        license="see the checkpoint",
        license_status="not read",
        prompt_family=None,
        base_model=None,
        sources={"config": str(checkpoint.folder)},
    )


def variant_name(source_id: str) -> str:
    """The last part of a source's id, without a trailing ``-hf``, safe as a file name."""
    name = source_id.rstrip("/").split("/")[-1].removesuffix("-hf")
    return re.sub(r"[^A-Za-z0-9._-]", "-", name) or "checkpoint"


def _grid(dims: ModelDims, request: ConvertRequest, plan: DeploymentPlan) -> GridChoice:
    """The candidates behind the plan's grid: a name, or a list of one's own."""
    if request.wishes.pinpoints is not None:
        return asked_pinpoints(dims, request.wishes.pinpoints)
    if "," in plan.grid:
        return asked_pinpoints(dims, plan.grid)
    return asked_grid(dims, plan.grid)


def _misfit(request: ConvertRequest, wishes: PlanRequest, plan: DeploymentPlan) -> str:
    memory = plan.memory
    advice = nearest_advice(request.profile, wishes, plan)
    if not memory.shortfall_bytes:
        reason = plan.rejected[-1].reason if plan.rejected else "it does not go together"
        return f"nothing that was asked fits {request.profile.name}: {reason}. {advice}"
    return (
        f"{plan.variant} at {plan.precision} with grid {plan.grid} and {plan.context_tokens} "
        f"tokens of context needs {format_bytes(memory.total_bytes)}; {request.profile.name} "
        f"leaves {format_bytes(memory.budget_bytes)}, {format_bytes(memory.shortfall_bytes)} "
        f"less. {advice}"
    )
