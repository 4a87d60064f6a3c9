"""Checkpoints of every layout open to the same tensors; damaged ones are refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from llava_edge.convert.checkpoint.config.original import to_hugging_face
from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
from llava_edge.convert.testing.random_spec import preset
from llava_edge.profiles.errors import CheckpointError
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.profiles.models.model_dims import ModelDims

SPEC = preset("odd")
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "odd"
    write_random_checkpoint(folder, SPEC, max_shard_bytes=300_000)
    return folder


@pytest.fixture
def hub(pristine: Path, tmp_path: Path) -> Path:
    """A sharded checkpoint of one's own to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "hub"))


def stored_tensors(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def rewrite(folder: Path, tensors: Mapping[str, Any], file: str = "model.safetensors") -> None:
    for old in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        old.unlink()
    save_file(dict(tensors), folder / file, {"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def assert_same_tensors(one: Checkpoint, other: Checkpoint) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        np.testing.assert_array_equal(one.read(name), other.read(name), name)


def replaced(name: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def to_4_52(name: str) -> str:
    return replaced(
        name,
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("image_newline", "model.image_newline"),
    )


def to_5_6(name: str) -> str:
    return to_4_52(name).replace("vision_tower.vision_model.", "vision_tower.")


def to_original(name: str) -> str:
    return replaced(
        name,
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower.vision_tower."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("image_newline", "model.image_newline"),
    )


def original_config(folder: Path) -> dict[str, Any]:
    """The configuration as the original training code would have saved it."""
    config = json.loads((folder / "config.json").read_text())
    return {
        **config["text_config"],
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "mm_hidden_size": SPEC.vision_hidden_size,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "a/tower-of-five-patches",
        "vision_config": config["vision_config"],
    }


def make_original(folder: Path) -> None:
    rewrite(folder, {to_original(k): v for k, v in stored_tensors(folder).items()})
    (folder / "config.json").write_text(json.dumps(original_config(folder)))


LAYOUTS: dict[str, tuple[Callable[[str], str], str]] = {
    "hub": (lambda name: name, "hub"),
    "hub, flat tower": (lambda n: n.replace("vision_model.", ""), "hub"),
    "hub, newline as 5.4 saved it": (
        lambda n: replaced(n, ("image_newline", "model.image_newline")),
        "hub",
    ),
    "4.52": (to_4_52, "transformers-4.52"),
    "5.6": (to_5_6, "transformers-5.6"),
    "5.6 under an adapter": (lambda n: "base_model.model." + to_5_6(n), "transformers-5.6"),
    "hub under an adapter": (lambda n: "base_model.model." + n, "hub"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_opens_to_the_same_canonical_tensors(
    pristine: Path, hub: Path, layout: str
) -> None:
    rename, name = LAYOUTS[layout]
    rewrite(hub, {rename(k): v for k, v in stored_tensors(hub).items()})
    opened = open_checkpoint(hub)
    assert opened.layout == name
    assert_same_tensors(opened, open_checkpoint(pristine))


@pytest.mark.parametrize("flat", [False, True], ids=["vision_model", "flat tower"])
def test_the_original_layout_opens_to_the_same_tensors_and_sizes(
    pristine: Path, hub: Path, flat: bool
) -> None:
    make_original(hub)
    if flat:
        tensors = stored_tensors(hub)
        rewrite(hub, {k.replace("vision_model.", ""): v for k, v in tensors.items()})
    opened, hub_form = open_checkpoint(hub), open_checkpoint(pristine)
    assert opened.layout == "original"
    assert_same_tensors(opened, hub_form)
    assert (opened.dims.text, opened.dims.vision) == (hub_form.dims.text, hub_form.dims.vision)
    assert opened.dims.image_grid_pinpoints == hub_form.dims.image_grid_pinpoints
    assert opened.dims.image_token_id == SPEC.vocab_size


def test_an_original_checkpoint_without_processor_files_has_those_of_clip(
    pristine: Path, hub: Path
) -> None:
    make_original(hub)
    written = open_checkpoint(pristine).preprocessor_config()
    (hub / "preprocessor_config.json").unlink()
    (hub / "processor_config.json").unlink()
    derived = open_checkpoint(hub).preprocessor_config()
    written.pop("processor_class")
    assert derived == written


def test_a_released_original_configuration_names_its_tower_only(pristine: Path) -> None:
    config = original_config(pristine)
    del config["vision_config"]
    config |= {
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": 1024,
        "image_grid_pinpoints": "[(336, 672), (1008, 336)]",
        "architectures": ["LlavaMistralForCausalLM"],
        "model_type": "llava",
        "sliding_window": None,
    }
    dims = open_dims(config)
    assert (dims.vision.hidden_size, dims.vision.image_size) == (1024, 336)
    assert dims.text.model_type == "mistral"
    listed = dims.image_grid_pinpoints
    assert listed == ((336, 672), (1008, 336))
    # The original reads (width, height): a tall candidate of two tiles, then a wide one of three.
    assert AnyRes(336, 14, listed, "original").candidates == ((672, 336), (336, 1008))
    assert AnyRes(336, 14, listed, "hf").candidates == listed


def open_dims(config: dict[str, Any]) -> ModelDims:
    return ModelDims.from_config(to_hugging_face(config))


def test_all_that_an_original_configuration_cannot_say_is_listed(pristine: Path) -> None:
    config = original_config(pristine)
    del config["vision_config"], config["vocab_size"], config["mm_vision_select_layer"]
    config |= {
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "linear",
        "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": True,
        "mm_resampler_type": "spatial_pool",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
        "architectures": ["LlavaMptForCausalLM"],
        "model_type": "llava_mpt",
        "mm_vision_tower": "google/siglip-so400m",
    }
    with pytest.raises(CheckpointError) as caught:
        open_dims(config)
    for part in (
        "'pad'",
        "'flat'",
        "'linear'",
        "cls_patch",
        "mm_use_im_start_end",
        "videos are converted from the Hugging Face layout",
        "(6x6)",
        "llava_mpt",
        "siglip",
        "vocab_size is missing",
        "mm_vision_select_layer is missing",
    ):
        assert part in str(caught.value)


def test_what_transformers_saves_opens_as_well(pristine: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    LlavaNextForConditionalGeneration.from_pretrained(pristine).save_pretrained(saved)
    LlavaNextProcessor.from_pretrained(pristine, backend="pil").save_pretrained(saved)
    opened, first = open_checkpoint(saved), open_checkpoint(pristine)
    assert opened.dims == first.dims
    assert_same_tensors(opened, first)
    assert not (saved / "preprocessor_config.json").exists()
    of_both = opened.preprocessor_config(), first.preprocessor_config()
    for key in ("size", "crop_size", "image_mean", "image_std", "image_grid_pinpoints", "resample"):
        assert of_both[0][key] == of_both[1][key]
    assert opened.generation_config()["eos_token_id"] == 2


def test_a_raw_state_dict_in_bfloat16_opens_with_in_memory_names(pristine: Path, hub: Path) -> None:
    model = LlavaNextForConditionalGeneration.from_pretrained(pristine, dtype=torch.bfloat16)
    for file in (*hub.glob("*.safetensors"), *hub.glob("*.index.json")):
        file.unlink()
    save_torch(model.state_dict(), hub / "model.safetensors")
    opened = open_checkpoint(hub)
    assert opened.layout == "transformers-5.6"
    head = opened.read("lm_head.weight", slice(3, 6))
    assert head.dtype == np.float32
    np.testing.assert_array_equal(head, model.lm_head.weight[3:6].float().detach().numpy())


def test_buffers_of_old_files_are_skipped(pristine: Path, hub: Path) -> None:
    extra = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
        "vision_tower.vision_model.embeddings.position_ids": np.zeros((1, 26), np.int64),
    }
    rewrite(hub, {**stored_tensors(hub), **extra})
    assert_same_tensors(open_checkpoint(hub), open_checkpoint(pristine))


def test_what_nothing_reads_may_be_absent(hub: Path) -> None:
    """Feature layer -2 of 4 blocks needs three of them, and never the last norm."""
    kept = {
        name: value
        for name, value in stored_tensors(hub).items()
        if "post_layernorm" not in name and "vision_model.encoder.layers.3." not in name
    }
    rewrite(hub, kept)
    opened = open_checkpoint(hub)
    assert "vision_tower.encoder.layers.2.mlp.fc2.bias" in opened.tensors
    assert "vision_tower.post_layernorm.weight" not in opened.tensors


def test_a_tied_head_is_the_embedding_table(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "c", preset("odd", tie_word_embeddings=True))
    opened = open_checkpoint(tmp_path / "c")
    assert opened.dims.text.tie_word_embeddings
    assert opened.tensors["lm_head.weight"] == opened.tensors["language_model.embed_tokens.weight"]
    stored = sum(value.nbytes for value in stored_tensors(tmp_path / "c").values())
    assert opened.weight_bytes == stored


def test_a_stored_head_wins_over_the_flag(pristine: Path, hub: Path) -> None:
    change_config(hub, tie_word_embeddings=True)
    opened = open_checkpoint(hub)
    assert not opened.dims.text.tie_word_embeddings
    assert_same_tensors(opened, open_checkpoint(pristine))


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "no index"])
def test_shards_open_with_and_without_an_index(pristine: Path, hub: Path, indexed: bool) -> None:
    if not indexed:
        (hub / "model.safetensors.index.json").unlink()
    opened = open_checkpoint(hub)
    assert len(opened.weight_files) > 1
    assert_same_tensors(opened, open_checkpoint(pristine))


def test_one_file_of_another_name_opens(pristine: Path, hub: Path) -> None:
    rewrite(hub, stored_tensors(hub), "weights.safetensors")
    (hub / "._weights.safetensors").write_bytes(b"Mac OS X")
    assert_same_tensors(open_checkpoint(hub), open_checkpoint(pristine))


def test_the_digest_follows_contents_and_not_the_place(pristine: Path, hub: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = open_checkpoint(pristine).digest(lambda _, done, total: seen.append((done, total)))
    assert len(first) == 64
    assert open_checkpoint(hub).digest() == first
    files = (pristine / "config.json", *pristine.glob("*.safetensors"))
    assert seen[-1] == (seen[-1][1], sum(file.stat().st_size for file in files))
    (hub / "chat_template.jinja").write_text("other")
    assert open_checkpoint(hub).digest() == first
    shard = sorted(hub.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    changed = open_checkpoint(hub)
    assert changed.digest() != first
    shard.unlink()
    with pytest.raises(CheckpointError, match="changed while it was read"):
        changed.digest()


def test_the_digest_is_the_one_that_is_documented(hub: Path) -> None:
    rewrite(hub, stored_tensors(hub))
    lines = ""
    for name in ("config.json", "model.safetensors"):
        data = (hub / name).read_bytes()
        lines += f"{sha256(data).hexdigest()}  {len(data)}  {name}\n"
    assert open_checkpoint(hub).digest() == sha256(lines.encode()).hexdigest()


def test_a_snapshot_in_a_hub_cache_knows_its_id_and_revision(hub: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--llava-hf--llava-v1.6-odd" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in hub.iterdir():
        (snapshot / file.name).symlink_to(file)
    opened = open_checkpoint(snapshot)
    assert (opened.source_id, opened.revision) == ("llava-hf/llava-v1.6-odd", "0" * 40)
    assert (open_checkpoint(hub).source_id, open_checkpoint(hub).revision) == ("hub", None)
    named = open_checkpoint(hub, source_id="me/mine", revision="abc")
    assert (named.source_id, named.revision) == ("me/mine", "abc")


def no_weights(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()


def pickles_only(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps({"a": 1}))
    (folder / "last.ckpt").write_bytes(b"")


def drop(*parts: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = stored_tensors(folder)
        rewrite(folder, {k: v for k, v in tensors.items() if not any(p in k for p in parts)})

    return damage


def put(name: str, value: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        rewrite(folder, {**stored_tensors(folder), name: value})

    return damage


def truncate_second_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 10)


def rename_all(prefix: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        rewrite(folder, {prefix + k: v for k, v in stored_tensors(folder).items()})

    return damage


def mixed_layouts(folder: Path) -> None:
    tensors = stored_tensors(folder)
    rewrite(folder, {to_5_6(k) if "layers.1." in k else k: v for k, v in tensors.items()})


def duplicate_in_other_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    save_file({"image_newline": np.zeros(96, np.float16)}, folder / "zz.safetensors")


FIRST_NORM = "language_model.model.norm.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (lambda f: shutil.rmtree(f), ("is no folder",)),
    "no config": (lambda f: (f / "config.json").unlink(), ("has no config.json",)),
    "config no json": (lambda f: (f / "config.json").write_text("{"), ("is no valid JSON",)),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), ("no JSON object",)),
    "config no utf-8": (
        lambda f: (f / "config.json").write_bytes(b'"\xff"'),
        ("is no UTF-8 text",),
    ),
    "config nested without end": (
        lambda f: (f / "config.json").write_text("[" * 200_000),
        ("is no valid JSON",),
    ),
    "config a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        ("config.json is a folder",),
    ),
    "unknown model": (lambda f: change_config(f, model_type="blip"), ("'blip'",)),
    "quantised": (
        lambda f: change_config(f, quantization_config={"quant_method": "awq"}),
        ("already quantised (awq)",),
    ),
    "no weights": (no_weights, ("holds no *.safetensors",)),
    "pickles only": (
        pickles_only,
        ("pickle", "last.ckpt, pytorch_model-00001-of-00002.bin", "safe_serialization=True"),
    ),
    "shard of the index missing": (
        lambda f: sorted(f.glob("*.safetensors"))[2].unlink(),
        ("incomplete", "model-00003-of-"),
    ),
    "shard missing, no index": (
        lambda f: (
            (f / "model.safetensors.index.json").unlink(),
            sorted(f.glob("*.safetensors"))[0].unlink(),
        ),
        ("incomplete", "model-00001-of-"),
    ),
    "shard truncated": (truncate_second_shard, ("model-00002-of-", "truncated")),
    "shard outside": (
        lambda f: change_index(f, lambda m: m.update(a="../secret.safetensors")),
        ("outside the folder: ../secret.safetensors",),
    ),
    "shard absolute": (
        lambda f: change_index(f, lambda m: m.update(a="/etc/x.safetensors")),
        ("outside the folder",),
    ),
    "shard a pickle": (
        lambda f: change_index(f, lambda m: m.update(a="model.bin")),
        ("outside the folder: model.bin",),
    ),
    "index without map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        ("no weight_map",),
    ),
    "index names a tensor that is not there": (
        lambda f: change_index(f, lambda m: m.update(ghost=sorted(m.values())[0])),
        ("not there: ghost (in model-00001-of-",),
    ),
    "tensor in two shards": (
        duplicate_in_other_shard,
        ("tensor image_newline lies in both", "zz.safetensors"),
    ),
    "tensors missing": (
        drop("layers.1.self_attn.q_proj", "image_newline"),
        (
            "4 missing",
            "image_newline",
            "language_model.layers.1.self_attn.q_proj.weight",
            "vision_tower.encoder.layers.1.self_attn.q_proj.bias",
        ),
    ),
    "head missing": (drop("lm_head"), ("1 missing: lm_head.weight", "top level of config.json")),
    "no tower": (drop("vision_tower"), ("no vision tower at all",)),
    "tensor unexpected": (
        put("language_model.model.layers.0.self_attn.q_proj.bias", np.zeros(96, np.float16)),
        ("1 unexpected: language_model.model.layers.0.self_attn.q_proj.bias",),
    ),
    "quantised by names": (
        put("language_model.model.layers.0.self_attn.q_proj.qweight", np.zeros(9, np.int32)),
        ("the checkpoint is quantised",),
    ),
    "one layer too many": (
        lambda f: change_config(
            f,
            text_config={
                **json.loads((f / "config.json").read_text())["text_config"],
                "num_hidden_layers": 2,
            },
        ),
        ("9 unexpected: language_model.model.layers.2.",),
    ),
    "shape": (
        put(FIRST_NORM, np.zeros(95, np.float16)),
        ("language_model.norm.weight has [95], expected [96]",),
    ),
    "type": (
        put(FIRST_NORM, np.zeros(96, np.float64)),
        ("language_model.norm.weight (F64)", "BF16 / F16 / F32"),
    ),
    "stored twice": (
        put("model.image_newline", np.zeros(96, np.float16)),
        ("1 stored twice: image_newline and model.image_newline",),
    ),
    "two layouts mixed": (mixed_layouts, ("names of two layouts in the decoder",)),
    "names of nobody": (rename_all("mine."), ("no known LLaVA-NeXT layout",)),
    "adapter": (
        lambda f: rewrite(f, {"base_model.model.x.lora_A.weight": np.zeros(2, np.float32)}),
        ("is an adapter", "Merge it"),
    ),
    "original weights, hub config": (
        lambda f: rewrite(f, {to_original(k): v for k, v in stored_tensors(f).items()}),
        ("config.json of the other kind",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_at_fault_is_refused_with_what_is_wrong(hub: Path, fault: str) -> None:
    damage, said = FAULTS[fault]
    damage(hub)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(hub)
    for part in said:
        assert part in str(caught.value)


def test_faults_of_all_kinds_are_reported_in_one_message(hub: Path) -> None:
    tensors = stored_tensors(hub)
    del tensors["image_newline"]
    tensors |= {
        FIRST_NORM: np.zeros(5, np.int64),
        "language_model.model.extra": np.zeros(1, np.float16),
    }
    rewrite(hub, tensors)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(hub)
    for part in ("missing: image_newline", "model.extra", "has [5], expected [96]", "(I64)"):
        assert part in str(caught.value)


def test_processor_files_are_needed_in_a_hub_checkpoint(hub: Path) -> None:
    (hub / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither preprocessor_config\.json nor"):
        open_checkpoint(hub).preprocessor_config()


def test_a_tensor_that_is_not_there_is_said(pristine: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tensor 'nothing'"):
        open_checkpoint(pristine).read("nothing")
