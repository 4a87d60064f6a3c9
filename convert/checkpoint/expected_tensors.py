"""ExpectedTensors: the tensors that a model of given dimensions has, with their shapes.

Names are canonical, see ``layouts``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llava_edge.convert.checkpoint.formats.gptq_settings import GptqSettings
from llava_edge.profiles.models.model_dims import ModelDims, TextDims, VisionDims

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExpectedTensors:
    """Canonical names and shapes: ``required`` for the graphs, ``optional`` never read."""

    required: Mapping[str, Shape]
    optional: Mapping[str, Shape]


def expected_tensors(dims: ModelDims) -> ExpectedTensors:
    """Canonical names and shapes of all weights that a model of these dimensions has.

    Blocks of the vision tower above the feature layer and its final norm are optional: nothing
    reads them. So is the head of a model with tied embeddings.
    """
    required: dict[str, Shape] = {}
    optional: dict[str, Shape] = {}
    _add_text(dims.text, required, optional)
    _add_vision(dims.vision, required, optional)
    width = dims.text.hidden_size
    _add_linear(
        required,
        "multi_modal_projector.linear_1",
        width,
        dims.vision.feature_size,
        dims.vision.projector_bias,
    )
    _add_linear(
        required, "multi_modal_projector.linear_2", width, width, dims.vision.projector_bias
    )
    if dims.takes_tiles:
        required["image_newline"] = (width,)
    return ExpectedTensors(required, optional)


def with_gptq(expected: ExpectedTensors, text: TextDims, gptq: GptqSettings) -> ExpectedTensors:
    """The tensors of a checkpoint whose decoder layers are GPTQ v1.

    ``g_idx`` may be absent; some tools write a bias of zeros for layers that have none.

    Args:
        expected: those of the model with plain weights.
        text: dimensions of the language model.
        gptq: bits and group size.
    """
    required: dict[str, Shape] = {}
    optional = dict(expected.optional)
    for name, shape in expected.required.items():
        if not (name.startswith("language_model.layers.") and name.endswith("_proj.weight")):
            required[name] = shape
            continue
        (num_rows, num_columns), prefix = shape, name.removesuffix(".weight")
        groups = 1 if gptq.group_size == -1 else num_columns // gptq.group_size
        required[f"{prefix}.qweight"] = (num_columns * gptq.bits // 32, num_rows)
        required[f"{prefix}.qzeros"] = (groups, num_rows * gptq.bits // 32)
        required[f"{prefix}.scales"] = (groups, num_rows)
        optional[f"{prefix}.g_idx"] = (num_columns,)
        if f"{prefix}.bias" not in expected.required:
            optional[f"{prefix}.bias"] = (num_rows,)
    return ExpectedTensors(required, optional)


def _add_text(text: TextDims, required: dict[str, Shape], optional: dict[str, Shape]) -> None:
    width = text.hidden_size
    required["language_model.embed_tokens.weight"] = (text.vocab_size, width)
    for layer in range(text.num_hidden_layers):
        prefix = f"language_model.layers.{layer}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        required[f"{prefix}input_layernorm.weight"] = (width,)
        _add_linear(required, f"{attention}q_proj", text.query_size, width, text.qkv_bias)
        _add_linear(required, f"{attention}k_proj", text.key_value_size, width, text.qkv_bias)
        _add_linear(required, f"{attention}v_proj", text.key_value_size, width, text.qkv_bias)
        _add_linear(required, f"{attention}o_proj", width, text.query_size, text.o_bias)
        required[f"{prefix}post_attention_layernorm.weight"] = (width,)
        _add_linear(required, f"{mlp}gate_proj", text.intermediate_size, width, text.mlp_bias)
        _add_linear(required, f"{mlp}up_proj", text.intermediate_size, width, text.mlp_bias)
        _add_linear(required, f"{mlp}down_proj", width, text.intermediate_size, text.mlp_bias)
    required["language_model.norm.weight"] = (width,)
    head = optional if text.tie_word_embeddings else required
    head["lm_head.weight"] = (text.vocab_size, width)


def _add_vision(vision: VisionDims, required: dict[str, Shape], optional: dict[str, Shape]) -> None:
    width, patch = vision.hidden_size, vision.patch_size
    embeddings = "vision_tower.embeddings."
    required[f"{embeddings}class_embedding"] = (width,)
    required[f"{embeddings}patch_embedding.weight"] = (width, 3, patch, patch)
    required[f"{embeddings}position_embedding.weight"] = (vision.num_patches + 1, width)
    _add_norm(required, "vision_tower.pre_layrnorm", width)
    for block in range(vision.num_hidden_layers):
        target = required if block < vision.num_blocks_used else optional
        prefix = f"vision_tower.encoder.layers.{block}."
        _add_norm(target, f"{prefix}layer_norm1", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _add_linear(target, f"{prefix}self_attn.{projection}", width, width, True)
        _add_norm(target, f"{prefix}layer_norm2", width)
        _add_linear(target, f"{prefix}mlp.fc1", vision.intermediate_size, width, True)
        _add_linear(target, f"{prefix}mlp.fc2", width, vision.intermediate_size, True)
    _add_norm(optional, "vision_tower.post_layernorm", width)


def _add_linear(
    target: dict[str, Shape], name: str, out_features: int, in_features: int, bias: bool
) -> None:
    target[f"{name}.weight"] = (out_features, in_features)
    if bias:
        target[f"{name}.bias"] = (out_features,)


def _add_norm(target: dict[str, Shape], name: str, width: int) -> None:
    target[f"{name}.weight"] = (width,)
    target[f"{name}.bias"] = (width,)
