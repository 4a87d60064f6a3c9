"""An int8 KV cache, chosen at load: what it takes, what it answers, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge.profiles.errors import (
    ArtifactError,
    EngineError,
    OutOfMemoryError,
    RequestError,
)
from llava_edge.profiles.memory.buffers import cache_scale_shape, kv_cache_bytes
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.graph_signature import check_interfaces, scale_names
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.cli.run import main as run_main
from llava_edge.runtime.loading import placement
from llava_edge.runtime.loading.placement import certain_host_terms, check_host_memory, choose_cache
from llava_edge.runtime.util.checksummed_json import seal

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"), cache="int8")


def test_the_weights_are_stored_once(artifact: Path) -> None:
    files = open_artifact(artifact).manifest.files
    weights = files["decoder/weights.bin"].bytes
    second = files["decoder/int8_cache.onnx"].bytes
    scales = kv_cache_bytes(open_artifact(artifact).manifest.model.text, 0, "int8")

    assert sorted(name for name in files if name.startswith("decoder/")) == [
        "decoder/int8_cache.onnx",
        "decoder/model.onnx",
        "decoder/weights.bin",
    ]
    assert second < files["decoder/model.onnx"].bytes + scales + 2000
    assert second < weights / 4


@pytest.fixture(scope="module")
def for_gpus(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    checkpoint = make_checkpoint("odd", backbone="mistral")
    return make_artifact(checkpoint, cache="int8", profile="a100", context_tokens=2048)


@pytest.mark.parametrize(
    ("made", "cache"),
    [
        ("artifact", "float32"),
        ("artifact", "int8"),
        ("for_gpus", "float16"),
        ("for_gpus", "int8"),
    ],
)
def test_the_cache_is_of_the_type_that_was_asked_and_as_large_as_the_plan_says(
    made: str, cache: Any, picture: Image.Image, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(made)
    options: dict[str, Any] = {"threads": 1, "context_tokens": 500, "allow_slow": True}
    with LlavaEdge.load(folder, cache=cache, **options) as model:
        held = model._decoder.cache
        before = {name: buffer.address for name, buffer in held._buffers.items()}
        answer = model.generate("What is this?", [picture], max_new_tokens=5)

        assert (model.cache, len(answer.token_ids)) == (cache, 5)
        text = model.artifact.manifest.model.text
        assert {buffer.dtype.name for buffer in held._buffers.values()} == {cache}
        # In place: nothing was allocated anew, nothing grew.
        assert {name: buffer.address for name, buffer in held._buffers.items()} == before
        scales = 2 * text.num_hidden_layers * 4 * int(np.prod(cache_scale_shape(text)))
        planned = kv_cache_bytes(text, 500, cache)
        assert held.nbytes == planned - (scales if cache == "int8" else 0)
        # Codes, and not all of them nothing.
        assert held.part(0, "key").any()
        assert held.part(0, "key").shape[1] == answer.prompt_tokens + 4


@pytest.mark.parametrize("made", ["artifact", "for_gpus"])
def test_answers_are_close_to_those_with_a_float_cache(
    made: str, picture: Image.Image, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(made)
    logits = {}
    for cache in ("auto", "int8"):
        with LlavaEdge.load(
            folder,
            threads=1,
            cache=cache,  # type: ignore[arg-type]
            allow_slow=True,
        ) as model:
            logits[cache] = model.teacher_forced_logits("What is it?", [picture], range(9, 25))

    gap = np.abs(logits["int8"] - logits["auto"]).max() / np.ptp(logits["auto"])
    assert 0 < gap < 0.05


@pytest.mark.parametrize(("made", "own"), [("artifact", "float32"), ("for_gpus", "float16")])
def test_the_float_cache_is_what_is_taken_unasked(
    made: str, own: str, request: pytest.FixtureRequest
) -> None:
    with LlavaEdge.load(request.getfixturevalue(made), threads=1, allow_slow=True) as model:
        assert model.cache == own
        assert not any(b.dtype == np.int8 for b in model._decoder.cache._buffers.values())


def test_only_the_graph_of_the_chosen_cache_is_opened(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_edge.runtime.backends.onnxruntime import Session

    opened: list[str] = []
    real = Session._open
    monkeypatch.setattr(
        Session,
        "_open",
        lambda self, model, name, *rest: opened.append(name) or real(self, model, name, *rest),
    )
    LlavaEdge.load(artifact, threads=1, cache="int8").close()

    assert opened == ["model.onnx", "int8_cache.onnx"]


def test_what_an_artifact_does_not_have_is_refused_with_the_next_step(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    plain = make_artifact(make_checkpoint("odd", backbone="mistral"))

    with pytest.raises(EngineError, match=r"int8 was asked.*has float32.*convert again with --ca"):
        LlavaEdge.load(plain, cache="int8")
    with pytest.raises(EngineError, match="float16 was asked; this artifact for the cpu target"):
        LlavaEdge.load(plain, cache="float16")
    with pytest.raises(RequestError, match="cache 'fp8' is unknown; types are auto, float32"):
        LlavaEdge.load(plain, cache="fp8")  # type: ignore[arg-type]


def test_a_cuda_artifact_has_its_own_types(for_gpus: Path) -> None:
    manifest = open_artifact(for_gpus).manifest
    assert choose_cache("auto", manifest) == choose_cache("float16", manifest) == "float16"
    assert choose_cache("int8", manifest) == "int8"
    with pytest.raises(EngineError, match=r"float32 was asked; .* cuda .* has float16 and int8"):
        choose_cache("float32", manifest)

    with pytest.raises(EngineError, match=r"has float16.*convert again with --cache int8"):
        choose_cache("int8", replace(manifest, decoder_int8_cache=None))


def test_less_memory_is_asked_for(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_artifact(artifact)
    text, context = opened.manifest.model.text, 50_000
    narrow, wide = (
        certain_host_terms(opened.manifest, context, cache) for cache in ("int8", "float32")
    )
    assert narrow.kv_cache == kv_cache_bytes(text, context, "int8")
    assert 3.9 < wide.kv_cache / narrow.kv_cache < 4

    monkeypatch.setattr(placement, "available_host_bytes", lambda: narrow.total)
    check_host_memory(opened, context, 0, "int8")
    with pytest.raises(OutOfMemoryError):
        check_host_memory(opened, context, 0, "float32")


def test_the_command_takes_it(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--prompt", "one", "--raw", "--max-new-tokens", "3", "--threads", "1", "--json"]
    assert run_main([str(artifact), *asked, "--cache", "int8"]) == 0

    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["token_ids"]) == 3
    with pytest.raises(EngineError, match="float16 was asked"):
        run_main([str(artifact), *asked, "--cache", "fp16"])


def other_type(m: dict[str, Any]) -> None:
    m["decoder_int8_cache"] = {**m["decoder"], "file": m["decoder_int8_cache"]["file"]}


def same_file(m: dict[str, Any]) -> None:
    m["decoder_int8_cache"]["file"] = m["decoder"]["file"]


def not_listed(m: dict[str, Any]) -> None:
    m["decoder_int8_cache"]["file"] = "decoder/another.onnx"


def exchanged(m: dict[str, Any]) -> None:
    m["decoder"], m["decoder_int8_cache"] = m["decoder_int8_cache"], m["decoder"]


def of_an_earlier_schema(m: dict[str, Any]) -> None:
    m["schema_version"] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_type, "the manifest says"),
        (same_file, "for both types of cache"),
        (not_listed, "as decoder_int8_cache.file and does not list it"),
        (exchanged, "decoder with int8 cache: inputs: past_key_values.0.key is float32"),
        (of_an_earlier_schema, "fields of a later schema_version"),
    ],
)
def test_a_manifest_that_does_not_fit_its_second_graph_is_refused(
    artifact: Path, tmp_path: Path, change: Change, message: str
) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(artifact, folder)
    path = folder / "manifest.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(seal(document))

    with pytest.raises(ArtifactError, match=message):
        LlavaEdge.load(folder, threads=1)


def test_a_graph_without_scales_of_a_layer_is_refused(artifact: Path, tmp_path: Path) -> None:
    from tests.faults.models.tamper import Tampered

    copy = Tampered(artifact, tmp_path / "copy")
    graph = copy.model("decoder_int8_cache").graph
    (scale,) = (t for t in graph.initializer if t.name == scale_names(1)[1])
    graph.initializer.remove(scale)

    with pytest.raises(ArtifactError, match=r"layers\.1\.self_attn\.v_scale is None; an int8"):
        check_interfaces(open_artifact(copy.seal()))
