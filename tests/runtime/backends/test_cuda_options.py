"""What is asked of ONNX Runtime for a GPU, and answers that must not depend on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from llava_edge.profiles.boards.nvml import read_gpus
from llava_edge.profiles.errors import OutOfMemoryError, RequestError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.backends import onnxruntime as session
from llava_edge.runtime.backends import process
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.processing.request import VideoInput

BOUND = 1.5e-2
"""Of the logits' range: what two ways through float16 may differ by, as verification has it."""


@pytest.fixture
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd"), profile="a100", context_tokens=1024)


@pytest.mark.parametrize(
    ("asked", "all_logits"),
    [
        ({}, False),
        ({"temperature": 0.8, "top_k": 20, "seed": 1}, False),
        ({"temperature": 0.8, "top_k": 20, "top_p": 0.7, "seed": 1}, False),
        ({"temperature": 0.8, "top_p": 0.7, "seed": 1}, True),
        ({"repetition_penalty": 1.4}, True),
    ],
)
def test_answers_are_the_same_with_the_best_logits_and_with_all(
    artifact: Path,
    picture: Image.Image,
    asked: dict[str, Any],
    all_logits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = {"best": 0, "all": 0}
    real, real_best = Decoder.step, Decoder.step_best

    def step(self: Decoder, row: Any) -> Any:
        steps["all"] += 1
        return real(self, row)

    def step_best(self: Decoder, row: Any) -> Any:
        steps["best"] += 1
        return real_best(self, row)

    monkeypatch.setattr(Decoder, "step", step)
    monkeypatch.setattr(Decoder, "step_best", step_best)
    found = []
    for best in (True, False):
        cuda = CudaOptions(best_on_device=best)
        with LlavaEdge.load(artifact, "cpu", allow_slow=True, cuda=cuda) as model:
            found.append(model.generate("What?", [picture], max_new_tokens=24, **asked).token_ids)
        assert steps["best"] == (0 if all_logits else 23)

    assert found[0] == found[1]
    assert steps["all"] == (46 if all_logits else 23)


def opened_with(
    artifact: Path, cuda: CudaOptions, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, str], list[str | None]]:
    """Provider options of a decoder session, and the graph id of two runs that were asked for."""
    options: dict[str, str] = {}
    real = onnxruntime.InferenceSession

    def inference_session(model: Any, settings: Any, providers: list[Any], **more: Any) -> Any:
        # Python's layer would go on with the CPU, whatever fails.
        assert more == {"enable_fallback": 0}
        options.update(providers[0][1])
        return real(model, settings, providers=["CPUExecutionProvider"])

    names = {"cpu": "CPUExecutionProvider", "cuda": "CPUExecutionProvider"}
    monkeypatch.setattr(session, "_PROVIDERS", names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", inference_session)
    given = Session(artifact / "decoder/model.onnx", SessionOptions(device="cuda", cuda=cuda))
    ids: list[str | None] = []

    class Ran:
        def run_with_iobinding(self, _: Any, how: Any) -> None:
            try:
                ids.append(None if how is None else how.get_run_config_entry("gpu_graph_id"))
            except RuntimeError:  # ONNX Runtime: there is no such entry
                ids.append(None)

    given._session = Ran()
    for replay in (True, False):
        given.run_bound(None, shrink=False, replay=replay)
    return options, ids


def test_a_step_is_recorded_and_everything_else_kept_out(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, ids = opened_with(artifact, CudaOptions(graph=True), monkeypatch)

    assert options["enable_cuda_graph"] == "1"
    assert ids == ["1", "-1"]


def test_nothing_is_recorded_unless_asked(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, ids = opened_with(artifact, CudaOptions(memory_limit_bytes=77), monkeypatch)

    assert options == {"arena_extend_strategy": "kSameAsRequested", "gpu_mem_limit": "77"}
    assert ids == [None, None]


def test_weight_only_products_are_tried_out_for_steps_and_prompts() -> None:
    entries = CudaOptions(weight_only_gemm=True).session_entries(2048)

    assert entries["ep.cuda.fpa_intb_gemm"] == "1"
    assert entries["ep.cuda.fpa_intb_profile_m"] == "1,2048"
    assert "ep.cuda.fpa_intb_gemm" not in CudaOptions().session_entries(2048)


def test_buffers_take_what_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    layer = SimpleNamespace(
        ArenaExtendStrategy=SimpleNamespace(kSameAsRequested="exactly"),
        set_arena_extend_strategy=asked.append,
    )
    monkeypatch.setattr(onnxruntime.capi, "onnxruntime_pybind11_state", layer)
    monkeypatch.setattr(session, "_on_device", lambda array, _: asked.append(array.shape))
    monkeypatch.setattr(session, "preload_cuda", lambda: None)
    process.take_exact_memory.cache_clear()

    session.Buffer((2, 3), np.float16, "cuda")
    session.Buffer((4,), np.float16, "cuda")
    assert asked == ["exactly", (2, 3), (4,)], "once, and before the first"

    process.take_exact_memory.cache_clear()
    del layer.set_arena_extend_strategy
    session.Buffer((5,), np.float16, "cuda")
    assert asked[3:] == [(5,)], "other builds have no such arena"
    process.take_exact_memory.cache_clear()


def test_libraries_of_another_folder_are_found_before_the_first_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    folder = tmp_path / "nvidia/cu13/lib"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda **asked: said.append(asked))
    monkeypatch.setattr(session, "_on_device", lambda array, _: said.append(array.shape))
    process.preload_cuda.cache_clear()
    session.Buffer((2, 3), np.float16, "cuda")
    process.preload_cuda.cache_clear()

    assert said == [{"cudnn": False, "directory": str(folder)}, (2, 3)]


def test_weights_count_towards_a_limit() -> None:
    key = "session.use_device_allocator_for_initializers"
    assert CudaOptions().session_entries(512)[key] == "1"
    assert key not in CudaOptions(memory_limit_bytes=1 << 30).session_entries(512)


def test_a_limit_must_be_a_number_of_bytes() -> None:
    with pytest.raises(RequestError, match="memory_limit_bytes is -1"):
        CudaOptions(memory_limit_bytes=-1)


@pytest.mark.gpu
@pytest.mark.parametrize("best", [True, False])
def test_a_replayed_graph_answers_as_plain_steps_do(
    artifact: Path, picture: Image.Image, best: bool
) -> None:
    # The driver is asked, not the code under test: what fails where a GPU is has failed.
    if not read_gpus().gpus:
        pytest.skip("there is no NVIDIA GPU")
    forced: dict[str, tuple[int, ...]] = {}
    found: dict[bool, list[Any]] = {False: [], True: []}
    for graph in found:
        cuda = CudaOptions(graph=graph, best_on_device=best)
        with LlavaEdge.load(artifact, "cuda", engine="ort", strict_device=True, cuda=cuda) as model:
            # The second answer replays what the first recorded, behind other prompts.
            for prompt in ("What?", "And what is on the left of it, if anything?"):
                answer = model.generate(prompt, [picture], max_new_tokens=48)
                ids = forced.setdefault(prompt, answer.token_ids)
                rows = model.teacher_forced_logits(prompt, [picture], ids[:-1])
                said = model.teacher_forced_logits(prompt, [picture], answer.token_ids[:-1])
                chosen = said[np.arange(len(said)), list(answer.token_ids)]
                assert (said.max(1) - chosen <= BOUND * np.ptp(said)).all()
                found[graph].append(rows)
            assert answer.off_device == ()

    # A recorded step is given the capacity as the total, which may split attention in another way.
    for plain, replayed in zip(found[False], found[True], strict=True):
        assert np.abs(plain - replayed).max() <= BOUND * np.ptp(plain)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_an_int8_cache_on_a_gpu_gives_the_logits_that_the_processor_gives(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    picture: Image.Image,
    graph: bool,
) -> None:
    if not read_gpus().gpus:
        pytest.skip("there is no NVIDIA GPU")
    # Heads of 64 in groups of 4: what the fast kernel for codes takes, where there is one.
    sizes = {"hidden_size": 512, "heads": 8, "kv_heads": 2, "intermediate_size": 512}
    checkpoint = make_checkpoint("odd", backbone="mistral", **sizes)
    opened = open_artifact(
        make_artifact(checkpoint, profile="a100", context_tokens=1024, cache="int8")
    )
    # Chunks as well: behind the first one attention reads codes of the one before.
    chunked = replace(opened, manifest=replace(opened.manifest, prefill_chunk=64))
    options: dict[str, Any] = {"engine": "ort", "allow_slow": True}
    options["cuda"] = CudaOptions(graph=graph)
    kinds: tuple[tuple[Any, Any], ...] = (("cpu", "float16"), ("cpu", "int8"), ("cuda", "int8"))
    found = {}
    for device, cache in kinds:
        with LlavaEdge.over(chunked, device, cache=cache, **options) as model:
            found[device, cache] = model.teacher_forced_logits("What?", [picture], range(9, 25))
            assert model.cache == cache
    wanted = found["cpu", "int8"]
    lost = np.abs(wanted - found["cpu", "float16"]).max()

    # Beside rounding, a first chunk may be attended before its keys become codes.
    assert np.abs(found["cuda", "int8"] - wanted).max() <= lost + 0.015 * np.ptp(wanted)


@pytest.mark.gpu
def test_features_left_on_the_device_lead_to_the_same_answer(
    artifact: Path, picture: Image.Image
) -> None:
    if not read_gpus().gpus:
        pytest.skip("there is no NVIDIA GPU")
    found = []
    for stay in (False, True):
        cuda = CudaOptions(features_on_device=stay)
        with LlavaEdge.load(artifact, "cuda", engine="ort", cuda=cuda) as model:
            found.append(model.generate("What?", [picture, picture], max_new_tokens=24))

    assert found[0].token_ids == found[1].token_ids
    # The context of the driver alone takes hundreds of MiB.
    assert all(answer.peak_memory.device_bytes for answer in found)


@pytest.mark.gpu
def test_a_video_on_a_gpu_gives_the_logits_that_the_processor_gives(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    if not read_gpus().gpus:
        pytest.skip("there is no NVIDIA GPU")
    checkpoint = make_checkpoint("odd", model_type="llava_next_video", image_size=56)
    artifact = make_artifact(checkpoint, profile="a100", context_tokens=1024)
    frames = np.random.default_rng(0).integers(0, 256, (8, 60, 80, 3), np.uint8)
    found = []
    for device in ("cpu", "cuda"):
        with LlavaEdge.load(artifact, device, engine="ort", allow_slow=True) as model:
            clip = VideoInput(frames, 8)
            found.append(model.teacher_forced_logits("What?", (), range(9, 25), video=clip))

    assert np.abs(found[0] - found[1]).max() <= BOUND * np.ptp(found[0])


@pytest.mark.gpu
def test_a_limit_that_is_too_low_is_memory_that_ran_out(artifact: Path) -> None:
    if not read_gpus().gpus:
        pytest.skip("there is no NVIDIA GPU")

    with pytest.raises(OutOfMemoryError):
        LlavaEdge.load(artifact, "cuda", engine="ort", cuda=CudaOptions(memory_limit_bytes=1 << 12))
