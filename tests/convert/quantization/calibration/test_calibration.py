from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from llava_edge.convert.quantization.calibration.calibration_set import CalibrationModel
from llava_edge.convert.quantization.calibration.conversations import (
    Conversation,
    read_conversations,
)
from llava_edge.convert.quantization.calibration.synthetic import draw_conversations
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.profiles.models.model_dims import STOCK_PINPOINTS
from llava_edge.runtime.artifact.open import Artifact, open_artifact

_STOCK = AnyRes(336, 14, STOCK_PINPOINTS, "hf")


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Artifact:
    return open_artifact(make_artifact(make_checkpoint("odd")))


@pytest.fixture
def model(artifact: Artifact) -> Iterator[CalibrationModel]:
    with _open(artifact) as opened:
        yield opened


def _open(artifact: Artifact, **changes: Any) -> CalibrationModel:
    manifest = artifact.manifest
    values: dict[str, Any] = {
        "dims": manifest.model,
        "tokens": manifest.tokens,
        "prompt": manifest.prompt,
        "processing": manifest.image_processing,
        "target": manifest.target,
        "context_tokens": manifest.context_tokens,
        "threads": 1,
        **changes,
    }
    return CalibrationModel.open(artifact.folder, **values)


def _conversation(image: Image.Image | bytes | None, name: str = "a") -> Conversation:
    opener = None if image is None else partial(_same, image)
    return Conversation(name, "What is it?", "A picture.", opener)


def _same(image: Image.Image | bytes) -> Image.Image | bytes:
    return image


def test_a_sample_is_what_the_reference_hands_its_language_model(
    model: CalibrationModel, make_checkpoint: Callable[..., Path], picture: Image.Image
) -> None:
    folder = make_checkpoint("odd")
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    reference = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    text = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A picture."}]},
        ]
    )
    batch = processor(images=picture, text=text, return_tensors="pt")
    seen: list[torch.Tensor] = []
    reference.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("hidden_states", *args[:1])),
        with_kwargs=True,
    )
    with torch.no_grad():
        reference(**batch)
    sample = model.prepare([_conversation(picture)], {}).samples[0]
    embedded = sample.embed()
    assert embedded.dtype == np.float32
    np.testing.assert_allclose(embedded, seen[0][0].numpy(), atol=2e-5)
    is_image = (batch["input_ids"][0] == reference.config.image_token_id).numpy()
    np.testing.assert_array_equal(sample.kinds > 0, is_image)


def test_a_graph_for_cuda_embeds_on_the_cpu_in_half_precision(
    model: CalibrationModel,
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    picture: Image.Image,
) -> None:
    half = open_artifact(make_artifact(make_checkpoint("odd"), profile="a100"))
    with _open(half) as opened:
        found = opened.prepare([_conversation(picture)], {}).samples[0].embed()
    exact = model.prepare([_conversation(picture)], {}).samples[0].embed()
    assert found.dtype == np.float32
    assert 0 < np.abs(found - exact).max() < 0.01 * np.abs(exact).max()


def test_text_alone_is_a_sample_and_counted(model: CalibrationModel, picture: Image.Image) -> None:
    found = model.prepare(
        [_conversation(None, "words"), _conversation(picture, "both")], {"source": "here"}
    )
    words = found.samples[0]
    assert set(words.kinds.tolist()) == {0}
    assert words.embed().shape == (len(words.kinds), 96)
    report = found.report
    assert (report["source"], report["num_samples"], report["num_text_only"]) == ("here", 2, 1)
    assert sum(report["tokens"].values()) == found.num_tokens
    # 600 x 400 pixels fit best into two by two tiles of 70.
    assert report["grids"] == {"2x2": 1}
    assert report["grids_without_sample"] == ["1x2", "2x1", "3x1", "1x3"]
    json.dumps(report, allow_nan=False)


def test_a_corrupt_image_and_a_missing_one_are_left_out_by_name(
    model: CalibrationModel,
    tmp_path: Path,
    picture: Image.Image,
    caplog: pytest.LogCaptureFixture,
) -> None:
    picture.save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    lines = [
        {"image": f"{name}.png", "question": "What?", "answer": "That."}
        for name in ("cut", "good", "gone")
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    conversations, source = read_conversations(tmp_path, _STOCK, limit=9, seed=0)
    with caplog.at_level(logging.WARNING):
        found = model.prepare(conversations, source)
    assert [sample.name for sample in found.samples] == ["a.jsonl:2"]
    left_out = found.report["left_out"]
    assert [each["sample"] for each in left_out] == ["a.jsonl:1", "a.jsonl:3"]
    assert "cut.png" in left_out[0]["reason"]
    assert "No such file" in left_out[1]["reason"]
    assert "a.jsonl:1 is left out" in caplog.text


def test_the_vision_graph_is_open_only_while_images_are_embedded(
    model: CalibrationModel, picture: Image.Image
) -> None:
    found = model.prepare([_conversation(None), _conversation(picture)], {})
    found.samples[0].embed()
    assert not model._encoder.is_open
    first = found.samples[1].embed()
    assert model._encoder.is_open
    found.embedded()
    assert not model._encoder.is_open
    np.testing.assert_array_equal(found.samples[1].embed(), first)


def test_nothing_left_is_refused_with_every_reason(model: CalibrationModel) -> None:
    broken = [_conversation(b"nothing", "first"), _conversation(b"GIF89a", "second")]
    with pytest.raises(RequestError, match=r"(?s)no calibration sample.*- first: .*- second: "):
        model.prepare(broken, {})


def test_a_sample_longer_than_the_context_is_left_out(artifact: Artifact) -> None:
    with (
        _open(artifact, context_tokens=10) as short,
        pytest.raises(RequestError, match=r"tokens; the context holds 10"),
    ):
        short.prepare([_conversation(None)], {})


def test_without_a_template_question_and_answer_stand_alone(
    artifact: Artifact, picture: Image.Image
) -> None:
    with _open(artifact, prompt=None) as plain, _open(artifact) as templated:
        bare = plain.prepare([_conversation(picture)], {}).samples[0]
        full = templated.prepare([_conversation(picture)], {}).samples[0]
    assert (bare.kinds > 0).sum() == (full.kinds > 0).sum()
    assert 0 < (bare.kinds == 0).sum() < (full.kinds == 0).sum()


def test_the_digest_knows_words_and_pixels(model: CalibrationModel, picture: Image.Image) -> None:
    other = picture.copy()
    other.putpixel((3, 3), (1, 2, 3))
    first = _conversation(picture)
    digests = [
        model.prepare([conversation], {}).digest
        for conversation in (
            first,
            replace(first, name="another name"),
            replace(first, answer="A image."),
            _conversation(other),
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_the_drawn_set_brings_every_grid_and_a_quarter_of_text() -> None:
    close = ((2, 3), (3, 2), (2, 2), (3, 3), (1, 2))
    anyres = AnyRes(28, 14, tuple((28 * r, 28 * c) for r, c in close), "hf")
    conversations, source = draw_conversations(anyres, count=80, seed=5)
    grids = []
    for conversation in conversations:
        if conversation.image is None:
            continue
        image = conversation.image()
        assert isinstance(image, Image.Image)
        layout = anyres.layout(image.height, image.width)
        grids.append((layout.rows, layout.columns))
    assert grids == list(close) * 12
    assert "drawn" in source["source"]
    assert all(c.question and c.answer for c in conversations)


def test_the_drawn_set_follows_from_its_seed() -> None:
    def looks(seed: int) -> list[object]:
        conversations, _ = draw_conversations(_STOCK, count=6, seed=seed)
        return [
            (c.question, c.answer, c.image and c.image().tobytes())  # type: ignore[union-attr]
            for c in conversations
        ]

    assert looks(1) == looks(1)
    assert looks(1) != looks(2)


def test_an_artifact_with_the_thumbnail_alone_gets_drawings_as_well() -> None:
    conversations, _ = draw_conversations(AnyRes(70, 14, (), "hf"), count=4)
    assert sum(c.image is not None for c in conversations) == 3


def test_a_stop_token_written_in_a_sample_is_text_and_ends_nothing(artifact: Artifact) -> None:
    (stop,) = artifact.manifest.tokens.stop
    written = Tokenizer.from_file(str(artifact.path("tokenizer.json"))).id_to_token(stop)
    plain = Conversation("plain", "Say more.", "It ends here and goes on.")
    marked = Conversation("marked", f"Say {written} more.", f"It ends here{written} and goes on.")
    with _open(artifact) as model:
        samples = model.prepare([plain, marked], {}).samples
        ids = [model._tokenizer.encode_pieces(model._pieces(each)) for each in (plain, marked)]
        rows = [sample.embed() for sample in samples]

    assert ids[1].count(stop) == ids[0].count(stop)
    assert len(samples[1].kinds) == len(ids[1]) > len(ids[0])
    assert [len(each) for each in rows] == [len(each) for each in ids]
