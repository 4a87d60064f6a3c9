"""The fake refuses what CUDA refuses, and more: what it lets pass is worth something."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.fake_cuda.record import FakeCuda

pytestmark = pytest.mark.fake_cuda

INVALID_VALUE, OUT_OF_MEMORY, NO_FUNCTION = 1, 2, 98
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_error_is_left(cuda: FakeCuda) -> Iterator[None]:
    """The next session in this process would find it: ONNX Runtime reads the last error."""
    yield
    cuda.library.cudaGetLastError()


def take(cuda: FakeCuda, size: int) -> int:
    pointer = ctypes.c_void_p()
    assert cuda.library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)) == 0
    return int(pointer.value or 0)


@pytest.fixture
def memory(cuda: FakeCuda) -> Iterator[int]:
    """A KiB of the device."""
    pointer = take(cuda, 1024)
    yield pointer
    assert cuda.library.cudaFree(ctypes.c_void_p(pointer)) == 0


def copy(cuda: FakeCuda, target: int, source: int, size: int, kind: int, stream: Any = None) -> int:
    arguments = (ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), kind)
    return int(cuda.library.cudaMemcpyAsync(*arguments, stream))


@pytest.fixture
def stream(cuda: FakeCuda) -> Iterator[ctypes.c_void_p]:
    handle = ctypes.c_void_p()
    assert cuda.library.cudaStreamCreate(ctypes.byref(handle)) == 0
    yield handle
    assert cuda.library.cudaStreamDestroy(handle) == 0


def test_what_is_copied_there_comes_back(cuda: FakeCuda, memory: int) -> None:
    sent, got = np.arange(256, dtype=np.int32), np.zeros(256, np.int32)

    assert copy(cuda, memory, sent.ctypes.data, 1024, TO_DEVICE) == 0
    assert copy(cuda, got.ctypes.data, memory, 1024, TO_HOST) == 0

    np.testing.assert_array_equal(got, sent)


def test_the_host_cannot_read_device_memory() -> None:
    program = (
        "import ctypes; cuda = ctypes.CDLL('libcudart.so.13'); p = ctypes.c_void_p();"
        "assert cuda.cudaMalloc(ctypes.byref(p), ctypes.c_size_t(64)) == 0;"
        "print('taken', flush=True); ctypes.string_at(p.value, 1)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout == "taken\n"
    assert done.returncode == -signal.SIGSEGV


def test_what_was_not_asked_for_is_not_there(cuda: FakeCuda) -> None:
    """Of a page and a half, two are taken."""
    host, pointer = np.zeros(4 * MIB, np.uint8), take(cuda, 3 * MIB)
    found = [copy(cuda, pointer, host.ctypes.data, 3 * MIB + more, TO_DEVICE) for more in (0, 1)]

    assert cuda.library.cudaFree(ctypes.c_void_p(pointer)) == 0
    assert found == [0, INVALID_VALUE]


@pytest.mark.parametrize("case", ["behind its end", "host for device", "device for host"])
def test_a_copy_that_leaves_its_place_is_refused(cuda: FakeCuda, memory: int, case: str) -> None:
    host = np.zeros(4096, np.uint8)
    asked = {
        "behind its end": (memory, host.ctypes.data, 1025, TO_DEVICE),
        "host for device": (host.ctypes.data, host.ctypes.data + 2048, 16, TO_DEVICE),
        "device for host": (memory, memory + 512, 16, TO_DEVICE),
    }[case]

    assert copy(cuda, *asked) == INVALID_VALUE
    assert cuda.library.cudaGetLastError() == INVALID_VALUE


def test_memory_is_counted_in_pages_and_given_back(cuda: FakeCuda) -> None:
    before = cuda.used
    large = take(cuda, 3 * MIB)
    assert cuda.used - before == 4 * MIB
    # Small ones share a page.
    small = [take(cuda, 1000) for _ in range(20)]
    assert cuda.used - before <= 6 * MIB

    for pointer in (*small, large):
        assert cuda.library.cudaFree(ctypes.c_void_p(pointer)) == 0

    assert cuda.used == before
    assert cuda.library.cudaFree(ctypes.c_void_p(large)) == INVALID_VALUE


def test_the_device_ends_somewhere(cuda: FakeCuda) -> None:
    pointer = ctypes.c_void_p()
    size = ctypes.c_size_t(cuda.library.fake_total() + 1)

    assert cuda.library.cudaMalloc(ctypes.byref(pointer), size) == OUT_OF_MEMORY


def test_a_recording_is_replayed(cuda: FakeCuda, stream: ctypes.c_void_p, memory: int) -> None:
    library, pinned = cuda.library, ctypes.c_void_p()
    assert library.cudaMallocHost(ctypes.byref(pinned), ctypes.c_size_t(64)) == 0
    address = int(pinned.value or 0)
    held = (ctypes.c_uint8 * 64).from_address(address)
    graph, ready = ctypes.c_void_p(), ctypes.c_void_p()

    assert library.cudaStreamBeginCapture(stream, 0) == 0
    assert copy(cuda, memory, address, 64, TO_DEVICE, stream) == 0
    assert library.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
    assert library.cudaGraphInstantiate(ctypes.byref(ready), graph, ctypes.c_ulonglong(0)) == 0
    for value in (7, 9):
        held[:] = [value] * 64
        assert library.cudaGraphLaunch(ready, stream) == 0
        got = np.zeros(64, np.uint8)
        assert copy(cuda, got.ctypes.data, memory, 64, TO_HOST) == 0
        assert set(got.tolist()) == {value}

    assert library.cudaGraphExecDestroy(ready) == library.cudaGraphDestroy(graph) == 0
    assert library.cudaFreeHost(pinned) == 0


@pytest.mark.parametrize("what", ["allocate", "wait", "pageable", "legacy stream"])
def test_a_recording_is_spoilt_by(
    cuda: FakeCuda, stream: ctypes.c_void_p, memory: int, what: str
) -> None:
    library, host, pointer = cuda.library, np.zeros(64, np.uint8), ctypes.c_void_p()
    acts = {
        "allocate": lambda: library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(64)),
        "wait": lambda: library.cudaStreamSynchronize(stream),
        "pageable": lambda: copy(cuda, memory, host.ctypes.data, 64, TO_DEVICE, stream),
        "legacy stream": lambda: copy(cuda, memory, memory + 64, 64, ON_DEVICE),
    }
    graph = ctypes.c_void_p()
    assert library.cudaStreamBeginCapture(stream, 0) == 0

    assert acts[what]() == CAPTURE_UNSUPPORTED

    assert library.cudaStreamEndCapture(stream, ctypes.byref(graph)) == CAPTURE_INVALIDATED
    assert acts[what]() == 0
    if pointer.value:
        assert library.cudaFree(pointer) == 0


def test_only_registered_kernels_are_launched(cuda: FakeCuda, stream: ctypes.c_void_p) -> None:
    class Size(ctypes.Structure):
        _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))

    one = Size(1, 1, 1)

    code = cuda.library.cudaLaunchKernel(
        ctypes.c_void_p(4096), one, one, None, ctypes.c_size_t(0), stream
    )

    assert code == NO_FUNCTION
