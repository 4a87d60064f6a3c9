"""``device="cuda:1"``: everything of a model is on the GPU that was named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from llava_edge.profiles.boards.nvml import Gpu, GpuReport
from llava_edge.profiles.errors import EngineError, RequestError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.backends import onnxruntime as session
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.backends.onnxruntime import Buffer
from llava_edge.runtime.cli import main as cli
from llava_edge.runtime.generation import engine
from llava_edge.runtime.loading import memory_fit as load_fit
from llava_edge.runtime.loading.placement import choose_device
from llava_edge.runtime.verification import host as this_machine
from llava_edge.runtime.verification.host import describe_host
from tests.support.fake_cudart import FakeCudart, FakeTensorRT, install

GIB = 1 << 30
SMALL = Gpu("Small", 1 << 20, 1 << 10, "8.9", "0000:17:00.0")
LARGE = Gpu("Large", 80 * GIB, 80 * GIB, "8.9", "0000:65:00.0")


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd"), profile="rtx-4090", context_tokens=1024)


@pytest.fixture
def engine_version() -> str:
    """Of the library that built the artifact's engine; read before a fake takes its place."""
    return str(pytest.importorskip("tensorrt_rtx").__version__)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    """A machine whose first GPU has no memory left."""
    cudart = FakeCudart(gpus=2)
    install(monkeypatch, cudart, None)
    for module in (load_fit, this_machine):
        monkeypatch.setattr(module, "read_gpus", lambda: GpuReport((SMALL, LARGE)))
    return cudart


@pytest.fixture
def device_ids(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What ONNX Runtime is told with each session."""
    found: list[str | None] = []
    real = onnxruntime.InferenceSession

    def open_session(model: Any, settings: Any, providers: Any, **options: Any) -> Any:
        found.extend(given.get("device_id") for _, given in providers)
        return real(model, settings, providers=[providers[0][0]], **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    return found


def test_sessions_buffers_and_memory_are_those_of_the_gpu_that_is_named(
    artifact: Path,
    two_gpus: FakeCudart,
    device_ids: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
    picture: Image.Image,
) -> None:
    asked = []

    def process_bytes(_pid: int, pci_bus_id: str | None = None) -> int:
        asked.append(pci_bus_id)
        return 5 * GIB

    monkeypatch.setattr(engine, "process_bytes", process_bytes)
    real = session._on_device
    places = set()
    monkeypatch.setattr(
        session, "_on_device", lambda array, place: (places.add(place), real(array, place))[1]
    )
    with LlavaEdge.load(
        artifact,
        "cuda:1",
        threads=1,
        engine="ort",
        cuda=CudaOptions(features_on_device=True),
    ) as model:
        answer = model.generate("What is this?", [picture], max_new_tokens=4)
        assert (model.device, answer.device) == ("cuda:1", "cuda:1")
        assert model.degraded == ()
    assert device_ids == ["1", "1"]
    assert places == {("cuda", 1)}
    assert two_gpus.current == 1
    assert set(asked) == {LARGE.pci_bus_id}
    assert answer.peak_memory.device_bytes == 5 * GIB


def test_without_a_number_the_first_gpu_decides(artifact: Path, two_gpus: FakeCudart) -> None:
    with LlavaEdge.load(artifact, "cuda", threads=1, engine="ort") as model:
        assert model.device == "cuda"
        assert "on the GPU" in model.degraded[0], "the first has no memory"


def test_a_gpu_that_is_not_there_is_an_error_that_lists_those_that_are(
    artifact: Path, two_gpus: FakeCudart
) -> None:
    listed = r"cuda:2 was asked; CUDA shows cuda:0 Small \(0000:17:00\.0\), cuda:1 Large"
    with pytest.raises(RequestError, match=listed):
        LlavaEdge.load(artifact, "cuda:2", threads=1)


def test_the_command_takes_the_number_and_refuses_other_names(
    artifact: Path, two_gpus: FakeCudart, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(artifact), "--prompt", "Hi", "--max-new-tokens", "2", "--engine", "ort"]
    assert cli.main([*command, "--device", "cuda:1"]) == 0
    assert cli.main([*command, "--device", "cuda:5"]) == 2
    assert "CUDA shows cuda:0 Small" in capsys.readouterr().err
    assert cli.main([*command, "--device", "gpu1"]) == 2
    assert "devices are auto, cpu, cuda and cuda:N" in capsys.readouterr().err


def test_an_engine_runs_on_the_gpu_that_is_named(
    artifact: Path,
    engine_version: str,
    two_gpus: FakeCudart,
    monkeypatch: pytest.MonkeyPatch,
    picture: Image.Image,
) -> None:
    library = FakeTensorRT(artifact / "vision/model.onnx", engine_version)
    install(monkeypatch, two_gpus, library)
    ran_on = []
    library.spoil = lambda features: (ran_on.append(two_gpus.current), features)[1]
    with LlavaEdge.load(artifact, "cuda:1", threads=1, trust_engines=True) as model:
        # Another library of the process chose another GPU for this thread meanwhile.
        two_gpus.current = 0
        model.generate("What is this?", [picture], max_new_tokens=2)
    assert set(ran_on) == {1}


def test_a_name_with_a_number_is_a_device_of_its_kind() -> None:
    with pytest.raises(EngineError, match="cuda:1 was asked; this ONNX Runtime has no CUDA"):
        choose_device("cuda:1", "cuda", allow_slow=True)
    with pytest.raises(EngineError, match="does not run on cuda"):
        choose_device("cuda:1", "cpu", allow_slow=False)
    with pytest.raises(RequestError, match="device 'cuda:one' is unknown"):
        choose_device("cuda:one", "cuda", allow_slow=False)


def test_the_cuda_runtime_works_on_its_gpu_and_knows_how_many_there_are() -> None:
    library = FakeCudart(gpus=2)
    cuda = CudaRuntime(library, 1)
    library.current = 0
    cuda.allocate(16)
    assert (cuda.index, library.current) == (1, 1)
    with pytest.raises(EngineError, match="cuda:2 was asked; the CUDA runtime shows 2 GPUs"):
        CudaRuntime(library, 2)


def test_a_machine_has_the_name_of_the_gpu_that_computes(two_gpus: FakeCudart) -> None:
    assert describe_host("cuda").machine == "Small"
    found = describe_host("cuda:1")
    assert (found.machine, found.provider) == ("Large", "CPUExecutionProvider")


def test_options_of_the_provider_name_another_gpu_than_the_first() -> None:
    assert CudaOptions().provider_options(captures=False, gpu=3)["device_id"] == "3"
    assert "device_id" not in CudaOptions().provider_options(captures=False)


def test_the_first_rows_of_a_buffer_lie_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    as_value = onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(session, "_on_device", lambda array, _: as_value(array))
    whole = Buffer((1, 4, 2), np.float32, "cuda", 1)
    assert whole.by_address[:2] == whole.first(2).by_address[:2] == ("cuda", 1)
