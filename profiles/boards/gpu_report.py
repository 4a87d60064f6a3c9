"""GpuReport: the GPUs that compute for this process, and what they hold now."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llava_edge.profiles.boards.cuda_devices import VISIBLE
from llava_edge.profiles.errors import ProfileError


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver sees it, or a MIG instance of one.

    ``total_bytes`` and ``free_bytes`` are None on boards that share the host's memory.
    ``pci_bus_id`` is such as ``0000:17:00.0``; None where the driver does not tell.
    """

    name: str
    total_bytes: int | None
    free_bytes: int | None
    compute_capability: str | None
    pci_bus_id: str | None = None


@dataclass(frozen=True)
class GpuReport:
    """What the libraries said.

    Attributes:
        gpus: in the order in which CUDA counts them.
        driver: its version.
        problem: empty where all went well or there is no library.
        hidden: GPUs of the machine that CUDA does not show to this process.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    problem: str = ""
    hidden: tuple[Gpu, ...] = ()

    def number(self, index: int) -> Gpu | None:
        """The GPU that computes as ``cuda:index``; None where the driver shows none at all.

        Raises:
            ProfileError: it shows others, or hides all.
        """
        if index < len(self.gpus):
            return self.gpus[index]
        if not (self.gpus or self.hidden):
            return None
        listed = ", ".join(
            f"cuda:{place} {gpu.name} ({gpu.pci_bus_id or 'PCI id unknown'})"
            for place, gpu in enumerate(self.gpus)
        )
        hidden = ", ".join(f"{gpu.name} ({gpu.pci_bus_id})" for gpu in self.hidden)
        visible = os.environ.get(VISIBLE)
        hides = f" {hidden} is hidden: {VISIBLE} is {visible!r:.80}." if hidden else ""
        raise ProfileError(
            f"cuda:{index} was asked; CUDA shows {listed or 'no GPU'}.{hides} Name a GPU that is "
            f"shown, or change {VISIBLE}."
        )
