"""The one place where transformers reads files of a checkpoint.

transformers follows what the files say: ``auto_map`` to Python files in the folder or in another
repository, kernels and attention code by name, adapters, custom generation loops, paths. None of
that is wanted. So it never sees the checkpoint's folder: it is given a folder of its own with
reduced copies, which hold settings of the classes that are used here and nothing else. Classes are
transformers' own, chosen by name from a list. Besides, remote code, other weights than safetensors
and the network are ruled out by argument.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from llava_edge.convert.checkpoint.config.image import check_image_class
from llava_edge.convert.checkpoint.config.tokenizer_settings import (
    ADDED,
    CONFIG,
    SPECIAL,
    is_known,
    read_added_tokens,
    read_special_tokens,
    read_tokenizer_config,
    refuse_foreign_class,
)
from llava_edge.convert.checkpoint.config.tokenizer_source import (
    library_errors,
    read_merges,
    read_tokenizer_json,
    read_vocab,
)
from llava_edge.convert.util.text_files import read_object, read_text
from llava_edge.profiles.errors import CheckpointError

REFERENCE = f"transformers {transformers.__version__}"
"""What artifacts are compared with."""

_MODELS: Mapping[str, tuple[str, str]] = {
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration"),
    "llava_next": ("LlavaNextConfig", "LlavaNextForConditionalGeneration"),
    "llava_next_video": ("LlavaNextVideoConfig", "LlavaNextVideoForConditionalGeneration"),
}
_INNER: Mapping[str, Mapping[str, str]] = {
    "text_config": {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config"},
    "vision_config": {"clip_vision_model": "CLIPVisionConfig"},
}
_OLDER_FIELDS = frozenset({"rope_theta", "rope_scaling"})
"""What earlier releases wrote where the classes of today have ``rope_parameters``."""
_IMAGE_KEYS = frozenset(
    {
        *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale"),
        *("rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb"),
        *("do_pad", "image_grid_pinpoints", "default_to_square"),
    }
)
_PROCESSOR_KEYS = frozenset(
    {
        *("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"),
        *("image_token", "video_token", "chat_template"),
    }
)
_PLAIN = (str, int, float, bool, type(None))

SAFE: Mapping[str, Any] = {"trust_remote_code": False, "local_files_only": True}
"""Arguments of every ``from_pretrained``."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that transformers' ``AutoTokenizer`` makes of a checkpoint's files.

    Raises:
        CheckpointError: the tokenizer is of a class of the checkpoint's own, a file is malformed,
            or transformers cannot read it.
    """
    loader: Any = transformers.AutoTokenizer
    with _reduced(folder) as view, _failures("tokenizer", folder):
        return loader.from_pretrained(view, **SAFE)


def load_merges(folder: Path) -> Any:
    """Transformers' ``Qwen2Tokenizer`` of ``vocab.json`` and ``merges.txt``.

    Raises:
        CheckpointError: as ``load_tokenizer``.
    """
    loader: Any = transformers.Qwen2Tokenizer
    with _reduced(folder) as view, _failures("tokenizer", folder):
        return loader.from_pretrained(view, **SAFE)


def load_processor(folder: Path, tokenizer_json: str | None = None) -> Any:
    """Transformers' processor of a checkpoint in Hugging Face layout.

    The video model's own class needs torchvision; templates, ids and tiles are those of
    ``LlavaNextProcessor``.

    Args:
        folder: the checkpoint.
        tokenizer_json: stands for a ``tokenizer.json`` that the checkpoint does not have. Its
            ``tokenizer.model`` is never shown to transformers, which reads such files otherwise
            than sentencepiece does.

    Raises:
        CheckpointError: as ``load_tokenizer``, also for the image processor.
    """
    kind = read_object(folder / "config.json").get("model_type")
    loader: Any = (
        transformers.LlavaProcessor if kind == "llava" else transformers.LlavaNextProcessor
    )
    with _reduced(folder, tokenizer_json, processor=True) as view, _failures("processor", folder):
        return loader.from_pretrained(view, **SAFE)


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' model of a checkpoint in Hugging Face layout, for inference, on the CPU.

    Raises:
        CheckpointError: the configuration is none of a supported model, or transformers cannot
            load the weights.
    """
    config = reduced_config(read_object(folder / "config.json"))
    loader: Any = getattr(transformers, _MODELS[config["model_type"]][1])
    with _folder() as view, _failures("model", folder):
        _write(view / "config.json", config)
        generation = read_object(folder / "generation_config.json")
        _write(view / "generation_config.json", _token_ids(generation))
        for file in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
            (view / file.name).symlink_to(file.absolute())
        return loader.from_pretrained(view, dtype=dtype, use_safetensors=True, **SAFE).eval()


def meta_model(config: Mapping[str, Any]) -> Any:
    """Transformers' model of a ``config.json``, without weights (torch's meta device).

    Raises:
        CheckpointError: it is none of a supported model, or transformers refuses a value.
    """
    fields = reduced_config(config)
    config_class, model_class = _MODELS[fields.pop("model_type")]
    with library_errors("transformers refuses config.json"):
        made = getattr(transformers, config_class)(**fields)
        with torch.device("meta"):
            return getattr(transformers, model_class)(made)


def image_processor(settings: Mapping[str, Any], *, crops: bool) -> Any:
    """Transformers' PIL image processor with a checkpoint's values.

    Args:
        settings: values of ``preprocessor_config.json``.
        crops: one tile from the middle, as LLaVA-1.5 has; else AnyRes tiles.

    Raises:
        CheckpointError: the settings name a class of the checkpoint's own.
    """
    made: Any = CLIPImageProcessorPil if crops else LlavaNextImageProcessorPil
    values = {key: value for key, value in settings.items() if key in _IMAGE_KEYS}
    check_image_class(settings)
    if crops:
        values.pop("image_grid_pinpoints", None)
    return made(**values)


def reduced_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` with the fields of transformers' classes alone, in both parts as well.

    Left out is what selects code (``auto_map``, attention and kernels by name, quantisers) or
    belongs to every model (labels, types, names).

    Raises:
        CheckpointError: a model, language model or tower is none of those that are used here.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _MODELS:
        raise _unknown("model_type", kind, _MODELS)
    kept = _own_fields(config, _MODELS[kind][0])
    for part, classes in _INNER.items():
        inner = config.get(part)
        if not isinstance(inner, Mapping):
            kept.pop(part, None)
            continue
        named = inner.get("model_type", next(iter(classes)))
        if not isinstance(named, str) or named not in classes:
            raise _unknown(f"{part}.model_type", named, classes)
        kept[part] = {**_own_fields(inner, classes[named]), "model_type": named}
    return {**kept, "model_type": kind}


def _own_fields(values: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    made: Any = getattr(transformers, class_name)
    common = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    fields = {field.name for field in dataclasses.fields(made)} - common
    fields |= {*_OLDER_FIELDS, *made.attribute_map}
    return {key: value for key, value in values.items() if key in fields}


def _unknown(key: str, found: object, known: Mapping[str, Any]) -> CheckpointError:
    return CheckpointError(
        f"config.json has {key} {found!r:.80}; known are {', '.join(known)}. Code of a checkpoint "
        "is never run, so no other model can be the reference. Convert a model of a known type."
    )


@contextmanager
def _reduced(
    folder: Path, stand_in: str | None = None, *, processor: bool = False
) -> Iterator[Path]:
    """A folder with reduced copies of the tokenizer's files, and of the processor's."""
    refuse_foreign_class(folder)
    with _folder() as view:
        _copy_tokenizer(folder, view, stand_in)
        if processor:
            _copy_processor(folder, view)
        yield view


def _copy_tokenizer(folder: Path, view: Path, stand_in: str | None) -> None:
    config = read_object(folder / "config.json")
    kept = {}
    if isinstance(config.get("model_type"), str):
        kept["model_type"] = config["model_type"]
    if is_known(config.get("tokenizer_class")):
        kept["tokenizer_class"] = config["tokenizer_class"]
    _write(view / "config.json", kept)
    for name, read in (
        (CONFIG, read_tokenizer_config),
        (SPECIAL, read_special_tokens),
        (ADDED, read_added_tokens),
    ):
        if (folder / name).is_file():
            _write(view / name, read(folder))
    if (folder / "tokenizer.json").is_file():
        text = read_tokenizer_json(folder / "tokenizer.json")
        (view / "tokenizer.json").write_text(text, "utf-8")
    elif stand_in is not None:
        (view / "tokenizer.json").write_text(stand_in, "utf-8")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        _write(view / "vocab.json", read_vocab(folder / "vocab.json"))
        (view / "merges.txt").write_text(read_merges(folder / "merges.txt"), "utf-8")


def _copy_processor(folder: Path, view: Path) -> None:
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            values = read_object(folder / name)
            kept = {k: v for k, v in values.items() if k in _PROCESSOR_KEYS and _is_plain(v)}
            if isinstance(values.get("image_processor"), Mapping):
                kept["image_processor"] = _image_values(values["image_processor"])
            # transformers fails at a file of templates without one; to us it says nothing.
            if name != "chat_template.json" or "chat_template" in kept:
                _write(view / name, kept)
    if (folder / "chat_template.jinja").is_file():
        (view / "chat_template.jinja").write_text(
            read_text(folder / "chat_template.jinja"), "utf-8"
        )
    if (folder / "preprocessor_config.json").is_file():
        values = read_object(folder / "preprocessor_config.json")
        _write(view / "preprocessor_config.json", _image_values(values))


def _image_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    check_image_class(settings)
    kept = {key: value for key, value in settings.items() if key in _IMAGE_KEYS}
    kind = settings.get("image_processor_type")
    if isinstance(kind, str) and kind.startswith("LlavaNext"):
        # What the video model's files name reads pictures as this one does.
        kind = "LlavaNextImageProcessor"
    return {**kept, "image_processor_type": kind} if kind else kept


def _is_plain(value: object) -> bool:
    """A text or number, or named texts, as templates may be."""
    if isinstance(value, Mapping):
        return all(isinstance(each, str) for each in value.values())
    return isinstance(value, _PLAIN)


def _token_ids(generation: Mapping[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: generation[key] for key in names if isinstance(generation.get(key), (int, list))}


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="llava-edge-") as name:
        yield Path(name)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values), "utf-8")


@contextmanager
def _failures(what: str, folder: Path) -> Iterator[None]:
    """Errors of transformers as ``CheckpointError``, panics of its libraries as well; offline.

    Its warnings are about files that it was not given, so they would only mislead.
    """
    version = transformers.__version__
    constants: Any = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    logging: Any = transformers.logging
    verbosity = logging.get_verbosity()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    try:
        with library_errors(f"transformers {version} cannot read the {what} of {folder}"):
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.set_verbosity(verbosity)
