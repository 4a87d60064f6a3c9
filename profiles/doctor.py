"""``llava-edge doctor``: what this machine has, what that means, what to install.

Standard library only: packages are looked up by their metadata and none is imported.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llava_edge.profiles.boards.cuda_devices import VISIBLE
from llava_edge.profiles.boards.detect import (
    MachineFacts,
    detect_profile,
    known_board,
    read_machine,
)
from llava_edge.profiles.boards.engines import INSTALL, LIBRARIES, RTX_CAPABILITIES, rtx_target
from llava_edge.profiles.boards.hardware import load_profile
from llava_edge.profiles.command_line import CommandParser, wrapped
from llava_edge.profiles.errors import ProfileError
from llava_edge.profiles.sizes import format_bytes

SUMMARY = "Say what this machine has, what that means and what to install."

_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "transformers",
    "av",
)
_MINIMUM_RUNTIME = (1, 27)
_WAYS = ("tensorrt", "tensorrt-rtx", "ort on cuda", "ort on cpu")
"""Ways to run the vision tower, in the order in which loading tries them."""


@dataclass(frozen=True)
class Diagnosis:
    """Findings in the order in which they are read; ``ready`` says whether models can run now."""

    facts: MachineFacts
    architecture: str
    packages: dict[str, str]
    findings: tuple[str, ...]
    install: tuple[str, ...]
    ready: bool
    other_engines: dict[str, str]
    """Why each way to run the vision tower cannot be taken, by its name; the others can."""

    @property
    def engines(self) -> tuple[str, ...]:
        """Ways to run the vision tower that can be taken, best first."""
        return tuple(name for name in _WAYS if name not in self.other_engines)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        facts, cpus = self.facts, self.facts.cpus
        return {
            "architecture": self.architecture,
            "board": facts.board,
            "cpu": {
                "model": facts.cpu_model,
                "threads": facts.cpu_cores,
                "processors": None if cpus is None else cpus.present,
                "allowed": None if cpus is None else cpus.allowed,
                "quota": None if cpus is None else cpus.quota,
                "limited_by": None if cpus is None else cpus.limited_by,
                "int8_isa": facts.int8_isa,
            },
            "memory": {
                "total_bytes": facts.memory_bytes,
                "available_bytes": facts.available_bytes,
                "limited_by_cgroup": facts.limited_by_cgroup,
            },
            "driver": facts.gpus.driver,
            "gpus": [
                {
                    "device": f"cuda:{place}",
                    "pci_bus_id": gpu.pci_bus_id,
                    "name": gpu.name,
                    "total_bytes": gpu.total_bytes,
                    "free_bytes": gpu.free_bytes,
                    "compute_capability": gpu.compute_capability,
                }
                for place, gpu in enumerate(facts.gpus.gpus)
            ],
            "hidden_gpus": [
                {"pci_bus_id": gpu.pci_bus_id, "name": gpu.name} for gpu in facts.gpus.hidden
            ],
            "packages": self.packages,
            "findings": list(self.findings),
            "install": list(self.install),
            "engine": self.engines[0] if self.engines else None,
            "other_engines": self.other_engines,
            "ready": self.ready,
        }


def installed_version(package: str) -> str | None:
    """Version of an installed package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def diagnose(
    facts: MachineFacts,
    architecture: str,
    lookup: Callable[[str], str | None] = installed_version,
) -> Diagnosis:
    """Draw conclusions; pure, so that any machine can be described in a test."""
    packages = {name: found for name in _PACKAGES if (found := lookup(name)) is not None}
    findings: list[str] = []
    install: list[str] = []
    has_gpu = bool(facts.gpus.gpus) or facts.board is not None
    _memory_findings(facts, findings)
    _gpu_findings(facts, findings)
    ready = _runtime_findings(facts, architecture, has_gpu, packages, findings, install)
    others = _other_engines(facts, has_gpu, packages)
    findings.append(_tower_finding(others))
    findings += [f"{name} is not used: {reason}" for name, reason in others.items()]
    if "torch" not in packages:
        findings.append(
            "torch is not installed: artifacts run, but checkpoints cannot be converted"
        )
    return Diagnosis(facts, architecture, packages, tuple(findings), tuple(install), ready, others)


def main(argv: list[str] | None = None) -> int:
    """Print the diagnosis; with ``--json`` one JSON object as the last line of stdout."""
    parser = CommandParser("doctor", SUMMARY, "[options]")
    parser.add_argument("--detect", action="store_true", help="this machine (the only choice)")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object as the last line of stdout"
    )
    arguments = parser.parse_args(argv)
    diagnosis = diagnose(read_machine(), platform.machine())
    print(_report(diagnosis), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(diagnosis.to_json()))
    return 0


def _memory_findings(facts: MachineFacts, findings: list[str]) -> None:
    limited = " (limited by a control group)" if facts.limited_by_cgroup else ""
    findings.append(
        f"memory: {format_bytes(facts.available_bytes)} free of "
        f"{format_bytes(facts.memory_bytes)}{limited}"
    )
    meaning = {
        "amx": "int8 runs on AMX",
        "vnni": "int8 runs on VNNI",
        "neon-dot": "int8 runs on NEON dot products",
        "none": "no int8 dot products: int8 artifacts for CPUs run through block kernels instead",
    }
    findings.append(
        f"CPU: {facts.cpu_model}, {facts.cpu_cores} threads{_cpu_limit(facts)}; "
        f"{meaning[facts.int8_isa]}"
    )


def _cpu_limit(facts: MachineFacts) -> str:
    cpus = facts.cpus
    if cpus is None or cpus.limited_by is None:
        return ""
    if cpus.limited_by == "quota":
        granted = f"{cpus.quota:.3g} of {cpus.present}"
        return f" (a control group grants the time of {granted} processors)"
    return f" (affinity or a cpuset allows {cpus.allowed} of {cpus.present} processors)"


def _gpu_findings(facts: MachineFacts, findings: list[str]) -> None:
    if facts.board:
        findings.append(f"board: {facts.board}; GPU and CPU share the memory above")
    several = len(facts.gpus.gpus) > 1
    if facts.gpus.problem:
        findings.append(f"GPU: {facts.gpus.problem}")
    for place, gpu in enumerate(facts.gpus.gpus):
        sizes = "memory shared with the host"
        if gpu.total_bytes is not None and gpu.free_bytes is not None:
            sizes = f"{format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}"
        first = " (computes unless another is named)" if place == 0 and several else ""
        findings.append(
            f"GPU cuda:{place}: {gpu.name}, PCI id {gpu.pci_bus_id or 'unknown'}, {sizes}, compute "
            f"capability {gpu.compute_capability or 'unknown'}, driver "
            f"{facts.gpus.driver or 'unknown'}{first}"
        )
    findings += [
        f"GPU hidden from CUDA by {VISIBLE}: {gpu.name}, PCI id {gpu.pci_bus_id or 'unknown'}"
        for gpu in facts.gpus.hidden
    ]
    if not (facts.gpus.gpus or facts.gpus.hidden or facts.gpus.problem or facts.board):
        findings.append("GPU: the NVIDIA driver is not installed or shows none; models run on CPU")


def _runtime_findings(
    facts: MachineFacts,
    architecture: str,
    has_gpu: bool,
    packages: dict[str, str],
    findings: list[str],
    install: list[str],
) -> bool:
    both = {"onnxruntime", "onnxruntime-gpu"} <= set(packages)
    if both:
        findings.append(
            "onnxruntime and onnxruntime-gpu are both installed; they overwrite each other"
        )
        install.append("pip uninstall -y onnxruntime onnxruntime-gpu")
    wanted = "onnxruntime-gpu" if has_gpu else "onnxruntime"
    present = packages.get(wanted)
    if present is not None and not both:
        old = _version(present) < _MINIMUM_RUNTIME
        findings.append(f"{wanted} {present} is installed" + (", too old" if old else ""))
        if old:
            install.append(f"pip install --upgrade '{wanted}>=1.27'")
        return not old
    if has_gpu and "onnxruntime" in packages and not both:
        findings.append("onnxruntime without CUDA is installed; the GPU will not be used")
    if not has_gpu:
        install.append("pip install 'llava-edge[cpu]'")
    elif architecture == "x86_64":
        install.append("pip install 'llava-edge[gpu]'")
    else:
        install.append(_aarch64_wheels(facts))
    # A CPU build still runs the cpu target on a machine that has a GPU as well.
    return "onnxruntime" in packages and not both


def _aarch64_wheels(facts: MachineFacts) -> str:
    names = [facts.board or "", *(gpu.name for gpu in facts.gpus.gpus)]
    for name in names:
        board = known_board(name, facts.memory_bytes) if name else None
        if board is not None:
            return board.wheels
    return load_profile("jetson-orin-nano-8gb").wheels


def _other_engines(facts: MachineFacts, has_gpu: bool, packages: dict[str, str]) -> dict[str, str]:
    both = {"onnxruntime", "onnxruntime-gpu"} <= set(packages)
    capabilities = {gpu.compute_capability for gpu in facts.gpus.gpus if gpu.compute_capability}
    supported = {capability for capability in capabilities if rtx_target(capability)}
    others: dict[str, str] = {}
    for name in LIBRARIES:
        if not has_gpu:
            others[name] = "there is no NVIDIA GPU"
        elif name == "tensorrt-rtx" and capabilities and not supported:
            others[name] = (
                f"compute capability {', '.join(sorted(capabilities))} stands outside NVIDIA's "
                f"support matrix ({', '.join(RTX_CAPABILITIES)})"
            )
        elif name not in packages:
            others[name] = f"it is not installed. {INSTALL[name]}"
    if not has_gpu:
        others["ort on cuda"] = "there is no NVIDIA GPU"
    elif both or "onnxruntime-gpu" not in packages:
        others["ort on cuda"] = "onnxruntime-gpu is not installed alone"
    if both or not {"onnxruntime", "onnxruntime-gpu"} & set(packages):
        others["ort on cpu"] = "no build of ONNX Runtime is installed alone"
    return others


def _tower_finding(others: dict[str, str]) -> str:
    found = [name for name in _WAYS if name not in others]
    if not found:
        return "vision tower: nothing can run it"
    plain = next((name for name in found if name not in LIBRARIES), "nothing")
    if found[0] not in LIBRARIES:
        return f"vision tower: {found[0]}"
    return (
        f"vision tower: {found[0]}, with an engine that was built here (llava-edge build-engine) "
        f"or that came with an artifact you trust; {plain} without one"
    )


def _version(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split(".")[:2]:
        digits = "".join(c for c in part if c.isascii() and c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _report(diagnosis: Diagnosis) -> str:
    lines = [wrapped(finding) for finding in diagnosis.findings]
    try:
        profile = detect_profile(diagnosis.facts)
        lines.append(f"plans on this machine may use {format_bytes(profile.budget_bytes)}")
    except ProfileError as error:
        lines.append(wrapped(str(error)))
    if diagnosis.install:
        lines += ["", "to install:", *(wrapped(f"  {each}") for each in diagnosis.install)]
    state = "can" if diagnosis.ready else "cannot"
    lines += ["", f"This machine {state} run artifacts now."]
    return "\n".join(lines)
