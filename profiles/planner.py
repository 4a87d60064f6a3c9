"""The search: which variant, grid, precision and context fit a board, and why not the next larger.

The lattice is small (a few hundred points), so every point is computed. Candidates are put in the
order of preference and the first that fits is taken; all before it are reported with the reason.
Each is tried at its smallest context, one full image of the grid and ``MIN_TEXT_TOKENS``; the
chosen one then gets the largest context that still fits.

More memory never gives a smaller variant, nor for the same variant a smaller grid: what fits a
budget fits every larger one, and the order of candidates does not depend on the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llava_edge.profiles.boards.hardware import HardwareProfile
from llava_edge.profiles.memory.buffers import MIN_TEXT_TOKENS, video_tokens_per_frame
from llava_edge.profiles.memory.constants import Constants, memory_constants, speed_constants
from llava_edge.profiles.memory.distributed import Parallelism, device_terms, parallelisms
from llava_edge.profiles.memory.estimate import estimate_memory
from llava_edge.profiles.memory.formats import (
    PRECISIONS,
    VisionFormat,
    body_route,
    default_vision,
    rounded_activations,
    vision_obstacle,
)
from llava_edge.profiles.memory.speed import Prediction, predict_speed, steps_read_codes
from llava_edge.profiles.memory.terms import Machine, MemoryTerms, Workload
from llava_edge.profiles.models.grids import GridChoice, asked_grid, asked_pinpoints, stock_grids
from llava_edge.profiles.models.variants import Variant, candidates
from llava_edge.profiles.plan import (
    DeploymentPlan,
    PlanMemory,
    PredictedSpeed,
    RejectedCandidate,
)
from llava_edge.profiles.plan_request import (
    PlanRequest,
    check_request,
)
from llava_edge.profiles.sizes import format_bytes

CONTEXT_STEP = 256
"""Contexts beyond the smallest are multiples of this."""

DEFAULT_FRAMES = 8
"""Frames that a video model is planned for unless said: what the reference's examples sample."""


@dataclass(frozen=True)
class PlanResult:
    """The answer, and what else is worth knowing.

    ``pareto``, where it was asked for, holds the plans that no other beats in variant, grid,
    precision and predicted decode speed at once.
    """

    plan: DeploymentPlan
    pareto: tuple[DeploymentPlan, ...]
    notes: tuple[str, ...]


def plan_deployment(
    profile: HardwareProfile, request: PlanRequest | None = None, *, pareto: bool = False
) -> PlanResult:
    """Choose what runs on ``profile``.

    Args:
        profile: the board.
        request: what is asked; None for everything left open.
        pareto: also find the plans that no other beats.

    Where nothing fits, the plan is the candidate that needs least and says ``fits`` false.

    Raises:
        RequestError: the request itself is malformed.
    """
    search = _Search(profile, request or PlanRequest())
    return search.result(pareto)


def nearest_fit(profile: HardwareProfile, request: PlanRequest) -> DeploymentPlan | None:
    """The plan nearest to a request that does not fit, with less context, precision, grid or model.

    One wish alone is dropped first where that is enough; then one after another, and each stays
    dropped. None where nothing fits at all.
    """
    wishes: tuple[dict[str, Any], ...] = (
        {"context_tokens": None},
        {"grid": None, "pinpoints": None},
        {"precision": None},
        {"vision_precision": None},
    )
    for alone in wishes:
        plan = plan_deployment(profile, replace(request, **alone)).plan
        if plan.fits:
            return plan
    for dropped in (
        {"context_tokens": None},
        {"vision_precision": None},
        {"precision": None},
        {"grid": None, "pinpoints": None},
        {"variants": ()},
    ):
        request = replace(request, **dropped)
        plan = plan_deployment(profile, request).plan
        if plan.fits:
            return plan
    return None


def nearest_advice(profile: HardwareProfile, request: PlanRequest, plan: DeploymentPlan) -> str:
    """What to do about a request that does not fit: the nearest that does, or what to change.

    Args:
        profile: the board.
        request: that does not fit.
        plan: what was found for it.
    """
    nearest = nearest_fit(profile, request)
    if nearest is not None:
        return (
            f"Nearest that fits: {nearest.variant} at {nearest.precision}, grid {nearest.grid}, "
            f"context {nearest.context_tokens} ({format_bytes(nearest.memory.total_bytes)})."
        )
    if plan.memory.shortfall_bytes:
        return "Nothing smaller fits either; free memory or name another board."
    return (
        "Nothing smaller fits either; ask for fewer images or frames, or a context that holds them."
    )


@dataclass(frozen=True)
class _Sized:
    """Memory of one candidate at one context."""

    terms: MemoryTerms
    host: MemoryTerms
    engine: str
    num_devices: int
    overrun: int

    @property
    def fits(self) -> bool:
        return self.overrun <= 0


@dataclass(frozen=True)
class _Candidate:
    """One point of the lattice at its smallest context."""

    variant: Variant
    precision: str
    grid: GridChoice
    context_tokens: int
    sized: _Sized
    speed: Prediction
    obstacle: str

    @property
    def fits(self) -> bool:
        return self.sized.fits and not self.obstacle


class _Search:
    def __init__(self, profile: HardwareProfile, request: PlanRequest) -> None:
        check_request(profile, request)
        self.profile = profile
        self.request = request
        self.machine = Machine.of(profile)
        self.memory: Mapping[str, Constants] = memory_constants()
        self.speeds: Mapping[str, Constants] = speed_constants()
        kind: Literal["image", "video"] = "video" if request.num_frames else "image"
        self.variants = request.variants or candidates(kind)
        self.precisions: Sequence[str] = (request.precision,) if request.precision else PRECISIONS

    def result(self, pareto: bool) -> PlanResult:
        found = sorted(self.candidates(), key=self.order)
        chosen = next((c for c in found if c.fits), None)
        if chosen is None:
            least = min(found, key=lambda c: (bool(c.obstacle), c.sized.overrun))
            rejected = [self.rejection(c) for c in found]
            plan = self.plan(least, least.context_tokens, least.sized, rejected)
            return PlanResult(plan, (), self.notes(least))
        rejected = [self.rejection(c) for c in found[: found.index(chosen)]]
        context, sized = self.largest_context(chosen)
        if following := self.next_context(chosen, context):
            rejected.append(following)
        plan = self.plan(chosen, context, sized, rejected)
        front = self.pareto(found) if pareto else ()
        return PlanResult(plan, front, self.notes(chosen))

    def candidates(self) -> list[_Candidate]:
        return [
            self.candidate(variant, precision, grid)
            for variant in self.variants
            for grid in self.grids(variant)
            for precision in self.precisions
        ]

    def grids(self, variant: Variant) -> tuple[GridChoice, ...]:
        if self.request.pinpoints is not None:
            return (asked_pinpoints(variant.dims, self.request.pinpoints),)
        if self.request.grid is not None:
            return (asked_grid(variant.dims, self.request.grid),)
        return stock_grids(variant.dims)

    def candidate(self, variant: Variant, precision: str, grid: GridChoice) -> _Candidate:
        request, limit = self.request, variant.dims.text.max_positions
        media = self.media_tokens(variant, grid)
        least = media + MIN_TEXT_TOKENS
        context = least if request.context_tokens is None else request.context_tokens
        obstacle = ""
        if least > limit:
            obstacle = (
                f"{media} media tokens and {MIN_TEXT_TOKENS} of text need {least} positions; "
                f"the model has {limit}"
            )
        elif context > limit:
            obstacle = f"{context} tokens of context were asked; the model has {limit} positions"
        elif context < least:
            obstacle = (
                f"{context} tokens of context were asked; {media} media tokens and "
                f"{MIN_TEXT_TOKENS} of text need {least}"
            )
        wanted = self.request.vision_precision
        if wanted == "int8" and not obstacle:
            why = vision_obstacle(precision, self.profile.target, self.profile.int8_isa)
            obstacle = f"an int8 tower was asked, but {why}" if why else ""
        sized = self.size(variant, precision, grid, context)
        speed = predict_speed(
            variant.dims,
            precision,
            self.profile,
            media_tokens=media,
            num_tiles=self.media_tiles(variant, grid),
            cache=request.cache,
            num_devices=sized.num_devices,
            constants=self.speeds,
            vision=self.vision(precision),
        )
        return _Candidate(variant, precision, grid, context, sized, speed, obstacle)

    def vision(self, precision: str) -> VisionFormat:
        """Format of the tower beside a language model of that precision."""
        machine, wanted = self.machine, self.request.vision_precision
        chosen = default_vision(precision, machine.target, machine.int8_isa)
        possible = vision_obstacle(precision, machine.target, machine.int8_isa) is None
        if wanted is not None and possible:
            chosen = VisionFormat(wanted)
        return replace(chosen, wide_weights=self.request.vision_wide_weights)

    def media_tokens(self, variant: Variant, grid: GridChoice) -> int:
        """Tokens of the largest prompt: all images, or the video where that is longer."""
        return max(self.request.num_images * grid.max_image_tokens, self.frame_tokens(variant))

    def media_tiles(self, variant: Variant, grid: GridChoice) -> int:
        """Tiles or frames that the tower sees for the prompt of ``media_tokens``."""
        if self.frame_tokens(variant) == self.media_tokens(variant, grid):
            return self.request.num_frames
        return self.request.num_images * grid.max_tiles

    def frame_tokens(self, variant: Variant) -> int:
        """Tokens of all frames of the video."""
        return self.request.num_frames * video_tokens_per_frame(variant.dims.vision)

    def size(self, variant: Variant, precision: str, grid: GridChoice, context: int) -> _Sized:
        """On one device, else on as few as hold it; where none do, the spread that lacks least.

        An int8 cache is the artifact's own, which is run on one device.
        """
        work = Workload(
            context_tokens=context,
            num_images=self.request.num_images,
            tiles_per_image=grid.max_tiles,
            num_frames=self.request.num_frames,
            cache=self.request.cache,
            chunk_tokens=self.profile.prefill_chunk,
        )
        vision = self.vision(precision)
        estimate = estimate_memory(variant.dims, precision, work, self.machine, self.memory, vision)
        apart = self.profile.kind == "cuda"
        host = estimate.host_peak if apart else MemoryTerms()
        budget, host_budget = self.profile.budget_bytes, self.profile.host_budget_bytes
        host_over = host.total - host_budget if apart and host_budget is not None else 0
        over = max(estimate.peak.total - budget, host_over)
        single = _Sized(estimate.peak, host, self.engine(), 1, over)
        if single.fits or self.profile.num_devices == 1 or self.request.cache == "int8":
            return single
        text = variant.dims.text
        nearest = single
        for parallel in parallelisms(text, precision, self.profile.num_devices):
            spread = self.spread(variant, precision, work, parallel, host, host_over)
            if spread.fits:
                return spread
            if spread.overrun < nearest.overrun:
                nearest = spread
        return nearest

    def engine(self) -> str:
        """What runs the tower on one device."""
        if self.request.engine != "auto":
            return self.request.engine
        return "ort" if self.profile.rtx_target is None else "tensorrt-rtx"

    def spread(
        self,
        variant: Variant,
        precision: str,
        work: Workload,
        parallel: Parallelism,
        host: MemoryTerms,
        host_over: int,
    ) -> _Sized:
        terms = device_terms(variant.dims, precision, work, parallel, self.memory)
        over = max(terms.total - self.profile.budget_bytes, host_over)
        return _Sized(terms, host, parallel.engine, parallel.num_devices, over)

    def order(self, c: _Candidate) -> tuple[float, ...]:
        """Sort key, smallest first: what is preferred comes first."""
        variant = -float(c.variant.parameters)
        grid = -float(c.grid.max_image_tokens)
        precision = float(PRECISIONS.index(c.precision))
        if self.request.prefer == "quality":
            return (grid, variant, precision)
        if self.request.prefer == "speed":
            # Without rates the bytes of the weights decide: they are what a token streams.
            streamed = c.sized.terms.decoder_weights + c.sized.terms.lm_head
            answer = c.speed.answer_seconds
            return (grid, float(streamed) if answer is None else answer, variant, precision)
        return (variant, grid, precision)

    def contexts(self, c: _Candidate) -> list[int]:
        """Contexts from the smallest to all positions."""
        if self.request.context_tokens is not None:
            return [c.context_tokens]
        limit = c.variant.dims.text.max_positions
        first = (c.context_tokens // CONTEXT_STEP + 1) * CONTEXT_STEP
        return sorted({c.context_tokens, *range(first, limit, CONTEXT_STEP), limit})

    def largest_context(self, c: _Candidate) -> tuple[int, _Sized]:
        contexts = self.contexts(c)
        low, high = 0, len(contexts) - 1
        best = c.sized
        # More context never needs less memory, so halving finds the edge.
        while low < high:
            middle = (low + high + 1) // 2
            sized = self.size(c.variant, c.precision, c.grid, contexts[middle])
            # A longer context must not spread the model over more devices.
            if sized.fits and sized.num_devices == c.sized.num_devices:
                low, best = middle, sized
            else:
                high = middle - 1
        return contexts[low], best

    def next_context(self, c: _Candidate, context: int) -> RejectedCandidate | None:
        larger = [n for n in self.contexts(c) if n > context]
        if not larger:
            return None
        sized = self.size(c.variant, c.precision, c.grid, larger[0])
        if sized.num_devices != c.sized.num_devices:
            why = f"{larger[0]} tokens of context need {sized.num_devices} devices"
        else:
            why = f"{larger[0]} tokens of context: {self.over_budget(sized)}"
        return RejectedCandidate(c.variant.name, c.precision, c.grid.name, sized.terms.total, why)

    def rejection(self, c: _Candidate) -> RejectedCandidate:
        reason = c.obstacle or (
            f"{self.over_budget(c.sized)} at its smallest context of {c.context_tokens} tokens"
        )
        return RejectedCandidate(
            c.variant.name, c.precision, c.grid.name, c.sized.terms.total, reason
        )

    def over_budget(self, sized: _Sized) -> str:
        budget = self.profile.budget_bytes
        over = sized.terms.total - budget
        if over <= 0:
            host_budget = self.profile.host_budget_bytes or 0
            return (
                f"the host needs {format_bytes(sized.host.total)}, "
                f"{format_bytes(sized.host.total - host_budget)} more than its "
                f"{format_bytes(host_budget)}"
            )
        where = f" on each of {sized.num_devices} devices" if sized.num_devices > 1 else ""
        if self.request.cache == "int8" and self.profile.num_devices > 1:
            where = " on the one device that an int8 cache is for"
        return (
            f"needs {format_bytes(sized.terms.total)}{where}, {format_bytes(over)} more than "
            f"{format_bytes(budget)}"
        )

    def plan(
        self,
        c: _Candidate,
        context: int,
        sized: _Sized,
        rejected: Sequence[RejectedCandidate] = (),
    ) -> DeploymentPlan:
        apart = self.profile.kind == "cuda"
        return DeploymentPlan(
            profile=self.profile.name,
            variant=c.variant.name,
            precision=c.precision,
            grid=c.grid.name,
            max_tiles=c.grid.max_tiles,
            max_image_tokens=c.grid.max_image_tokens,
            context_tokens=context,
            engine=sized.engine,
            memory=PlanMemory(
                terms=sized.terms.as_dict(),
                budget_bytes=self.profile.budget_bytes,
                host_terms=sized.host.as_dict() if apart else {},
                host_budget_bytes=self.profile.host_budget_bytes if apart else None,
            ),
            predicted=PredictedSpeed(c.speed.decode_tokens_per_second, c.speed.ttft_seconds),
            fits=c.fits and sized.fits,
            rejected=tuple(rejected),
            vision_precision=self.vision(c.precision).precision,
        )

    def pareto(self, found: Sequence[_Candidate]) -> tuple[DeploymentPlan, ...]:
        fitting = [c for c in found if c.fits]
        scores = [_scores(c) for c in fitting]
        kept = [
            c
            for c, mine in zip(fitting, scores, strict=True)
            if not any(_beats(other, mine) for other in scores)
        ]
        return tuple(self.plan(c, *self.largest_context(c)) for c in kept)

    def notes(self, c: _Candidate) -> tuple[str, ...]:
        notes = []
        if c.grid.beyond_stock:
            notes.append(
                f"grid {c.grid.name} holds candidates that {c.variant.name} was not trained on; "
                "answers may be worse than with its own grid."
            )
        if self.profile.target == "cpu" and c.precision == "fp16":
            notes.append("fp16 on a CPU is stored as fp16 and computed and planned as float32.")
        target, isa = self.profile.target, self.profile.int8_isa
        route = body_route(c.variant.dims.text, c.precision, target, isa)
        rounded = rounded_activations(c.precision, route, target)
        if rounded is not None:
            notes.append(f"{c.precision} on a CPU: {rounded}.")
        if self.vision(c.precision).precision == "int8":
            notes.append(
                "the tower is planned at int8; calibration may leave layers in fp16, and the plan "
                "is then made again with them (--vision-precision fp16 turns it off)."
            )
        if self.request.cache == "int8" and self.profile.target == "cuda":
            steps = (
                "steps read the codes"
                if steps_read_codes(c.variant.dims.text)
                else "so do steps, as this model's heads do not suit the kernels that read codes, "
                "and decoding is predicted slower than with a float16 cache"
            )
            notes.append(
                "with an int8 cache on a GPU, prompts make float16 of one layer's codes, counted "
                f"in attention_workspace; {steps}. Its speed was not measured on a GPU."
            )
        if c.sized.engine == "tensorrt-rtx" and self.profile.rtx_target is None:
            notes.append(
                f"compute capability {self.profile.compute_capability} stands outside NVIDIA's "
                "support matrix of TensorRT-RTX: its engine compiles, and nobody has shown that it "
                "runs. The artifact runs without it as well, on ONNX Runtime."
            )
        if c.sized.num_devices > 1:
            notes.append(
                f"one device cannot hold it: {c.sized.num_devices} of {self.profile.num_devices} "
                f"are used through {c.sized.engine}; the terms are those of one device."
            )
        return tuple(notes)


def _scores(c: _Candidate) -> tuple[float, ...]:
    rate = c.speed.decode_tokens_per_second
    streamed = c.sized.terms.decoder_weights + c.sized.terms.lm_head
    return (
        float(c.variant.parameters),
        float(c.grid.max_image_tokens),
        -float(PRECISIONS.index(c.precision)),
        -float(streamed) if rate is None else rate,
    )


def _beats(other: tuple[float, ...], mine: tuple[float, ...]) -> bool:
    return other != mine and all(o >= m for o, m in zip(other, mine, strict=True))
