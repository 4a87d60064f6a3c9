"""Names of every release of transformers and of every training wrapper are those of one model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from llava_edge.convert.checkpoint.layouts import hub_name, read_name
from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.profiles.errors import CheckpointError
from tests.support.saved_layouts import CANONICAL, DATA, NUMBERS, config, shapes, write

SAVED: Mapping[str, Any] = json.loads(DATA.read_text("utf-8"))
Rename = Callable[[str], str]


def forms() -> dict[str, tuple[int, int]]:
    """Every distinct pair of config.json and names, by the first release that wrote it."""
    found: dict[tuple[int, int], str] = {}
    for release, saved in SAVED["releases"].items():
        for form, (document, names, _) in saved.items():
            if document is not None and names is not None:
                found.setdefault((document, names), f"{release} {form}")
    return {name: pair for pair, name in found.items()}


def assert_whole(opened: Checkpoint, stored: Mapping[str, str]) -> None:
    """Every tensor is the one that its number says."""
    for name in stored:
        assert set(opened.read(name).reshape(-1).tolist()) == {NUMBERS[name]}, name
    assert opened.tensors.keys() >= stored.keys()


@pytest.mark.parametrize("form", forms())
def test_what_a_release_of_transformers_saved_opens_to_the_same_tensors(
    tmp_path: Path, form: str
) -> None:
    document, names = forms()[form]
    stored = {
        name: kept
        for name, kept in zip(CANONICAL, SAVED["names"][names], strict=True)
        if kept is not None
    }
    folder = write(tmp_path / "saved", SAVED["configs"][document], stored)
    theirs = {name: set(value.reshape(-1).tolist()) for name, value in loaded(folder).items()}
    wanted = {name: {NUMBERS[name]} for name in stored}
    table = wanted["language_model.embed_tokens.weight"]
    if theirs["lm_head.weight"] not in ({NUMBERS["lm_head.weight"]}, table):
        # Configurations whose text_config alone ties: transformers draws a head for them.
        assert "lm_head.weight" not in stored
        with pytest.raises(CheckpointError, match=r"top level of config\.json"):
            open_checkpoint(folder)
        return

    opened = open_checkpoint(folder)

    assert_whole(opened, stored)
    assert opened.dims.text.tie_word_embeddings == ("lm_head.weight" not in stored)
    assert theirs == {"lm_head.weight": table, **wanted}


def loaded(folder: Path) -> dict[str, Any]:
    """Tensors by canonical name as transformers reads the folder."""
    document = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, document["architectures"][0])
    state = kind.from_pretrained(folder).state_dict()
    read = {read_name(name): value for name, value in state.items()}
    return {name.canonical: value for name, value in read.items() if name is not None}


def test_every_minor_release_from_4_39_on_is_in_the_data() -> None:
    minors = [tuple(map(int, release.split(".")[:2])) for release in SAVED["releases"]]
    until = {4: range(39, 58), 5: range(25)}

    assert minors == [(major, minor) for major, listed in until.items() for minor in listed]
    assert tuple(SAVED["canonical"]) == CANONICAL


def test_every_release_loads_again_what_it_saved() -> None:
    outcomes = {outcome for saved in SAVED["releases"].values() for _, _, outcome in saved.values()}

    assert outcomes == {"loads"}


def in_memory(name: str) -> str:
    """Names of 5.6 and later in memory."""
    stored = name if name.startswith("lm_head") else f"model.{name}"
    return stored.replace("language_model.language_model.", "language_model.")


def compiled_layers(name: str) -> str:
    return hub_name(name).replace(".layers.0.", ".layers.0._orig_mod.")


def fsdp(name: str) -> str:
    head, _, tail = hub_name(name).partition(".layers.0.")
    wrapped = f"{head}.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.{tail}"
    return f"_fsdp_wrapped_module.{wrapped if tail else head}"


def original(name: str) -> str:
    pairs = (
        ("language_model.", "model."),
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("image_newline", "model.image_newline"),
    )
    for begin, stored in pairs:
        if name.startswith(begin):
            return stored + name[len(begin) :]
    return name


def under(prefix: str, rename: Rename) -> Rename:
    return lambda name: prefix + rename(name)


WRAPPED: dict[str, Rename] = {
    "PEFT, merged in place": under("base_model.model.", in_memory),
    "DeepSpeed": under("module.", in_memory),
    "DeepSpeed of old names": under("module.", hub_name),
    "DDP of a compiled model": under("module._orig_mod.", hub_name),
    "a compiled model in DDP": under("_orig_mod.module.", in_memory),
    "compiled layers": compiled_layers,
    "FSDP with checkpointing": fsdp,
    "Lightning": under("model.", in_memory),
    "Fabric": under("_forward_module.", hub_name),
    "a merged adapter in DeepSpeed": under("module.base_model.model.", hub_name),
    "doubled containers": under("model.model.", in_memory),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_of_training_are_no_part_of_a_name(tmp_path: Path, wrapper: str) -> None:
    stored = {name: WRAPPED[wrapper](name) for name in CANONICAL}
    folder = write(tmp_path / "saved", config("llava_next", "untied"), stored)

    assert_whole(open_checkpoint(folder), stored)


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "base_model.model."])
def test_names_of_the_original_are_told_from_those_of_transformers(wrapper: str) -> None:
    for name in CANONICAL:
        read = read_name(wrapper + original(name))
        assert read is not None
        assert read.canonical == name


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "audio_tower.layers.0.self_attn.q_proj.weight",
        "model.layers",
        "vision_tower.layers.0.mlp.fc1.weight",
        "language_model.image_newline",
        "image_newline.0",
        "model.mm_projector.1.weight",
        "x.model.embed_tokens.weight",
        "base_model.embed_tokens.weight",
        "",
    ],
)
def test_a_name_of_no_part_is_read_as_none(name: str) -> None:
    assert read_name(name) is None


def mixture(change: Callable[[dict[str, str]], object]) -> dict[str, str]:
    stored = {name: hub_name(name) for name in CANONICAL}
    change(stored)
    return stored


def test_files_of_two_checkpoints_in_one_folder_are_told_by_the_part(tmp_path: Path) -> None:
    block = "vision_tower.encoder.layers.1.mlp.fc1.weight"
    stored = mixture(lambda names: names.update({block: in_memory(block)}))
    folder = write(tmp_path / "saved", config("llava_next", "untied"), stored)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    for part in (
        "two layouts in the tower",
        "1 begin with 'model.vision_tower.'",
        "keep the files",
    ):
        assert part in str(caught.value)


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    stored = mixture(lambda names: None)
    folder = write(tmp_path / "saved", config("llava_next", "untied"), stored)
    add(folder, {"model.language_model.norm.weight": np.zeros(32, np.float32)})

    with pytest.raises(CheckpointError, match="1 stored twice: language_model"):
        open_checkpoint(folder)


def add(folder: Path, tensors: Mapping[str, Any]) -> None:
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})


def test_a_llava_next_that_calls_itself_llava_is_told_what_to_set(tmp_path: Path) -> None:
    stored = {name: hub_name(name) for name in CANONICAL}
    document = config("llava_next", "untied")
    folder = write(tmp_path / "saved", document, stored)
    (folder / "config.json").write_text(
        json.dumps({**document, "model_type": "llava", "architectures": ["LlavaForCausalLM"]})
    )

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    for part in ('set model_type to "llava_next"', "top level of config.json", "image_newline"):
        assert part in str(caught.value)


def test_keys_of_anyres_without_a_newline_leave_a_llava_1_5_what_it_is(tmp_path: Path) -> None:
    stored = {name: hub_name(name) for name in shapes("llava")}
    document = config("llava", "untied") | {"image_grid_pinpoints": [[28, 56], [56, 28]]}

    opened = open_checkpoint(write(tmp_path / "saved", document, stored))

    assert not opened.dims.takes_tiles


def test_a_llava_1_5_that_calls_itself_llava_next_is_told_what_it_is(tmp_path: Path) -> None:
    stored = {name: hub_name(name) for name in CANONICAL if name != "image_newline"}
    folder = write(tmp_path / "saved", config("llava_next", "untied"), stored)

    with pytest.raises(CheckpointError, match=r"without image_newline this is LLaVA-1\.5"):
        open_checkpoint(folder)


COMPUTED = (
    "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.language_model.rotary_emb.inv_freq",
    "language_model.model.rotary_emb.original_inv_freq",
    "language_model.model.layers.0.self_attn.rotary_emb.cos_cached",
    "vision_tower.vision_model.embeddings.position_ids",
    "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "only in the index"])
def test_an_index_may_name_what_models_compute(tmp_path: Path, stored: bool) -> None:
    names = {name: hub_name(name) for name in CANONICAL}
    folder = write(tmp_path / "saved", config("llava_next", "untied"), names)
    if stored:
        add(folder, {name: np.zeros(8, np.float32) for name in COMPUTED})
    shard = folder / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(shard)
    listed = dict.fromkeys((*names.values(), *COMPUTED), shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))

    assert_whole(open_checkpoint(folder), names)


def test_an_index_may_name_the_head_that_is_the_embedding_table(tmp_path: Path) -> None:
    names = {name: hub_name(name) for name in CANONICAL if name != "lm_head.weight"}
    folder = write(tmp_path / "saved", config("llava_next", "tied"), names)
    shard = folder / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(shard)
    listed = dict.fromkeys((*names.values(), "language_model.lm_head.weight"), shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))

    assert open_checkpoint(folder).dims.text.tie_word_embeddings
