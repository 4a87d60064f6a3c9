"""Planned memory: what an artifact and its requests take, by the very model that planned them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from llava_edge.profiles.boards.hardware import Int8Isa
from llava_edge.profiles.memory.buffers import CacheType
from llava_edge.profiles.memory.constants import Constants, memory_constants
from llava_edge.profiles.memory.estimate import estimate_memory
from llava_edge.profiles.memory.formats import PRECISIONS, VisionFormat
from llava_edge.profiles.memory.terms import Machine, MemoryEstimate, MemoryTerms, Phases, Workload
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.util.arrays import DeviceKind

_OF_A_REQUEST = (
    "image_decoding",
    "pixel_values",
    "vision_activations",
    "image_features",
    "prompt_embeddings",
    "prefill_activations",
    "attention_workspace",
)

_NOT_CERTAIN = (
    *_OF_A_REQUEST,
    "engine_workspace",
    "driver_context",
    "process",
    "allocator_slack",
)


def planned_memory(manifest: Manifest, work: Workload) -> MemoryEstimate:
    """Every term of every phase of an artifact's work.

    Layers that an int8 tower has in float are not known here: they count as int8.
    """
    stored = manifest.precision.language_model
    precision = stored if stored in PRECISIONS else "fp16"
    tower = manifest.precision.vision_tower
    vision = VisionFormat("int8" if tower == "int8" else "fp16")
    machine = Machine(manifest.target, int8_isa=stored_isa(manifest))
    return estimate_memory(manifest.model, precision, work, machine, _constants(), vision)


def stored_isa(manifest: Manifest) -> Int8Isa:
    """Instructions that int8 weights are laid out for, whatever the machine has that runs them.

    Without any they have a scale a group, which takes more memory than one a row; see
    ``formats.group_size``.
    """
    stored = manifest.precision
    grouped = stored.language_model == "int8" and stored.int8_route == "nbits"
    return "none" if grouped else "vnni"


def on_the_host(estimate: MemoryEstimate) -> MemoryEstimate:
    """An artifact made for a GPU may run on the CPU, if asked to: what would lie there lies here.

    An upper bound of what was planned: pixels and features count on both sides. What the CPU's
    kernels need beside it, in float32 where the graph is float16, is not planned at all.
    """
    if not estimate.device:
        return estimate
    phases = {
        name: terms + replace(estimate.device[name], driver_context=0)
        for name, terms in estimate.host.items()
    }
    return MemoryEstimate(device={}, host=phases)


def certain_phases(
    manifest: Manifest, context_tokens: int, cache: CacheType | None = None
) -> tuple[MemoryTerms, MemoryTerms]:
    """While weights are loaded and while an answer is made, what is taken whatever is asked.

    What this process has already, allowances for the allocator and everything that belongs to a
    request are left out. A cuda artifact that runs on the CPU is counted as on its device.
    """
    work = Workload(context_tokens, num_images=0, image_pixels=0, cache=cache)
    phases = _where_it_runs(planned_memory(manifest, work), "cpu")
    nothing = dict.fromkeys(_NOT_CERTAIN, 0)
    return replace(phases["load"], **nothing), replace(phases["decode"], **nothing)


class RequestMemory:
    """Host memory of one request beside what is loaded.

    Args:
        manifest: of the artifact.
        device: where the decoder runs; what lies on it is no host memory.
        batch_tiles: tiles encoded at once.
    """

    def __init__(self, manifest: Manifest, device: DeviceKind, batch_tiles: int) -> None:
        self._manifest = manifest
        self._device = device
        self._batch_tiles = batch_tiles

    def host_bytes(self, num_tiles: int, num_frames: int, num_tokens: int) -> int:
        """What is still to be taken once the pixels are there: the largest phase.

        Args:
            num_tiles: tiles to be encoded, of all images.
            num_frames: frames to be encoded.
            num_tokens: positions to be computed.
        """
        work = Workload(
            max(1, num_tokens),
            num_images=1 if num_tiles else 0,
            tiles_per_image=num_tiles,
            num_frames=num_frames,
            chunk_tokens=self._manifest.prefill_chunk,
            batch_tiles=self._batch_tiles,
            image_pixels=0,
        )
        phases = _where_it_runs(planned_memory(self._manifest, work), self._device)
        taken = dict.fromkeys(("image_decoding", "pixel_values"), 0)
        if not num_tiles and not num_frames:
            taken["vision_activations"] = 0
        terms = (replace(phases[name], **taken).as_dict() for name in ("encode", "prefill"))
        return max(sum(term[name] for name in _OF_A_REQUEST) for term in terms)


def _where_it_runs(estimate: MemoryEstimate, device: DeviceKind) -> Phases:
    """Phases of the host; on the CPU those of the device, where an artifact is made for one."""
    return estimate.host if device == "cuda" or not estimate.device else estimate.device


@cache
def _constants() -> dict[str, Constants]:
    return memory_constants()
