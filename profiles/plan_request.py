"""PlanRequest: what is asked of the planner, and whether a plan can be made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from llava_edge.profiles.boards.engines import RTX_CAPABILITIES, RTX_UNPROVEN, rtx_target
from llava_edge.profiles.boards.hardware import HardwareProfile
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.memory.buffers import CacheType
from llava_edge.profiles.memory.formats import (
    PRECISIONS,
    VISION_PRECISIONS,
    PrecisionName,
    int8_cache_obstacle,
)
from llava_edge.profiles.models.variants import Variant

Prefer = Literal["largest", "quality", "speed"]


Engine = Literal["auto", "ort", "tensorrt", "tensorrt-rtx"]
"""What is asked to run the tower; ``auto`` takes TensorRT-RTX where NVIDIA's matrix has the GPU."""


MAX_CONTEXT = 1 << 24


MAX_IMAGES = 4096


MAX_FRAMES = 65536


@dataclass(frozen=True)
class PlanRequest:
    """What is asked; None leaves a thing to the search.

    Attributes:
        variants: candidates; empty for all image variants, or video variants with ``num_frames``.
        precision: pins one.
        grid: a named grid; ``pinpoints`` for a list of one's own.
        context_tokens: pins the context.
        num_images: full images that one prompt must hold.
        num_frames: frames that one video prompt must hold.
        cache: type of the cache; None for the target's own.
        prefer: ``largest`` puts the variant first, ``quality`` the grid, ``speed`` the grid and
            then the shortest predicted answer.
        engine: what runs the tower, see ``Engine``.
        vision_precision: ``fp16`` or ``int8`` of tower and projector; None takes int8 wherever the
            board and the language model's precision allow it.
        vision_wide_weights: weights of the tower that a conversion left wider than its format, see
            ``VisionFormat``.
    """

    variants: tuple[Variant, ...] = ()
    precision: str | None = None
    grid: str | None = None
    pinpoints: str | None = None
    context_tokens: int | None = None
    num_images: int = 1
    num_frames: int = 0
    cache: CacheType | None = None
    prefer: Prefer = "largest"
    engine: Engine = "auto"
    vision_precision: PrecisionName | None = None
    vision_wide_weights: int = 0


def check_request(profile: HardwareProfile, request: PlanRequest) -> None:
    """Refuse what no plan can be made of; every fault is listed.

    Raises:
        RequestError: there is one.
    """
    faults: list[str] = []
    if request.precision is not None and request.precision not in PRECISIONS:
        faults.append(f"precision {request.precision!r:.40} is not one of {', '.join(PRECISIONS)}")
    if request.vision_precision not in (None, *VISION_PRECISIONS):
        faults.append(
            f"vision precision {request.vision_precision!r:.40} is not one of "
            f"{', '.join(VISION_PRECISIONS)}"
        )
    if request.grid is not None and request.pinpoints is not None:
        faults.append("grid and pinpoints were both given; give one of them")
    if request.prefer not in get_args(Prefer):
        faults.append(f"prefer {request.prefer!r:.40} is not one of {', '.join(get_args(Prefer))}")
    if request.engine not in get_args(Engine):
        faults.append(f"engine {request.engine!r:.40} is not one of {', '.join(get_args(Engine))}")
    counts = (
        ("context", request.context_tokens, 1, MAX_CONTEXT),
        ("images", request.num_images, 1, MAX_IMAGES),
        ("frames", request.num_frames, 0, MAX_FRAMES),
    )
    for name, count, least, most in counts:
        if count is None and name == "context":
            continue
        if type(count) is not int or not least <= count <= most:
            faults.append(f"{name} is {count!r:.40}; it must be {least} to {most}")
    faults += [
        f"{v.name} takes images only, but a video was asked"
        for v in request.variants
        if request.num_frames and v.kind != "video"
    ]
    capability = profile.compute_capability
    if request.engine == "tensorrt-rtx" and rtx_target(capability, unproven=True) is None:
        faults.append(
            f"engine tensorrt-rtx compiles for compute capabilities "
            f"{', '.join((*RTX_CAPABILITIES, *RTX_UNPROVEN))}; "
            f"{profile.name} has {capability or 'no GPU'}"
        )
    if request.engine == "tensorrt" and profile.kind == "cpu":
        faults.append(f"engine tensorrt needs an NVIDIA GPU; {profile.name} has none")
    if request.cache == "float16" and profile.target == "cpu":
        faults.append("cache float16 does not go with the cpu target; use float32 or int8")
    if request.cache == "float32" and profile.target == "cuda":
        faults.append("cache float32 does not go with the cuda target; use float16 or int8")
    if request.cache == "int8" and (why := int8_cache_obstacle(capability)):
        faults.append(f"cache int8 was asked, but {why}; use float16")
    if faults:
        raise RequestError(f"This plan cannot be made: {'; '.join(faults)}.")
