"""A load that fails, wherever it does, leaves nothing open: no file, no thread, no mapping."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from traceback import walk_tb
from typing import Any

import pytest

from llava_edge.profiles.errors import ArtifactError, EngineError, OutOfMemoryError, RequestError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime import model as pipeline
from llava_edge.runtime.backends.onnxruntime import Session
from llava_edge.runtime.loading import open_components as components

PARTS = (
    "RequestBuilder",
    "EmbeddingTable",
    "open_tower",
    "VisionEncoder",
    "cached_encoder",
    "PromptEmbedder",
    "Decoder",
    "RequestMemory",
    "Engine",
    "least_context",
)


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


def held(artifact: Path) -> tuple[int, int, int]:
    """Open descriptors, threads, and mappings of the artifact's files, of this process."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        sum(str(artifact) in line for line in maps),
    )


def load(artifact: Path, **options: Any) -> LlavaEdge:
    return LlavaEdge.load(artifact, threads=3, **options)


@pytest.fixture
def before(artifact: Path) -> tuple[int, int, int]:
    # What the libraries open once for the process.
    load(artifact).close()
    return held(artifact)


def test_a_loaded_model_holds_something_and_a_closed_one_nothing(
    artifact: Path, before: tuple[int, int, int]
) -> None:
    model = load(artifact)
    assert all(now > then for now, then in zip(held(artifact)[:2], before[:2], strict=True))
    model.close()
    assert held(artifact) == before


@pytest.mark.parametrize("part", PARTS)
def test_a_load_that_fails_at_any_part_leaves_nothing_open(
    artifact: Path, before: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineError(f"{part} fails")

    monkeypatch.setattr(pipeline if part == "Engine" else components, part, fail)
    with pytest.raises(EngineError, match=f"{part} fails") as failed:
        load(artifact)
    # The error is still there, and with it the frames that it came through.
    assert held(artifact) == before, failed


@pytest.mark.parametrize("nth", [1, 2])
def test_a_graph_that_does_not_open_leaves_nothing_open(
    artifact: Path, before: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    real = Session.from_files
    opened: list[str] = []

    def open_or_fail(files: Any, name: str, options: Any) -> Session:
        opened.append(name)
        session = real(files, name, options)
        if len(opened) == nth:
            session.close()
            raise OutOfMemoryError(name)
        return session

    monkeypatch.setattr(Session, "from_files", open_or_fail)
    with pytest.raises(OutOfMemoryError) as failed:
        load(artifact)
    assert held(artifact) == before, failed


@pytest.mark.parametrize("step", range(4))
def test_a_progress_that_raises_leaves_nothing_open(
    artifact: Path, before: tuple[int, int, int], step: int
) -> None:
    def progress(what: str, done: int, of: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as failed:
        load(artifact, progress=progress)
    assert held(artifact) == before, failed


@pytest.mark.parametrize("step", ["check_interfaces", "fit_at_load", "self_test_if_needed"])
def test_a_load_that_fails_before_or_after_its_parts_leaves_nothing_open(
    artifact: Path, before: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise EngineError(f"{step} fails")

    monkeypatch.setattr(pipeline, step, fail)
    with pytest.raises(EngineError, match=f"{step} fails") as failed:
        load(artifact)
    assert held(artifact) == before, failed


def test_what_is_asked_wrongly_leaves_nothing_open(
    artifact: Path, before: tuple[int, int, int]
) -> None:
    with pytest.raises(RequestError) as failed:
        load(artifact, context_tokens=1 << 20)
    assert held(artifact) == before, failed


def test_memory_of_a_failed_load_is_free_while_its_error_is_looked_at(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    made: list[weakref.ref[Any]] = []
    real = components.Decoder

    def make(*arguments: Any, **options: Any) -> Any:
        decoder = real(*arguments, **options)
        made.append(weakref.ref(decoder))
        return decoder

    def fail(*_: object) -> None:
        raise OutOfMemoryError("no memory")

    monkeypatch.setattr(components, "Decoder", make)
    monkeypatch.setattr(components, "RequestMemory", fail)
    with pytest.raises(OutOfMemoryError) as failed:
        load(artifact)
    assert [ref() for ref in made] == [None], failed


def test_a_failed_load_leaves_the_errors_of_its_application_alone(tmp_path: Path) -> None:
    def use_a_camera() -> None:
        number = 7
        raise ValueError(f"camera {number} is off")

    try:
        use_a_camera()
    except ValueError as error:
        # What is being handled is the context of our error, and not ours to clear.
        with pytest.raises(ArtifactError):
            load(tmp_path)
        trace = list(walk_tb(error.__traceback__))
        assert trace[-1][0].f_locals == {"number": 7}
