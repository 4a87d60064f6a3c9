"""Plans that are made again: context as it began, a wider tower, fp16 beside a quantised model.

A plan counts with the memory that is free when it is made. What is made again keeps what the first
plan saw, so that other work on the board meanwhile changes nothing.
"""

from __future__ import annotations

from dataclasses import replace

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.planning.artifact_plan import (
    ArtifactPlan,
    as_variant,
    choose,
    plan_artifact,
)
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.profiles.boards.detect import detect_profile
from llava_edge.profiles.errors import BudgetError, RequestError
from llava_edge.profiles.plan import DeploymentPlan
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.util.progress import Notify


def with_begun_context(
    request: ConvertRequest,
    checkpoint: Checkpoint,
    planned: ArtifactPlan,
    begun: object,
    say: Notify,
) -> ArtifactPlan:
    """The plan with the context that an unfinished conversion began with.

    Args:
        request: what was asked.
        checkpoint: opened.
        planned: with the memory that is free now.
        begun: context in the journal of the unfinished conversion; anything but an int for none.
        say: told where it differs.
    """
    plan = planned.plan
    if request.force or request.wishes.context_tokens is not None or type(begun) is not int:
        return planned
    if begun == plan.context_tokens:
        return planned
    wishes = replace(request.wishes, context_tokens=begun)
    try:
        again = plan_artifact(replace(_whole_board(request), wishes=wishes), checkpoint)
    except RequestError:
        return planned
    chosen = (plan.variant, plan.precision, plan.vision_precision, plan.grid)
    found = again.plan
    if chosen != (found.variant, found.precision, found.vision_precision, found.grid):
        return planned
    say(
        f"note: keeps {begun} tokens of context, as it began; the memory that is free now "
        f"would give {plan.context_tokens} (--force begins again)"
    )
    return replace(again, plan=_as_seen(found, plan))


def context_with_wide_tower(
    request: ConvertRequest, checkpoint: Checkpoint, planned: ArtifactPlan, wide_weights: int
) -> int:
    """Tokens of context beside a tower that keeps weights wider than its precision.

    Raises:
        BudgetError: it does not fit any more.
    """
    try:
        wishes = _wide_tower(request, checkpoint, planned, wide_weights)
        return choose(request, wishes)[0].context_tokens
    except BudgetError as error:
        raise BudgetError(
            f"calibration keeps {wide_weights} weights of the tower wider than "
            f"{planned.plan.vision_precision}, and with them {error}"
        ) from error


def with_wide_tower(
    request: ConvertRequest,
    checkpoint: Checkpoint,
    planned: ArtifactPlan,
    wide_weights: int,
    context_tokens: int,
) -> ArtifactPlan:
    """The plan for such a tower, with the context that ``context_with_wide_tower`` found."""
    wishes = _wide_tower(request, checkpoint, planned, wide_weights)
    again, _ = choose(_whole_board(request), replace(wishes, context_tokens=context_tokens))
    again = replace(again, engine=planned.plan.engine)
    return replace(planned, plan=_as_seen(again, planned.plan))


def require_room_for_fp16(
    request: ConvertRequest, checkpoint: Checkpoint, planned: ArtifactPlan
) -> None:
    """Make sure that this machine can run fp16, which ``--quality`` compares with.

    Args:
        request: for the fp16 artifact.
        checkpoint: opened.
        planned: of that artifact.

    Raises:
        RequestError: it has too little memory.
    """
    here = replace(request, profile=detect_profile(device="cpu"))
    wishes = replace(
        here.wishes,
        variants=(as_variant(checkpoint),),
        context_tokens=None,
        num_frames=planned.num_frames,
    )
    try:
        choose(here, wishes)
    except BudgetError as error:
        raise RequestError(
            f"--quality asks the model at fp16 on this machine first, and {error} Convert on a "
            "larger machine, or leave --quality out."
        ) from error


def _wide_tower(
    request: ConvertRequest, checkpoint: Checkpoint, planned: ArtifactPlan, wide_weights: int
) -> PlanRequest:
    plan = planned.plan
    wishes = replace(
        request.wishes,
        variants=(as_variant(checkpoint),),
        num_frames=planned.num_frames,
        precision=plan.precision,
        vision_precision="int8" if plan.vision_precision == "int8" else None,
        vision_wide_weights=wide_weights,
    )
    return wishes if wishes.pinpoints is not None else replace(wishes, grid=plan.grid)


def _whole_board(request: ConvertRequest) -> ConvertRequest:
    """The request for the whole board, whatever others hold of it now."""
    profile = replace(request.profile, system_reserve_bytes=0, host_reserve_bytes=0)
    return replace(request, profile=profile)


def _as_seen(plan: DeploymentPlan, first: DeploymentPlan) -> DeploymentPlan:
    """A plan with the budget that was there when the first one was made."""
    seen = first.memory
    memory = replace(
        plan.memory, budget_bytes=seen.budget_bytes, host_budget_bytes=seen.host_budget_bytes
    )
    return replace(plan, memory=memory, rejected=first.rejected)
