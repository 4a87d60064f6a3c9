"""Which engine runs the tower, and what an engine's features become, on a GPU that is recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge.convert.cli.building import build_here
from llava_edge.profiles.errors import (
    ArtifactError,
    DependencyError,
    EngineError,
    LlavaEdgeError,
    RequestError,
)
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.cli import main as cli
from llava_edge.runtime.processing.request import PromptOptions
from llava_edge.runtime.util.checksummed_json import seal
from llava_edge.runtime.util.progress import no_progress
from tests.support.fake_cudart import DOWNLOAD, MOVE, UPLOAD, FakeCudart, FakeTensorRT, install

trt = pytest.importorskip("tensorrt_rtx")

ENGINE = "engines/vision-tensorrt-rtx-sm89.engine"
QUESTION = "What is <image> and <image>?"


@pytest.fixture(scope="module")
def shipped(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd"), profile="rtx-4090", context_tokens=1024)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cudart() -> FakeCudart:
    return FakeCudart()


@pytest.fixture
def library(shipped: Path) -> FakeTensorRT:
    return FakeTensorRT(shipped / "vision/model.onnx", trt.__version__)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, cudart: FakeCudart, library: FakeTensorRT) -> FakeCudart:
    install(monkeypatch, cudart, library)
    return cudart


def load(artifact: Path, **options: Any) -> LlavaEdge:
    return LlavaEdge.load(artifact, threads=1, **options)


def test_a_trusted_engine_answers_as_the_graph_does_and_features_stay_on_the_device(
    shipped: Path, gpu: FakeCudart, library: FakeTensorRT, picture: Image.Image
) -> None:
    images = [picture, picture.rotate(90, expand=True)]
    with load(shipped, engine="ort") as model:
        expected = model.generate(QUESTION, images, max_new_tokens=6)
        logits = model.teacher_forced_logits(QUESTION, images, expected.token_ids)
    assert (expected.device, expected.engine) == ("cuda", "ort")

    with load(shipped, trust_engines=True) as model:
        gpu.calls.clear()
        library.runs.clear()
        answer = model.generate(QUESTION, images, max_new_tokens=6)
        moved, downloaded, uploaded = (gpu.copied(kind) for kind in (MOVE, DOWNLOAD, UPLOAD))
        np.testing.assert_array_equal(
            model.teacher_forced_logits(QUESTION, images, expected.token_ids), logits
        )
        hidden = model.artifact.manifest.model.text.hidden_size

    assert answer.engine == "tensorrt-rtx"
    assert set(answer.other_engines) == {"tensorrt"}
    assert "tensorrt is not installed" in answer.other_engines["tensorrt"]
    assert answer.token_ids == expected.token_ids
    assert moved == 2 * hidden * answer.image_tokens
    # The newline's row is all that goes up beside pixels and text; nothing comes down.
    assert (downloaded, uploaded) == (0, 2 * hidden)
    assert gpu.calls[-1] == ("cudaStreamDestroy",)


def test_features_of_onnx_runtime_stay_on_the_device_where_asked(
    shipped: Path, gpu: FakeCudart, picture: Image.Image
) -> None:
    images = [picture, picture.rotate(90, expand=True)]
    with load(shipped, engine="ort") as model:
        expected = model.generate(QUESTION, images, max_new_tokens=6)
        logits = model.teacher_forced_logits(QUESTION, images, expected.token_ids)
    assert gpu.copied(MOVE) == 0

    with load(shipped, engine="ort", cuda=CudaOptions(features_on_device=True)) as model:
        answer = model.generate(QUESTION, images, max_new_tokens=6)
        assert gpu.copied(DOWNLOAD) == 0
        # Once to where the tiles lie together, and again to their places in the prompt.
        row_bytes = 2 * model.artifact.manifest.model.text.hidden_size
        patches = model.artifact.manifest.model.vision.num_patches
        tiles = sum(
            layout.num_tiles
            for layout in model._requests.build(QUESTION, images, PromptOptions()).layouts
        )
        assert gpu.copied(MOVE) >= tiles * patches * row_bytes + expected.image_tokens * row_bytes
        found = model.teacher_forced_logits(QUESTION, images, expected.token_ids)

    assert answer.token_ids == expected.token_ids
    np.testing.assert_array_equal(found, logits)
    assert ("cudaStreamDestroy",) in gpu.calls
    with pytest.raises(EngineError, match="without features_on_device"):
        load(
            shipped,
            engine="ort",
            vision_cache_bytes=1 << 30,
            cuda=CudaOptions(features_on_device=True),
        )


def test_tiles_go_through_in_batches_that_the_engine_takes(
    shipped: Path, gpu: FakeCudart, library: FakeTensorRT, picture: Image.Image
) -> None:
    with load(shipped, engine="ort") as model:
        expected = model.teacher_forced_logits("What?", [picture])
    library.max_tiles = 2

    with load(shipped, trust_engines=True) as model:
        library.runs.clear()
        np.testing.assert_array_equal(model.teacher_forced_logits("What?", [picture]), expected)

    assert len(library.runs) > 1
    assert max(library.runs) == 2


def test_a_shipped_engine_is_not_opened_without_trust(
    shipped: Path, gpu: FakeCudart, library: FakeTensorRT
) -> None:
    with load(shipped) as model:
        assert model.engine == "ort"
        reason = model.generate("Hello", max_new_tokens=1).other_engines["tensorrt-rtx"]
    assert "trust_engines=True (--trust-engines)" in reason
    with pytest.raises(EngineError, match="engine tensorrt-rtx was asked for: the artifact carr"):
        load(shipped, engine="tensorrt-rtx")
    assert library.opened == 0


def edited(artifact: Path, out: Path, **facts: Any) -> Path:
    """A copy whose engine says other things of itself, sealed as an artifact is."""
    import hashlib

    shutil.copytree(artifact, out)
    record = out / ENGINE.replace(".engine", ".json")
    record.write_text(json.dumps({**json.loads(record.read_text()), **facts}))
    document = json.loads((out / "manifest.json").read_text())
    data = record.read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    document["files"][record.relative_to(out).as_posix()] = entry
    (out / "manifest.json").write_bytes(seal(document))
    (out / "certificate.json").unlink(missing_ok=True)
    return out


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"compute_capability": "12.0"}, "for compute capability 12.0, and this GPU (RTX) has 8.9"),
        ({"library_version": "1.6.0"}, "tensorrt-rtx 1.6.0 built it, and"),
        ({"graph": {"vision/model.onnx": "0" * 64}}, "built from another vision graph"),
        ({"device": "RTX 4090"}, "it was tuned on RTX 4090 and is bound to it; this is RTX"),
    ],
)
def test_an_engine_that_is_bound_to_something_else_is_refused_in_a_sentence(
    shipped: Path,
    gpu: FakeCudart,
    library: FakeTensorRT,
    tmp_path: Path,
    facts: dict[str, Any],
    reason: str,
) -> None:
    artifact = edited(shipped, tmp_path / "artifact", **facts)

    with pytest.raises(EngineError) as caught:
        load(artifact, engine="tensorrt-rtx", trust_engines=True)
    assert reason in str(caught.value)
    assert "llava-edge build-engine" in str(caught.value)
    assert "\n" not in str(caught.value)
    with load(artifact, trust_engines=True) as model:
        assert model.engine == "ort"
    assert library.opened == 0


def test_a_corrupt_engine_is_named_and_not_opened(
    shipped: Path, gpu: FakeCudart, library: FakeTensorRT, tmp_path: Path
) -> None:
    artifact = Path(shutil.copytree(shipped, tmp_path / "artifact"))
    data = bytearray((artifact / ENGINE).read_bytes())
    data[len(data) // 2] ^= 1
    (artifact / ENGINE).write_bytes(data)

    with pytest.raises(ArtifactError, match=rf"{ENGINE} is damaged: its SHA-256 is not[^\n]*$"):
        load(artifact, engine="tensorrt-rtx", trust_engines=True)
    assert library.opened == 0
    with load(artifact, trust_engines=True) as model:
        assert model.engine == "ort"


def test_what_the_library_or_the_warm_up_refuses_leaves_the_graph_to_onnx_runtime(
    shipped: Path, gpu: FakeCudart, library: FakeTensorRT
) -> None:
    library.refusal = "magic tag\ndoes not match."
    with load(shipped, trust_engines=True) as model:
        reason = model.generate("Hello", max_new_tokens=1).other_engines["tensorrt-rtx"]
    assert reason.endswith("cannot read the engine: magic tag does not match.")
    library.refusal = ""
    library.spoil = lambda features: features * np.float16("nan")
    with load(shipped, trust_engines=True) as model:
        assert model.engine == "ort"
    library.spoil = lambda features: features
    gpu.fails["cudaStreamSynchronize"] = 700
    with pytest.raises(
        EngineError, match=r"cudaStreamSynchronize with code 700 \(error number 700"
    ):
        load(shipped, trust_engines=True, engine="tensorrt-rtx")


def test_an_engine_of_another_tower_is_refused(
    shipped: Path,
    gpu: FakeCudart,
    library: FakeTensorRT,
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
) -> None:
    cpu = make_artifact(make_checkpoint("odd", image_size=56), profile="cpu-16gb")
    library.graph = cpu / "vision/model.onnx"
    with pytest.raises(EngineError, match=r"pixel_values is half \[-1, 3, 56, 56\]; this model's"):
        load(shipped, trust_engines=True, engine="tensorrt-rtx")


def test_without_the_library_onnx_runtime_answers_and_says_why(
    shipped: Path, cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, cudart, None)

    with load(shipped, trust_engines=True) as model:
        answer = model.generate("Hello", max_new_tokens=1)
    assert answer.engine == "ort"
    assert answer.other_engines["tensorrt-rtx"] == (
        "tensorrt-rtx is not installed. Install it with: pip install 'llava-edge[tensorrt]'"
    )
    with pytest.raises(DependencyError, match=r"^engine tensorrt was asked for: tensorrt is not"):
        load(shipped, engine="tensorrt")
    with pytest.raises(RequestError, match="engine 'best' is unknown; engines are auto, tensorrt"):
        load(shipped, engine="best")


def test_an_artifact_on_the_cpu_says_why_no_gpu_engine_runs(
    shipped: Path,
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--prompt", "Hello", "--max-new-tokens", "1", "--json", "--allow-slow"]
    cpu = make_artifact(make_checkpoint("odd"))

    found = []
    for folder in (shipped, cpu):
        assert cli.main(["run", str(folder), *arguments]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))

    for answer in found:
        assert (answer["engine"], answer["device"]) == ("ort", "cpu")
        assert set(answer["other_engines"]) == {"tensorrt", "tensorrt-rtx", "ort on cuda"}
    assert "needs an NVIDIA GPU" in found[0]["other_engines"]["tensorrt-rtx"]
    assert "is for the cpu target" in found[1]["other_engines"]["tensorrt-rtx"]


def test_an_engine_that_this_machine_built_needs_no_trust_until_it_is_damaged(
    shipped: Path,
    cudart: FakeCudart,
    library: FakeTensorRT,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(force: bool = False) -> tuple[Path, Any, bool]:
        return build_here(
            open_artifact(shipped),
            "tensorrt-rtx",
            no_progress,
            force=force,
            open_cuda=lambda: CudaRuntime(cudart),
        )

    path, facts, is_new = build()
    assert (is_new, build()[2], build(force=True)[2]) == (True, False, True)
    assert path.is_relative_to(cache)
    assert (facts.compute_capability, facts.max_tiles) == ("8.9", 5)
    with monkeypatch.context() as patch:
        install(patch, cudart, library)
        with load(shipped) as model:
            assert model.engine == "tensorrt-rtx"
        path.write_bytes(b"damage")
        with pytest.raises(ArtifactError, match=r"is damaged.*build-engine --force"):
            load(shipped, engine="tensorrt-rtx")
    assert build()[2] is True


def test_building_here_is_refused_where_it_cannot_be(
    shipped: Path,
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(artifact: Path, asked: Any = None, **gpu: Any) -> None:
        build_here(
            open_artifact(artifact),
            asked,
            no_progress,
            open_cuda=lambda: CudaRuntime(FakeCudart(**gpu)),
        )

    with pytest.raises(RequestError, match="is for the cpu target"):
        build(make_artifact(make_checkpoint("odd")))
    with pytest.raises(EngineError, match="shows no GPU"):
        build(shipped, gpus=0)
    with pytest.raises(EngineError, match=r"does not compile for Orin \(compute capability 8\.7\)"):
        build(shipped, "tensorrt-rtx", capability=(8, 7), name="Orin")
    with pytest.raises(LlavaEdgeError, match=r"no TensorRT builds an engine here: tensorrt is not"):
        build(shipped, capability=(8, 7), name="Orin")
