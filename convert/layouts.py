"""Layouts: the names of a checkpoint's tensors, brought to one canonical set.

Canonical names are those of transformers, less its changing prefixes::

    language_model.embed_tokens.weight      vision_tower.embeddings.class_embedding
    language_model.layers.N.…               vision_tower.embeddings.patch_embedding.weight
    language_model.norm.weight              vision_tower.pre_layrnorm.weight, .bias
    lm_head.weight                          vision_tower.encoder.layers.N.…
    image_newline                           multi_modal_projector.linear_1.weight …

The layout is decided once a checkpoint: in the original files a bare ``model.`` is the language
model, in newer in-memory names it is the whole, so deciding key by key would mix the two.

Sources: transformers 4.51 to 5.23 ``modeling_llava_next.py`` and ``conversion_mapping.py``; the
original LLaVA ``llava/model/llava_arch.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llava_edge.convert.gptq_settings import GptqSettings
from llava_edge.convert.safetensors_file import TensorRef
from llava_edge.profiles.errors import CheckpointError, shorten
from llava_edge.profiles.model_dims import ModelDims, TextDims, VisionDims

WEIGHT_DTYPES = frozenset({"F16", "BF16", "F32"})
"""Types in which a weight may be stored."""

GPTQ_INTEGERS = (".qweight", ".qzeros", ".g_idx")
"""Endings of the int32 tensors of a GPTQ layer, which stand beside its ``.scales``."""

ADAPTER_PREFIX = "base_model.model."

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """One naming scheme: ``prefixes`` are (stored, canonical), the first that fits is taken."""

    name: str
    prefixes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ExpectedTensors:
    """Canonical names and shapes: ``required`` for the graphs, ``optional`` never read."""

    required: Mapping[str, _Shape]
    optional: Mapping[str, _Shape]


_PROJECTOR = ("multi_modal_projector.", "multi_modal_projector.")

HUB = Layout(
    "hub",
    (
        ("language_model.model.", "language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "vision_tower."),
        _PROJECTOR,
        ("image_newline", "image_newline"),
        # transformers 5.4 and 5.5 left this one name unmapped when saving.
        ("model.image_newline", "image_newline"),
    ),
)
MEMORY_4_52 = Layout(
    "transformers-4.52",
    (
        ("model.language_model.", "language_model."),
        ("lm_head.", "lm_head."),
        ("model.vision_tower.vision_model.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.image_newline", "image_newline"),
    ),
)
ORIGINAL = Layout(
    "original",
    (
        ("model.embed_tokens.", "language_model.embed_tokens."),
        ("model.layers.", "language_model.layers."),
        ("model.norm.", "language_model.norm."),
        ("lm_head.", "lm_head."),
        ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
        ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
        ("model.image_newline", "image_newline"),
    ),
)


def hub_name(canonical: str) -> str:
    """Name under which transformers saves a tensor, given its canonical one.

    Raises:
        ValueError: no tensor of a model has such a name.
    """
    for stored, prefix in HUB.prefixes:
        if canonical.startswith(prefix):
            return stored + canonical[len(prefix) :]
    raise ValueError(f"{canonical!r} is no canonical tensor name")


def detect_layout(names: Iterable[str]) -> Layout:
    """Decide which naming scheme a checkpoint follows.

    Args:
        names: all tensor names as stored, without the adapter prefix.

    Raises:
        CheckpointError: the names belong to no known scheme, or to an unmerged adapter.
    """
    listed = sorted(names)
    if any(".lora_" in name for name in listed):
        raise CheckpointError(
            "the checkpoint is an adapter (its tensors are named lora_A, lora_B), not a model. "
            "Merge it into its base model and save that."
        )

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in listed)

    if has("model.mm_projector."):
        layout = ORIGINAL
    elif has("model.language_model."):
        layout = MEMORY_4_52
    elif has("language_model.model."):
        layout = HUB
    else:
        raise CheckpointError(
            f"tensor names belong to no known LLaVA-NeXT layout: {shorten(listed)}. Known are the "
            "llava-hf hub names (language_model.model.…), transformers' in-memory names "
            "(model.language_model.…) and the original ones (model.mm_projector.…)."
        )
    inner = next(stored for stored, canonical in layout.prefixes if canonical == "vision_tower.")
    if has(inner):
        return layout
    # transformers 5.6 dropped the inner module of the vision tower from its names.
    flat = inner.removesuffix("vision_model.")
    name = "transformers-5.6" if layout is MEMORY_4_52 else layout.name
    return Layout(name, tuple((flat if s == inner else s, c) for s, c in layout.prefixes))


def canonical_tensors(
    stored: Mapping[str, TensorRef], dims: ModelDims, gptq: GptqSettings | None = None
) -> tuple[str, dict[str, TensorRef]]:
    """Rename all tensors of a checkpoint and check them against its dimensions.

    Args:
        stored: tensors by the name that the files give them.
        dims: dimensions from the configuration.
        gptq: settings of a GPTQ checkpoint, whose decoder layers have four tensors for a weight.

    Returns:
        Name of the layout, and the tensors by canonical name. With tied embeddings and no stored
        head, ``lm_head.weight`` is the very tensor of ``language_model.embed_tokens.weight``.

    Raises:
        CheckpointError: tensors are missing, unexpected, doubled, or of another shape or type than
            the configuration says; all are reported together.
    """
    kept = {name: ref for name, ref in _strip_adapter(stored).items() if not _is_buffer(name)}
    layout = detect_layout(kept)
    expected = expected_tensors(dims)
    if gptq is not None:
        expected = _with_gptq(expected, dims.text, gptq)
    known = {**expected.required, **expected.optional}
    found: dict[str, TensorRef] = {}
    unexpected: list[str] = []
    doubled: list[str] = []
    for name, ref in kept.items():
        canonical = _rename(name, layout)
        if canonical is None or canonical not in known:
            unexpected.append(name)
        elif canonical in found:
            doubled.append(f"{found[canonical].name} and {name}")
        else:
            found[canonical] = ref
    missing = [name for name in expected.required if name not in found]
    faults = [
        *_group("missing", missing),
        *_group("unexpected", unexpected),
        *_group("stored twice", doubled),
        *_group("of another shape than config.json says", _wrong_shapes(found, known)),
        *_group(
            f"not stored as {' / '.join(sorted(WEIGHT_DTYPES))} (I32 for GPTQ codes)"
            if gptq
            else f"not stored as {' / '.join(sorted(WEIGHT_DTYPES))}",
            _wrong_types(found),
        ),
    ]
    if faults:
        listed = "\n  - ".join([*faults, *_hints(missing, unexpected, dims)])
        raise CheckpointError(
            f"the weights ({layout.name} layout, {len(stored)} tensors) do not fit config.json:"
            f"\n  - {listed}"
        )
    if dims.text.tie_word_embeddings:
        found.setdefault("lm_head.weight", found["language_model.embed_tokens.weight"])
    return layout.name, found


def expected_tensors(dims: ModelDims) -> ExpectedTensors:
    """Canonical names and shapes of all weights that a model of these dimensions has.

    Blocks of the vision tower above the feature layer and its final norm are optional: nothing
    reads them. So is the head of a model with tied embeddings.
    """
    required: dict[str, _Shape] = {}
    optional: dict[str, _Shape] = {}
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


def _with_gptq(expected: ExpectedTensors, text: TextDims, gptq: GptqSettings) -> ExpectedTensors:
    """The tensors of a checkpoint whose decoder layers are GPTQ v1.

    ``g_idx`` may be absent; some tools write a bias of zeros for layers that have none.
    """
    required: dict[str, _Shape] = {}
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


def _add_text(text: TextDims, required: dict[str, _Shape], optional: dict[str, _Shape]) -> None:
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


def _add_vision(
    vision: VisionDims, required: dict[str, _Shape], optional: dict[str, _Shape]
) -> None:
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
    target: dict[str, _Shape], name: str, out_features: int, in_features: int, bias: bool
) -> None:
    target[f"{name}.weight"] = (out_features, in_features)
    if bias:
        target[f"{name}.bias"] = (out_features,)


def _add_norm(target: dict[str, _Shape], name: str, width: int) -> None:
    target[f"{name}.weight"] = (width,)
    target[f"{name}.bias"] = (width,)


def _strip_adapter(stored: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    if stored and all(name.startswith(ADAPTER_PREFIX) for name in stored):
        return {name.removeprefix(ADAPTER_PREFIX): ref for name, ref in stored.items()}
    return dict(stored)


def _is_buffer(name: str) -> bool:
    """Old files hold two buffers that are computed, not trained."""
    return name.endswith((".rotary_emb.inv_freq", ".embeddings.position_ids"))


def _rename(name: str, layout: Layout) -> str | None:
    for stored, canonical in layout.prefixes:
        if name == stored or (stored.endswith(".") and name.startswith(stored)):
            return canonical + name[len(stored) :]
    return None


def _group(what: str, names: list[str]) -> list[str]:
    return [f"{len(names)} {what}: {shorten(names, 8)}"] if names else []


def _wrong_shapes(found: Mapping[str, TensorRef], known: Mapping[str, _Shape]) -> list[str]:
    return [
        f"{name} has {list(ref.shape)}, expected {list(known[name])}"
        for name, ref in found.items()
        if ref.shape != known[name]
    ]


def _wrong_types(found: Mapping[str, TensorRef]) -> list[str]:
    return [
        f"{name} ({ref.dtype})"
        for name, ref in found.items()
        if ref.dtype not in ({"I32"} if name.endswith(GPTQ_INTEGERS) else WEIGHT_DTYPES)
    ]


def _hints(missing: list[str], unexpected: list[str], dims: ModelDims) -> list[str]:
    hints = []
    if any(
        name.endswith((".qweight", ".qzeros", ".weight_packed", ".absmax")) for name in unexpected
    ):
        hints.append("next step: the checkpoint is quantised; give the float16 or bfloat16 one")
    tower = [name for name in expected_tensors(dims).required if name.startswith("vision_tower.")]
    if set(tower) <= set(missing):
        hints.append(
            "next step: there is no vision tower at all, as in checkpoints that kept it frozen; "
            "give the llava-hf conversion, which holds it"
        )
    if missing == ["lm_head.weight"]:
        hints.append("next step: if the head shares the embeddings, set tie_word_embeddings")
    return hints
