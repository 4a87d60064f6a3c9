"""The CUDA runtime library through ctypes: streams, copies on the device, and what GPU it is.

Memory that a graph reads or writes is ONNX Runtime's (``Buffer``). Addresses of both are plain
integers, valid for every library of the process. The runtime comes with ONNX Runtime's CUDA
packages; nothing more is needed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from llava_edge.profiles.errors import EngineError, OutOfMemoryError
from llava_edge.runtime.backends.cuda_libraries import nvidia_folders
from llava_edge.runtime.util.arrays import Array

_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
_FOLDERS = ("cu13/lib", "cuda_runtime/lib")
"""Below the ``nvidia`` packages of pip."""

_SUCCESS, _OUT_OF_MEMORY = 0, 2
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_NON_BLOCKING = 1
_NAME_BYTES = 256
_PROPERTIES_BYTES = 16 << 10
"""More than cudaDeviceProp takes in any release (about 1 KiB); the name stands first in all."""


class CudaRuntime:
    """One loaded library, one GPU and one stream of our own.

    Args:
        library: the shared library; something of the same functions stands in for it in tests.
        index: of the GPU, as CUDA counts them.

    Raises:
        EngineError: there is no such GPU, or the driver does not go with the library.

    Attributes:
        index: as given.
        compute_capability: of the GPU, such as ``8.9``.
        device_name: of the GPU, such as ``NVIDIA GeForce RTX 4090``.
        stream: handle of a stream; copies and runs are enqueued there.
    """

    def __init__(self, library: Any, index: int = 0) -> None:
        self._library = library
        self.index = index
        self._process = os.getpid()
        count = ctypes.c_int()
        self._call("cudaGetDeviceCount", ctypes.byref(count))
        if count.value < 1:
            raise EngineError("the CUDA runtime shows no GPU. Run llava-edge doctor.")
        if index >= count.value:
            raise EngineError(
                f"cuda:{index} was asked; the CUDA runtime shows {count.value} GPUs, cuda:0 to "
                f"cuda:{count.value - 1}. llava-edge doctor lists them."
            )
        self.make_current()
        major, minor = (self._attribute(a) for a in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR))
        self.compute_capability = f"{major}.{minor}"
        self.device_name = self._name()
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        self.stream = int(stream.value or 0)

    @classmethod
    def open(cls, load: Callable[[str], Any] = ctypes.CDLL, index: int = 0) -> CudaRuntime:
        """Find the library and start.

        Args:
            load: stands in for ``ctypes.CDLL`` in tests.
            index: of the GPU.

        Raises:
            EngineError: it is not there, or does not work.
        """
        for name in _candidates():
            try:
                library = load(name)
            except OSError:
                continue
            return cls(library, index)
        raise EngineError(
            f"the CUDA runtime ({_NAMES[0]}) is not found. Install it with: "
            "pip install 'onnxruntime-gpu[cuda]'"
        )

    def make_current(self) -> None:
        """Have what this thread allocates, creates and runs from now on go to this GPU.

        CUDA keeps the choice for each thread, and other libraries change it.
        """
        self._call("cudaSetDevice", ctypes.c_int(self.index))

    def allocate(self, nbytes: int) -> int:
        """Memory of the driver's own; the address. Its content is whatever lay there.

        Raises:
            OutOfMemoryError: there is none.
        """
        address = ctypes.c_void_p()
        self.make_current()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return int(address.value or 0)

    def free(self, address: int) -> None:
        """Give back what ``allocate`` gave; waits for what the device has to do.

        Nothing is raised, since nobody is there to hear it when an object ends: a device that fails
        says so at the next call, and memory of the parent is no matter of a child of ``fork()``.
        """
        if os.getpid() == self._process:
            with suppress(EngineError):
                self._call("cudaFree", ctypes.c_void_p(address))

    def upload(self, address: int, array: Array) -> None:
        """Enqueue a copy of a contiguous host array to the device."""
        self._copy(address, array.ctypes.data, array.nbytes, _TO_DEVICE)

    def download(self, array: Array, address: int) -> None:
        """Enqueue a copy from the device into a contiguous host array."""
        self._copy(array.ctypes.data, address, array.nbytes, _TO_HOST)

    def move(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy from one place of the device to another."""
        self._copy(target, source, nbytes, _ON_DEVICE)

    def synchronize(self) -> None:
        """Wait until everything enqueued is done.

        Raises:
            EngineError: something of it failed.
        """
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def close(self) -> None:
        """Give the stream back; idempotent."""
        stream, self.stream = self.stream, 0
        if stream:
            self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def _copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(nbytes),
            ctypes.c_int(kind),
            ctypes.c_void_p(self.stream),
        )

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._call(
            "cudaDeviceGetAttribute",
            ctypes.byref(value),
            ctypes.c_int(attribute),
            ctypes.c_int(self.index),
        )
        return value.value

    def _name(self) -> str:
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        # CUDA 12 exports the current layout under a name of its own.
        symbol = "cudaGetDeviceProperties_v2"
        if not hasattr(self._library, symbol):
            symbol = "cudaGetDeviceProperties"
        self._call(symbol, properties, ctypes.c_int(self.index))
        name = properties.raw[:_NAME_BYTES].split(b"\0", 1)[0]
        return name.decode("utf-8", errors="replace")

    def _call(self, function: str, *arguments: Any) -> None:
        try:
            code = int(getattr(self._library, function)(*arguments))
        except AttributeError as error:
            raise EngineError(f"the CUDA runtime has no {function}; it is too old.") from error
        if code == _SUCCESS:
            return
        said = f"CUDA failed in {function} with code {code} ({self._meaning(code)})."
        if code == _OUT_OF_MEMORY:
            # It stays on record and would be taken for the failure of the next caller.
            self._library.cudaGetLastError()
            raise OutOfMemoryError(f"{said} Use fewer images, a lower grid, or a smaller context.")
        raise EngineError(said)

    def _meaning(self, code: int) -> str:
        describe = self._library.cudaGetErrorString
        describe.restype = ctypes.c_char_p
        text = describe(ctypes.c_int(code))
        return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else "unknown"


def _candidates() -> Iterator[str]:
    """Names for the loader, then files of pip's packages."""
    yield from _NAMES
    for folder in nvidia_folders(_FOLDERS):
        yield from (str(path) for path in sorted(folder.glob("libcudart.so*")))
