"""Preflight: what a download and its conversion need of this host, said before the first byte."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from llava_edge.convert.checkpoint.hub.download import DownloadPlan
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.profiles.models.variants import Variant, candidates, load_variants
from llava_edge.profiles.sizes import format_bytes
from llava_edge.runtime.util.host_memory import available_host_bytes
from llava_edge.runtime.util.progress import Notify

PROCESS_BYTES = 640 << 20
"""Resident size of a conversion apart from tensors: torch, transformers, onnx-ir. Measured 560 MiB
(VmHWM of a demo conversion)."""
TENSOR_COPIES = 4
"""Copies of the largest tensor at once: as read, joined, turned, and as written."""


@dataclass(frozen=True)
class HostNeeds:
    """What converting one variant takes: disk for checkpoint and artifact, and memory."""

    disk_bytes: int
    memory_bytes: int

    def lacks(self, disk_free: int, memory_free: int | None) -> list[str]:
        """What is missing, in words."""
        faults = []
        if self.disk_bytes > disk_free:
            faults.append(f"disk: {format_bytes(self.disk_bytes)} of {format_bytes(disk_free)}")
        if memory_free is not None and self.memory_bytes > memory_free:
            faults.append(
                f"memory: {format_bytes(self.memory_bytes)} of {format_bytes(memory_free)}"
            )
        return faults


def conversion_needs(dims: ModelDims, parameters: int, bytes_to_fetch: int) -> HostNeeds:
    """Disk and memory for fetching and converting a model of these sizes at fp16."""
    text = dims.text
    packed = text.query_size + 2 * text.key_value_size
    largest = text.hidden_size * max(text.vocab_size, text.intermediate_size, packed)
    return HostNeeds(
        disk_bytes=bytes_to_fetch + 2 * parameters,
        memory_bytes=PROCESS_BYTES + TENSOR_COPIES * 2 * largest,
    )


def check_download(plan: DownloadPlan, out_parent: Path, say: Notify) -> None:
    """Print id, revision, bytes, and what is needed against what is there.

    Args:
        plan: the download.
        out_parent: a folder on the disk that the artifact will be written to.
        say: prints a line.

    Raises:
        RequestError: this host cannot do it; names the largest variant that it can.
    """
    say(f"{plan.repo_id} at revision {plan.revision}")
    known = {variant.hub_id: variant for variant in load_variants()}
    variant = known.get(plan.repo_id)
    memory_free = available_host_bytes()
    disk_free = min(plan.disk_free_bytes, _disk_free(out_parent))
    needs = HostNeeds(plan.bytes_to_fetch + plan.total_bytes, PROCESS_BYTES)
    if variant is not None:
        needs = conversion_needs(variant.dims, variant.parameters, plan.bytes_to_fetch)
    memory_text = "unknown" if memory_free is None else format_bytes(memory_free)
    say(
        f"to fetch {format_bytes(plan.bytes_to_fetch)} of {format_bytes(plan.total_bytes)}; "
        f"disk needed {format_bytes(needs.disk_bytes)}, free {format_bytes(disk_free)}; "
        f"memory needed {format_bytes(needs.memory_bytes)}, free {memory_text}"
    )
    faults = needs.lacks(disk_free, memory_free)
    if faults:
        largest = largest_convertible(disk_free, memory_free)
        advice = (
            f"The largest variant that this host can convert is {largest.name}."
            if largest is not None
            else "No variant can be converted on this host."
        )
        raise RequestError(
            f"{plan.repo_id} cannot be converted on this host ({'; '.join(faults)}). {advice} "
            "Free space, or set HF_HOME and OUT to a larger disk."
        )


def largest_convertible(disk_free: int, memory_free: int | None) -> Variant | None:
    """The largest image variant whose download and conversion fit."""
    for variant in candidates():
        needs = conversion_needs(variant.dims, variant.parameters, variant.fp16_bytes)
        if not needs.lacks(disk_free, memory_free):
            return variant
    return None


def _disk_free(folder: Path) -> int:
    present = folder.absolute()
    while not present.exists():
        present = present.parent
    return shutil.disk_usage(present).free
