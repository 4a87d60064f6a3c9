"""The machine in the words of a certificate."""

from __future__ import annotations

import platform
from pathlib import Path

import onnxruntime
import pytest

from llava_edge.profiles.boards.nvml import Gpu, GpuReport
from llava_edge.runtime.verification import host as this_machine
from llava_edge.runtime.verification.host import describe_host


def proc(root: Path, cpuinfo: str) -> Path:
    (root / "proc").mkdir()
    (root / "proc" / "cpuinfo").write_text(cpuinfo)
    return root


def test_processor_and_instructions_are_the_kernels_words(tmp_path: Path) -> None:
    host = describe_host("cpu", proc(tmp_path, "model name : Some CPU\nflags : fpu avx512_vnni\n"))

    assert (host.cpu, host.int8_isa) == ("Some CPU", "vnni")
    assert (host.machine, host.provider) == (platform.machine(), "CPUExecutionProvider")
    assert host.onnxruntime == onnxruntime.__version__


def test_a_board_has_a_name(tmp_path: Path) -> None:
    root = proc(tmp_path, "CPU part : 0xd42\nFeatures : fp asimddp\n")
    (root / "proc" / "device-tree").mkdir()
    (root / "proc" / "device-tree" / "model").write_text("NVIDIA Jetson Orin Nano\0")

    host = describe_host("cpu", root)

    assert (host.machine, host.cpu, host.int8_isa) == (
        "NVIDIA Jetson Orin Nano",
        "0xd42",
        "neon-dot",
    )


@pytest.mark.parametrize("gpus", [(Gpu("NVIDIA L4", None, None, None),), ()])
def test_on_cuda_the_gpu_names_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: tuple[Gpu, ...]
) -> None:
    monkeypatch.setattr(this_machine, "read_gpus", lambda: GpuReport(gpus, None))

    host = describe_host("cuda", proc(tmp_path, ""))

    assert host.machine == ("NVIDIA L4" if gpus else platform.machine())
    assert (host.provider, host.cpu) == ("CUDAExecutionProvider", "unknown")


def test_a_system_without_proc_is_no_obstacle(tmp_path: Path) -> None:
    assert describe_host("cpu", tmp_path).int8_isa == "none"
