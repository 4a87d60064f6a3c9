"""Original configurations: from the names of the LLaVA repositories to those of Hugging Face.

The original training code keeps the language model's fields at the top level, names the vision
tower instead of describing it, and reads grids as (width, height). What cannot be said in the
other form is refused, all reasons together.

Sources: LLaVA ``llava/model/language_model/*.py``, ``llava/mm_utils.py`` and
``llava/model/llava_arch.py``; ``convert_llava_next_weights_to_hf.py`` of transformers 4.47.1.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from llava_edge.profiles.errors import CheckpointError
from llava_edge.profiles.models.config_section import MAX_SIZE

_CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_TOWERS: Mapping[str, Mapping[str, Any]] = {
    "clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}
_BACKBONES: Mapping[str, str] = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
_TEXT_KEYS = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "partial_rotary_factor",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
)
_MAX_LITERAL_CHARACTERS = 10_000
_MAX_PINPOINTS = 1024


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a configuration was written by the original repositories."""
    return "mm_vision_tower" in config and "text_config" not in config


def to_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say an original configuration in the words of ``LlavaNextConfig``.

    ``image_grid_pinpoints`` stay as the file lists them. The original code reads the pairs as
    (width, height), conversions to Hugging Face copy them and read (height, width); which of the
    two holds is the choice of ``reference`` in ``AnyRes``, and turning the list here would turn it
    twice. The image mark has no row in these checkpoints; ``image_token_index`` is the first id
    behind the table.

    Raises:
        CheckpointError: the configuration asks for something that LLaVA-NeXT does not do; all
            reasons are listed.
    """
    faults: list[str] = []
    backbone = _backbone(config, faults)
    tower = _tower(config, faults)
    pinpoints = _pinpoints(config.get("image_grid_pinpoints"), faults)
    for key, wanted in (
        ("image_aspect_ratio", "anyres"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("mm_projector_type", "mlp2x_gelu"),
    ):
        if config.get(key) != wanted:
            faults.append(f"{key} is {config.get(key)!r:.80}; LLaVA-NeXT has {wanted!r}")
    feature = config.get("mm_vision_select_feature", "patch")
    if feature != "patch":
        faults.append(f"mm_vision_select_feature is {feature!r:.80}; exported is 'patch'")
    sampler = config.get("mm_resampler_type")
    if sampler is not None:
        faults.append(
            f"mm_resampler_type is {sampler!r:.80}: this layout pools images as well and does not "
            "say what a video is; videos are converted from the Hugging Face layout"
        )
    if config.get("mm_use_im_start_end"):
        faults.append("mm_use_im_start_end wraps images in tokens that no LLaVA-NeXT format has")
    width = config.get("mm_hidden_size")
    if tower is not None and width is not None and width != tower.get("hidden_size"):
        faults.append(
            f"mm_hidden_size {width!r:.80} is not the tower's {tower.get('hidden_size')!r:.80}"
        )
    layer = config.get("mm_vision_select_layer")
    if layer is None:
        faults.append("mm_vision_select_layer is missing")
    if "vocab_size" not in config:
        faults.append("vocab_size is missing")
    if faults:
        listed = "\n  - ".join(faults)
        raise CheckpointError(
            f"config.json is in the original layout and cannot be kept faithfully:\n  - {listed}\n"
            "Next step: give the llava-hf conversion of this model if there is one."
        )
    text = {key: config[key] for key in _TEXT_KEYS if key in config}
    return {
        "model_type": "llava_next",
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_token_index": config["vocab_size"],
        "image_grid_pinpoints": pinpoints,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "torch_dtype": config.get("torch_dtype"),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default",
        "vision_config": dict(tower or {}),
        "text_config": {"model_type": backbone, **text},
    }


def _backbone(config: Mapping[str, Any], faults: list[str]) -> str | None:
    architectures = config.get("architectures")
    named = (
        [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []
    )
    # model_type is 'llava' for every base in the first release; the class name tells them apart.
    for key in (*named, config.get("model_type")):
        if isinstance(key, str) and key in _BACKBONES:
            return _BACKBONES[key]
    faults.append(
        f"language model of architectures {named!s:.200}, model_type "
        f"{config.get('model_type')!r:.80} is "
        f"unknown; known are {', '.join(_BACKBONES)}"
    )
    return None


def _tower(config: Mapping[str, Any], faults: list[str]) -> Mapping[str, Any] | None:
    described = config.get("vision_config")
    if isinstance(described, Mapping):
        return described
    name = str(config.get("mm_vision_tower"))
    tower = _TOWERS.get(name.rstrip("/").rsplit("/", 1)[-1])
    if tower is None:
        faults.append(
            f"mm_vision_tower {name!r:.200} is unknown; known are {', '.join(sorted(_TOWERS))}, "
            "others need a vision_config entry"
        )
    return tower


def _pinpoints(raw: object, faults: list[str]) -> list[list[int]] | None:
    value = raw
    if isinstance(raw, str) and len(raw) <= _MAX_LITERAL_CHARACTERS:
        try:
            value = ast.literal_eval(raw)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None
    if (
        not isinstance(value, list)
        or not 0 < len(value) <= _MAX_PINPOINTS
        or not all(
            isinstance(point, (list, tuple))
            and len(point) == 2
            and all(type(side) is int and 0 < side <= MAX_SIZE for side in point)
            for point in value
        )
    ):
        # Literals may be hexadecimal: such numbers can be longer than Python writes in decimal.
        shown = repr(raw[:200] if isinstance(raw, str) else raw)[:200]
        faults.append(f"image_grid_pinpoints {shown} is no list of (width, height) pairs")
        return None
    return [list(point) for point in value]
