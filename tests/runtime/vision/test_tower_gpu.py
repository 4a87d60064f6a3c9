"""The same as ``test_select.py``, on a GPU that is there: make test-gpu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_edge.convert.cli.building import build_here
from llava_edge.profiles.boards.engines import LIBRARIES, LibraryName
from llava_edge.profiles.boards.nvml import read_gpus
from llava_edge.profiles.errors import DependencyError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.backends.onnxruntime import Buffer
from llava_edge.runtime.backends.tensorrt import open_library
from llava_edge.runtime.util.progress import no_progress
from llava_edge.runtime.verification.tolerances import GAP, bounds_for

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda() -> CudaRuntime:
    # The driver is asked, not the code under test: what fails where a GPU is has failed.
    if not read_gpus().gpus:
        pytest.skip("there is no NVIDIA GPU")
    return CudaRuntime.open()


def test_copies_on_the_device_arrive(cuda: CudaRuntime) -> None:
    rows = np.arange(64, dtype=np.float16).reshape(8, 8)
    source, target = (Buffer(rows.shape, np.float16, "cuda") for _ in range(2))
    source.write(rows)
    cuda.move(target.address, source.address + 16 * 3, 32)
    cuda.upload(target.address + 64, rows[0])
    found = np.empty_like(rows)
    cuda.download(found, target.address)
    cuda.synchronize()
    np.testing.assert_array_equal(found[:5], [*rows[3:5], *np.zeros((2, 8)), rows[0]])


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_engine_built_here_answers_within_the_bounds_of_the_graph(
    cuda: CudaRuntime,
    library: LibraryName,
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    picture: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        open_library(library)
    except DependencyError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    artifact = make_artifact(make_checkpoint("odd"), profile="a100", context_tokens=1024)
    build_here(open_artifact(artifact), library, no_progress)

    found = {}
    for engine in ("ort", library):
        with LlavaEdge.load(artifact, device="cuda", engine=engine) as model:
            found[engine] = model.teacher_forced_logits("What?", [picture], [5, 9])
            precision = model.artifact.manifest.precision

    bound = bounds_for("cuda", precision).value("decode_logits", GAP)
    gap = np.abs(found[library] - found["ort"]).max() / np.ptp(found["ort"])
    assert gap <= bound
