"""Random checkpoints: genuine LLaVA-NeXT folders with weights drawn from a seed.

They load in transformers like a released model, so whatever converts them converts the real ones,
at any size and without a download. Scales are chosen so that signals keep their size through every
block and logits spread by about two, which leaves arg-max margins far above rounding.

Weights are drawn, rounded to float16 and written block by block: a model of 14 GB needs a few tens
of MiB of memory for each core that draws. Each tensor has a generator of its own, so order,
sharding and the number of cores change nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llava_edge.convert.checkpoint.expected_tensors import expected_tensors
from llava_edge.convert.checkpoint.layouts import hub_name
from llava_edge.convert.testing.random_spec import RandomSpec
from llava_edge.convert.testing.random_tokenizer import (
    FAMILIES,
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    train_tokenizer,
)
from llava_edge.convert.util.safetensors_io import write_safetensors
from llava_edge.profiles.boards.cpu_limit import read_cpu_limit
from llava_edge.profiles.errors import ExportError, OutputExistsError
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.util.atomic_write import atomic_folder

DEFAULT_SHARD_BYTES = 5_000_000_000

RANDOM_KEY = "llava_edge_random_weights"
"""Entry of ``config.json`` that says so; anyone who measures such a model must be able to tell."""

_BLOCK_ELEMENTS = 1 << 22
_MOST_THREADS = 16
_LOGIT_STD = 2.0
_EMBEDDING_STD = 0.4
_ATTENTION_STD = 1.4
"""Gain of queries and keys: attention scores then spread by about two, so a few positions win."""
_BIAS_STD = 0.1
_GAIN_STD = 0.1
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

_VIDEO_KEYS = (
    "crop_size",
    "do_center_crop",
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
    "size",
)

_Stored = tuple[str, str, tuple[int, ...]]


def write_random_checkpoint(
    folder: Path,
    spec: RandomSpec,
    seed: int = 0,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a Hugging Face LLaVA-NeXT checkpoint with random float16 weights.

    Args:
        folder: must not exist, or be empty; it appears whole or not at all.
        spec: sizes of the model.
        seed: the same seed and spec give the same bytes.
        max_shard_bytes: weights above this are split into shards with an index.

    Raises:
        OutputExistsError: the folder holds something.
        CheckpointError: the spec describes a model that is not supported.
        ValueError: the vocabulary is too small.
        ExportError: the disk is full or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(f"{folder} exists and is not empty. Choose another folder.")
    tokenizer = train_tokenizer(
        spec.backbone, spec.vocab_size, video=spec.model_type == "llava_next_video"
    )
    config = _config(spec, tokenizer)
    dims = ModelDims.from_config(config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as partial:
            _write_texts(partial, spec, config, tokenizer)
            _write_weights(partial, dims, seed, max_shard_bytes)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Normal:
    """A normal distribution."""

    mean: float
    std: float


def _config(spec: RandomSpec, tokenizer: Tokenizer) -> dict[str, Any]:
    family = FAMILIES[spec.backbone]
    ids = tokenizer.get_vocab(with_added_tokens=True)
    config = spec.config(
        image_token_id=ids[IMAGE_TOKEN],
        video_token_id=ids.get(VIDEO_TOKEN),
        bos_token_id=ids[family.bos] if family.bos else None,
        eos_token_id=ids[family.eos],
        pad_token_id=ids[family.pad],
    )
    return {**config, RANDOM_KEY: True}


def _write_texts(
    folder: Path, spec: RandomSpec, config: dict[str, Any], tokenizer: Tokenizer
) -> None:
    family = FAMILIES[spec.backbone]
    text = config["text_config"]
    processor = {
        "llava": "LlavaProcessor",
        "llava_next": "LlavaNextProcessor",
        "llava_next_video": "LlavaNextVideoProcessor",
    }[spec.model_type]
    side = spec.image_size
    image_processor = {
        "image_processor_type": (
            "CLIPImageProcessor" if spec.model_type == "llava" else "LlavaNextImageProcessor"
        ),
        "processor_class": processor,
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
    if spec.model_type != "llava":
        image_processor |= {
            "do_pad": True,
            "image_grid_pinpoints": config["image_grid_pinpoints"],
        }
    named = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.pad}
    files: dict[str, dict[str, Any]] = {
        "config.json": config,
        "generation_config.json": {
            key: text[key]
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            if text[key] is not None
        },
        "preprocessor_config.json": image_processor,
        "processor_config.json": {
            "processor_class": processor,
            "image_token": IMAGE_TOKEN,
            "num_additional_image_tokens": 1,
            "patch_size": spec.patch_size,
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": processor,
            **{key: token for key, token in named.items() if token is not None},
            **({"unk_token": family.unk} if family.unk else {}),
            "clean_up_tokenization_spaces": False,
            "model_max_length": spec.max_positions,
            "padding_side": "left",
        },
    }
    if spec.model_type == "llava_next_video":
        files["processor_config.json"]["video_token"] = VIDEO_TOKEN
        files["video_preprocessor_config.json"] = {
            **{key: image_processor[key] for key in _VIDEO_KEYS},
            "do_sample_frames": False,
            "processor_class": processor,
            "video_processor_type": "LlavaNextVideoVideoProcessor",
        }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    (folder / "chat_template.jinja").write_text(family.chat_template + "\n", "utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_weights(folder: Path, dims: ModelDims, seed: int, max_shard_bytes: int) -> None:
    expected = expected_tensors(dims)
    shapes = {**expected.required, **expected.optional}
    if dims.text.tie_word_embeddings:
        del shapes["lm_head.weight"]
    canonical = {hub_name(name): name for name in shapes}
    shards = _split(
        [(hub_name(name), "F16", shape) for name, shape in shapes.items()], max_shard_bytes
    )
    total = sum(2 * math.prod(shape) for shape in shapes.values())

    def blocks(stored: str) -> Iterator[NDArray[np.float16]]:
        name = canonical[stored]
        return _draw(name, math.prod(shapes[name]), _distribution(name, shapes[name], dims), seed)

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        file = "model" if single else f"model-{number:05}-of-{len(shards):05}"
        place = folder / f"{file}.safetensors"
        write_safetensors(place, shard, blocks, {"format": "pt"}, threads=_threads())
        weight_map |= {name: f"{file}.safetensors" for name, _, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, "utf-8")


def _threads() -> int:
    """Drawing takes far longer than writing, and numpy lets go of the interpreter meanwhile."""
    return min(_MOST_THREADS, read_cpu_limit().usable)


def _split(tensors: Sequence[_Stored], max_bytes: int) -> list[list[_Stored]]:
    shards: list[list[_Stored]] = [[]]
    used = 0
    for tensor in tensors:
        size = 2 * math.prod(tensor[2])
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def _draw(name: str, count: int, normal: _Normal, seed: int) -> Iterator[NDArray[np.float16]]:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    for start in range(0, count, _BLOCK_ELEMENTS):
        block = generator.standard_normal(min(_BLOCK_ELEMENTS, count - start), dtype=np.float32)
        block *= np.float32(normal.std)
        block += np.float32(normal.mean)
        yield block.astype(np.float16)


def _distribution(name: str, shape: tuple[int, ...], dims: ModelDims) -> _Normal:
    """Scale of a tensor: variance one over fan-in, less on branches that add to the residual."""
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    embedding_std = _embedding_std(dims)
    if name.endswith("bias"):
        return _Normal(0.0, _BIAS_STD)
    if "norm" in name:
        return _Normal(1.0, _GAIN_STD)
    if name == "language_model.embed_tokens.weight" or name == "image_newline":
        return _Normal(0.0, embedding_std)
    if name == "lm_head.weight":
        return _Normal(0.0, _LOGIT_STD / math.sqrt(fan_in))
    if name.endswith(("class_embedding", "position_embedding.weight")):
        return _Normal(0.0, 0.5)
    # An image then weighs as much as words do.
    gain = 1.1 * embedding_std if name.endswith("linear_2.weight") else 1.0
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        gain = _ATTENTION_STD
    layers = (
        dims.text.num_hidden_layers
        if name.startswith("language_model.")
        else dims.vision.num_hidden_layers
    )
    if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
        # What a branch gets is smaller than one (averaged values, gated or half-rectified
        # activations), and all branches together shall add as much as the embedding brings.
        gain = 1.6 / math.sqrt(2 * layers)
    return _Normal(0.0, gain / math.sqrt(fan_in))


def _embedding_std(dims: ModelDims) -> float:
    """Small against the branches, or an answer would repeat its last token for ever.

    Where the table is the head as well, it is what gives the same logit spread.
    """
    tied = dims.text.tie_word_embeddings
    return _LOGIT_STD / math.sqrt(dims.text.hidden_size) if tied else _EMBEDDING_STD
