"""Where an artifact runs now, in the words of a certificate."""

from __future__ import annotations

import platform
from pathlib import Path

from llava_edge.profiles.boards.detect import read_board, read_cpu_model, read_int8_isa
from llava_edge.profiles.boards.device_name import parse_device
from llava_edge.profiles.boards.engines import EngineName
from llava_edge.profiles.boards.nvml import read_gpus
from llava_edge.runtime.artifact.certificate import Host
from llava_edge.runtime.backends.onnxruntime import ENGINE_VERSION, provider_name
from llava_edge.runtime.util.arrays import DeviceKind


def describe_host(device: str, root: Path = Path("/"), engine: EngineName = "ort") -> Host:
    """This machine.

    Args:
        device: name of where the graphs run, such as ``cuda:1``. A GPU gives the machine its name,
            else the board does where it has one, else the architecture.
        root: stands in for the file system in tests.
        engine: what runs the vision tower; it is part of the provider's name where it is another.
    """
    try:
        cpuinfo = (root / "proc" / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    machine = read_board(root) or platform.machine()
    kind: DeviceKind = "cpu"
    if (asked := parse_device(device)).kind == "cuda":
        kind = "cuda"
        gpu = read_gpus().number(asked.gpu)
        machine = machine if gpu is None else gpu.name
    return Host(
        machine=machine,
        cpu=read_cpu_model(cpuinfo),
        int8_isa=read_int8_isa(cpuinfo),
        provider=provider_name(kind) if engine == "ort" else f"{engine}, {provider_name(kind)}",
        onnxruntime=ENGINE_VERSION,
    )
