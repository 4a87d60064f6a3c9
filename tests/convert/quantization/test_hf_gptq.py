"""The Hugging Face GPTQ checkpoint: the rules that make it load elsewhere, and reading it back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.checkpoint.quantized.gptq_checkpoint import GptqSource, open_gptq
from llava_edge.convert.checkpoint.quantized.source import (
    LINEARS,
    RtnSource,
    linear_name,
    quantize_head,
)
from llava_edge.convert.onnx.decoder import build_decoder_graph
from llava_edge.convert.onnx.linear import QuantizedLayers
from llava_edge.convert.quantization.export_hf import check_emit_hf, write_hf_gptq
from llava_edge.convert.util.safetensors_io import write_safetensors
from llava_edge.profiles.errors import CheckpointError, RequestError
from llava_edge.runtime.util.arrays import Array

SIZES = {"hidden_size": 128, "intermediate_size": 384, "heads": 4, "vocab_size": 401, "layers": 2}
STORED_LAYERS = "language_model.model.layers."
FORMATS = {
    "int4": (4, 128),
    "int4 groups of 32": (4, 32),
    "int8": (8, 128),
    "int8 channel": (8, -1),
}


@dataclass(frozen=True)
class Emitted:
    """A checkpoint, the source of its codes, and what was written of both."""

    checkpoint: Checkpoint
    source: RtnSource
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return value

    @property
    def tensors(self) -> dict[str, Array]:
        return read_all(self.folder)


def read_all(folder: Path) -> dict[str, Array]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture(scope="module")
def emit(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Emitted]:
    made: dict[str, Emitted] = {}

    def make(bits: int = 4, group: int = 128, shard: int = 1 << 30, **changes: Any) -> Emitted:
        key = repr((bits, group, shard, changes))
        if key not in made:
            folder = tmp_path_factory.mktemp("gptq")
            checkpoint = open_checkpoint(make_checkpoint("odd", **{**SIZES, **changes}))
            source = RtnSource(checkpoint, bits, group, scale="absmax")
            write_hf_gptq(folder, checkpoint, source, max_shard_bytes=shard)
            made[key] = Emitted(checkpoint, source, folder)
        return made[key]

    return make


@pytest.mark.parametrize(("bits", "group"), FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("backbone", ["llama", "mistral", "qwen2"])
def test_the_weights_read_back_are_the_weights_that_were_written(
    emit: Callable[..., Emitted], backbone: str, bits: int, group: int
) -> None:
    emitted = emit(bits, group, backbone=backbone)

    again = open_gptq(open_checkpoint(emitted.folder), f"int{bits}")

    assert (again.bits, again.group_size) == (bits, group)
    for name in [linear_name(layer, linear) for layer in (0, 1) for linear in LINEARS]:
        wanted, found = emitted.source.linear(name), again.linear(name)
        np.testing.assert_array_equal(found.qweight, wanted.qweight)
        np.testing.assert_array_equal(found.scales, wanted.scales)
    plain = [
        name
        for name in emitted.checkpoint.tensors
        if f"{name.removesuffix('.weight')}.qweight" not in again.checkpoint.tensors
    ]
    assert "image_newline" in plain
    assert "lm_head.weight" in plain
    for name in plain:
        np.testing.assert_array_equal(
            again.checkpoint.read(name), emitted.checkpoint.read(name), err_msg=name
        )


def test_names_are_those_that_transformers_saves(
    emit: Callable[..., Emitted], tmp_path: Path
) -> None:
    import transformers

    emitted = emit(backbone="qwen2")
    loader: Any = transformers.LlavaNextForConditionalGeneration
    loader.from_pretrained(emitted.checkpoint.folder).save_pretrained(tmp_path)

    theirs, ours = set(read_all(tmp_path)), set(emitted.tensors)

    gptq = (".qweight", ".qzeros", ".scales", ".g_idx")
    unpacked = {
        f"{name.rsplit('.', 1)[0]}.weight" if name.endswith(gptq) else name for name in ours
    }
    assert unpacked == theirs


def test_vllm_finds_exactly_the_decoder_quantised(emit: Callable[..., Emitted]) -> None:
    # It takes layers with integer tensors for quantised, unless a list of names says otherwise,
    # which it would match by substring.
    emitted = emit()

    kinds = {name: array.dtype for name, array in emitted.tensors.items()}

    integers = {n.rsplit(".", 1)[0] for n, kind in kinds.items() if kind == np.int32}
    assert integers == {
        f"{STORED_LAYERS}{layer}.{linear}" for layer in (0, 1) for linear in LINEARS
    }
    assert {kind for kind in kinds.values() if kind != np.int32} == {np.dtype(np.float16)}
    settings = emitted.config["quantization_config"]
    assert "modules_in_block_to_quantize" not in settings
    assert (settings["sym"], settings["desc_act"]) == (True, False)


@pytest.mark.parametrize(("bits", "group"), FORMATS.values(), ids=FORMATS)
def test_the_settings_are_what_the_loaders_ask_for(
    emit: Callable[..., Emitted], bits: int, group: int
) -> None:
    emitted = emit(bits, group)

    settings = emitted.config["quantization_config"]

    meta = settings.pop("meta")
    assert settings == {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "block_name_to_quantize": "model.language_model.layers",
    }
    assert meta["quantizer"][0].startswith("llava-edge:")
    beside = json.loads((emitted.folder / "quantize_config.json").read_text())
    assert beside == {**settings, "meta": meta}
    assert emitted.config["dtype"] == "float16"


@pytest.mark.parametrize(("bits", "group"), FORMATS.values(), ids=FORMATS)
def test_layers_have_the_v1_layout(emit: Callable[..., Emitted], bits: int, group: int) -> None:
    tensors = emit(bits, group).tensors
    name = f"{STORED_LAYERS}1.mlp.down_proj"  # 384 inputs, 128 outputs
    columns = 384 if group == -1 else group

    assert tensors[f"{name}.qweight"].shape == (384 * bits // 32, 128)
    assert tensors[f"{name}.qzeros"].shape == (384 // columns, 128 * bits // 32)
    assert tensors[f"{name}.scales"].shape == (384 // columns, 128)
    np.testing.assert_array_equal(tensors[f"{name}.g_idx"], np.arange(384) // columns)
    # Zero points are stored less one: 7 in every half byte, 127 in every byte.
    word = 0x77777777 if bits == 4 else 0x7F7F7F7F
    assert np.unique(tensors[f"{name}.qzeros"]) == [word]
    assert (tensors[f"{name}.scales"] > 0).all()


def test_the_folder_holds_all_that_loading_needs(emit: Callable[..., Emitted]) -> None:
    import transformers

    emitted = emit()
    names = {file.name for file in emitted.folder.iterdir()}

    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "quantize_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    processor: Any = transformers.LlavaNextProcessor.from_pretrained(emitted.folder)
    source: Any = transformers.LlavaNextProcessor.from_pretrained(emitted.checkpoint.folder)
    text = "A <image> and words."
    assert processor.tokenizer(text).input_ids == source.tokenizer(text).input_ids
    assert processor.chat_template == source.chat_template


def test_no_file_of_the_folder_names_code_of_the_source(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(make_checkpoint("odd", **SIZES), folder)
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        path = folder / name
        values = json.loads(path.read_text()) if path.is_file() else {}
        values["auto_map"] = {"AutoTokenizer": ["payload.Custom", None]}
        if name == "config.json":
            values["text_config"] |= {"auto_map": {}, "_attn_implementation": "owner/kernel"}
        path.write_text(json.dumps(values))
    checkpoint = open_checkpoint(folder)
    emitted = tmp_path / "emitted"
    emitted.mkdir()

    write_hf_gptq(emitted, checkpoint, RtnSource(checkpoint, 4, 128, scale="absmax"))

    texts = [file.read_text() for file in emitted.glob("*.json")]
    assert texts
    assert not [t for t in texts if "auto_map" in t or "payload" in t or "owner/kernel" in t]


def test_shards_have_an_index_and_keep_a_layers_tensors_together(
    emit: Callable[..., Emitted],
) -> None:
    # 8,704 bytes are a whole query layer less its order, so that a cut would fall inside.
    whole, cut = emit(), emit(shard=8_704)

    index = json.loads((cut.folder / "model.safetensors.index.json").read_text())

    files = sorted(file.name for file in cut.folder.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert set(index["weight_map"]) == set(whole.tensors)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in whole.tensors.values())
    for layer in {name.rsplit(".", 1)[0] for name in whole.tensors if name.endswith("qweight")}:
        parts = ("qweight", "qzeros", "scales", "g_idx")
        assert len({index["weight_map"][f"{layer}.{part}"] for part in parts}) == 1


def test_a_shared_head_stays_shared(emit: Callable[..., Emitted]) -> None:
    emitted = emit(tie_word_embeddings=True)

    assert not any("lm_head" in name for name in emitted.tensors)
    assert emitted.config["tie_word_embeddings"] is True
    again = open_checkpoint(emitted.folder)
    assert again.tensors["lm_head.weight"] == again.tensors["language_model.embed_tokens.weight"]


def test_what_has_no_gptq_checkpoint_is_refused_beforehand(
    make_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = open_checkpoint(make_checkpoint("odd", **SIZES))
    ragged = open_checkpoint(make_checkpoint("odd", intermediate_size=164))

    check_emit_hf(checkpoint, "int4")
    check_emit_hf(ragged, "int8")
    with pytest.raises(RequestError, match="asked at fp16"):
        check_emit_hf(checkpoint, "fp16")
    with pytest.raises(RequestError, match=r"\(164, 96\).*multiples of 8 at int4"):
        check_emit_hf(ragged, "int4")


# Reading what others wrote.


@pytest.fixture
def gptq_folder(emit: Callable[..., Emitted], tmp_path: Path) -> Path:
    for file in emit(backbone="mistral").folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_settings(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, **changes: Array | None) -> None:
    """Replace, add or (None) drop tensors of the first layer's q_proj."""
    tensors = read_all(folder)
    for part, array in changes.items():
        name = f"{STORED_LAYERS}0.self_attn.q_proj.{part}"
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = array
    kinds = {"float16": "F16", "int32": "I32", "float32": "F32"}
    listed = [(name, kinds[array.dtype.name], array.shape) for name, array in tensors.items()]
    write_safetensors(folder / "model.safetensors", listed, lambda name: [tensors[name]])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quant_method": "awq"}, r"already quantised \(awq\)"),
        ({"quant_method": "compressed-tensors"}, r"\(compressed-tensors\)"),
        ({"bits": 3}, "bits is 3"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 1024}, "group_size is 1024"),
        ({"sym": False}, "sym is false"),
        ({"checkpoint_format": "gptq_v2"}, "'gptq_v2'"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"lm_head": True}, "the head is quantised"),
        ({"dynamic": {"-:layers.0": {}}}, "dynamic gives some layers"),
        ({"group_size": 64}, r"\[1, 128\], expected \[2, 128\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_that_cannot_be_kept_are_refused(
    gptq_folder: Path, changes: dict[str, Any], reason: str
) -> None:
    change_settings(gptq_folder, **changes)

    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(gptq_folder)


def test_all_reasons_are_told_together(gptq_folder: Path) -> None:
    change_settings(gptq_folder, bits=2, sym=False, group_size=16)

    with pytest.raises(CheckpointError, match=r"(?s)bits is 2.*group_size is 16.*sym is false"):
        open_checkpoint(gptq_folder)


@pytest.mark.parametrize(
    ("part", "array", "reason"),
    [
        ("g_idx", np.zeros(128, np.int32)[::-1] + (np.arange(128) == 5), "act-order"),
        ("qzeros", np.full((1, 16), 0x66666666, np.int32), "sym is false"),
        ("qzeros", np.full((1, 16), np.int64(0x88888888).astype(np.int32)), "gptq_v2"),
        ("scales", np.full((1, 128), -1, np.float16), "not positive"),
        ("scales", np.full((1, 128), 1 / 3, np.float32), "no exact float16"),
        ("bias", np.ones(128, np.float16), "it has a bias"),
    ],
    ids=["act-order", "other zeros", "v2 zeros", "negative scales", "float32 scales", "bias"],
)
def test_layers_that_cannot_be_kept_are_refused_before_any_code_is_read(
    gptq_folder: Path, part: str, array: Array, reason: str
) -> None:
    kind = np.int32 if array.dtype.kind == "i" else array.dtype
    change_tensors(gptq_folder, **{part: array.astype(kind)})
    checkpoint = open_checkpoint(gptq_folder)

    with pytest.raises(CheckpointError, match=rf"layers\.0\.self_attn\.q_proj: .*{reason}"):
        open_gptq(checkpoint, "int4")


def test_a_bias_of_zeros_and_a_missing_order_change_nothing(gptq_folder: Path) -> None:
    name = linear_name(0, "self_attn.q_proj")
    before = GptqSource(open_checkpoint(gptq_folder)).linear(name)
    change_tensors(gptq_folder, bias=np.zeros(128, np.float16), g_idx=None)

    after = open_gptq(open_checkpoint(gptq_folder), "int4").linear(name)

    np.testing.assert_array_equal(after.dequantize(), before.dequantize())


def test_desc_act_with_columns_in_place_is_kept(gptq_folder: Path) -> None:
    change_settings(gptq_folder, desc_act=True)

    assert open_gptq(open_checkpoint(gptq_folder), "int4").bits == 4


def test_settings_may_lie_in_a_file_of_their_own(gptq_folder: Path) -> None:
    config = json.loads((gptq_folder / "config.json").read_text())
    del config["quantization_config"]
    (gptq_folder / "config.json").write_text(json.dumps(config))
    old = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    (gptq_folder / "quantize_config.json").write_text(json.dumps(old))

    settings = open_checkpoint(gptq_folder).gptq

    assert settings is not None
    assert (settings.bits, settings.group_size) == (4, 128)


def test_another_precision_than_the_checkpoints_own_is_refused(gptq_folder: Path) -> None:
    checkpoint = open_checkpoint(gptq_folder)

    for precision in ("fp16", "int8"):
        with pytest.raises(RequestError, match=f"{precision} was asked for.*--precision int4"):
            open_gptq(checkpoint, precision)


def test_a_checkpoint_that_was_read_can_be_written_again(
    gptq_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = open_checkpoint(gptq_folder)
    folder = tmp_path_factory.mktemp("again")

    write_hf_gptq(folder, checkpoint, open_gptq(checkpoint, "int4"))

    first, second = read_all(gptq_folder), read_all(folder)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array, err_msg=name)


def test_a_decoder_graph_from_the_checkpoint_is_the_graph_from_its_source(
    emit: Callable[..., Emitted], tmp_path: Path
) -> None:
    emitted = emit(backbone="qwen2")
    again = open_gptq(open_checkpoint(emitted.folder), "int4")
    written = []
    for source in (emitted.source, again):
        folder = tmp_path / type(source).__name__
        folder.mkdir()
        checkpoint = source.checkpoint
        weights = QuantizedLayers(source, partial(quantize_head, checkpoint))
        text = checkpoint.dims.text
        build_decoder_graph(text, checkpoint, np.float32, 32, weights=weights).save(folder)
        written.append([(folder / n).read_bytes() for n in ("model.onnx", "weights.bin")])

    assert written[0] == written[1]


def test_the_head_of_a_gptq_checkpoint_is_rounded_as_any_other(
    emit: Callable[..., Emitted],
) -> None:
    emitted = emit()

    head = quantize_head(open_checkpoint(emitted.folder))

    assert (head.bits, head.group_size) == (8, 128)
    np.testing.assert_array_equal(head.qweight, quantize_head(emitted.source.checkpoint).qweight)
