"""An artifact opens when it is what its manifest says, and is refused by name when it is not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from llava_edge.convert.onnx.embeddings import write_embeddings
from llava_edge.convert.output.artifact_writer import ArtifactWriter, write_certificate
from llava_edge.profiles.errors import ArtifactError
from llava_edge.profiles.models.model_dims import ModelDims, TextDims, VisionDims
from llava_edge.runtime.artifact import open as artifact_module
from llava_edge.runtime.artifact.certificate import Certificate, StageResult
from llava_edge.runtime.artifact.manifest import (
    SCHEMA_VERSION,
    GraphSpec,
    ImageProcessing,
    Manifest,
    Precision,
    Source,
    TensorSpec,
    TokenIds,
)
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util.checksummed_json import seal
from llava_edge.runtime.util.json_codec import to_json

FILES = (
    "vision/model.onnx",
    "vision/weights.bin",
    "decoder/model.onnx",
    "decoder/weights.bin",
    "embeddings.safetensors",
    "tokenizer.json",
)
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def manifest() -> Manifest:
    """The manifest of a model with a hidden size of 4 and 7 embedding rows; no files yet."""
    vision = VisionDims(4, 8, 2, 2, 28, 14, 1e-5, "quick_gelu", (1,), "gelu", True)
    text = TextDims(
        "llama", 7, 4, 8, 1, 2, 2, 2, 1e-6, 1e4, 1.0, 64, "silu", False, False, False, (0,), False
    )
    x, y = TensorSpec("x", "float32", ("n", 4)), TensorSpec("y", "float32", ("n", 4))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        variant="toy",
        target="cpu",
        precision=Precision("fp32", "fp32", "fp32", "fp16", "float32"),
        plan={},
        model=ModelDims("llava_next", vision, text, ((28, 56),), 6, None),
        image_processing=ImageProcessing(
            28, 14, ((28, 56),), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255
        ),
        tokens=TokenIds(image=6, video=None, bos=1, stop=(2,), num_text_tokens=7),
        prompt=None,
        vision=GraphSpec("vision/model.onnx", (x,), (y,)),
        decoder=GraphSpec("decoder/model.onnx", (x,), (y,)),
        embeddings="embeddings.safetensors",
        tokenizer="tokenizer.json",
        context_tokens=64,
        source=Source("toy", None, "0" * 64, "hf"),
        reference="none",
        tools={"llava-edge": "0.1.0"},
        conversion={},
        files={},
    )


def toy_graph(*, location: str = "weights.bin", offset: str = "0", op: str = "MatMul") -> bytes:
    """``y = x @ w`` with ``w`` float32 [4, 4] outside the graph."""
    weight = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location="EXTERNAL"
    )
    for key, value in (("location", location), ("offset", offset), ("length", "64")):
        weight.external_data.add(key=key, value=value)
    shape: list[str | int | None] = ["n", 4]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"])],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight],
    )
    imports = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, ir_version=10, opset_imports=imports)
    return bytes(model.SerializeToString())


def build_graph(part: str, **options: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / part).mkdir()
        (folder / part / "model.onnx").write_bytes(toy_graph(**options))
        (folder / part / "weights.bin").write_bytes(np.eye(4, dtype=np.float32).tobytes())

    return build


def build_texts(folder: Path) -> None:
    write_embeddings(folder / "embeddings.safetensors", [np.ones((7, 4))], np.ones(4))
    (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def issue(make_certificate: Callable[..., Certificate]) -> Callable[..., Path]:
    """``issue(folder, **changes)``: writes a certificate that says passed, but for the changes."""

    def write(folder: Path, **changes: Any) -> Path:
        return write_certificate(folder, to_json(make_certificate(**changes)))

    return write


@pytest.fixture
def toy(tmp_path: Path, manifest: Manifest, issue: Callable[..., Path]) -> Path:
    """A whole artifact with a certificate that says passed."""
    with ArtifactWriter(tmp_path / "toy", {}) as writer:
        writer.part("vision", build_graph("vision"))
        writer.part("decoder", build_graph("decoder"))
        writer.part("texts", build_texts)
        folder = writer.finish(manifest, "a toy\n")
    issue(folder)
    return folder


def edit_manifest(folder: Path, edit: Edit) -> None:
    """Change the manifest and seal it again, as somebody who knows how would."""
    document = json.loads((folder / "manifest.json").read_text())
    edit(document)
    (folder / "manifest.json").write_bytes(seal(document))


def relist(folder: Path, name: str) -> None:
    """Enter a changed or added file into the manifest."""
    data = (folder / name).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(folder, lambda document: document["files"].update({name: entry}))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_whole_artifact_opens_verified(toy: Path, manifest: Manifest) -> None:
    artifact = open_artifact(toy, require_verified=True)
    assert artifact.verified
    assert artifact.certificate is not None
    assert artifact.certificate.passed is True
    assert artifact.path("vision/model.onnx") == toy / "vision/model.onnx"
    assert set(artifact.manifest.files) == set(FILES)
    blank = dataclasses.replace(artifact.manifest, files={}, self_sha256="")
    assert blank == manifest
    assert (
        artifact.manifest_sha256 == hashlib.sha256((toy / "manifest.json").read_bytes()).hexdigest()
    )


def test_a_link_to_the_artifact_is_followed(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(toy)
    assert open_artifact(tmp_path / "link").folder == toy.resolve()


def test_a_path_that_is_not_listed_has_no_place(toy: Path) -> None:
    with pytest.raises(ArtifactError, match="lists no file"):
        open_artifact(toy).path("../secret")


@pytest.mark.parametrize("where", [0, 0.5, -1], ids=["first byte", "middle byte", "last byte"])
@pytest.mark.parametrize("name", [*FILES, "manifest.json", "certificate.json"])
def test_one_changed_byte_is_refused_by_name(toy: Path, name: str, where: float) -> None:
    size = (toy / name).stat().st_size
    flip(toy / name, int(size * where) if where >= 0 else size - 1)
    with pytest.raises(ArtifactError, match=re.escape(name)):
        open_artifact(toy)


def test_every_single_changed_byte_of_the_manifest_is_refused(toy: Path) -> None:
    path = toy / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flip(path, position)
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            artifact_module.read_manifest(toy)
        path.write_bytes(whole)


def test_digests_are_left_out_only_when_asked(toy: Path) -> None:
    flip(toy / "tokenizer.json", 0)
    open_artifact(toy, verify_digests=False)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is damaged"):
        open_artifact(toy)


@pytest.mark.parametrize("name", ["gptq/model.safetensors", "engines/vision.engine"])
def test_what_opening_does_not_use_is_hashed_only_when_everything_is(toy: Path, name: str) -> None:
    (toy / name).parent.mkdir()
    (toy / name).write_bytes(b"weights")
    relist(toy, name)
    (toy / name).write_bytes(b"WEIGHTS")
    open_artifact(toy)
    with pytest.raises(ArtifactError, match=rf"{name} is damaged"):
        open_artifact(toy, hash_everything=True)
    (toy / name).write_bytes(b"short")
    with pytest.raises(ArtifactError, match="has 5 bytes"):
        open_artifact(toy)


def test_a_missing_file_is_named(toy: Path) -> None:
    (toy / "decoder/weights.bin").unlink()
    (toy / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"decoder/weights\.bin is missing\n.*tokenizer\.json"):
        open_artifact(toy)


@pytest.mark.parametrize("name", ["extra.bin", "vision/extra.bin", "manifest.json.bak", "vision/x"])
def test_a_file_that_is_not_listed_is_refused(toy: Path, name: str) -> None:
    (toy / name).write_bytes(b"")
    with pytest.raises(ArtifactError, match=re.escape(name)):
        open_artifact(toy)


def test_the_card_may_be_changed_or_missing(toy: Path) -> None:
    (toy / "README.md").write_text("my own words")
    open_artifact(toy)
    (toy / "README.md").unlink()
    open_artifact(toy)


LEFT_BY_TOOLS = (
    ".gitattributes",
    ".DS_Store",
    "vision/.DS_Store",
    "decoder/.nfs000000001",
    ".cache/huggingface/.gitignore",
    ".cache/huggingface/download/vision/model.onnx.metadata",
    ".git/objects/pack/deep/deeper/deepest/pack.idx",
)


@pytest.mark.parametrize("name", LEFT_BY_TOOLS)
def test_what_tools_leave_under_names_with_a_dot_is_not_looked_at(toy: Path, name: str) -> None:
    (toy / name).parent.mkdir(parents=True, exist_ok=True)
    (toy / name).write_bytes(b"anything")
    os.mkfifo((toy / name).with_name(".pipe"))
    (toy / ".link").symlink_to("/nowhere")
    (toy / ".folder").symlink_to(toy.parent)
    assert open_artifact(toy, require_verified=True).verified


def test_a_listed_name_with_a_dot_is_checked_like_any_other(toy: Path) -> None:
    (toy / ".more").mkdir()
    (toy / ".more/data.bin").write_bytes(b"listed")
    relist(toy, ".more/data.bin")
    open_artifact(toy)
    (toy / ".more/data.bin").write_bytes(b"LISTED")
    with pytest.raises(ArtifactError, match=r"\.more/data\.bin is damaged"):
        open_artifact(toy)
    (toy / ".more/other.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"\.more/other\.bin is not listed"):
        open_artifact(toy)


def link_into_blobs(toy: Path, blobs: Path) -> None:
    """Every file becomes a relative link to a blob named by its digest, as in a hub's cache."""
    blobs.mkdir()
    for file in [path for path in toy.rglob("*") if path.is_file()]:
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.replace(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))


def test_files_may_be_links_to_files(toy: Path, tmp_path: Path) -> None:
    link_into_blobs(toy, tmp_path / "blobs")
    artifact = open_artifact(toy, require_verified=True, hash_everything=True)
    assert artifact.verified
    assert artifact.files["tokenizer.json"].read(100) == (toy / "tokenizer.json").read_bytes()

    (toy / "tokenizer.json").resolve().write_bytes(b"?" * artifact.files["tokenizer.json"].size)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is damaged"):
        open_artifact(toy)
    (toy / "tokenizer.json").resolve().write_bytes(b"shorter")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json has 7 bytes"):
        open_artifact(toy)


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "certificate.json"])
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("missing", "is a link to .*missing, where there is nothing"),
        ("circle", "leads in a circle"),
        ("folder", "is a link to a folder"),
        ("pipe", "regular file"),
        ("/dev/zero", "regular file"),
    ],
)
def test_a_link_to_anything_but_a_file_is_refused(
    toy: Path, tmp_path: Path, name: str, target: str, reason: str
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (toy / name).unlink()
    (toy / name).symlink_to(tmp_path / target)
    with pytest.raises(ArtifactError, match=f"{re.escape(name)}.*{reason}"):
        open_artifact(toy)


def test_a_link_to_a_folder_is_refused_although_its_files_are_right(
    toy: Path, tmp_path: Path
) -> None:
    (toy / "vision").rename(tmp_path / "moved")
    (toy / "vision").symlink_to(tmp_path / "moved")
    with pytest.raises(ArtifactError, match="vision is a link to a folder"):
        open_artifact(toy)


def test_an_opened_artifact_reads_what_was_hashed_whatever_its_names_stand_for(toy: Path) -> None:
    before = {name: (toy / name).read_bytes() for name in FILES}
    artifact = open_artifact(toy)
    for name in FILES:
        (toy / name).rename(toy / "old")
        (toy / name).write_bytes(b"another")
    assert {name: artifact.files[name].read(1 << 20) for name in FILES} == before


def test_closing_an_artifact_gives_all_descriptors_back(toy: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    artifact = open_artifact(toy)
    assert len(os.listdir("/proc/self/fd")) >= before + len(FILES)
    artifact.close()
    artifact.close()
    assert len(os.listdir("/proc/self/fd")) == before
    open_artifact(toy)
    assert len(os.listdir("/proc/self/fd")) == before, "nobody holds it"


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "certificate.json"])
def test_an_artifact_that_is_refused_leaves_nothing_open(toy: Path, name: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    flip(toy / name, (toy / name).stat().st_size // 2)
    with pytest.raises(ArtifactError) as refused:
        open_artifact(toy)
    assert len(os.listdir("/proc/self/fd")) == before, refused.value


@pytest.mark.parametrize("name", ["manifest.json", "certificate.json", "tokenizer.json"])
def test_a_pipe_in_place_of_a_file_does_not_block(toy: Path, name: str) -> None:
    (toy / name).unlink()
    os.mkfifo(toy / name)
    with pytest.raises(ArtifactError, match=r"no regular file|not a regular file"):
        open_artifact(toy)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "vision/../../secret",
        "/etc/passwd",
        "",
        ".",
        "vision//weights.bin",
        "./tokenizer.json",
        "a\\b",
        "a\x00b",
        "a b\n",
        "a/b/c/d/e",
        "manifest.json",
        "certificate.json",
        "README.md",
    ],
)
def test_a_listed_name_that_leads_elsewhere_is_refused(toy: Path, name: str) -> None:
    entry = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    edit_manifest(toy, lambda document: document["files"].update({name: entry}))
    with pytest.raises(ArtifactError, match=r"plain path|not to be listed"):
        open_artifact(toy)


def test_a_schema_of_the_future_names_the_tool_that_reads_it(toy: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        document.update(schema_version=99, something_new={"a": 1}, tools={"llava-edge": "7.2.0"})

    edit_manifest(toy, edit)
    with pytest.raises(ArtifactError, match=r"schema_version 99.*Install llava-edge 7\.2\.0"):
        open_artifact(toy)


@pytest.mark.parametrize("value", [None, "1", True, 0, -1, 1.0], ids=repr)
def test_a_schema_version_that_never_was_is_refused(toy: Path, value: object) -> None:
    edit_manifest(toy, lambda document: document.update(schema_version=value))
    with pytest.raises(ArtifactError, match="schema_version"):
        open_artifact(toy)


def with_prompt(**changes: object) -> Edit:
    """Gives a manifest a prompt format."""
    turn = {"before": "", "after": ""}
    prompt = {
        **{"source": "template", "family": "vicuna", "prefix": "", "default_system": ""},
        **{"system": turn, "user": turn, "user_after_system": "", "assistant": turn},
        **{"generation_prompt": "", "image": "<image>", "video": "<video>", "special_tokens": []},
    }
    return lambda document: document.update(prompt={**prompt, **changes})


def test_a_prompt_format_may_leave_out_what_it_does_not_use(toy: Path) -> None:
    edit_manifest(toy, with_prompt())
    assert open_artifact(toy).manifest.prompt is not None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_prompt(image="none"), r"prompt\.image is 'none'; it must hold one <image>"),
        (with_prompt(video="<video><video>"), r"prompt\.video"),
        (with_prompt(part_order=[["image"], ["text"]]), "must name each kind once"),
        (with_prompt(part_order=[["image", "text", "video", "text"]]), "must name each kind once"),
        (with_prompt(dates=["%999999999d"]), "no plain form of a date"),
        (
            with_prompt(assistant={"before": "", "after": "", "cut": {"through": ""}}),
            "at an empty mark",
        ),
        (
            with_prompt(system={"before": "", "after": "", "copies": [{"before": ""}] * 9}),
            "copies a text more than 8 times",
        ),
        (with_prompt(joints=[{"left": "end", "right": "text", "text": ""}]), "allowed are"),
        (lambda d: d.update(extra=1), r"unknown keys: extra"),
        (lambda d: d["model"]["text"].update(extra=1), r"text has unknown keys"),
        (lambda d: d.pop("source"), "lacks keys: source"),
        (lambda d: d["model"]["text"].update(num_attention_heads=0), "num_attention_heads is 0"),
        (lambda d: d["model"]["text"].update(vocab_size=1 << 40), "vocab_size is"),
        (lambda d: d["model"]["text"].update(sliding_windows=[]), "one window a layer"),
        (lambda d: d["model"]["vision"].update(feature_layers=[]), "outside the tower"),
        (lambda d: d["image_processing"].update(tile_size=0), "tile_size is 0"),
        (lambda d: d["image_processing"].update(image_std=[0, 1, 1]), "impossible"),
        (lambda d: d["image_processing"].update(image_grid_pinpoints=[[28, 29]]), "multiples"),
        (lambda d: d["tokens"].update(image=-1), r"tokens\.image is -1"),
        (lambda d: d["tokens"].update(stop=[-5]), r"tokens\.stop"),
        (lambda d: d["tokens"].update(num_text_tokens=8), r"num_text_tokens is 8 of 7"),
        (lambda d: d.update(context_tokens=0), "context_tokens is 0"),
        (lambda d: d.update(flavour="tpu"), "flavour is 'tpu'"),
        (lambda d: d.update(embeddings="other.safetensors"), "does not list it"),
        (lambda d: d["vision"].update(file="tokenizer.json"), r"not an \.onnx file"),
        (lambda d: d["vision"].update(inputs=[]), "lists 0"),
        (lambda d: d["vision"]["inputs"][0].update(name="z"), "manifest says z"),
        (lambda d: d["decoder"]["outputs"][0].update(dtype="float16"), "manifest says y float16"),
        (lambda d: d["decoder"]["inputs"][0].update(shape=["n", 5]), "manifest says x"),
        (lambda d: d["decoder"]["inputs"][0].update(shape=[True, 4]), "has a size True"),
        (lambda d: d["files"]["tokenizer.json"].update(sha256="00"), "impossible size or digest"),
    ],
)
def test_a_well_sealed_manifest_with_an_impossible_value_is_refused(
    toy: Path, edit: Edit, message: str
) -> None:
    edit_manifest(toy, edit)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(toy)


def test_several_faults_are_reported_together(toy: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["model"]["text"]["head_dim"] = 0
        document["context_tokens"] = -1

    edit_manifest(toy, edit)
    with pytest.raises(ArtifactError, match=r"head_dim is 0(.|\n)*context_tokens is -1"):
        open_artifact(toy)


def test_an_oversized_manifest_is_refused_before_it_is_parsed(toy: Path) -> None:
    (toy / "manifest.json").write_bytes(b"[" * ((8 << 20) + 1))
    with pytest.raises(ArtifactError, match=r"at most 8\.0 MiB are read"):
        open_artifact(toy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "If"}, "outside the allowed set: If"),
        ({"location": "../vision/weights.bin"}, "no plain file name"),
        ({"location": "/etc/passwd"}, "no plain file name"),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "no plain file name"),
        ({"location": "secret.bin"}, "does not list beside the graph"),
        ({"offset": "4"}, r"ends at 68; weights\.bin has 64"),
    ],
)
def test_a_graph_that_reaches_too_far_is_refused_even_if_listed(
    toy: Path, options: dict[str, str], message: str
) -> None:
    (toy / "decoder/model.onnx").write_bytes(toy_graph(**options))
    relist(toy, "decoder/model.onnx")
    with pytest.raises(ArtifactError, match=message):
        open_artifact(toy)


def test_graphs_that_the_manifest_does_not_name_are_judged_too(toy: Path) -> None:
    (toy / "decoder/second.onnx").write_bytes(toy_graph(op="Loop"))
    relist(toy, "decoder/second.onnx")
    with pytest.raises(ArtifactError, match=r"second\.onnx(.|\n)*Loop"):
        open_artifact(toy)


@pytest.mark.parametrize("folder", ["gptq", "engines"])
def test_a_graph_cannot_hide_where_nothing_is_judged(toy: Path, folder: str) -> None:
    (toy / folder).mkdir()
    name = f"{folder}/model.onnx"
    (toy / name).write_bytes(toy_graph(op="Loop"))
    relist(toy, name)
    open_artifact(toy)
    edit_manifest(toy, lambda document: document["vision"].update(file=name))
    with pytest.raises(ArtifactError, match=rf"{name}' as vision\.file, in a folder that is not"):
        open_artifact(toy)


def test_what_the_checks_let_through_runs(toy: Path) -> None:
    session = onnxruntime.InferenceSession(open_artifact(toy).path("vision/model.onnx"))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x)


def test_without_certificate_there_is_a_warning_and_nothing_is_claimed(
    toy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (toy / "certificate.json").unlink()
    with caplog.at_level(logging.WARNING):
        artifact = open_artifact(toy)
    assert not artifact.verified
    assert artifact.certificate is None
    assert "has no certificate.json" in caplog.text
    with pytest.raises(ArtifactError, match="a verified artifact is required"):
        open_artifact(toy, require_verified=True)


def test_a_certificate_for_another_manifest_does_not_count(
    toy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_manifest(toy, lambda document: document.update(variant="toy2"))
    with caplog.at_level(logging.WARNING):
        artifact = open_artifact(toy)
    assert not artifact.verified
    assert artifact.certificate is not None
    assert "issued for another manifest.json" in caplog.text
    with pytest.raises(ArtifactError, match="issued for another"):
        open_artifact(toy, require_verified=True)


FAILED = StageResult("packing", "differing", 1.0, 0.0, "fail")
OPEN = StageResult("greedy", "differing_tokens", 0.0, 0.0, "inconclusive")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"passed": False, "verdict": "fail", "stages": (OPEN, FAILED)},
            "verification failed (packing)",
        ),
        (
            {"passed": False, "verdict": "inconclusive", "stages": (OPEN,)},
            "the evidence did not suffice (greedy)",
        ),
        (
            {"passed": False, "verdict": "inconclusive", "mode": "none", "stages": ()},
            "verification was left out (--verify none)",
        ),
        ({"passed": False}, "verification did not pass"),
        ({"stages": (FAILED,)}, "its stages do not bear that out"),
        ({"stages": ()}, "its stages do not bear that out"),
        ({"target": "cuda"}, "speaks of the cuda target; the artifact is for the cpu target"),
    ],
)
def test_a_certificate_that_does_not_say_passed_for_it_leaves_an_artifact_unverified(
    toy: Path,
    issue: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    reason: str,
) -> None:
    issue(toy, **changes)
    with caplog.at_level(logging.WARNING):
        artifact = open_artifact(toy)
    assert not artifact.verified
    assert artifact.certificate is not None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert reason in caplog.text
    with pytest.raises(ArtifactError, match=re.escape(reason)):
        open_artifact(toy, require_verified=True)


def test_a_certificate_of_a_newer_schema_names_its_reader_and_does_not_count(
    toy: Path, issue: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = issue(toy)
    document = json.loads(path.read_text())
    document.update(schema_version=3, something_new=[1], tools={"llava-edge": "7.2.0"})
    path.write_bytes(seal(document))
    with caplog.at_level(logging.WARNING):
        artifact = open_artifact(toy)
    assert not artifact.verified
    assert artifact.certificate is None
    assert "schema_version 3" in caplog.text
    assert "llava-edge 7.2.0 reads it" in caplog.text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("schema_version"), "states no schema_version"),
        (lambda d: d.update(schema_version=True), "states no schema_version"),
        (lambda d: d.update(schema_version=0), "states no schema_version"),
        (lambda d: d.pop("manifest_sha256"), "does not say which manifest"),
        (lambda d: d.pop("passed"), "lacks keys: passed"),
        (lambda d: d.update(passed="yes"), r"passed must be bool"),
        (lambda d: d.update(verdict="fine"), "verdict is 'fine'"),
        (lambda d: d.update(more=1), "unknown keys: more"),
        (lambda d: d["host"].update(cpu=None), r"host\.cpu must be str"),
        (lambda d: d["stages"][0].update(value="0"), r"stages\[0\]\.value must be float"),
        (lambda d: d.update(stages={}), "stages must be a list"),
    ],
)
def test_a_well_sealed_certificate_that_is_none_is_refused(
    toy: Path, edit: Edit, message: str
) -> None:
    document = json.loads((toy / "certificate.json").read_text())
    edit(document)
    (toy / "certificate.json").write_bytes(seal(document))
    with pytest.raises(ArtifactError, match=rf"certificate\.json.*{message}"):
        open_artifact(toy)


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / name)


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        open_artifact(tmp_path)


def test_a_folder_with_too_many_files_is_given_up(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_module, "MAX_FILES", 2)
    with pytest.raises(ArtifactError, match="holds more than 6 files"):
        open_artifact(toy)


def test_a_name_that_is_no_text_is_shown_as_escapes(toy: Path) -> None:
    (toy / os.fsdecode(b"\xff\x1b[2J")).write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"\\udcff\\x1b\[2J is not listed"):
        open_artifact(toy)
