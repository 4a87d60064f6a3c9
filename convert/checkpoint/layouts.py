"""Layouts: the names of a checkpoint's tensors, brought to one canonical set.

Canonical names are those of transformers, less its changing prefixes::

    language_model.embed_tokens.weight      vision_tower.embeddings.class_embedding
    language_model.layers.N.…               vision_tower.embeddings.patch_embedding.weight
    language_model.norm.weight              vision_tower.pre_layrnorm.weight, .bias
    lm_head.weight                          vision_tower.encoder.layers.N.…
    image_newline                           multi_modal_projector.linear_1.weight …

A stored name is a canonical one behind containers: ``model.``, ``language_model.``, a tower's
``vision_tower.`` and ``vision_model.``. Which of them, how often and in which order has changed
with every few releases, and raw state dicts, mixed mappings and training wrappers add more. What
follows them has never changed, and no two parts of the model share a first word there. So one rule
per part reads all of them, in any combination. One rule holds for the whole: within a part all
names have the same prefix, else the files come from two checkpoints.

Sources: what each release from 4.39 on writes, ``tests/data/saved_layouts.json``; the original
LLaVA ``llava/model/llava_arch.py``; torch's wrappers for compilation, DDP, FSDP, checkpointing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llava_edge.convert.checkpoint.expected_tensors import expected_tensors, with_gptq
from llava_edge.convert.checkpoint.formats.gptq_settings import GptqSettings
from llava_edge.convert.checkpoint.formats.quantized_formats import find_format
from llava_edge.convert.util.safetensors_io import TensorRef
from llava_edge.profiles.errors import CheckpointError, printable, shorten
from llava_edge.profiles.models.model_dims import ModelDims

WEIGHT_DTYPES = frozenset({"F16", "BF16", "F32"})
"""Types in which a weight may be stored."""

GPTQ_INTEGERS = (".qweight", ".qzeros", ".g_idx")
"""Endings of the int32 tensors of a GPTQ layer, which stand beside its ``.scales``."""

ORIGINAL = "original"
"""Layout of the original LLaVA repositories."""

_WRAPPERS = frozenset(
    {
        "_checkpoint_wrapped_module",
        "_forward_module",
        "_fpw_module",
        "_fsdp_wrapped_module",
        "_orig_mod",
        "module",
    }
)
"""Modules that training puts around others; no module of a model is called so."""

_ADAPTER = r"(?:base_model\.model\.)?"
_TEXT = r"(?:(?:model|language_model)\.)*"
_WHOLE = r"(?:model\.)*"
_RULES = (
    ("decoder", rf"{_ADAPTER}{_TEXT}(?=(?:embed_tokens|layers|norm)\.)", "language_model."),
    ("head", rf"{_ADAPTER}{_TEXT}(?=lm_head\.)", ""),
    (
        "tower",
        rf"{_ADAPTER}{_WHOLE}(?:(?:vision_tower|vision_model)\.)+"
        r"(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm)\.)",
        "vision_tower.",
    ),
    ("projector", rf"{_ADAPTER}{_WHOLE}(?=multi_modal_projector\.)", ""),
    ("projector", rf"{_ADAPTER}{_WHOLE}mm_projector\.0\.", "multi_modal_projector.linear_1."),
    ("projector", rf"{_ADAPTER}{_WHOLE}mm_projector\.2\.", "multi_modal_projector.linear_2."),
    ("newline", rf"{_ADAPTER}{_WHOLE}(?=image_newline$)", ""),
)
_COMPILED = tuple((part, re.compile(pattern), to) for part, pattern, to in _RULES)
_HUB = (
    ("lm_head.", "language_model.lm_head."),
    ("language_model.", "language_model.model."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("multi_modal_projector.", "multi_modal_projector."),
    ("image_newline", "image_newline"),
)
_DECODERS = {
    "language_model.model.": "hub",
    "model.language_model.": "transformers-5.6",
    "model.language_model.model.": "transformers-5.5",
}
_BUFFER_ENDINGS = (
    ".rotary_emb.inv_freq",
    ".rotary_emb.original_inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".position_ids",
)


@dataclass(frozen=True)
class ReadName:
    """A stored name: the part of the model, what stands before the rest, the canonical name."""

    part: str
    prefix: str
    canonical: str


def hub_name(canonical: str) -> str:
    """Name under which transformers saves a tensor, given its canonical one.

    Raises:
        ValueError: no tensor of a model has such a name.
    """
    for prefix, stored in _HUB:
        if canonical.startswith(prefix):
            return stored + canonical[len(prefix) :]
    raise ValueError(f"{canonical!r} is no canonical tensor name")


def read_name(stored: str) -> ReadName | None:
    """Part and canonical name of a stored name; None where it names no tensor of such a model."""
    name = ".".join(word for word in stored.split(".") if word not in _WRAPPERS)
    for part, pattern, to in _COMPILED:
        if (match := pattern.match(name)) is not None:
            return ReadName(part, match[0], to + name[match.end() :])
    return None


def is_buffer(stored: str) -> bool:
    """Whether a name is that of a tensor that models compute; old files and indexes hold some."""
    return stored.endswith(_BUFFER_ENDINGS)


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
        CheckpointError: tensors are missing, unexpected, doubled, of two layouts, or of another
            shape or type than the configuration says; all are reported together.
    """
    read = {name: read_name(name) for name in stored if not is_buffer(name)}
    layout = _layout(read)
    expected = expected_tensors(dims)
    if gptq is not None:
        expected = with_gptq(expected, dims.text, gptq)
    known = {**expected.required, **expected.optional}
    found: dict[str, TensorRef] = {}
    unexpected: list[str] = []
    doubled: list[str] = []
    for name, target in read.items():
        if target is None or target.canonical not in known:
            unexpected.append(name)
        elif target.canonical in found:
            doubled.append(f"{found[target.canonical].name} and {name}")
        else:
            found[target.canonical] = stored[name]
    missing = [name for name in expected.required if name not in found]
    types = " / ".join(sorted(WEIGHT_DTYPES)) + (" (I32 for GPTQ codes)" if gptq else "")
    faults = [
        *_group("missing", missing),
        *_group("unexpected", unexpected),
        *_group("stored twice", doubled),
        *_mixed(read.values()),
        *_group("of another shape than config.json says", _wrong_shapes(found, known)),
        *_group(f"not stored as {types}", _wrong_types(found)),
    ]
    if faults:
        listed = "\n  - ".join([*faults, *_hints(missing, unexpected, found, dims, gptq)])
        raise CheckpointError(
            f"the weights ({layout} layout, {len(stored)} tensors) do not fit config.json:"
            f"\n  - {listed}"
        )
    if dims.text.tie_word_embeddings:
        found.setdefault("lm_head.weight", found["language_model.embed_tokens.weight"])
    return layout, found


def _layout(read: Mapping[str, ReadName | None]) -> str:
    """What to call the names; nothing but ``ORIGINAL`` decides anything."""
    names = [name for name in read.values() if name is not None]
    if not names:
        raise CheckpointError(
            f"tensor names belong to no known LLaVA-NeXT layout: {shorten(sorted(read))}. Known "
            "are the llava-hf hub names (language_model.model.…), transformers' in-memory names "
            "(model.language_model.…) and the original ones (model.mm_projector.…), under the "
            "wrappers of training as well."
        )
    if any("mm_projector." in name.prefix for name in names):
        return ORIGINAL
    prefixes = {name.part: name.prefix.removeprefix("base_model.model.") for name in names}
    layout = _DECODERS.get(prefixes.get("decoder", ""), "transformers")
    if layout == "transformers-5.6" and prefixes.get("tower", "").endswith("vision_model."):
        return "transformers-4.52"
    return layout


def _mixed(names: Iterable[ReadName | None]) -> list[str]:
    """Parts whose names have more than one prefix: files of two checkpoints in one folder."""
    counts: dict[str, dict[str, int]] = {}
    for name in names:
        if name is not None and "mm_projector." not in name.prefix:
            prefixes = counts.setdefault(name.part, {})
            prefixes[name.prefix] = prefixes.get(name.prefix, 0) + 1
    return [
        f"names of two layouts in the {part}: "
        + ", ".join(f"{count} begin with {printable(prefix)!r}" for prefix, count in found.items())
        + ". Two checkpoints lie in the folder; keep the files of one"
        for part, found in counts.items()
        if len(found) > 1
    ]


def _group(what: str, names: list[str]) -> list[str]:
    return [f"{len(names)} {what}: {shorten(names, 8)}"] if names else []


def _wrong_shapes(
    found: Mapping[str, TensorRef], known: Mapping[str, tuple[int, ...]]
) -> list[str]:
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


def _hints(
    missing: list[str],
    unexpected: list[str],
    found: Mapping[str, TensorRef],
    dims: ModelDims,
    gptq: GptqSettings | None,
) -> list[str]:
    hints = []
    quantized = find_format(unexpected, {ref.dtype for ref in found.values()})
    if gptq is not None and any(name.endswith(".qweight") for name in missing):
        hints.append(
            "next step: config.json says that the decoder is quantised by GPTQ; where its weights "
            "are plain, remove quantization_config, else give the float16 or bfloat16 checkpoint"
        )
    elif quantized is not None:
        hints.append(f"next step: the checkpoint is quantised: {quantized}")
    tower = [name for name in expected_tensors(dims).required if name.startswith("vision_tower.")]
    if set(tower) <= set(missing):
        hints.append(
            "next step: there is no vision tower at all, as in checkpoints that kept it frozen; "
            "give the llava-hf conversion, which holds it"
        )
    if missing == ["lm_head.weight"]:
        hints.append(
            "next step: if the head shares the embeddings, set tie_word_embeddings to true at the "
            "top level of config.json (inside text_config transformers does not look for it)"
        )
    newline = any(
        name is not None and name.part == "newline" for name in map(read_name, unexpected)
    )
    if dims.model_type == "llava" and newline:
        hints.append(
            'next step: image_newline belongs to LLaVA-NeXT, and model_type is "llava". At the top '
            'level of config.json set model_type to "llava_next" and architectures to '
            '["LlavaNextForConditionalGeneration"]; image_grid_pinpoints must stand there, and '
            "preprocessor_config.json must be that of LlavaNextImageProcessor"
        )
    if missing == ["image_newline"] and dims.model_type == "llava_next":
        hints.append(
            "next step: without image_newline this is LLaVA-1.5, if anything; at the top level of "
            'config.json model_type is then "llava"'
        )
    return hints
