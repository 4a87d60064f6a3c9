"""TensorRT and TensorRT-RTX, one code path: the only file of the runtime that reaches either.

Both packages have the same API. They are imported by name when an engine is asked for, never
before, so that everything else works where neither is installed.

Opening an engine runs code of the library over bytes of the file: callers hand in engines that were
built on this machine, or shipped ones that the user trusts (``engine_cache.py``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_edge.profiles.boards.engines import ENGINE_PACKAGES, INSTALL, LibraryName
from llava_edge.profiles.errors import DependencyError, EngineError, OutOfMemoryError

PIXELS, FEATURES = "pixel_values", "image_features"

Shape = tuple[int, ...]


@dataclass
class TensorRTLibrary:
    """An imported library.

    Attributes:
        name: ``tensorrt`` or ``tensorrt-rtx``.
        version: its own, such as ``1.7.1.116``.
        module: the package itself; its API is untyped.
        messages: errors that it logged, oldest first; ``reason`` takes them.
    """

    name: LibraryName
    version: str
    module: Any
    messages: list[str] = field(default_factory=list)
    logger: Any = None

    def reason(self, otherwise: str) -> str:
        """The first error logged since last asked, on one line; ``otherwise`` where none was."""
        found, self.messages[:] = list(self.messages), []
        return found[0] if found else otherwise

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def open_library(
    name: LibraryName, load: Callable[[str], Any] = importlib.import_module
) -> TensorRTLibrary:
    """Import a library.

    Args:
        name: which of the two.
        load: stands in for the import in tests.

    Raises:
        DependencyError: it is not installed; holds the command.
        EngineError: it is installed and its own libraries cannot be loaded, or it is too old.
    """
    package = ENGINE_PACKAGES[name]
    try:
        module = load(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise EngineError(f"{name} is installed, but {error}. {INSTALL[name]}") from error
        raise DependencyError(f"{name} is not installed. {INSTALL[name]}") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(
            f"{name} is installed and cannot be loaded: {one_line(str(error))}. {INSTALL[name]}"
        ) from error
    version = str(getattr(module, "__version__", "0"))
    if name == "tensorrt" and not version.split(".")[0].isdecimal():
        raise EngineError(f"{name} states the version {version!r:.40}, which is none.")
    if name == "tensorrt" and int(version.split(".")[0]) < 10:
        raise EngineError(f"{name} {version} is too old; 10 or later is needed. {INSTALL[name]}")
    library = TensorRTLibrary(name, version, module)
    library.logger = _logger(module, library.messages)
    return library


def _logger(module: Any, messages: list[str]) -> Any:
    """A logger that keeps errors; the library prints to stderr otherwise."""
    worst = (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR)

    class Keeping(module.ILogger):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in worst and len(messages) < 64:
                messages.append(one_line(message))

    return Keeping()


class TensorRTEngine:
    """A tower's engine, ready to run.

    Args:
        library: the one that built it.
        plan: the serialised engine.
        tile_shape: (3, T, T) of one tile.
        feature_shape: (patches, hidden) of one tile.
        kernels: kernels that an earlier run compiled (TensorRT-RTX only); empty for none.

    Raises:
        EngineError: the library refuses it, or it is not the engine of such a tower.
        OutOfMemoryError: the device has no room for it.

    Attributes:
        max_tiles: tiles that one run may take.
    """

    def __init__(
        self,
        library: TensorRTLibrary,
        plan: Any,
        tile_shape: Shape,
        feature_shape: Shape,
        kernels: bytes = b"",
    ) -> None:
        self.library = library
        self._tile_shape = tile_shape
        trt = library.module
        library.messages.clear()
        self._runtime = trt.Runtime(library.logger)
        self._engine = _deserialize(library, self._runtime, plan)
        self.max_tiles = self._check(tile_shape, feature_shape)
        self._kernels: Any = None
        self._context = self._new_context(kernels)
        if self._context is None:
            reason = library.reason("no execution context")
            kind = OutOfMemoryError if "memory" in reason.lower() else EngineError
            raise kind(f"{library} cannot prepare the engine: {reason}.")

    def run(self, pixels: int, num_tiles: int, features: int, stream: int) -> None:
        """Enqueue one run.

        Args:
            pixels: device address of float16 (num_tiles, 3, T, T).
            num_tiles: 1 to ``max_tiles``.
            features: device address of float16 (num_tiles, patches, hidden).
            stream: CUDA stream; the caller waits for it.

        Raises:
            EngineError: the library refuses.
        """
        if not 1 <= num_tiles <= self.max_tiles:
            raise EngineError(
                f"{num_tiles} tiles were asked; the engine takes 1 to {self.max_tiles} at once."
            )
        context = self._context
        done = (
            context.set_input_shape(PIXELS, (num_tiles, *self._tile_shape))
            and context.set_tensor_address(PIXELS, pixels)
            and context.set_tensor_address(FEATURES, features)
            and context.execute_async_v3(stream)
        )
        if not done:
            reason = self.library.reason("no reason given")
            raise EngineError(f"{self.library} failed while running the vision engine: {reason}.")

    def kernels(self) -> bytes:
        """Kernels compiled so far, to be given to the next process; empty where there are none."""
        return b"" if self._kernels is None else bytes(self._kernels.serialize())

    def _new_context(self, kernels: bytes) -> Any:
        # TensorRT-RTX compiles kernels at the first run; full TensorRT did so when it built.
        if not hasattr(self._engine, "create_runtime_config"):
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        if hasattr(config, "create_runtime_cache"):
            self._kernels = config.create_runtime_cache()
            # Kernels of another driver or version are refused, and then compiled anew.
            if kernels and not self._kernels.deserialize(kernels):
                self.library.messages.clear()
            config.set_runtime_cache(self._kernels)
        return self._engine.create_execution_context(config)

    def _check(self, tile_shape: Shape, feature_shape: Shape) -> int:
        engine, trt = self._engine, self.library.module
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if names != {PIXELS, FEATURES}:
            raise EngineError(
                f"the engine has the tensors {', '.join(sorted(names))[:200]}; a vision engine has "
                f"{PIXELS} and {FEATURES}."
            )
        for name, mode, shape in (
            (PIXELS, trt.TensorIOMode.INPUT, tile_shape),
            (FEATURES, trt.TensorIOMode.OUTPUT, feature_shape),
        ):
            found = tuple(engine.get_tensor_shape(name))
            half = engine.get_tensor_dtype(name) == trt.DataType.HALF
            if engine.get_tensor_mode(name) != mode or found[1:] != shape or not half:
                raise EngineError(
                    f"the engine's {name} is {engine.get_tensor_dtype(name)} {list(found)}; this "
                    f"model's is float16 [tiles, {', '.join(map(str, shape))}]."
                )
        profile: Sequence[Any] = engine.get_tensor_profile_shape(PIXELS, 0)
        return int(next(iter(profile[2])))


def _deserialize(library: TensorRTLibrary, runtime: Any, plan: Any) -> Any:
    if fault := _header_fault(library, runtime, plan):
        raise EngineError(f"{library} cannot use the engine: {fault}.")
    try:
        engine = runtime.deserialize_cuda_engine(plan)
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"{library} cannot read the engine: {one_line(str(error))}.") from error
    if engine is None:
        reason = library.reason("no reason given")
        kind = OutOfMemoryError if "memory" in reason.lower() else EngineError
        raise kind(f"{library} cannot read the engine: {reason}.")
    return engine


_DIAGNOSTICS = {
    "VERSION_MISMATCH": "another version of the library built it",
    "UNSUPPORTED_CC": "it was built for another compute capability",
    "OLD_CUDA_DRIVER": "the CUDA driver is older than it needs",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is older than it needs",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "MALFORMED_ENGINE": "it is damaged",
    "CUDA_ERROR": "CUDA reports an error",
}


def _header_fault(library: TensorRTLibrary, runtime: Any, plan: Any) -> str:
    """What the library says of an engine's header; empty where it is content or cannot be asked."""
    trt = library.module
    if not hasattr(runtime, "get_engine_validity"):
        return ""
    validity, bits = runtime.get_engine_validity(plan)
    if validity != trt.EngineValidity.INVALID:
        return ""
    known = trt.EngineInvalidityDiagnostics.__members__
    found = [
        text for name, text in _DIAGNOSTICS.items() if name in known and bits & int(known[name])
    ]
    return ", ".join(found) or library.reason("no reason given")


def one_line(text: str) -> str:
    """A library's message as a part of a sentence: on one line, no full stop, at most 300 long."""
    return " ".join(text.split()).rstrip(".")[:300]
