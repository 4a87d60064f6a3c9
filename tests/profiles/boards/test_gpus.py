"""The GPU that computes is the GPU that is asked: CUDA's order, the library's figures."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from llava_edge.profiles.boards import cuda_devices
from llava_edge.profiles.boards.cuda_devices import (
    CudaDevice,
    list_cuda_devices,
    plain_pci_id,
    read_devices,
)
from llava_edge.profiles.boards.detect import MachineFacts, detect_profile
from llava_edge.profiles.boards.nvml import Gpu, GpuReport, process_bytes, read_gpus
from llava_edge.profiles.doctor import diagnose
from llava_edge.profiles.errors import ProfileError, RequestError

GIB = 1 << 30
T4 = Gpu("Tesla T4", 15 * GIB, 14 * GIB, "7.5", "0000:17:00.0")
A100 = Gpu("NVIDIA A100-SXM4-80GB", 80 * GIB, 60 * GIB, "8.0", "0000:65:00.0")
L4 = Gpu("NVIDIA L4", 22 * GIB, 21 * GIB, "8.9", "0001:b1:00.0")
NAMES = {gpu: str(UUID(int=place + 1)) for place, gpu in enumerate((T4, A100, L4))}
INSTANCE = str(UUID(int=77))


class Nvml:
    """The driver's library on a machine of some GPUs, as ctypes calls it."""

    def __init__(self, *gpus: Gpu, instance_of: Gpu | None = None, nameless: bool = False) -> None:
        self.gpus, self.instance_of = gpus, instance_of
        if nameless:
            # A board whose library knows neither slots nor names.
            self.nvmlDeviceGetPciInfo_v3 = self.nvmlDeviceGetUUID = lambda *_: 3

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlShutdown(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.gpus)
        return 0

    def nvmlSystemGetDriverVersion(self, buffer: Any, size: int) -> int:  # noqa: N802
        buffer.value = b"580.1"
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:  # noqa: N802
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:  # noqa: N802
        assert name == f"MIG-{INSTANCE}".encode()
        handle._obj.value = 100
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, size: int) -> int:  # noqa: N802
        buffer.value = self._gpu(handle).name.encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        if handle.value == 100:
            memory._obj.total, memory._obj.free = 10 * GIB, 9 * GIB
            return 0
        gpu = self._gpu(handle)
        memory._obj.total, memory._obj.free = gpu.total_bytes or 0, gpu.free_bytes or 0
        return 0 if gpu.total_bytes else 3

    def nvmlDeviceGetCudaComputeCapability(  # noqa: N802
        self, handle: Any, major: Any, minor: Any
    ) -> int:
        text = self._gpu(handle).compute_capability or "0.0"
        major._obj.value, minor._obj.value = map(int, text.split("."))
        return 0

    def nvmlDeviceGetPciInfo_v3(self, handle: Any, pci: Any) -> int:  # noqa: N802
        pci._obj.id = f"0000{self._gpu(handle).pci_bus_id}".upper().encode()
        return 0

    def nvmlDeviceGetUUID(self, handle: Any, buffer: Any, size: int) -> int:  # noqa: N802
        instance = handle.value == 100
        buffer.value = f"MIG-{INSTANCE}".encode() if instance else self._name(handle).encode()
        return 0

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any, count: Any) -> int:  # noqa: N802
        count._obj.value = 7 if self._gpu(handle) is self.instance_of else 0
        return 0

    def nvmlDeviceGetMigDeviceHandleByIndex(  # noqa: N802
        self, handle: Any, index: int, instance: Any
    ) -> int:
        instance._obj.value = 100
        return 0 if index == 2 else 6

    def nvmlDeviceGetComputeRunningProcesses_v3(  # noqa: N802
        self, handle: Any, count: Any, listed: Any
    ) -> int:
        listed[0].pid, listed[0].used = 9, handle.value * GIB
        count._obj.value = 1
        return 0

    def _gpu(self, handle: Any) -> Gpu:
        return self.gpus[handle.value - 1]

    def _name(self, handle: Any) -> str:
        return f"GPU-{NAMES[self._gpu(handle)]}"


def shown(*gpus: Gpu) -> list[CudaDevice]:
    """What CUDA says of GPUs, in this order."""
    return [
        CudaDevice(gpu.pci_bus_id, NAMES[gpu], gpu.name, gpu.total_bytes, gpu.compute_capability)
        for gpu in gpus
    ]


def look(
    nvml: Nvml, cuda: Sequence[CudaDevice] | None = None, **environment: str
) -> tuple[Gpu, ...]:
    return read_gpus(nvml, lambda: cuda, environment).gpus


def test_gpus_stand_in_the_order_in_which_cuda_counts_them() -> None:
    nvml = Nvml(T4, A100, L4)
    report = read_gpus(nvml, lambda: shown(A100, L4, T4), {})
    assert report == GpuReport((A100, L4, T4), "580.1")
    # Fewer are shown, as CUDA_VISIBLE_DEVICES=1,0 would have it behind that order.
    report = read_gpus(nvml, lambda: shown(L4, A100), {"CUDA_VISIBLE_DEVICES": "1,0"})
    assert (report.gpus, report.hidden) == ((L4, A100), (T4,))
    assert read_gpus(nvml, lambda: [], {"CUDA_VISIBLE_DEVICES": ""}).gpus == ()


def test_they_are_matched_by_pci_id_where_names_are_not_told() -> None:
    nameless = [replace(device, uuid=None) for device in shown(L4, T4)]
    assert look(Nvml(T4, A100, L4), nameless) == (L4, T4)


def test_where_cuda_cannot_be_asked_its_rules_are_followed() -> None:
    nvml = Nvml(T4, A100, L4)
    report = read_gpus(nvml, lambda: None, {"CUDA_VISIBLE_DEVICES": f"2,{0}"})
    assert (report.gpus, report.hidden) == ((L4, T4), (A100,))
    assert "cannot be asked" in report.problem
    assert look(nvml, CUDA_VISIBLE_DEVICES=f"GPU-{NAMES[A100]}") == (A100,)
    assert look(nvml, CUDA_VISIBLE_DEVICES="-1") == ()
    assert look(nvml) == (T4, A100, L4)


def test_of_one_gpu_with_nothing_to_hide_cuda_is_not_asked() -> None:
    def started() -> None:
        raise AssertionError("CUDA was asked")

    assert read_gpus(Nvml(L4), started, {}).gpus == (L4,)
    assert read_gpus(Nvml(), started, {"CUDA_VISIBLE_DEVICES": "0"}).gpus == ()


def test_a_part_of_a_divided_gpu_has_its_own_memory() -> None:
    part = CudaDevice(A100.pci_bus_id, INSTANCE, "A100 MIG 1g.10gb", 10 * GIB, "8.0")
    (gpu,) = look(Nvml(A100, instance_of=A100), [part])
    assert gpu == replace(A100, name=part.name, total_bytes=10 * GIB, free_bytes=9 * GIB)


def test_a_board_on_no_bus_is_found_and_one_that_only_cuda_knows_counts() -> None:
    board = Gpu("NVIDIA Thor", None, None, "11.0")
    told = CudaDevice("0000:00:00.0", None, "Thor", 122 * GIB, "11.0")
    assert look(Nvml(board, nameless=True), [told], CUDA_VISIBLE_DEVICES="0") == (board,)
    other = CudaDevice("0009:01:00.0", str(UUID(int=5)), "Other", 8 * GIB, "9.0")
    assert look(Nvml(T4, A100), [other])[0].total_bytes == 8 * GIB


def test_memory_of_a_process_is_that_on_one_gpu_where_one_is_named() -> None:
    nvml = Nvml(T4, A100)
    assert process_bytes(9, nvml) == 3 * GIB
    assert process_bytes(9, nvml, A100.pci_bus_id) == 2 * GIB
    assert process_bytes(9, nvml, "0000:ff:00.0") is None


def test_a_number_that_is_not_there_is_an_error_that_lists_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    report = GpuReport((A100, T4), hidden=(L4,))
    assert report.number(1) is T4
    listed = (
        r"cuda:2 was asked; CUDA shows cuda:0 NVIDIA A100-SXM4-80GB \(0000:65:00.0\), cuda:1 Tesla "
        r"T4 .* NVIDIA L4 .* is hidden: CUDA_VISIBLE_DEVICES is '1,0'"
    )
    with pytest.raises(ProfileError, match=listed):
        report.number(2)
    with pytest.raises(RequestError, match="CUDA shows no GPU"):
        GpuReport(hidden=(L4,)).number(0)
    # Without the management library CUDA itself has to know.
    assert GpuReport().number(1) is None


def facts(*gpus: Gpu, hidden: Sequence[Gpu] = (), board: str | None = None) -> MachineFacts:
    report = GpuReport(gpus, "580.1", hidden=tuple(hidden))
    return MachineFacts(64 * GIB, 32 * GIB, False, "CPU", 8, "vnni", board, report)


def test_the_plan_counts_the_memory_of_the_gpu_that_is_named() -> None:
    two = facts(A100, T4)
    for device in ("auto", "cuda", "cuda:0"):
        assert detect_profile(two, device).budget_bytes == 60 * GIB
    second = detect_profile(two, "cuda:1")
    assert (second.title, second.budget_bytes, second.num_devices) == ("Tesla T4", 14 * GIB, 1)
    assert second.compute_capability == "7.5"
    # One of several alike: it alone counts, while a plan for all spreads over them.
    fuller = replace(A100, free_bytes=10 * GIB)
    assert detect_profile(facts(A100, fuller)).num_devices == 2
    assert detect_profile(facts(A100, fuller), "cuda:0").budget_bytes == 60 * GIB
    with pytest.raises(RequestError, match="cuda:2 was asked; CUDA shows cuda:0 NVIDIA A100"):
        detect_profile(two, "cuda:2")


def test_what_is_hidden_does_not_compute() -> None:
    nothing = facts(hidden=[L4])
    assert detect_profile(nothing).kind == "cpu"
    with pytest.raises(RequestError, match=r"NVIDIA L4 .* is hidden"):
        detect_profile(nothing, "cuda")


def test_a_board_with_one_memory_has_one_gpu() -> None:
    jetson = facts(board="NVIDIA Jetson Orin Nano Developer Kit")
    assert detect_profile(jetson, "cuda:0").kind == "unified"
    with pytest.raises(ProfileError, match="no NVIDIA GPU of that number"):
        detect_profile(jetson, "cuda:1")
    thor = facts(Gpu("NVIDIA Thor", None, None, "11.0"))
    assert detect_profile(thor, "cuda:0").kind == "unified"


@pytest.mark.parametrize("name", ["cuda:", "cuda:-1", "cuda:x", "cuda:1 ", "CUDA", "gpu", "", 1])
def test_other_names_are_no_devices(name: Any) -> None:
    with pytest.raises(RequestError, match="devices are auto, cpu, cuda and cuda:N"):
        detect_profile(facts(T4), name)


def test_the_doctor_lists_them_by_number_and_place() -> None:
    found = diagnose(facts(A100, T4, hidden=[L4]), "x86_64", lambda _: None)
    document = found.to_json()
    assert [(gpu["device"], gpu["pci_bus_id"]) for gpu in document["gpus"]] == [
        ("cuda:0", "0000:65:00.0"),
        ("cuda:1", "0000:17:00.0"),
    ]
    assert document["hidden_gpus"] == [{"pci_bus_id": "0001:b1:00.0", "name": "NVIDIA L4"}]
    lines = [line for line in found.findings if "GPU" in line]
    assert lines[0].startswith("GPU cuda:0: NVIDIA A100-SXM4-80GB, PCI id 0000:65:00.0, 60.0 GiB")
    assert lines[0].endswith("(computes unless another is named)")
    assert lines[2] == (
        "GPU hidden from CUDA by CUDA_VISIBLE_DEVICES: NVIDIA L4, PCI id 0001:b1:00.0"
    )


class Driver:
    """CUDA's driver with some devices, as ctypes calls it."""

    def __init__(self, *devices: CudaDevice, started: bool = True, code: int = 0) -> None:
        self.devices, self.started, self.code = devices, started, code

    def cuInit(self, flags: int) -> int:  # noqa: N802
        self.started = self.code == 0
        return self.code

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.devices)
        return 0 if self.started else 3

    def cuDeviceGet(self, handle: Any, index: Any) -> int:  # noqa: N802
        handle._obj.value = index.value + 40
        return 0

    def cuDeviceGetPCIBusId(self, room: Any, size: int, handle: Any) -> int:  # noqa: N802
        room.value = str(self._one(handle).pci_bus_id).upper().encode()
        return 0

    def cuDeviceGetName(self, room: Any, size: int, handle: Any) -> int:  # noqa: N802
        room.value = self._one(handle).name.encode()
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, handle: Any) -> int:  # noqa: N802
        size._obj.value = self._one(handle).total_bytes
        return 0

    def cuDeviceGetUuid_v2(self, room: Any, handle: Any) -> int:  # noqa: N802
        ctypes.memmove(room, UUID(self._one(handle).uuid).bytes, 16)
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: Any, handle: Any) -> int:  # noqa: N802
        numbers = str(self._one(handle).compute_capability).split(".")
        value._obj.value = int(numbers[attribute.value - 75])
        return 0

    def _one(self, handle: Any) -> CudaDevice:
        return self.devices[handle.value - 40]


def test_the_driver_that_runs_in_this_process_is_asked_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = tuple(shown(L4, T4))
    monkeypatch.setattr(cuda_devices, "_open", lambda: Driver(*expected))
    monkeypatch.setattr(subprocess, "run", None)
    assert list_cuda_devices() == expected


def test_a_process_that_did_not_start_it_lets_a_child_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(*shown(L4), started=False)
    monkeypatch.setattr(cuda_devices, "_open", lambda: driver)
    cuda_devices._ask_child.cache_clear()
    asked = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command[1:])
        devices = [vars(device) for device in shown(A100, T4)]
        return SimpleNamespace(stdout=json.dumps(devices).encode())

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        assert list_cuda_devices() == tuple(shown(A100, T4))
    # Once as long as what hides GPUs stays, and nothing of the current folder is imported.
    assert asked == [["-I", cuda_devices.__file__]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    list_cuda_devices()
    assert len(asked) == 2
    assert not driver.started, "children of fork() could not use it any more"
    cuda_devices._ask_child.cache_clear()


@pytest.mark.parametrize(
    ("code", "said"), [(0, [vars(device) for device in shown(L4)]), (100, []), (803, None)]
)
def test_a_child_tells_devices_that_none_is_shown_or_that_it_knows_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, said: Any
) -> None:
    driver = Driver(*shown(L4), started=False, code=code)
    monkeypatch.setattr(cuda_devices, "_open", lambda: driver)
    assert cuda_devices.main() == 0
    assert json.loads(capsys.readouterr().out) == said


def test_a_child_that_fails_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_devices, "_open", lambda: Driver(started=False))
    cuda_devices._ask_child.cache_clear()
    # For real: there is no driver on a machine without a GPU, and with one it answers.
    found = list_cuda_devices()
    assert found is None or all(isinstance(device, CudaDevice) for device in found)
    cuda_devices._ask_child.cache_clear()
    monkeypatch.setattr(sys, "executable", "/usr/bin/server")
    assert list_cuda_devices() is None
    cuda_devices._ask_child.cache_clear()


def test_a_driver_without_these_functions_says_nothing() -> None:
    assert read_devices(object()) is None
    assert read_devices(Driver(started=False)) is None


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("00000000:17:00.0", "0000:17:00.0"),
        ("0000:65:00.0", "0000:65:00.0"),
        ("0001:B1:00.0\n", "0001:b1:00.0"),
        ("", None),
        ("nowhere", None),
        ("x:y", None),
    ],
)
def test_pci_ids_have_one_form(text: str, plain: str | None) -> None:
    assert plain_pci_id(text) == plain
