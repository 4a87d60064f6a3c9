"""LoadFit: the cache an artifact is loaded with, chosen by the memory that is free now.

The plan was made for a board that has nothing else to do. Where less is free, an int8 cache (if the
artifact has one) keeps the whole context, and a shorter context still answers most questions; only
where not even that fits is loading refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llava_edge.profiles.boards.nvml import Gpu, read_gpus
from llava_edge.profiles.errors import EngineError, RequestError
from llava_edge.profiles.memory.buffers import MIN_TEXT_TOKENS, CacheType, video_tokens_per_frame
from llava_edge.profiles.memory.formats import int8_cache_obstacle
from llava_edge.profiles.memory.terms import MemoryTerms, Workload
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.memory_estimate import on_the_host, planned_memory
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.loading.placement import AskedCache, check_host_memory, choose_cache
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.util.arrays import DeviceKind
from llava_edge.runtime.util.host_memory import available_host_bytes
from llava_edge.runtime.util.validation import require_count


@dataclass(frozen=True)
class LoadFit:
    """What was chosen.

    Attributes:
        context_tokens: positions of the cache.
        cache: type of its keys and values.
        degraded: what was reduced and why; empty if nothing.
        gpu: that computes, as it was found; None on the CPU and where the driver lists none.
    """

    context_tokens: int
    cache: CacheType
    degraded: tuple[str, ...] = ()
    gpu: Gpu | None = field(default=None, compare=False)


def fit_at_load(
    artifact: Artifact,
    device: DeviceKind,
    asked: int | None = None,
    vision_cache_bytes: int = 0,
    cache: AskedCache = "auto",
    gpu: int = 0,
) -> LoadFit:
    """Context and type of the cache to load with.

    Args:
        artifact: opened.
        device: where the decoder will run.
        asked: positions, taken as they are; None for the artifact's or, where its largest request
            does not fit what is free, as many as do and at least ``least_context``.
        vision_cache_bytes: what the vision cache may grow to.
        cache: taken as it is; ``auto`` for the type that the artifact computes in or, where the
            largest request does not fit with it, int8, if the artifact has a graph for it.
        gpu: which one, on ``cuda``.

    Raises:
        RequestError: what was asked is out of range, or there is no such GPU.
        EngineError: the artifact has no decoder graph with that cache, or the GPU cannot take it.
        OutOfMemoryError: not even what loading certainly takes is free.
    """
    manifest = artifact.manifest
    planned = manifest.context_tokens
    found = read_gpus().number(gpu) if device == "cuda" else None
    gpus = () if found is None else (found,)
    kinds = _possible_kinds(manifest, cache, gpus)
    if asked is not None:
        asked = require_count("context_tokens", asked, 1)
        if asked > planned:
            raise RequestError(
                f"a context of {asked} tokens was asked; the artifact was made for 1 to "
                f"{planned}. Convert again with --context for a longer one."
            )
    fit = _fitting(manifest, device, gpus, vision_cache_bytes, kinds, asked)
    if device == "cpu":
        check_host_memory(artifact, fit.context_tokens, vision_cache_bytes, fit.cache)
    return replace(fit, gpu=found)


def least_context(manifest: Manifest) -> int:
    """One full image of the grid, or one full video, and some text; see ``MIN_TEXT_TOKENS``."""
    media = ImageProcessor(manifest.image_processing).anyres.max_image_tokens
    if manifest.video_processing is not None:
        frames = manifest.video_processing.max_frames
        media = max(media, frames * video_tokens_per_frame(manifest.model.vision))
    return min(manifest.context_tokens, media + MIN_TEXT_TOKENS)


def _possible_kinds(manifest: Manifest, cache: AskedCache, gpus: Sequence[Gpu]) -> list[CacheType]:
    """Types of the cache to choose from, the preferred one first."""
    kinds = [choose_cache(cache, manifest)]
    obstacles = (int8_cache_obstacle(gpu.compute_capability) for gpu in gpus)
    obstacle = next((each for each in obstacles if each), None)
    if kinds == ["int8"] and obstacle:
        raise EngineError(
            f"an int8 cache was asked, but {obstacle}. Load without cache (--cache), with a "
            "shorter context if memory is short."
        )
    if cache == "auto":
        others = (kind for kind in manifest.decoders if kind not in kinds)
        kinds += [kind for kind in others if kind != "int8" or not obstacle]
    return kinds


def _fitting(
    manifest: Manifest,
    device: DeviceKind,
    gpus: Sequence[Gpu],
    vision_cache_bytes: int,
    kinds: Sequence[CacheType],
    asked: int | None,
) -> LoadFit:
    host = available_host_bytes()

    def lacks(context: int, kind: CacheType) -> str:
        estimate = planned_memory(manifest, largest_request(manifest, context, kind))
        if device == "cpu":
            estimate = on_the_host(estimate)
        needed = vision_cache_bytes + _beside_process(estimate.host_peak)
        for gpu in gpus:
            if gpu.free_bytes is None:
                # One memory for both.
                needed += estimate.device_bytes
            elif estimate.device_bytes > gpu.free_bytes:
                return _sentence(estimate.device_bytes, gpu.free_bytes, "on the GPU")
        return "" if host is None or needed <= host else _sentence(needed, host, "in host memory")

    wanted = manifest.context_tokens if asked is None else asked
    first, last = kinds[0], kinds[-1]
    why = lacks(wanted, first)
    if not why:
        return LoadFit(wanted, first)
    coarser = () if first == last else (f"cache lowered from {first} to {last}: {why}",)
    lacking = lacks(wanted, last) if coarser else why
    least = least_context(manifest)
    if not lacking or asked is not None or least == wanted:
        return LoadFit(wanted, last, coarser)
    fits, too_long = least, wanted
    if not lacks(least, last):
        # Memory grows with the context: the longest that fits lies between.
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            fits, too_long = (fits, middle) if lacks(middle, last) else (middle, too_long)
    shorter = f"context lowered from {wanted} to {fits} tokens: {lacking}"
    return LoadFit(fits, last, (*coarser, shorter))


def largest_request(manifest: Manifest, context: int, cache: CacheType) -> Workload:
    """The largest request of the artifact's plan."""
    anyres = ImageProcessor(manifest.image_processing).anyres
    video = manifest.video_processing
    return Workload(
        context,
        tiles_per_image=anyres.max_tiles,
        num_frames=0 if video is None else video.max_frames,
        cache=cache,
        chunk_tokens=manifest.prefill_chunk,
    )


def _beside_process(terms: MemoryTerms) -> int:
    """This process is there already, and the system's answer counts it as taken."""
    return replace(terms, process=0).total


def _sentence(needed: int, free: int, where: str) -> str:
    return (
        f"its largest request takes up to {needed / 2**30:.2f} GiB {where}, "
        f"{free / 2**30:.2f} GiB are free"
    )
