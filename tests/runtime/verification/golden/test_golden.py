"""Golden probes come back as they were written, and a malformed file is refused with its reason."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from llava_edge.profiles.errors import ArtifactError, ExportError
from llava_edge.profiles.models.model_dims import ModelDims, TextDims, VisionDims
from llava_edge.runtime.artifact.manifest import (
    SCHEMA_VERSION,
    GraphSpec,
    ImageProcessing,
    Manifest,
    Precision,
    Source,
    TokenIds,
    VideoProcessing,
)
from llava_edge.runtime.util.opened_file import OpenedFile
from llava_edge.runtime.verification.golden.probes import (
    GOLDEN_LIMIT,
    LOOP_LIMIT,
    GoldenProbe,
    golden_bytes,
    parse_golden,
    read_golden,
    read_golden_loop,
)

VOCAB, HIDDEN, CONTEXT, IMAGE = 50, 4, 64, 60
NAMES = [field.name for field in dataclasses.fields(GoldenProbe)]


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """Of a model with tiles of 28 pixels, four patches each; the image mark is beyond the table."""
    vision = VisionDims(4, 8, 2, 2, 28, 14, 1e-5, "quick_gelu", (1,), "gelu", True)
    text = TextDims(
        "llama", VOCAB, HIDDEN, 8, 1, 2, 2, 2, 1e-6, 1e4, 1.0, 64, "silu", False, False, False,
        (0,), False,
    )  # fmt: skip
    graph = GraphSpec("model.onnx", (), ())
    return Manifest(
        schema_version=SCHEMA_VERSION,
        variant="toy",
        target="cpu",
        precision=Precision("fp16", "fp16", "fp16", "fp16", "float32"),
        plan={},
        model=ModelDims("llava_next", vision, text, ((28, 56),), IMAGE, None),
        image_processing=ImageProcessing(28, 14, ((28, 56),), (0.5,) * 3, (0.5,) * 3, 1 / 255),
        tokens=TokenIds(image=IMAGE, video=None, bos=1, stop=(2,), num_text_tokens=VOCAB),
        prompt=None,
        vision=graph,
        decoder=graph,
        embeddings="",
        tokenizer="",
        context_tokens=CONTEXT,
        source=Source("toy", None, "0" * 64, "hf"),
        reference="none",
        tools={},
        conversion={},
        files={},
    )


@pytest.fixture
def probe() -> GoldenProbe:
    random = np.random.default_rng(0)
    logits = np.sort(random.normal(size=(4, 5)).astype(np.float32), axis=1)[:, ::-1].copy()
    return GoldenProbe(
        name="a picture",
        prompt="What is “this”?",
        images=(random.integers(0, 256, (28, 56, 3), np.uint8),),
        ids=np.array([1, IMAGE, IMAGE, 7, 49]),
        pixel_sha256="ab" * 32,
        feature_rows=np.array([0, 5, 11]),
        features=random.normal(size=(3, HIDDEN)).astype(np.float32),
        forced=np.array([3, 4, 5]),
        logit_ids=np.array([0, 10, 20, 30, 49]),
        logits=logits,
        top_ids=np.array([[1, 2], [3, 4], [5, 6], [7, 8]]),
        top_logits=logits[:, :2].copy(),
        ranges=np.full(4, 8.0, np.float32),
    )


def without_images(probe: GoldenProbe) -> GoldenProbe:
    return dataclasses.replace(
        probe,
        images=(),
        feature_rows=np.empty(0, np.int64),
        features=np.empty((0, HIDDEN), np.float32),
    )


def test_probes_come_back_as_they_were(
    probe: GoldenProbe, manifest: Manifest, tmp_path: Path
) -> None:
    second = dataclasses.replace(without_images(probe), name="words alone")
    (tmp_path / "golden").write_bytes(golden_bytes([probe, second], manifest))

    found = read_golden(OpenedFile(tmp_path / "golden"), manifest)

    for given, read in zip((probe, second), found, strict=True):
        for name in NAMES:
            np.testing.assert_array_equal(getattr(read, name), getattr(given, name), err_msg=name)
    assert found[0].logits.dtype == np.float32
    assert found[0].ids.dtype == np.int64
    assert found[0].images[0].dtype == np.uint8


def video_manifest(manifest: Manifest) -> Manifest:
    """Of a model whose frames have one token each."""
    return dataclasses.replace(
        manifest,
        model=dataclasses.replace(manifest.model, model_type="llava_next_video"),
        video_processing=VideoProcessing(28, (0.5,) * 3, (0.5,) * 3, 1 / 255, 4),
    )


def with_video(probe: GoldenProbe, frames: int = 3) -> GoldenProbe:
    pixels = np.random.default_rng(1).integers(0, 256, (frames, 30, 40, 3), np.uint8)
    return dataclasses.replace(
        without_images(probe),
        video=pixels,
        feature_rows=np.arange(frames),
        features=np.ones((frames, HIDDEN), np.float32),
    )


def test_a_video_comes_back_as_it_was(probe: GoldenProbe, manifest: Manifest) -> None:
    takes = video_manifest(manifest)
    given = with_video(probe)

    (read,) = parse_golden(golden_bytes([given], takes), takes, "golden")

    assert given.video is not None
    assert read.video is not None
    np.testing.assert_array_equal(read.video, given.video)
    assert parse_golden(golden_bytes([probe], takes), takes, "golden")[0].video is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"video": np.zeros((5, 30, 40, 3), np.uint8)}, "not 1 to 4 frames"),
        ({"video": np.zeros((0, 30, 40, 3), np.uint8)}, "not 1 to 4 frames"),
        ({"video": np.zeros((3, 30, 40, 4), np.uint8)}, "not 1 to 4 frames"),
        ({"video": np.zeros((3, 30, 40, 3), np.float32)}, "float32, not uint8"),
        ({"feature_rows": np.array([0, 1, 3])}, "outside the 3"),
    ],
)
def test_a_video_that_cannot_be_is_not_written(
    probe: GoldenProbe, manifest: Manifest, changes: dict[str, Any], named: str
) -> None:
    wrong = dataclasses.replace(with_video(probe), **changes)

    with pytest.raises(ExportError, match=named):
        golden_bytes([wrong], video_manifest(manifest))


def test_a_model_without_videos_has_no_probe_of_one(probe: GoldenProbe, manifest: Manifest) -> None:
    with pytest.raises(ExportError, match="not 1 to 0 frames"):
        golden_bytes([with_video(probe)], manifest)


def test_the_file_is_what_the_safetensors_library_reads(
    probe: GoldenProbe, manifest: Manifest
) -> None:
    tensors = load(golden_bytes([probe], manifest))

    assert set(tensors) >= {"0.ids", "0.features", "0.images.0"}
    np.testing.assert_array_equal(tensors["0.logits"], probe.logits)


def test_a_value_about_the_loop_comes_back_as_it_was(
    probe: GoldenProbe, manifest: Manifest, tmp_path: Path
) -> None:
    given = {"stop": ["a”b"], "seeds": [1, 2.5, None], "more": {"x": True}}
    (tmp_path / "golden").write_bytes(golden_bytes([probe], manifest, given))
    (tmp_path / "without").write_bytes(golden_bytes([probe], manifest))

    assert read_golden_loop(OpenedFile(tmp_path / "golden")) == given
    assert len(read_golden(OpenedFile(tmp_path / "golden"), manifest)) == 1
    assert read_golden_loop(OpenedFile(tmp_path / "without")) is None


def test_a_value_about_the_loop_is_bounded(probe: GoldenProbe, manifest: Manifest) -> None:
    with pytest.raises(ExportError, match="about the loop has"):
        golden_bytes([probe], manifest, "x" * (LOOP_LIMIT + 1))


def test_a_file_of_the_first_format_is_still_read(probe: GoldenProbe, manifest: Manifest) -> None:
    def first(header: dict[str, Any]) -> None:
        header["__metadata__"]["format"] = "llava-edge golden 1"

    data = rewritten(golden_bytes([probe], manifest), first)
    (read,) = parse_golden(data, manifest, "here")
    np.testing.assert_array_equal(read.logits, probe.logits)

    data = rewritten(golden_bytes([probe], manifest, [1]), first)
    with pytest.raises(ArtifactError, match="does not say what it is"):
        parse_golden(data, manifest, "here")


def test_the_same_probes_give_the_same_bytes(probe: GoldenProbe, manifest: Manifest) -> None:
    assert golden_bytes([probe], manifest) == golden_bytes([probe], manifest)


Change = Callable[[GoldenProbe], dict[str, Any]]


def changed(name: str, at: Any, value: Any) -> Change:
    """One entry of one array."""

    def change(probe: GoldenProbe) -> dict[str, Any]:
        array = getattr(probe, name).copy()
        array[at] = value
        return {name: array}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("ids", 0, -1), "no embedding"),
        (changed("ids", 0, VOCAB), "no embedding"),
        (changed("forced", 0, VOCAB), "forced holds an id"),
        (changed("logit_ids", 0, -1), "logit_ids holds an id"),
        (changed("top_ids", (0, 0), VOCAB), "top_ids holds an id"),
        (changed("feature_rows", 0, 12), "outside the 12 of its images"),
        (changed("feature_rows", 0, -1), "outside the 12 of its images"),
        (changed("features", (0, 0), np.nan), "not finite"),
        (changed("logits", (0, 0), np.inf), "not finite"),
        (changed("ranges", 0, 0), "not above zero"),
        (changed("top_logits", (0, 1), 99), "best first"),
        (lambda p: {"features": p.features[:, :3]}, r"features is \[3, 3\], not \[3, 4\]"),
        (lambda p: {"features": p.features[:2]}, r"features is \[2, 4\], not \[3, 4\]"),
        (lambda p: {"logits": p.logits[:3]}, r"logits is \[3, 5\], not \[4, 5\]"),
        (lambda p: {"top_ids": p.top_ids[:, :1]}, r"top_ids is \[4, 1\]"),
        (lambda p: {"ranges": p.ranges[:2]}, r"ranges is \[2\], not \[4\]"),
        (lambda p: {"ids": p.ids[:0]}, "0 tokens"),
        (lambda p: {"ids": np.ones(CONTEXT - 2, np.int64)}, "62 tokens and 3 forced ones"),
        (lambda p: {"ids": p.ids[None]}, "not I64 of 1 axes"),
        (lambda p: {"images": (np.zeros((28, 56, 4), np.uint8),)}, r"not \(height, width, 3\)"),
        (lambda p: {"images": (np.zeros((0, 56, 3), np.uint8),)}, r"not \(height, width, 3\)"),
        (lambda p: {"images": (np.zeros((28, 56, 3), np.float32),)}, "float32, not uint8"),
        (lambda p: {"images": ()}, "outside the 0 of its images"),
        (
            lambda p: {"feature_rows": p.feature_rows[:0], "features": p.features[:0]},
            "0 features are kept of 1 images",
        ),
        (
            lambda p: {"logit_ids": p.logit_ids[:0], "logits": p.logits[:, :0]},
            "no logits are kept",
        ),
        (lambda p: {"pixel_sha256": "ab"}, "impossible name or digest"),
        (lambda p: {"name": ""}, "impossible name or digest"),
        (lambda p: {"name": "a\x1b[2J"}, "impossible name or digest"),
    ],
)
def test_a_probe_that_cannot_be_of_this_model_is_not_written(
    probe: GoldenProbe, manifest: Manifest, change: Change, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        golden_bytes([dataclasses.replace(probe, **change(probe))], manifest)


def test_a_file_beyond_its_limit_is_not_written(probe: GoldenProbe, manifest: Manifest) -> None:
    large = np.zeros((1 << 10, 1 << 11, 3), np.uint8)
    with pytest.raises(ExportError, match=f"at most {GOLDEN_LIMIT} are allowed"):
        golden_bytes([dataclasses.replace(probe, images=(large,))], manifest)


@pytest.mark.parametrize("count", [0, 33])
def test_the_number_of_probes_is_bounded(
    probe: GoldenProbe, manifest: Manifest, count: int
) -> None:
    with pytest.raises(ExportError, match="1 to 32 probes"):
        golden_bytes([probe] * count, manifest)


def test_a_file_cut_anywhere_is_refused(probe: GoldenProbe, manifest: Manifest) -> None:
    data = golden_bytes([probe], manifest)
    for length in [*range(0, 64), *range(64, len(data), 97), len(data) - 1]:
        with pytest.raises(ArtifactError, match="here holds no golden probes"):
            parse_golden(data[:length], manifest, "here")


def test_whatever_one_byte_becomes_it_is_read_or_refused(
    probe: GoldenProbe, manifest: Manifest
) -> None:
    whole = golden_bytes([probe], manifest)
    for position in range(8 + int.from_bytes(whole[:8], "little")):
        for value in (0, 0x22, 0x39, 0x7D, 0xFF):
            data = bytearray(whole)
            data[position] = value
            try:
                parse_golden(bytes(data), manifest, "here")
            except ArtifactError as error:
                assert "here" in str(error)  # noqa: PT017


def rewritten(data: bytes, edit: Callable[[dict[str, Any]], None], tail: bytes = b"") -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :] + tail


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h.pop("__metadata__"), "does not say what it is"),
        (lambda h: h["__metadata__"].update(format="golden 2"), "its format is 'golden 2'"),
        (lambda h: h["__metadata__"].update(more="1"), "does not say what it is"),
        (lambda h: h["__metadata__"].update(loop="{"), "its part about the loop is not valid"),
        (lambda h: h["__metadata__"].update(loop=1), "does not say what it is"),
        (lambda h: h["__metadata__"].update(probes="[1]"), "the texts of probe 0 are 1"),
        (lambda h: h["__metadata__"].update(probes="{"), "not valid JSON"),
        (lambda h: h.pop("0.ids"), "overlap or leave a gap|0.ids is missing"),
        (lambda h: h["0.ids"].update(dtype="F64"), r"'0\.ids' is"),
        (lambda h: h["0.ids"].update(dtype=["I64"]), r"'0\.ids' is"),
        (lambda h: h["0.ids"].update(dtype="F32"), "does not lie where its shape says"),
        (lambda h: h["0.ids"].update(shape=[-1, -5]), r"'0\.ids' is"),
        (lambda h: h["0.ids"].update(shape=[1 << 22, 1 << 22]), "does not lie where"),
        (lambda h: h["0.ids"].update(data_offsets=[40, 0]), "does not lie where"),
        (lambda h: h["0.ids"].update(data_offsets=[0, True]), r"'0\.ids' is"),
        (lambda h: h["0.forced"].update(h["0.top_ids"]), "overlap or leave a gap"),
        (lambda h: h.update({"0.more": h.pop("0.ids")}), "0.ids is missing"),
        (
            lambda h: h.update({"0.more": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
            "tensors of no probe",
        ),
        (lambda h: h.update(a=1), "'a' is 1"),
    ],
)
def test_a_header_that_says_something_else_is_refused(
    probe: GoldenProbe,
    manifest: Manifest,
    edit: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    data = rewritten(golden_bytes([probe], manifest), edit)
    with pytest.raises(ArtifactError, match=message):
        parse_golden(data, manifest, "here")


def test_bytes_behind_the_last_tensor_are_refused(probe: GoldenProbe, manifest: Manifest) -> None:
    data = rewritten(golden_bytes([probe], manifest), lambda header: None, tail=b"more")
    with pytest.raises(ArtifactError, match="4 bytes belong to no tensor"):
        parse_golden(data, manifest, "here")
