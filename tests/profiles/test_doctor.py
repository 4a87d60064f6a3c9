import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from llava_edge.profiles import doctor
from llava_edge.profiles.boards.cpu_limit import CpuLimit
from llava_edge.profiles.boards.detect import MachineFacts
from llava_edge.profiles.boards.hardware import Int8Isa
from llava_edge.profiles.boards.nvml import Gpu, GpuReport
from llava_edge.profiles.doctor import Diagnosis, diagnose, main

GIB = 1 << 30
L4 = Gpu("NVIDIA L4", 22 * GIB, 21 * GIB, "8.9")
THOR = Gpu("NVIDIA Thor", None, None, "11.0")


def machine(board: str | None = None, *gpus: Gpu, isa: Int8Isa = "vnni") -> MachineFacts:
    return MachineFacts(8 * GIB, 4 * GIB, False, "CPU", 4, isa, board, GpuReport(gpus, "580"))


def packages(**found: str) -> Callable[[str], str | None]:
    return {name.replace("_", "-"): version for name, version in found.items()}.get


def examine(facts: MachineFacts, architecture: str = "x86_64", **found: str) -> Diagnosis:
    return diagnose(facts, architecture, packages(**found))


def test_a_bare_cpu_machine_is_told_the_extra() -> None:
    found = examine(machine())
    assert found.install == ("pip install 'llava-edge[cpu]'",)
    assert not found.ready


def test_a_ready_machine_needs_nothing() -> None:
    found = examine(machine(), onnxruntime="1.32.0", torch="2.13.0")
    assert found.install == ()
    assert found.ready


def test_a_gpu_wants_the_gpu_build() -> None:
    found = examine(machine(None, L4), onnxruntime="1.32.0")
    assert found.install == ("pip install 'llava-edge[gpu]'",)
    assert any("the GPU will not be used" in line for line in found.findings)
    assert found.ready


def test_both_builds_at_once_are_a_fault() -> None:
    found = examine(machine(None, L4), onnxruntime="1.32.0", onnxruntime_gpu="1.31.1")
    assert any("overwrite each other" in line for line in found.findings)
    assert found.install[0].startswith("pip uninstall")
    assert found.install[1] == "pip install 'llava-edge[gpu]'"
    assert not found.ready


def test_an_old_build_is_to_be_upgraded() -> None:
    found = examine(machine(), onnxruntime="1.20.1")
    assert found.install == ("pip install --upgrade 'onnxruntime>=1.27'",)
    assert not found.ready


@pytest.mark.parametrize(
    ("facts", "origin"),
    [
        (machine("NVIDIA Jetson Orin Nano Developer Kit"), "pypi.jetson-ai-lab.io/jp6"),
        (machine("NVIDIA Jetson AGX Thor Developer Kit", THOR), "JetPack 7"),
        (machine(None, Gpu("NVIDIA GB10", None, None, "12.1")), "DGX Spark"),
        (machine("NVIDIA Jetson Future"), "pypi.jetson-ai-lab.io"),
    ],
    ids=["Orin Nano", "Thor", "Spark", "unknown Jetson"],
)
def test_aarch64_gpus_are_told_where_wheels_come_from(facts: MachineFacts, origin: str) -> None:
    (command,) = examine(facts, "aarch64").install
    assert origin in command
    assert "PyPI has no onnxruntime-gpu wheel for aarch64" in command


A100 = Gpu("NVIDIA A100", 80 * GIB, 79 * GIB, "8.0")
ALL = {"onnxruntime_gpu": "1.31.1", "tensorrt": "11.4.0", "tensorrt_rtx": "1.7.1"}


@pytest.mark.parametrize(
    ("facts", "found", "engine", "reasons"),
    [
        (machine(None, L4), ALL, "tensorrt", {}),
        (
            machine(None, L4),
            {"tensorrt_rtx": "1.7.1", "onnxruntime_gpu": "1.31.1"},
            "tensorrt-rtx",
            {"tensorrt": "Install TensorRT 11 from NVIDIA"},
        ),
        (
            machine(None, A100),
            {"tensorrt_rtx": "1.7.1", "onnxruntime_gpu": "1.31.1"},
            "ort on cuda",
            {"tensorrt": "not installed", "tensorrt-rtx": "capability 8.0 stands outside"},
        ),
        (
            machine(None, L4),
            {"onnxruntime": "1.32.0"},
            "ort on cpu",
            {
                "tensorrt": "not installed",
                "tensorrt-rtx": "pip install 'llava-edge[tensorrt]'",
                "ort on cuda": "onnxruntime-gpu is not installed",
            },
        ),
        (
            machine(),
            {"tensorrt_rtx": "1.7.1"},
            None,
            {
                "tensorrt": "no NVIDIA GPU",
                "tensorrt-rtx": "no NVIDIA GPU",
                "ort on cuda": "no NVIDIA GPU",
                "ort on cpu": "no build of ONNX Runtime",
            },
        ),
    ],
)
def test_it_says_what_runs_the_tower_and_why_the_others_do_not(
    facts: MachineFacts, found: dict[str, str], engine: str | None, reasons: dict[str, str]
) -> None:
    diagnosis = examine(facts, **found)
    document = diagnosis.to_json()
    assert document["engine"] == engine
    assert set(document["other_engines"]) == set(reasons)
    for name, reason in reasons.items():
        assert reason in document["other_engines"][name]
        assert any(line.startswith(f"{name} is not used: ") for line in diagnosis.findings)
    assert any(line.startswith("vision tower: ") for line in diagnosis.findings)


def test_missing_int8_instructions_are_said() -> None:
    assert any("no int8 dot products" in f for f in examine(machine(isa="none")).findings)


@pytest.mark.parametrize(
    ("cpus", "text"),
    [
        (CpuLimit(8, 8, 4), "CPU: CPU, 4 threads; "),
        (CpuLimit(64, 2, 2), "2 threads (affinity or a cpuset allows 2 of 64 processors)"),
        (
            CpuLimit(64, 64, 32, 1.5),
            "1 threads (a control group grants the time of 1.5 of 64 processors)",
        ),
    ],
)
def test_threads_are_those_that_a_model_is_loaded_with(cpus: CpuLimit, text: str) -> None:
    facts = replace(machine(), cpu_cores=cpus.threads, cpus=cpus)
    found = examine(facts)
    assert any(text in line for line in found.findings)
    cpu = found.to_json()["cpu"]
    assert cpu["threads"] == cpus.threads
    assert (cpu["processors"], cpu["allowed"]) == (cpus.present, cpus.allowed)
    assert (cpu["quota"], cpu["limited_by"]) == (cpus.quota, cpus.limited_by)


def test_the_command_ends_with_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    assert document["memory"]["total_bytes"] > 0
    assert "run artifacts now" in captured.err
    assert main([]) == 0
    assert "run artifacts now" in capsys.readouterr().out


@pytest.mark.parametrize("board", ["Jetson Orin Nano", "NVIDIA Thor", "DGX Spark", None])
def test_what_is_to_be_installed_fits_80_columns(
    board: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "read_machine", lambda: machine(board, THOR))
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(doctor, "installed_version", packages())
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "to install:" in lines
    assert max(map(len, lines)) <= 80
