"""Random checkpoints: genuine for transformers, reproducible, with healthy signals."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaNextVideoForConditionalGeneration,
)

from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
from llava_edge.convert.testing.random_spec import RandomSpec, preset
from llava_edge.profiles.errors import CheckpointError, OutputExistsError, RequestError
from llava_edge.profiles.models.model_dims import STOCK_PINPOINTS, ModelDims
from llava_edge.profiles.models.variants import load_variants

SPECS = {
    "odd llama": preset("odd"),
    "odd qwen2 half windowed": preset(
        "odd", backbone="qwen2", sliding_window=40, max_window_layers=1
    ),
    "odd mistral windowed, two layers of features": preset(
        "odd", backbone="mistral", sliding_window=40, vision_feature_layer=(-2, 1)
    ),
    "odd tied, scaled, wide heads": preset(
        "odd", tie_word_embeddings=True, rope_factor=2.5, head_dim=32, projector_bias=False
    ),
    "tiny llama": preset("tiny"),
}


@pytest.fixture(params=SPECS, scope="module")
def spec(request: pytest.FixtureRequest) -> RandomSpec:
    return SPECS[request.param]


@pytest.fixture(scope="module")
def folder(spec: RandomSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "checkpoint"
    write_random_checkpoint(folder, spec, seed=5)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, info = LlavaNextForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), info


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def in_memory_name(canonical: str) -> str:
    return canonical if canonical.startswith("lm_head") else f"model.{canonical}"


def test_transformers_loads_it_with_nothing_missing_and_nothing_left_over(
    reference: tuple[Any, dict[str, Any]],
) -> None:
    assert not [kind for kind, keys in reference[1].items() if keys]


def test_every_tensor_reads_as_transformers_loads_it(
    folder: Path, reference: tuple[Any, dict[str, Any]]
) -> None:
    checkpoint = open_checkpoint(folder)
    state = reference[0].state_dict()
    assert {in_memory_name(name) for name in checkpoint.tensors} == set(state)
    for name in checkpoint.tensors:
        expected = state[in_memory_name(name)].numpy()
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), expected, name)


def test_dimensions_are_those_of_the_spec(folder: Path, spec: RandomSpec) -> None:
    dims = open_checkpoint(folder).dims
    assert dims.text.model_type == spec.backbone
    assert dims.text.hidden_size == spec.hidden_size
    assert dims.text.rope_factor == spec.rope_factor
    assert dims.text.tie_word_embeddings == spec.tie_word_embeddings
    assert dims.image_grid_pinpoints == spec.grid_pinpoints
    again = ModelDims.from_config(RandomSpec.from_dims(dims).config(dims.image_token_id))
    assert again == dims


def test_logits_spread_and_the_image_decides(
    folder: Path, reference: tuple[Any, dict[str, Any]]
) -> None:
    model = reference[0]
    processor = LlavaNextProcessor.from_pretrained(folder, backend="pil")
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    image = small.resize((90, 60), Image.Resampling.BICUBIC)
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]}
    ]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_index).sum() > 25
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]})
    logits = output.logits[0]
    top = logits.topk(2).values
    assert 1 < logits.std(-1).mean() < 3
    assert (top[:, 0] - top[:, 1]).median() > 0.2
    for hidden in output.hidden_states:
        assert 0.1 < hidden.std() < 3
    assert (logits[-1] - other.logits[0, -1]).abs().mean() > 0.2


def test_no_tensor_is_trivial(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.tensors:
        values = checkpoint.read(name).astype(np.float64)
        assert values.std() > 0.01, name
        assert np.abs(values).max() < 12, name


def test_the_tokenizer_encodes_any_text_and_stays_below_the_table(
    folder: Path, spec: RandomSpec
) -> None:
    processor = LlavaNextProcessor.from_pretrained(folder, backend="pil")
    tokenizer = processor.tokenizer
    text = "Ünïcode 漢字 🙂 \n\t what is shown?"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) <= spec.vocab_size
    assert (tokenizer.bos_token_id in ids) == (spec.backbone != "qwen2")
    assert ids.count(tokenizer.bos_token_id) <= 1
    assert processor.image_token_id == open_checkpoint(folder).dims.image_token_id


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("llama", "Be kind. USER: <image>\n<image>\nHi ASSISTANT: Yes. USER: So? ASSISTANT:"),
        (
            "mistral",
            "<<SYS>>\nBe kind.\n<</SYS>>\n\n[INST] <image>\n<image>\nHi [/INST] Yes. </s>"
            "[INST] So? [/INST]",
        ),
        (
            "qwen2",
            "<|im_start|>system\nBe kind.<|im_end|>\n"
            "<|im_start|>user\n<image>\n<image>\nHi<|im_end|>\n"
            "<|im_start|>assistant\nYes.<|im_end|>\n"
            "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_the_chat_template_puts_images_first_in_the_manner_of_its_family(
    tmp_path: Path, backbone: str, expected: str
) -> None:
    write_random_checkpoint(tmp_path / "c", preset("odd", backbone=backbone))
    processor = LlavaNextProcessor.from_pretrained(tmp_path / "c", backend="pil")
    say = [{"type": "text", "text": "Hi"}, {"type": "image"}, {"type": "image"}]
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": say},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [{"type": "text", "text": "So?"}]},
    ]
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == expected


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    spec = preset("odd")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_checkpoint(tmp_path / name, spec, seed=seed)
    first, again, other = (digests(tmp_path / name) for name in "abc")
    assert first == again
    assert [name for name in first if first[name] != other[name]] == ["model.safetensors"]


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "one", preset("odd"))
    write_random_checkpoint(tmp_path / "many", preset("odd"), max_shard_bytes=100_000)
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert (len(one.weight_files), len(many.weight_files)) == (1, 10)
    assert max(file.stat().st_size for file in many.weight_files) < 112_000
    assert one.tensors.keys() == many.tensors.keys()
    for name in one.tensors:
        np.testing.assert_array_equal(one.read(name), many.read(name), name)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == one.weight_bytes
    model, info = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "many", output_loading_info=True
    )
    assert model.dtype == torch.float16
    assert not [kind for kind, keys in info.items() if keys]


@pytest.mark.parametrize(
    ("model_type", "library"),
    [
        ("llava", LlavaForConditionalGeneration),
        ("llava_next_video", LlavaNextVideoForConditionalGeneration),
    ],
)
def test_the_sister_models_load_as_well(tmp_path: Path, model_type: str, library: Any) -> None:
    # An even number of patches: frames are pooled two by two.
    write_random_checkpoint(tmp_path / "c", preset("odd", model_type=model_type, image_size=56))
    checkpoint = open_checkpoint(tmp_path / "c")
    _, info = library.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not [kind for kind, keys in info.items() if keys]
    assert ("image_newline" in checkpoint.tensors) == (model_type != "llava")
    assert (checkpoint.dims.video_token_id is None) == (model_type == "llava")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="is not empty"):
        write_random_checkpoint(tmp_path, preset("odd"))
    assert os.listdir(tmp_path) == ["keep.txt"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, preset("odd"))
    assert open_checkpoint(tmp_path).layout == "hub"


def test_what_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no multiple of 5 heads"):
        write_random_checkpoint(tmp_path / "a", preset("odd", heads=5))
    with pytest.raises(ValueError, match="vocab_size 200 is below"):
        write_random_checkpoint(tmp_path / "b", preset("odd", vocab_size=200))

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_edge.convert.testing.random_checkpoint.write_safetensors", fail)
    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(tmp_path / "c", preset("odd"))
    assert list(tmp_path.iterdir()) == []


def test_presets_and_variants_have_the_sizes_they_promise() -> None:
    assert preset("tiny").grid_pinpoints == STOCK_PINPOINTS
    assert preset("odd").grid_pinpoints[0] == (70, 140)
    for variant in load_variants():
        spec = RandomSpec.from_variant(variant.name)
        config = spec.config(variant.dims.image_token_id, variant.dims.video_token_id)
        assert ModelDims.from_config(config) == variant.dims
    with pytest.raises(RequestError, match="no variant"):
        RandomSpec.from_variant("llava-9000")
    with pytest.raises(ValueError, match="there are tiny, odd, demo"):
        preset("huge")
