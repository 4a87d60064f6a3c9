"""The CUDA runtime by ctypes, against calls that are written down."""

from __future__ import annotations

import os

import numpy as np
import pytest

from llava_edge.profiles.errors import EngineError, OutOfMemoryError
from llava_edge.runtime.backends import cuda_runtime
from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.vision.gpu_features import GpuFeatures
from tests.support.fake_cudart import STREAM, FakeCudart


def test_it_knows_the_first_gpu_and_takes_a_stream() -> None:
    cuda = CudaRuntime(FakeCudart((12, 0), "NVIDIA GeForce RTX 5090"))
    assert (cuda.compute_capability, cuda.device_name) == ("12.0", "NVIDIA GeForce RTX 5090")
    assert cuda.stream == STREAM


def test_copies_carry_their_bytes_and_kind() -> None:
    library = FakeCudart()
    cuda = CudaRuntime(library)
    source = np.arange(6, dtype=np.float16)
    device, moved, back = (np.zeros(6, np.float16) for _ in range(3))

    cuda.upload(device.ctypes.data, source)
    cuda.move(moved.ctypes.data + 4, device.ctypes.data, 6)
    cuda.download(back, moved.ctypes.data)
    cuda.synchronize()
    cuda.close()
    cuda.close()

    assert back.tolist() == [0, 0, 0, 1, 2, 0]
    assert library.calls[-5:] == [
        ("cudaMemcpyAsync", 1, 12),
        ("cudaMemcpyAsync", 3, 6),
        ("cudaMemcpyAsync", 2, 12),
        ("cudaStreamSynchronize",),
        ("cudaStreamDestroy",),
    ]


def test_rows_of_features_are_given_back_with_their_object() -> None:
    library = FakeCudart()
    cuda = CudaRuntime(library)
    rows = GpuFeatures((3, 4), cuda)
    assert [len(memory) for memory in library.held.values()] == [24]
    rows.write(1, np.arange(4, dtype=np.float32))
    assert rows.read()[1].tolist() == [0, 1, 2, 3]

    cuda.close()
    del rows

    assert library.held == {}
    assert library.calls[-1] == ("cudaFree",)


def test_what_fails_or_belongs_to_another_process_is_not_given_back_aloud(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = FakeCudart()
    cuda = CudaRuntime(library)
    rows, others = GpuFeatures((3, 4), cuda), GpuFeatures((3, 4), cuda)
    library.fails["cudaFree"] = 700
    # Warnings are errors here, and so is what a finalizer does not catch.
    del rows
    assert library.calls[-1] == ("cudaFree",)

    calls = len(library.calls)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    del others
    assert len(library.calls) == calls


def test_memory_that_is_not_there_is_not_held_against_the_next_call() -> None:
    library = FakeCudart()
    cuda = CudaRuntime(library)
    library.fails["cudaMalloc"] = 2

    with pytest.raises(OutOfMemoryError, match=r"cudaMalloc with code 2 .*Use fewer images"):
        GpuFeatures((3, 4), cuda)

    assert library.calls[-1] == ("cudaGetLastError",)


@pytest.mark.parametrize(("code", "kind"), [(2, OutOfMemoryError), (35, EngineError)])
def test_a_failing_call_is_named_with_what_cuda_says(code: int, kind: type[Exception]) -> None:
    library = FakeCudart()
    library.fails["cudaGetDeviceCount"] = code
    with pytest.raises(kind, match=rf"cudaGetDeviceCount with code {code} \(error number {code}\)"):
        CudaRuntime(library)


def test_the_first_library_that_loads_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str) -> FakeCudart:
        asked.append(name)
        if name != "libcudart.so.12":
            raise OSError(name)
        return FakeCudart()

    assert CudaRuntime.open(load).compute_capability == "8.9"
    assert asked == ["libcudart.so.13", "libcudart.so.12"]
    monkeypatch.setattr(cuda_runtime, "_NAMES", ("libcudart.so.13",))
    with pytest.raises(EngineError, match=r"libcudart\.so\.13\) is not found\. Install it with"):
        CudaRuntime.open(load)


def test_an_old_library_is_named_by_what_it_lacks() -> None:
    with pytest.raises(EngineError, match="has no cudaGetDeviceCount; it is too old"):
        CudaRuntime(object())
