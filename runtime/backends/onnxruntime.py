"""Sessions and buffers: the one file that touches ONNX Runtime's untyped API.

A buffer is bound once and changed in place; on the CPU it shares its memory with a numpy array.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Before ONNX Runtime: it sets what that looks at when it is imported.
from llava_edge.runtime.backends.process import keep_in_children, preload_cuda, take_exact_memory

# isort: split
import onnxruntime as ort

from llava_edge.profiles.boards.cpu_limit import read_cpu_limit
from llava_edge.profiles.errors import EngineError, LlavaEdgeError, OutOfMemoryError
from llava_edge.runtime.artifact.onnx_proto import parse_onnx_header
from llava_edge.runtime.artifact.opened_files import OpenedFiles
from llava_edge.runtime.backends.cpu_fallback import nodes_that_compute, refusal
from llava_edge.runtime.backends.cuda_options import CAPTURE, NO_CAPTURE, CudaOptions
from llava_edge.runtime.backends.external_data import relocate
from llava_edge.runtime.util.allocation import allocate
from llava_edge.runtime.util.arrays import Array, DeviceKind

Place = tuple[DeviceKind, int]
"""A device and, on ``cuda``, which GPU."""

_PROVIDERS: dict[DeviceKind, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_RECORD = "session.record_ep_graph_assignment_info"
_LARGEST_GRAPH = (1 << 31) - 1
"""Bytes of a graph file: what a protobuf message can hold."""
_GRAPH_ID = "gpu_graph_id"
_SHRINK = "memory.enable_memory_arena_shrinkage"
_FOLDER = "session.model_external_initializers_file_folder_path"
_OUT_OF_MEMORY = (
    *("failed to allocate memory", "out of memory", "bad allocation", "bad_alloc"),
    # What an arena says of its limit, and cuBLAS of its workspace (CUBLAS_STATUS_ALLOC_FAILED).
    *("available memory of", "cublas failure 3"),
)


ENGINE_VERSION: str = ort.__version__
"""Of ONNX Runtime."""


def provider_name(device: DeviceKind) -> str:
    """ONNX Runtime's name of the provider that runs graphs on a device."""
    return _PROVIDERS[device]


def available_providers() -> tuple[str, ...]:
    """Providers that the installed ONNX Runtime was built with, in its own names and order."""
    return tuple(ort.get_available_providers())


def available_devices() -> tuple[DeviceKind, ...]:
    """Kinds of device that the installed ONNX Runtime can use, best first."""
    providers = available_providers()
    kinds: tuple[DeviceKind, ...] = ("cuda", "cpu")
    return tuple(kind for kind in kinds if _PROVIDERS[kind] in providers)


class Buffer:
    """A tensor at a fixed address, bound as input, output or both.

    Attributes:
        device: where it lies.
        gpu: which one, where it lies on one.
        array: the same memory as numpy on the CPU; None on another device.
        whole: the buffer whose first rows this is, where it is a part of one.
    """

    whole: Buffer | None = None

    def __init__(
        self, shape: Sequence[int], dtype: type[np.generic], device: DeviceKind, gpu: int = 0
    ) -> None:
        self.shape = tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.device, self.gpu = device, gpu
        self.array: Array | None = None
        what = f"a buffer {self.dtype.name}{list(self.shape)}"
        zeros = allocate(self.shape, self.dtype, what)
        # Written once here: memory that is only promised is taken back by killing.
        zeros.fill(0)
        with _mapped_errors(f"allocating {what} on {device}"):
            if device == "cpu":
                self.array = zeros
                self.value = ort.OrtValue.ortvalue_from_numpy(zeros)
            else:
                self.value = Buffer.holding(zeros, device, gpu).value

    @classmethod
    def holding(cls, array: Array, device: DeviceKind, gpu: int = 0) -> Buffer:
        """A buffer with the content of an array: copied to another device, shared on the CPU."""
        contiguous = np.asarray(array, order="C")
        if device == "cpu":
            return cls.over(contiguous)
        return cls._outside(contiguous.shape, contiguous.dtype, (device, gpu), contiguous)

    @classmethod
    def unwritten(
        cls, shape: Sequence[int], dtype: type[np.generic], device: DeviceKind, gpu: int = 0
    ) -> Buffer:
        """A buffer that a run writes whole before anybody reads it; zeros on the CPU.

        Zeros for another device would be made on the host and copied.
        """
        if device == "cpu":
            return cls(shape, dtype, device)
        return cls._outside(shape, np.dtype(dtype), (device, gpu), None)

    @classmethod
    def _outside(
        cls, shape: Sequence[int], dtype: np.dtype[Any], place: Place, array: Array | None
    ) -> Buffer:
        buffer = cls.__new__(cls)
        buffer.shape, buffer.dtype, (buffer.device, buffer.gpu) = tuple(shape), dtype, place
        buffer.array = None
        device = place[0]
        with _mapped_errors(f"allocating a buffer {dtype.name}{list(shape)} on {device}"):
            preload_cuda()
            take_exact_memory()
            if array is None:
                buffer.value = _room_on_device(buffer.shape, dtype, place)
            else:
                buffer.value = _on_device(array, place)
        return buffer

    @classmethod
    def over(cls, array: Array) -> Buffer:
        """A CPU buffer that shares memory with a contiguous array."""
        buffer = cls.__new__(cls)
        buffer.shape, buffer.dtype, buffer.array = array.shape, array.dtype, array
        buffer.device, buffer.gpu = "cpu", 0
        buffer.value = ort.OrtValue.ortvalue_from_numpy(array)
        return buffer

    def first(self, count: int) -> Buffer:
        """The first ``count`` rows of a buffer ``[1, rows, width]``: the same memory.

        ONNX Runtime has no tensor that is a part of another, so it is bound by its address. Bound
        as an output, it has a value of its own: only these rows are copied where it is read.
        """
        part = Buffer.__new__(Buffer)
        part.shape, part.dtype, part.device = (1, count, self.shape[-1]), self.dtype, self.device
        part.gpu = self.gpu
        part.array = None if self.array is None else self.array[:, :count]
        part.value, part.whole = None, self
        return part

    def write(self, array: Array) -> None:
        """Replace the whole content."""
        if self.array is not None:
            self.array[...] = array
        elif self.whole is not None:
            rows = allocate(self.whole.shape, self.dtype, "rows for the device")
            rows[:, self.shape[1] :] = 0
            rows[:, : self.shape[1]] = array
            self.whole.write(rows)
        else:
            contiguous = np.ascontiguousarray(array, self.dtype).reshape(self.shape)
            self.value.update_inplace(contiguous)

    def read(self) -> Array:
        """The content as numpy: the memory itself on the CPU, a copy elsewhere."""
        if self.array is not None:
            return self.array
        if self.whole is not None and self.value is None:
            return self.whole.read()[:, : self.shape[1]]
        copied: Array = self.value.numpy()
        return copied

    @property
    def address(self) -> int:
        """Where the memory begins, on its device; valid for every library of the process."""
        holder = self if self.whole is None else self.whole
        return int(holder.value.data_ptr())

    @property
    def by_address(self) -> tuple[str, int, Any, tuple[int, ...], int]:
        """What ONNX Runtime asks for to bind memory that is no tensor of its own."""
        return self.device, self.gpu, self.dtype.type, self.shape, self.address

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def _on_device(array: Array, place: Place) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(array, *place)


def _room_on_device(shape: tuple[int, ...], dtype: np.dtype[Any], place: Place) -> Any:
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, *place)


@dataclass(frozen=True)
class SessionOptions:
    """How a session is opened.

    Attributes:
        device: where it runs.
        gpu: which one on ``cuda``, as CUDA counts them.
        threads: 0 for as many as this process may use (``CpuLimit.threads``). Left to itself, ONNX
            Runtime takes every physical core of the machine and binds threads to them, whatever
            affinity and quotas leave.
        log_level: ONNX Runtime's; 4 is fatal errors only. Others come as exceptions, and would be
            written on stderr as well.
        wide_sums: int8 products are summed in 32 bits, see ``needs_wide_sums``.
        optimise: let ONNX Runtime change the graph; off where every node is to be seen.
        strict: a node that computes and is left to the CPU, where another device was asked for,
            is an error; otherwise see ``Session.off_device``.
        cuda: what is asked of a GPU; nothing on the CPU.
        prompt_tokens: positions computed at once in prefill.
    """

    device: DeviceKind = "cpu"
    gpu: int = 0
    threads: int = 0
    log_level: int = 4
    wide_sums: bool = False
    optimise: bool = True
    strict: bool = False
    cuda: CudaOptions = field(default_factory=CudaOptions)
    prompt_tokens: int = 512


class Session:
    """One graph, loaded.

    Attributes:
        threads: that compute on the CPU at once.
        run_seconds: adds up the time spent inside ONNX Runtime.
        off_device: nodes that compute and that ONNX Runtime put on the CPU although another device
            was asked for, as ``op_type name``. Nodes of sizes alone belong there and are left out.
    """

    def __init__(self, path: Path, options: SessionOptions) -> None:
        with OpenedFiles(path.parent) as beside:
            self._open_listed(beside, path.name, options)

    @classmethod
    def from_files(cls, files: OpenedFiles, name: str, options: SessionOptions) -> Session:
        """A graph of an artifact, over weights by the descriptors that were hashed.

        Args:
            files: of the artifact; they may be closed once the session is open.
            name: of the graph among them.
            options: how it is opened.
        """
        session = cls.__new__(cls)
        session._open_listed(files, name, options)
        return session

    @classmethod
    def from_bytes(cls, model: bytes, folder: Path, options: SessionOptions) -> Session:
        """A graph in memory whose weights lie in files of ``folder``."""
        session = cls.__new__(cls)
        with OpenedFiles(folder) as beside:
            label = f"a graph over the weights of {folder.name}"
            session._open(model, label, options, beside, "")
        session.off_device = ()
        return session

    def _open_listed(self, files: OpenedFiles, name: str, options: SessionOptions) -> None:
        folder, _, plain = name.rpartition("/")
        model = files[name].content(_LARGEST_GRAPH)
        self._open(model, plain, options, files, f"{folder}/" if folder else "")
        self.off_device = self._off_device(model, plain) if options.device != "cpu" else ()
        if self.off_device and options.strict:
            raise EngineError(refusal(str(files.root / name), options.device, self.off_device))

    def _open(
        self,
        model: bytes,
        label: str,
        options: SessionOptions,
        files: OpenedFiles,
        folder: str,
    ) -> None:
        """Open a model whose weights are files of a folder (empty, or ending with a slash)."""
        self.device, self.gpu = options.device, options.gpu
        self.run_seconds = 0.0
        self._is_recorded = False
        settings = ort.SessionOptions()
        model = self._place_weights(model, settings, files, folder)
        limit = read_cpu_limit()
        self.threads = options.threads or limit.threads
        settings.intra_op_num_threads = self.threads
        if limit.quota is not None and self.threads > limit.quota:
            # More threads were asked for than the quota grants. Where they wait busily, they spend
            # it, and then all of them stand still.
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.log_severity_level = options.log_level
        if options.wide_sums:
            settings.add_session_config_entry("session.x64quantprecision", "1")
        if not options.optimise:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Patterns that grow with the chunk length are not worth planning for: lengths vary.
        settings.enable_mem_pattern = False
        provider = _PROVIDERS[options.device]
        asked: dict[str, str] = {}
        self.captures = options.device == "cuda" and options.cuda.graph
        if options.device == "cuda":
            preload_cuda()
            asked = options.cuda.provider_options(captures=self.captures, gpu=options.gpu)
            entries = {_RECORD: "1", **options.cuda.session_entries(options.prompt_tokens)}
            for key, value in entries.items():
                settings.add_session_config_entry(key, value)
        with _mapped_errors(f"opening {label}"):
            # Else ONNX Runtime's Python layer takes whatever a GPU fails with, memory that ran out
            # too, says so on stdout, and opens the graph on the CPU.
            self._session = ort.InferenceSession(
                model, settings, providers=[(provider, asked)], enable_fallback=0
            )
        keep_in_children(self)
        # Asked at every run that wants logits of several positions.
        self._inputs = frozenset(given.name for given in self._session.get_inputs())
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        # ONNX Runtime goes on with the CPU where a provider's libraries do not load.
        if provider not in self.providers:
            raise EngineError(
                f"ONNX Runtime {ort.__version__} could not start {provider}, although this build "
                "has it: a CUDA library is missing or the driver is too old. Install the "
                "libraries with pip install 'onnxruntime-gpu[cuda]' nvidia-cublas, or run "
                "llava-edge doctor."
            )
        # The arena keeps what it once took. A prompt's activations are given back after the run;
        # measured on a full-size tower, the arena's peak is 0.4 GiB below plain allocation's.
        self._shrinking = ort.RunOptions()
        if options.device == "cpu":
            self._shrinking.add_run_config_entry(_SHRINK, "cpu:0")
        # Everything of other shapes than the one recorded has to be kept out of the recording.
        self._replaying = ort.RunOptions()
        if self.captures:
            self._shrinking.add_run_config_entry(_GRAPH_ID, NO_CAPTURE)
            self._replaying.add_run_config_entry(_GRAPH_ID, CAPTURE)

    def _place_weights(self, model: bytes, settings: Any, files: OpenedFiles, folder: str) -> bytes:
        """Have ONNX Runtime read weights by their descriptors; the model to give to it.

        It opens the files that a model names below one folder, follows links and refuses what lies
        outside. Below ``/`` nothing does, and a descriptor has a path there: what is mapped is the
        file that was hashed, piece by piece and only until it is packed. Handed over as memory
        (``add_external_initializers_from_files_in_memory``) the same weights take twice the peak;
        that is the way where the system has no such paths.
        """
        in_memory: dict[str, memoryview] = {}

        def place(location: str) -> str:
            opened = files[folder + location]
            path = opened.path_of_descriptor()
            if path is not None:
                return str(path.relative_to("/"))
            if location not in in_memory:
                in_memory[location] = memoryview(self._mappings.enter_context(opened.mapped()))
            return location

        self._mappings = ExitStack()
        placed = relocate(model, place)
        if in_memory:
            sizes = list(map(len, in_memory.values()))
            settings.add_external_initializers_from_files_in_memory(
                list(in_memory), list(in_memory.values()), sizes
            )
        elif placed != model:
            settings.add_session_config_entry(_FOLDER, "/")
        return placed

    def close(self) -> None:
        """End the session: its threads, mappings and memory; idempotent. Nothing may run."""
        self._session = None
        self._mappings.close()

    def _off_device(self, model: bytes, label: str) -> tuple[str, ...]:
        """What ONNX Runtime itself says of where it put the nodes of this session."""
        if not hasattr(self._session, "get_provider_graph_assignment_info"):
            return (f"(ONNX Runtime {ort.__version__} does not say which)",)
        on_cpu = [
            (node.op_type, node.name)
            for part in self._session.get_provider_graph_assignment_info()
            if part.ep_name == "CPUExecutionProvider" and part.ep_name != self.providers[0]
            for node in part.get_nodes()
        ]
        header = parse_onnx_header(model, label) if on_cpu else None
        return () if header is None else nodes_that_compute(header, on_cpu)

    @property
    def place(self) -> Place:
        """Where buffers of its own device lie."""
        return self.device, self.gpu

    def has_input(self, name: str) -> bool:
        """Whether the graph is given a value of that name."""
        return name in self._inputs

    def binding(self) -> Binding:
        """A fresh, empty set of bound inputs and outputs."""
        return Binding(self, self._session.io_binding())

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once with everything copied, for anyone who looks at a graph instead of using it.

        Args:
            feeds: all inputs, by name.
            outputs: names of the values to return, in that order.
        """
        with _mapped_errors("running the graph"):
            found: list[Array] = self._session.run(list(outputs), dict(feeds))
        return found

    def run_bound(self, binding: Any, *, shrink: bool, replay: bool = False) -> None:
        """Run with everything bound; used by Binding alone."""
        start = time.perf_counter()
        options = self._shrinking if shrink or self.captures else None
        try:
            self._session.run_with_iobinding(binding, self._replaying if replay else options)
            self._is_recorded |= replay and self.captures
        except Exception as error:
            mapped = _map_error(error, "running the graph")
            if isinstance(mapped, OutOfMemoryError):
                self._give_back(binding)
            raise mapped from error
        finally:
            self.run_seconds += time.perf_counter() - start

    def _give_back(self, binding: Any) -> None:
        """What a run took on a GPU until it failed, which smaller ones might have no use for.

        ONNX Runtime does that at the end of a run, one that fails as well, if it was asked to at
        its beginning. A recording keeps the addresses that it saw.
        """
        if self.device == "cpu" or self._is_recorded:
            return
        options = ort.RunOptions()
        options.add_run_config_entry(_SHRINK, f"gpu:{self.gpu}")
        if self.captures:
            options.add_run_config_entry(_GRAPH_ID, NO_CAPTURE)
        with suppress(Exception):
            self._session.run_with_iobinding(binding, options)


class Binding:
    """Inputs and outputs of one kind of call, bound once and run many times."""

    def __init__(self, session: Session, binding: Any) -> None:
        self._session = session
        self._binding = binding
        self._bound: dict[str, Buffer] = {}
        # In the order in which ONNX Runtime lists them: by their first binding.
        self._outputs: list[str] = []

    def input(self, name: str, buffer: Buffer) -> None:
        """Bind an input; binding a name again replaces it."""
        with _mapped_errors(f"binding the input {name}"):
            if buffer.whole is None:
                self._binding.bind_ortvalue_input(name, buffer.value)
            else:
                self._binding.bind_input(name, *buffer.by_address)
        self._bound[f"in {name}"] = buffer

    def output(self, name: str, buffer: Buffer) -> None:
        """Bind an output to a buffer of exactly its shape."""
        with _mapped_errors(f"binding the output {name}"):
            if buffer.whole is None:
                self._binding.bind_ortvalue_output(name, buffer.value)
            else:
                self._binding.bind_output(name, *buffer.by_address)
            if name not in self._outputs:
                self._outputs.append(name)
            if buffer.whole is not None:
                buffer.value = self._binding.get_outputs()[self._outputs.index(name)]
        self._bound[f"out {name}"] = buffer

    def inputs(self, buffers: Mapping[str, Buffer]) -> None:
        """Bind several inputs."""
        for name, buffer in buffers.items():
            self.input(name, buffer)

    def run(self, *, shrink: bool = False, replay: bool = False) -> None:
        """Run the graph once.

        Args:
            shrink: give the memory of activations back afterwards.
            replay: always these buffers and shapes, and nothing that the graph reads from host
                memory changes: where the session was opened with CUDA graphs, the first run is
                recorded and the others replay it.

        Raises:
            OutOfMemoryError: the provider could not allocate.
            EngineError: anything else that ONNX Runtime reports.
        """
        self._session.run_bound(self._binding, shrink=shrink, replay=replay)


@contextmanager
def _mapped_errors(act: str) -> Iterator[None]:
    try:
        yield
    except LlavaEdgeError:
        raise
    except Exception as error:
        raise _map_error(error, act) from error


def _map_error(error: Exception, act: str) -> Exception:
    text = str(error).strip().replace("\n", " ")
    # What CUDA said stands at the end, behind where in the source it was said.
    shown = text if len(text) <= 500 else f"{text[:150]} … {text[-350:]}"
    if isinstance(error, MemoryError) or any(mark in text.lower() for mark in _OUT_OF_MEMORY):
        return OutOfMemoryError(
            f"memory ran out while {act}: {shown}. Use a smaller context, a lower grid, or "
            "an artifact of lower precision."
        )
    if "cudnn is unavailable" in text.lower():
        return EngineError(
            f"a part of this graph needs cuDNN, which is not installed ({act}: {shown}). Convert "
            "the checkpoint again: what is converted now needs none."
        )
    return EngineError(f"ONNX Runtime {ort.__version__} failed while {act}: {shown}")
