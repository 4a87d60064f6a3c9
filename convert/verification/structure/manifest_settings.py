"""The manifest's settings against the checkpoint's own files: sizes, pixel values, ids, context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.util.text_files import exists, read_object
from llava_edge.convert.verification.reference.modules import ReferenceStructure
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.models.grids import asked_grid, asked_pinpoints
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.open import Artifact

_NAME = "manifest.json"


def manifest_settings_faults(
    artifact: Artifact, checkpoint: Checkpoint, reference: ReferenceStructure
) -> list[str]:
    """Where an artifact's manifest differs from what its checkpoint says.

    Args:
        artifact: the one to judge.
        checkpoint: what it was made from.
        reference: what transformers makes of its config.json.
    """
    manifest = artifact.manifest
    return [
        *_size_faults(manifest, checkpoint, reference),
        *_image_faults(manifest, checkpoint, reference),
        *_video_faults(manifest, checkpoint, reference),
        *_token_faults(artifact, checkpoint, reference),
    ]


def _size_faults(
    manifest: Manifest, checkpoint: Checkpoint, reference: ReferenceStructure
) -> Iterator[str]:
    vision, text = reference.vision, reference.text
    first = reference.decoder.layers[0]
    rope = text.rope_parameters
    tensors = checkpoint.tensors
    shared = tensors["lm_head.weight"] == tensors["language_model.embed_tokens.weight"]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    wanted: dict[str, dict[str, Any]] = {
        "vision": {
            **{name: getattr(vision, name) for name in sizes},
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "hidden_act": vision.hidden_act,
            "feature_layers": tuple(reference.feature_layers),
            "projector_hidden_act": reference.config.projector_hidden_act,
            "projector_bias": reference.projector.linear_1.bias is not None,
        },
        "text": {
            **{name: getattr(text, name) for name in sizes},
            "model_type": text.model_type,
            "vocab_size": text.vocab_size,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": first.self_attn.head_dim,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": rope["rope_theta"],
            "rope_factor": rope["factor"] if rope["rope_type"] == "linear" else 1.0,
            "max_position_embeddings": text.max_position_embeddings,
            "hidden_act": text.hidden_act,
            "qkv_bias": first.self_attn.q_proj.bias is not None,
            "o_bias": first.self_attn.o_proj.bias is not None,
            "mlp_bias": first.mlp.up_proj.bias is not None,
            "sliding_windows": tuple(window or 0 for window in reference.windows),
            "tie_word_embeddings": shared,
        },
    }
    for part, fields in wanted.items():
        for name, want in fields.items():
            have = getattr(getattr(manifest.model, part), name)
            if have != want:
                yield f"{_NAME}, model.{part}.{name}: it is {have}; config.json says {want}"
    if manifest.context_tokens > reference.last_position:
        yield (
            f"{_NAME}, context_tokens: it is {manifest.context_tokens}; the rotary embedding of "
            f"config.json covers {reference.last_position} positions"
        )


def _image_faults(
    manifest: Manifest, checkpoint: Checkpoint, reference: ReferenceStructure
) -> Iterator[str]:
    have = manifest.image_processing
    settings = checkpoint.preprocessor_config()
    side, patch = reference.vision.image_size, reference.vision.patch_size
    wanted = {
        "tile_size": side,
        "patch_size": patch,
        "image_mean": _channels(settings.get("image_mean", OPENAI_CLIP_MEAN)),
        "image_std": _channels(settings.get("image_std", OPENAI_CLIP_STD)),
        "rescale_factor": settings.get("rescale_factor", 1 / 255),
        "view": "tiles" if hasattr(reference.config, "image_grid_pinpoints") else "crop",
    }
    for name, want in wanted.items():
        if getattr(have, name) != want:
            yield (
                f"{_NAME}, image_processing.{name}: it is {getattr(have, name)}; the checkpoint's "
                f"image processor says {want}"
            )
    own = getattr(reference.config, "image_grid_pinpoints", ())
    listed = tuple(tuple(point) for point in own)
    if manifest.model.image_grid_pinpoints != listed:
        yield (
            f"{_NAME}, model.image_grid_pinpoints: they are {manifest.model.image_grid_pinpoints}; "
            f"config.json says {listed}"
        )
    grid = str(manifest.plan.get("grid"))
    allowed = _candidates(checkpoint, grid)
    # In this order: it decides ties, and one candidate less gives other images another grid.
    if have.image_grid_pinpoints != allowed:
        yield (
            f"{_NAME}, image_processing.image_grid_pinpoints: they are "
            f"{have.image_grid_pinpoints}; the plan's grid {grid} has {allowed}"
        )
    order = manifest.conversion.get("asked_reference") or (
        "original" if checkpoint.layout == "original" else "hf"
    )
    if have.reference != order:
        yield (
            f"{_NAME}, image_processing.reference: it is {have.reference}; asked was, or the "
            f"checkpoint's layout has, {order}"
        )


def _video_faults(
    manifest: Manifest, checkpoint: Checkpoint, reference: ReferenceStructure
) -> Iterator[str]:
    have = manifest.video_processing
    mark = getattr(reference.config, "video_token_id", None)
    for name, number in (
        ("tokens.video", manifest.tokens.video),
        ("model.video_token_id", manifest.model.video_token_id),
    ):
        if number != mark:
            yield f"{_NAME}, {name}: it is {number}; config.json says {mark}"
    if (have is not None) != reference.is_pooled:
        yield f"{_NAME}, video_processing: the reference's model and it do not agree on videos"
    if have is None:
        return
    settings = checkpoint.video_preprocessor_config()
    wanted = {
        "frame_size": reference.vision.image_size,
        "image_mean": _channels(settings.get("image_mean", OPENAI_CLIP_MEAN)),
        "image_std": _channels(settings.get("image_std", OPENAI_CLIP_STD)),
        "rescale_factor": settings.get("rescale_factor", 1 / 255),
    }
    for name, want in wanted.items():
        if getattr(have, name) != want:
            yield (
                f"{_NAME}, video_processing.{name}: it is {getattr(have, name)}; the checkpoint's "
                f"video processor says {want}"
            )


def _channels(value: Any) -> tuple[float, ...]:
    """A single number holds for every channel."""
    return tuple(np.broadcast_to(np.asarray(value, dtype=np.float64), 3).tolist())


def _candidates(checkpoint: Checkpoint, grid: str) -> tuple[tuple[int, int], ...]:
    """(height, width) of a plan's grid: a name, or a list of candidates."""
    for read in (asked_grid, asked_pinpoints):
        try:
            return read(checkpoint.dims, grid).pinpoints
        except RequestError:
            continue
    return ()


def _token_faults(
    artifact: Artifact, checkpoint: Checkpoint, reference: ReferenceStructure
) -> Iterator[str]:
    tokens = artifact.manifest.tokens
    tokenizer = Tokenizer.from_file(str(artifact.path(artifact.manifest.tokenizer)))
    control = {
        number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    image = reference.config.image_token_id
    if checkpoint.layout == "original":
        # Such a config.json has no id; the mark is an entry that the tokenizer was given.
        image = tokenizer.token_to_id("<image>")
    if tokens.image != image:
        yield f"{_NAME}, tokens.image: it is {tokens.image}; config.json says {image}"
    if checkpoint.layout != "original" and artifact.manifest.model.image_token_id != image:
        yield (
            f"{_NAME}, model.image_token_id: it is {artifact.manifest.model.image_token_id}; "
            f"config.json says {image}"
        )
    marks = {tokens.image, tokens.video, *_padding(checkpoint, tokenizer)} - {
        *tokens.stop,
        tokens.bos,
    }
    text = {*tokenizer.get_vocab(with_added_tokens=True).values()} - marks
    if tokens.num_text_tokens != max(text) + 1:
        yield (
            f"{_NAME}, tokens.num_text_tokens: it is {tokens.num_text_tokens}; tokenizer.json has "
            f"text up to {max(text)}"
        )
    if tokens.image not in control:
        yield f"{_NAME}, tokens.image: {tokens.image} is no control token of tokenizer.json"
    named = dict(_named_stops(checkpoint, tokenizer, control))
    for number, who in named.items():
        if number not in tokens.stop:
            yield f"{_NAME}, tokens.stop: {list(tokens.stop)} lacks {number}, which {who} names"
    for number in tokens.stop:
        if number not in control and number not in named:
            shown = tokenizer.id_to_token(number)
            yield f"{_NAME}, tokens.stop: {number} ({shown!r}) is no control token"


def _padding(checkpoint: Checkpoint, tokenizer: Tokenizer) -> set[int | None]:
    """The padding token that the checkpoint's files name."""
    found: set[int | None] = set()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = checkpoint.folder / name
        if exists(path):
            value = read_object(path).get("pad_token")
            content = value.get("content") if isinstance(value, Mapping) else value
            found.add(tokenizer.token_to_id(content) if isinstance(content, str) else None)
    return found


def _named_stops(
    checkpoint: Checkpoint, tokenizer: Tokenizer, control: set[int]
) -> Iterator[tuple[int, str]]:
    """Ids that a file of the checkpoint calls the end of an answer, and the file's name."""
    generation = checkpoint.generation_config()
    text = checkpoint.config.get("text_config")
    for who, source in (
        ("config.json", text if isinstance(text, Mapping) else {}),
        ("config.json", checkpoint.config),
    ):
        # Exported configurations carry defaults of other models: only control tokens count.
        yield from ((i, who) for i in _ids(source.get("eos_token_id")) if i in control)
    eos = read_object(checkpoint.folder / "tokenizer_config.json").get("eos_token")
    content = eos.get("content") if isinstance(eos, Mapping) else eos
    number = tokenizer.token_to_id(content) if isinstance(content, str) else None
    if number is not None:
        yield number, "tokenizer_config.json"
    for number in _ids(generation.get("eos_token_id")):
        if tokenizer.id_to_token(number) is not None:
            yield number, "generation_config.json"


def _ids(value: Any) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    return [number for number in listed if type(number) is int]
