"""A GPU that is none: CUDA calls are written down and carried out in host memory.

``FakeCudart`` stands in for the shared library, ``FakeTensorRT`` for the package: its engine runs
the ONNX graph in ONNX Runtime over the addresses that it is given, so what comes out is real.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from llava_edge.runtime.backends import onnxruntime as session
from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.backends.onnxruntime import Buffer

UPLOAD, DOWNLOAD, MOVE = 1, 2, 3
STREAM = 77


class FakeCudart:
    """The functions of libcudart that are used; ``calls`` holds (name, kind, bytes) or (name,)."""

    def __init__(
        self, capability: tuple[int, int] = (8, 9), name: str = "RTX", gpus: int = 1
    ) -> None:
        self.capability, self.name, self.gpus = capability, name, gpus
        self.calls: list[tuple[Any, ...]] = []
        self.fails: dict[str, int] = {}
        self.cudaGetErrorString = _Describe()
        self.held: dict[int, Any] = {}
        self.current = 0

    def copied(self, kind: int) -> int:
        """Bytes of all copies of a kind."""
        return sum(call[2] for call in self.calls if call[:2] == ("cudaMemcpyAsync", kind))

    def _code(self, function: str) -> int:
        self.calls.append((function,))
        return self.fails.get(function, 0)

    def cudaGetDeviceCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.gpus
        return self._code("cudaGetDeviceCount")

    def cudaDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> int:  # noqa: N802
        assert device.value == self.current
        value._obj.value = self.capability[attribute.value - 75]
        return self._code("cudaDeviceGetAttribute")

    def cudaGetDeviceProperties(self, properties: Any, device: Any) -> int:  # noqa: N802
        assert device.value == self.current
        properties.value = self.name.encode()
        return self._code("cudaGetDeviceProperties")

    def cudaSetDevice(self, device: Any) -> int:  # noqa: N802
        self.current = device.value
        return self.fails.get("cudaSetDevice", 0)

    def cudaStreamCreateWithFlags(self, stream: Any, flags: Any) -> int:  # noqa: N802
        stream._obj.value = STREAM
        return self._code("cudaStreamCreateWithFlags")

    def cudaMalloc(self, address: Any, nbytes: Any) -> int:  # noqa: N802
        memory = ctypes.create_string_buffer(nbytes.value)
        address._obj.value = ctypes.addressof(memory)
        self.held[address._obj.value] = memory
        return self._code("cudaMalloc")

    def cudaFree(self, address: Any) -> int:  # noqa: N802
        del self.held[address.value]
        return self._code("cudaFree")

    def cudaGetLastError(self) -> int:  # noqa: N802
        return self._code("cudaGetLastError")

    def cudaMemcpyAsync(  # noqa: N802
        self, target: Any, source: Any, count: Any, kind: Any, stream: Any
    ) -> int:
        assert stream.value == STREAM
        ctypes.memmove(target.value, source.value, count.value)
        self.calls.append(("cudaMemcpyAsync", kind.value, count.value))
        return self.fails.get("cudaMemcpyAsync", 0)

    def cudaStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        return self._code("cudaStreamSynchronize")

    def cudaStreamDestroy(self, stream: Any) -> int:  # noqa: N802
        return self._code("cudaStreamDestroy")


class _Describe:
    restype: Any = None

    def __call__(self, code: Any) -> bytes:
        return f"error number {code.value}".encode()


class FakeTensorRT:
    """The part of TensorRT's API that running an engine takes.

    Attributes:
        refusal: what ``deserialize_cuda_engine`` logs before it returns None.
        spoil: changes what the engine computes.
        runs: tiles of each run.
        opened: engines that were deserialised.
    """

    def __init__(self, graph: Path, version: str, max_tiles: int = 5) -> None:
        self.__version__ = version
        self.graph, self.max_tiles = graph, max_tiles
        self.refusal = ""
        self.spoil: Callable[[Any], Any] = lambda features: features
        self.runs: list[int] = []
        self.opened = 0
        self.TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
        self.DataType = SimpleNamespace(HALF="half")

    class ILogger:
        """Severities; ``log`` is the caller's."""

        INTERNAL_ERROR, ERROR = 0, 1

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        def deserialize(plan: Any) -> Any:
            self.opened += 1
            if self.refusal:
                logger.log(1, self.refusal)
                return None
            return _Engine(self)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class _Engine:
    def __init__(self, library: FakeTensorRT) -> None:
        self.library = library
        self.session = onnxruntime.InferenceSession(library.graph)
        values = (*self.session.get_inputs(), *self.session.get_outputs())
        self.shapes = {value.name: (-1, *value.shape[1:]) for value in values}
        self.num_io_tensors = 2

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_dtype(self, name: str) -> str:
        return "half"

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == "pixel_values" else "output"

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        tile = self.shapes[name][1:]
        most = (self.library.max_tiles, *tile)
        return (1, *tile), most, most

    def create_execution_context(self) -> Any:
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return name == "pixel_values" and shape[1:] == self.engine.shapes[name][1:]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        library = self.engine.library
        library.runs.append(self.shape[0])
        count = int(np.prod(self.shape))
        held = (ctypes.c_uint16 * count).from_address(self.addresses["pixel_values"])
        pixels = np.frombuffer(held, np.float16).reshape(self.shape)
        features = self.engine.session.run(None, {"pixel_values": pixels})[0]
        out = np.ascontiguousarray(library.spoil(features), np.float16)
        ctypes.memmove(self.addresses["image_features"], out.ctypes.data, out.nbytes)
        return True


def install(
    monkeypatch: pytest.MonkeyPatch, cudart: FakeCudart, library: FakeTensorRT | None
) -> None:
    """Make this process believe in a GPU; its device memory and provider are the CPU's."""
    providers = {"cpu": "CPUExecutionProvider", "cuda": "CPUExecutionProvider"}
    monkeypatch.setattr(session, "_PROVIDERS", providers)
    keep_on_host(monkeypatch)
    monkeypatch.setattr(CudaRuntime, "open", lambda index=0: CudaRuntime(cudart, index))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)


def keep_on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of another device lie in host memory, apart from the arrays they were made of."""
    as_value = onnxruntime.OrtValue.ortvalue_from_numpy
    # A copy, as on a device: what the host writes into the array later must not be seen.
    monkeypatch.setattr(session, "_on_device", lambda array, _: as_value(array.copy()))
    # Memory that nobody wrote holds anything but zeros.
    monkeypatch.setattr(
        session, "_room_on_device", lambda shape, dtype, _: as_value(np.full(shape, 77, dtype))
    )
    by_address = Buffer.by_address.fget
    assert by_address is not None
    here = property(lambda buffer: ("cpu", 0, *by_address(buffer)[2:]))
    monkeypatch.setattr(Buffer, "by_address", here)
