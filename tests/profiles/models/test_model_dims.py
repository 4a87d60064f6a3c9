"""Dimensions read from configurations, against hand-written numbers and transformers' classes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaConfig, LlavaNextConfig, LlavaNextVideoConfig

from llava_edge.profiles.errors import CheckpointError
from llava_edge.profiles.models.model_dims import STOCK_PINPOINTS, ModelDims

HUB_VISION = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
VICUNA = {
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32064,
}
VICUNA_13B = {
    **VICUNA,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
YI_34B = {
    **VICUNA,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
    "rope_theta": 5000000.0,
    "vocab_size": 64064,
}
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 8192,
    "max_window_layers": 70,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


@dataclass(frozen=True)
class Published:
    """A configuration as the hub has it, and what must be read from it.

    ``sizes``: hidden, intermediate, layers, heads, key/value heads, vocabulary, positions.
    """

    name: str
    model_type: str
    text: dict[str, Any]
    sizes: tuple[int, int, int, int, int, int, int]
    theta: float
    eps: float
    image_token: int
    video_token: int | None = None
    rope_factor: float = 1.0

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "model_type": self.model_type,
            "image_token_index": self.image_token,
            "text_config": copy.deepcopy(self.text),
            "vision_config": dict(HUB_VISION),
        }
        if self.video_token is not None:
            config["video_token_index"] = self.video_token
        return config


SMALL = (4096, 11008, 32, 32, 32, 32064, 4096)
PUBLISHED = (
    Published(
        "v1.6-mistral-7b",
        "llava_next",
        {
            "model_type": "mistral",
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 32064,
        },
        (4096, 14336, 32, 32, 8, 32064, 32768),
        1e6,
        1e-5,
        32000,
    ),
    Published("v1.6-vicuna-7b", "llava_next", VICUNA, SMALL, 1e4, 1e-5, 32000),
    Published(
        "v1.6-vicuna-13b",
        "llava_next",
        VICUNA_13B,
        (5120, 13824, 40, 40, 40, 32064, 4096),
        1e4,
        1e-5,
        32000,
    ),
    Published(
        "v1.6-34b", "llava_next", YI_34B, (7168, 20480, 60, 56, 8, 64064, 4096), 5e6, 1e-5, 64000
    ),
    Published(
        "llama3-8b",
        "llava_next",
        {
            **VICUNA,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 8,
            "rope_theta": 500000.0,
            "vocab_size": 128320,
        },
        (4096, 14336, 32, 32, 8, 128320, 8192),
        5e5,
        1e-5,
        128256,
    ),
    Published(
        "72b",
        "llava_next",
        {**QWEN, "intermediate_size": 24576, "num_key_value_heads": 64},
        (8192, 24576, 80, 64, 64, 152064, 32768),
        1e6,
        1e-6,
        151646,
    ),
    Published(
        "110b",
        "llava_next",
        {**QWEN, "intermediate_size": 49152, "num_key_value_heads": 8},
        (8192, 49152, 80, 64, 8, 152064, 32768),
        1e6,
        1e-6,
        151646,
    ),
    Published(
        "video-7b",
        "llava_next_video",
        {**VICUNA, "rope_scaling": {"factor": 2.5, "type": "linear"}},
        SMALL,
        1e4,
        1e-5,
        32001,
        32000,
        2.5,
    ),
    Published(
        "video-34b",
        "llava_next_video",
        YI_34B,
        (7168, 20480, 60, 56, 8, 64064, 4096),
        5e6,
        1e-5,
        64004,
        64003,
    ),
    Published("1.5-7b", "llava", VICUNA, SMALL, 1e4, 1e-5, 32000),
    Published(
        "1.5-13b", "llava", VICUNA_13B, (5120, 13824, 40, 40, 40, 32064, 4096), 1e4, 1e-5, 32000
    ),
)
LIBRARY = {
    "llava": LlavaConfig,
    "llava_next": LlavaNextConfig,
    "llava_next_video": LlavaNextVideoConfig,
}


def small_config(**text: Any) -> dict[str, Any]:
    return {
        "model_type": "llava_next",
        "vision_config": dict(HUB_VISION),
        "text_config": {"model_type": "llama", "num_hidden_layers": 4, **text},
    }


def assert_agrees_with_library(config: dict[str, Any]) -> None:
    """Every field against the configuration class that the reference itself would build."""
    library = LIBRARY[config["model_type"]](
        **{k: v for k, v in copy.deepcopy(config).items() if k != "model_type"}
    )
    dims = ModelDims.from_config(config)
    vision, text = library.vision_config, library.text_config
    for field in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "layer_norm_eps",
        "hidden_act",
    ):
        assert getattr(dims.vision, field) == getattr(vision, field), field
    for field in (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "hidden_act",
    ):
        assert getattr(dims.text, field) == getattr(text, field), field
    heads = text.hidden_size // text.num_attention_heads
    assert dims.text.head_dim == (getattr(text, "head_dim", None) or heads)
    rope = text.rope_parameters
    assert dims.text.rope_theta == rope["rope_theta"]
    assert dims.text.rope_factor == rope.get("factor", 1.0)
    assert dims.text.tie_word_embeddings == library.tie_word_embeddings
    assert dims.text.sliding_windows == library_windows(text)
    assert dims.image_token_id == library.image_token_index
    assert dims.video_token_id == getattr(library, "video_token_index", None)
    if config["model_type"] != "llava":
        assert [list(p) for p in dims.image_grid_pinpoints] == library.image_grid_pinpoints


def library_windows(text: Any) -> tuple[int, ...]:
    window = getattr(text, "sliding_window", None) or 0
    types = getattr(text, "layer_types", None)
    if types is None:
        return (window,) * text.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: p.name)
def test_a_hub_configuration_with_omitted_defaults_gives_the_published_sizes(
    published: Published,
) -> None:
    dims = ModelDims.from_config(published.config())
    text, vision = dims.text, dims.vision
    assert published.sizes == (
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.vocab_size,
        text.max_position_embeddings,
    )
    assert text.head_dim == 128
    assert (text.rope_theta, text.rope_factor) == (published.theta, published.rope_factor)
    assert text.rms_norm_eps == published.eps
    assert text.qkv_bias == (text.model_type == "qwen2")
    assert [text.o_bias, text.mlp_bias, text.tie_word_embeddings] == [False] * 3
    assert set(text.sliding_windows) == {0}
    assert (dims.image_token_id, dims.video_token_id) == (
        published.image_token,
        published.video_token,
    )
    assert (vision.num_patches, vision.head_dim, vision.feature_size) == (576, 64, 1024)
    assert (vision.feature_layers, vision.num_blocks_used) == ((23,), 23)
    assert (vision.hidden_act, vision.layer_norm_eps) == ("quick_gelu", 1e-5)
    stock = () if published.model_type == "llava" else STOCK_PINPOINTS
    assert dims.image_grid_pinpoints == stock


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: p.name)
def test_published_configurations_are_read_as_the_library_reads_them(published: Published) -> None:
    assert_agrees_with_library(published.config())


@pytest.mark.parametrize("model_type", sorted(LIBRARY))
@pytest.mark.parametrize("backbone", ["llama", "mistral", "qwen2"])
def test_what_a_configuration_leaves_out_is_what_the_library_fills_in(
    model_type: str, backbone: str
) -> None:
    assert_agrees_with_library({"model_type": model_type, "text_config": {"model_type": backbone}})


def test_a_vision_config_that_is_there_gets_the_defaults_of_its_own_class() -> None:
    config = {
        "model_type": "llava_next",
        "vision_config": {"patch_size": 14},
        "image_grid_pinpoints": [[224, 448]],
    }
    assert ModelDims.from_config(config).vision.hidden_size == 768
    assert_agrees_with_library(config)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param({"model_type": "mistral"}, id="mistral absent"),
        pytest.param({"model_type": "mistral", "sliding_window": None}, id="mistral null"),
        pytest.param({"model_type": "mistral", "sliding_window": 700}, id="mistral 700"),
        pytest.param({"model_type": "qwen2", "sliding_window": 700}, id="qwen2 unused"),
        pytest.param(
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3},
            id="qwen2 used, number absent",
        ),
        pytest.param(
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 0,
            },
            id="qwen2 every layer",
        ),
        pytest.param(
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            id="qwen2 layer_types",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e5}},
            id="rope nested",
        ),
        pytest.param(
            {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 5e5},
            id="rope flat",
        ),
        pytest.param({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, id="theta"),
        pytest.param({"factor": 2.0, "type": "linear"}, id="stray rope keys have no effect"),
        pytest.param({"num_key_value_heads": None, "model_type": "qwen2"}, id="qwen kv heads null"),
        pytest.param({"head_dim": 96, "model_type": "qwen2"}, id="head_dim of its own"),
        pytest.param({"tie_word_embeddings": True}, id="tie inside only"),
    ],
)
def test_an_unusual_language_model_is_read_as_the_library_reads_it(text: dict[str, Any]) -> None:
    assert_agrees_with_library(small_config(**text))


def test_the_sister_models_take_tying_from_the_language_model_too() -> None:
    for model_type in ("llava", "llava_next_video"):
        config = {**small_config(tie_word_embeddings=True), "model_type": model_type}
        assert_agrees_with_library(config)
        assert ModelDims.from_config(config).text.tie_word_embeddings


def test_positions_grow_with_linear_scaling() -> None:
    scaled = small_config(
        max_position_embeddings=4096, rope_scaling={"type": "linear", "factor": 2.5}
    )
    assert ModelDims.from_config(scaled).text.max_positions == 10240


@pytest.mark.parametrize(
    ("layer", "expected", "blocks", "width"),
    [
        pytest.param(-2, (23,), 23, 1024, id="minus two"),
        pytest.param(-1, (24,), 24, 1024, id="last"),
        pytest.param(7, (7,), 7, 1024, id="seven"),
        pytest.param([-2, 12, 3], (23, 12, 3), 23, 3072, id="list of three"),
    ],
)
def test_feature_layers_count_from_either_end(
    layer: int | list[int], expected: tuple[int, ...], blocks: int, width: int
) -> None:
    dims = ModelDims.from_config({**small_config(), "vision_feature_layer": layer})
    assert dims.vision.feature_layers == expected
    assert dims.vision.num_blocks_used == blocks
    assert dims.vision.feature_size == width


def test_biases_follow_the_architecture() -> None:
    biased = {"attention_bias": True, "mlp_bias": True}
    llama = ModelDims.from_config(small_config(**biased)).text
    qwen = ModelDims.from_config(small_config(model_type="qwen2", **biased)).text
    mistral = ModelDims.from_config(small_config(model_type="mistral", **biased)).text
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    assert (qwen.qkv_bias, qwen.o_bias, qwen.mlp_bias) == (True, False, False)
    assert (mistral.qkv_bias, mistral.o_bias, mistral.mlp_bias) == (False, False, False)


def test_another_model_type_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="'llava_onevision'; supported are"):
        ModelDims.from_config({"model_type": "llava_onevision"})


def test_unknown_parts_are_listed_together() -> None:
    config = {
        "model_type": "llava_next",
        "vision_config": {"model_type": "siglip_vision_model"},
        "text_config": {"model_type": "gemma"},
        "vision_feature_select_strategy": "full",
    }
    with pytest.raises(CheckpointError) as caught:
        ModelDims.from_config(config)
    for part in ("siglip_vision_model", "gemma", "'full'"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(
            {"text": {"hidden_size": "4096"}}, "text_config.hidden_size is '4096'", id="str"
        ),
        pytest.param({"text": {"num_attention_heads": 0}}, "num_attention_heads is 0", id="zero"),
        pytest.param({"text": {"num_hidden_layers": 10**9}}, "num_hidden_layers", id="layers"),
        pytest.param({"text": {"num_attention_heads": 30}}, "no multiple of 30 heads", id="heads"),
        pytest.param({"text": {"num_key_value_heads": 5}}, "no multiple of 5", id="kv heads"),
        pytest.param({"text": {"head_dim": 40}}, "head_dim 40", id="head dim"),
        pytest.param({"text": {"hidden_act": "relu"}}, "'relu' is not silu", id="act"),
        pytest.param({"text": {"rms_norm_eps": -1}}, "rms_norm_eps is -1", id="eps"),
        pytest.param({"text": {"rope_theta": 10**400}}, "rope_theta", id="theta"),
        pytest.param({"text": {"rope_scaling": {"type": "yarn"}}}, "'yarn'", id="yarn"),
        pytest.param({"text": {"rope_scaling": {"type": "linear"}}}, "factor is None", id="factor"),
        pytest.param({"text": {"rope_scaling": [1]}}, "not an object", id="rope list"),
        pytest.param({"text": {"partial_rotary_factor": 0.5}}, "0.5 is not 1", id="partial"),
        pytest.param({"vision": {"patch_size": 0}}, "patch_size is 0", id="patch"),
        pytest.param({"vision": {"patch_size": 13}}, "no multiple of patch 13", id="patch 13"),
        pytest.param({"vision": {"num_attention_heads": 15}}, "15 heads", id="vision heads"),
        pytest.param({"vision": {"num_channels": 1}}, "num_channels is 1", id="grey"),
        pytest.param({"vision": {"hidden_act": "silu"}}, "quick_gelu", id="vision act"),
        pytest.param({"vision_feature_layer": 30}, "outside the 24 blocks", id="layer"),
        pytest.param({"vision_feature_layer": 0}, "outside the 24 blocks", id="layer 0"),
        pytest.param(
            {"vision_feature_layer": "-2"}, "vision_feature_layer is '-2'", id="layer str"
        ),
        pytest.param({"vision_feature_layer": []}, "vision_feature_layer is []", id="no layer"),
        pytest.param({"projector_hidden_act": "relu"}, "is not gelu", id="projector"),
        pytest.param({"image_grid_pinpoints": [[336, 700]]}, "multiples", id="pinpoint"),
        pytest.param({"image_grid_pinpoints": "(1x1)"}, "not a list of", id="pinpoint str"),
        pytest.param({"image_grid_pinpoints": []}, "not a list of", id="no pinpoint"),
        pytest.param({"image_token_index": -1}, "image_token_index is -1", id="token"),
        pytest.param(
            {"model_type": "llava_next_video", "spatial_pool_stride": 4}, "stride 4", id="pooling"
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    config = small_config(**change.pop("text", {}))
    config["vision_config"] |= change.pop("vision", {})
    with pytest.raises(CheckpointError) as caught:
        ModelDims.from_config({**config, **change})
    assert said in str(caught.value)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
KEYS = sorted(
    {"image_grid_pinpoints", "vision_feature_layer", "image_token_index", "tie_word_embeddings"}
    | {"text_config", "vision_config", "projector_hidden_act", "vision_feature_select_strategy"}
)
TEXT_KEYS = sorted(set(QWEN) | set(YI_34B) | {"rope_scaling", "rope_parameters", "layer_types"})


@settings(max_examples=300, deadline=None)
@given(
    top=st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=2),
    text=st.dictionaries(st.sampled_from(TEXT_KEYS), JUNK, max_size=3),
    vision=st.dictionaries(st.sampled_from(sorted(HUB_VISION)), JUNK, max_size=3),
    backbone=st.sampled_from(["llama", "mistral", "qwen2"]),
)
def test_junk_in_a_configuration_never_ends_in_a_foreign_error(
    top: dict[str, Any], text: dict[str, Any], vision: dict[str, Any], backbone: str
) -> None:
    config = small_config(**{"model_type": backbone, **text})
    config["vision_config"] |= vision
    try:
        dims = ModelDims.from_config({**config, **top})
    except CheckpointError:
        return
    assert dims.text.head_dim % 16 == 0
