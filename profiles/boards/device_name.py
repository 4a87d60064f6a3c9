"""Names of devices: ``auto``, ``cpu``, ``cuda`` and, where there are several GPUs, ``cuda:1``.

GPUs are counted as CUDA counts them in this process, see ``nvml.read_gpus``.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Literal

from llava_edge.profiles.errors import RequestError

_NAME = re.compile(r"(auto|cpu|cuda)|cuda:([0-9]{1,4})")
DEVICE_METAVAR = "auto|cpu|cuda|cuda:N"


@dataclass(frozen=True)
class AskedDevice:
    """A device by its name.

    Attributes:
        kind: what was named.
        index: of a GPU that was named by its number, else None.
    """

    kind: Literal["auto", "cpu", "cuda"]
    index: int | None = None

    @property
    def gpu(self) -> int:
        """The GPU that is meant where it is one: the first unless another was named."""
        return self.index or 0


def parse_device(name: object) -> AskedDevice:
    """A device from its name.

    Raises:
        RequestError: there is no device of that name.
    """
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise RequestError(
            f"device {name!r:.40} is unknown; devices are auto, cpu, cuda and cuda:N, where N is "
            "the number of a GPU (llava-edge doctor lists them)"
        )
    if found[2] is not None:
        return AskedDevice("cuda", int(found[2]))
    return AskedDevice(found[1])  # type: ignore[arg-type]  # the pattern has these names alone


def cuda_name(index: int) -> str:
    """The name of a GPU; ``cuda`` stands for the first."""
    return f"cuda:{index}" if index else "cuda"


def device_argument(text: str) -> str:
    """For ``argparse``: a device's name as it was given."""
    try:
        parse_device(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
