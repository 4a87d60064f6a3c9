import json
from pathlib import Path

import pytest

from llava_edge.profiles.errors import CheckpointError, RequestError
from llava_edge.profiles.memory.formats import weight_bytes
from llava_edge.profiles.models.parameters import (
    head_parameters,
    projector_parameters,
    total_parameters,
    vision_parameters,
)
from llava_edge.profiles.models.variants import Variant, candidates, find_variant, load_variants

# Stored fp16 bytes, added up from the published shapes.
PUBLISHED = {
    "llava-v1.6-mistral-7b": 15_133_495_296,
    "llava-v1.6-vicuna-7b": 14_126_862_336,
    "llava-v1.6-vicuna-13b": 26_702_999_552,
    "llava-v1.6-34b": 69_504_167_936,
    "llama3-llava-next-8b": 16_710_553_600,
    "llava-next-72b": 145_333_899_264,
    "llava-next-110b": 223_177_887_744,
    "LLaVA-NeXT-Video-7B": 14_126_862_336,
    "LLaVA-NeXT-Video-34B": 69_504_167_936,
}
# A tower block and the last norm, never computed at vision_feature_layer -2.
UNUSED_TOWER_PARAMETERS = 12_596_224 + 2 * 1024

CONFIG = {
    "model_type": "llava_next",
    "text_config": {"model_type": "llama", "vocab_size": 32064, "num_hidden_layers": 2},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "image_size": 336,
        "patch_size": 14,
    },
    "image_token_index": 32000,
}


def by_name(name: str) -> Variant:
    return next(v for v in load_variants() if v.name == name)


def test_the_whole_family_and_its_forerunner_are_there() -> None:
    names = {v.name for v in load_variants()}
    assert names == {*PUBLISHED, "llava-1.5-7b", "llava-1.5-13b"}


@pytest.mark.parametrize("variant", load_variants(), ids=lambda v: str(v.name))
def test_dimensions_give_exactly_the_published_parameters(variant: Variant) -> None:
    assert total_parameters(variant.dims) == variant.parameters
    assert PUBLISHED.get(variant.name, variant.fp16_bytes) == variant.fp16_bytes
    assert variant.hub_id is not None
    assert variant.license
    assert {"config", "tokens", "prompt", "status"} <= set(variant.sources)


@pytest.mark.parametrize("variant", load_variants(), ids=lambda v: str(v.name))
def test_fp16_files_hold_the_checkpoint_less_the_unused_part_of_the_tower(
    variant: Variant,
) -> None:
    stored = weight_bytes(variant.dims, "fp16", "cuda", resident=False).total
    assert stored == variant.fp16_bytes - 2 * UNUSED_TOWER_PARAMETERS


def test_parts_of_the_mistral_variant_are_the_known_ones() -> None:
    dims = by_name("llava-v1.6-mistral-7b").dims
    assert vision_parameters(dims.vision) == 303_507_456
    assert vision_parameters(dims.vision, 23) == 290_909_184
    assert projector_parameters(dims) == 20_979_712
    assert head_parameters(dims.text) == 131_334_144


def test_candidates_come_largest_first_and_by_kind() -> None:
    sizes = [v.parameters for v in candidates()]
    assert sizes == sorted(sizes, reverse=True)
    assert len(candidates()) == 7
    assert {v.name for v in candidates("video")} == {"LLaVA-NeXT-Video-7B", "LLaVA-NeXT-Video-34B"}
    assert len(candidates("llava-1.5")) == 2


def test_the_video_variant_reaches_further_through_rope_scaling() -> None:
    assert by_name("LLaVA-NeXT-Video-7B").dims.text.max_positions == 10240
    assert by_name("LLaVA-NeXT-Video-34B").dims.text.max_positions == 4096


@pytest.mark.parametrize(
    "name",
    ["llava-next-72b", "llava-hf/llava-next-72b-hf", "lmms-lab/llava-next-72b"],
)
def test_a_variant_is_found_by_any_of_its_names(name: str) -> None:
    if name == "lmms-lab/llava-next-72b":
        name = str(by_name("llava-next-72b").original_id)
    assert find_variant(name).name == "llava-next-72b"


def test_a_folder_with_a_config_is_a_variant(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    variant = find_variant(str(tmp_path))
    assert variant.kind == "image"
    assert variant.name == tmp_path.name
    assert variant.parameters == total_parameters(variant.dims)
    assert find_variant(str(tmp_path / "config.json")).dims == variant.dims


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"'llava-99b'.*llava-next-110b"):
        find_variant("llava-99b")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"model_type": "bert"}', '{"model_type": "llava_next", "text_config": 5'],
)
def test_a_damaged_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError):
        find_variant(str(tmp_path))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        find_variant(str(tmp_path))
