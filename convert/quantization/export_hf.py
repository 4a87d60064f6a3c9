"""A Hugging Face GPTQ checkpoint of the whole model: what ``--emit hf`` writes.

The decoder's linear layers are GPTQ v1 tensors; everything else is fp16. Names are those that
transformers 5.23 saves. ``modules_in_block_to_quantize`` is left out on purpose: vLLM matches it by
substring and would take layers of the vision tower for quantised ones.

    config.json with quantization_config, quantize_config.json, generation_config.json
    model-0000N-of-0000M.safetensors and their index, or model.safetensors
    tokenizer, processor and template files of the source

Source of the tensors' layout: ``packing``; of the configuration: transformers' ``GPTQConfig``.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llava_edge.convert.checkpoint.expected_tensors import expected_tensors
from llava_edge.convert.checkpoint.formats.packing import GptqTensors, to_gptq
from llava_edge.convert.checkpoint.layouts import hub_name
from llava_edge.convert.checkpoint.open import QUANTIZE_CONFIG_FILE, Checkpoint
from llava_edge.convert.checkpoint.quantized.source import LINEARS, QuantizedSource, linear_name
from llava_edge.convert.checkpoint.weights import as_float16
from llava_edge.convert.util.safetensors_io import DTYPE_BYTES, write_safetensors
from llava_edge.convert.util.text_files import read_object
from llava_edge.profiles.errors import RequestError
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import Progress

"""Called with bytes done and bytes in all."""

BLOCKS = "model.language_model.layers"
"""Where transformers finds the decoder's layers; without it the loader would have to guess."""
MAX_SHARD_BYTES = 5_000_000_000

_BLOCK_ELEMENTS = 1 << 24
_COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
_DTYPE_KEYS = ("dtype", "torch_dtype")
_CODE_KEYS = ("auto_map", "attn_implementation", "_attn_implementation", "custom_generate")
"""What selects code in the files of a checkpoint."""
_PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_next_video": "LlavaNextVideoProcessor",
}


@dataclass(frozen=True)
class _Stored:
    """One tensor of the new checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Array]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def check_emit_hf(checkpoint: Checkpoint, precision: str) -> None:
    """Refuse what has no GPTQ checkpoint, before anything is written.

    Raises:
        RequestError: the precision is fp16, sizes do not fill the format's words, or the model's
            image mark has no row in the embedding table.
    """
    if precision == "fp16":
        raise RequestError(
            "a Hugging Face checkpoint (--emit hf) was asked at fp16; it is written for int8 and "
            "int4, since at fp16 it is the source itself. Leave --emit hf out, or take another "
            "precision."
        )
    dims, text = checkpoint.dims, checkpoint.dims.text
    faults: list[str] = []
    per_word = 4 if precision == "int8" else 8
    shapes = expected_tensors(dims).required
    linears = {shapes[f"{linear_name(0, linear)}.weight"] for linear in LINEARS}
    ragged = sorted(s for s in linears if s[0] % per_word or s[1] % per_word)
    if ragged:
        faults.append(
            f"linear layers of shape {ragged} do not fill 32-bit words; outputs and inputs must be "
            f"multiples of {per_word} at {precision}"
        )
    marks = [dims.image_token_id, dims.video_token_id]
    if any(mark is not None and mark >= text.vocab_size for mark in marks):
        faults.append(
            f"the image mark has the id {dims.image_token_id} and the table {text.vocab_size} rows "
            "(original layout); transformers cannot look it up. Convert the llava-hf version"
        )
    if faults:
        listed = "\n  - ".join(faults)
        raise RequestError(f"{checkpoint.source_id} has no GPTQ checkpoint:\n  - {listed}")


def write_hf_gptq(
    folder: Path,
    checkpoint: Checkpoint,
    source: QuantizedSource,
    *,
    tokenizer_file: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a complete checkpoint that transformers and vLLM load.

    Args:
        folder: an existing, empty folder.
        checkpoint: where everything that is not quantised comes from.
        source: the decoder's linear layers; one is in memory at a time.
        tokenizer_file: a ``tokenizer.json`` for a checkpoint that has none.
        max_shard_bytes: weights above this are split into shards with an index.
        progress: told about bytes of weights.

    Raises:
        CheckpointError: a weight does not fit the format or fp16.
        OSError: writing failed.
    """
    _write_texts(folder, checkpoint, source, tokenizer_file)
    tensors = [*_quantized(checkpoint, source), *_plain(checkpoint)]
    total = sum(tensor.nbytes for tensor in tensors)
    shards = _split(tensors, max_shard_bytes)
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        middle = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"model{middle}.safetensors"
        by_name = {tensor.name: tensor for tensor in shard}

        def blocks(name: str, by_name: Mapping[str, _Stored] = by_name) -> Iterator[Array]:
            nonlocal done
            for block in by_name[name].blocks():
                yield block
                done += block.nbytes
                if progress is not None:
                    progress("gptq", done, total)

        listed = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard]
        write_safetensors(folder / file, listed, blocks, {"format": "pt"})
        weight_map |= dict.fromkeys(by_name, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def quantization_config(bits: int, group_size: int) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``; also the whole of ``quantize_config.json``."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "block_name_to_quantize": BLOCKS,
        "meta": {"quantizer": [f"llava-edge:{version('llava-edge')}"]},
    }


def _write_texts(
    folder: Path, checkpoint: Checkpoint, source: QuantizedSource, tokenizer_file: Path | None
) -> None:
    settings = quantization_config(source.bits, source.group_size)
    _write_json(folder / "config.json", _config(checkpoint, settings))
    _write_json(folder / QUANTIZE_CONFIG_FILE, settings)
    for name in _COPIED:
        if (checkpoint.folder / name).is_file():
            _copy(checkpoint.folder / name, folder / name)
    if tokenizer_file is not None and not (folder / "tokenizer.json").exists():
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    _write_json(folder / "preprocessor_config.json", checkpoint.preprocessor_config())
    own = checkpoint.folder / "processor_config.json"
    if own.is_file():
        _copy(own, folder / own.name)
        return
    vision = checkpoint.dims.vision
    _write_json(
        folder / own.name,
        {
            "processor_class": _PROCESSORS[checkpoint.dims.model_type],
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": "default",
        },
    )


def _copy(source: Path, target: Path) -> None:
    """Copy a file; JSON that names code loses it, all else stays byte for byte."""
    if source.suffix == ".json" and source.name not in ("tokenizer.json", "vocab.json"):
        values = read_object(source)
        if (plain := _without_code(values)) != values:
            _write_json(target, plain)
            return
    shutil.copyfile(source, target)


def _without_code(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_code(v) for k, v in value.items() if k not in _CODE_KEYS}
    return [_without_code(each) for each in value] if isinstance(value, list) else value


def _config(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, Any]:
    """The source's configuration, said to be fp16 and quantised; code of its own is left out."""
    config: dict[str, Any] = _without_code(dict(checkpoint.config))
    tied = checkpoint.dims.text.tie_word_embeddings
    for section in ("text_config", "vision_config"):
        own = dict(config.get(section) or {})
        for key in (*_DTYPE_KEYS, "quantization_config"):
            own.pop(key, None)
        config[section] = own
    config["text_config"]["tie_word_embeddings"] = tied
    for key in _DTYPE_KEYS:
        config.pop(key, None)
    return config | {
        "tie_word_embeddings": tied,
        "dtype": "float16",
        "quantization_config": settings,
    }


def _quantized(checkpoint: Checkpoint, source: QuantizedSource) -> Iterator[_Stored]:
    shapes = expected_tensors(checkpoint.dims).required
    for layer in range(checkpoint.dims.text.num_hidden_layers):
        for linear in LINEARS:
            name = linear_name(layer, linear)
            yield from _linear(source, name, shapes[f"{name}.weight"])


def _linear(source: QuantizedSource, name: str, shape: tuple[int, ...]) -> Iterator[_Stored]:
    num_rows, num_columns = shape
    bits = source.bits
    groups = 1 if source.group_size == -1 else num_columns // source.group_size
    waiting: list[GptqTensors] = []

    def blocks(part: str) -> Iterator[Array]:
        # Tensors are written in this order, so a layer is loaded with its first and let go after
        # its last.
        if part == "qweight":
            waiting[:] = [to_gptq(source.linear(name))]
        tensors = waiting[0]
        if part == "g_idx":
            waiting.clear()
        yield getattr(tensors, part)

    for part, dtype, part_shape in (
        ("qweight", "I32", (num_columns * bits // 32, num_rows)),
        ("qzeros", "I32", (groups, num_rows * bits // 32)),
        ("scales", "F16", (groups, num_rows)),
        ("g_idx", "I32", (num_columns,)),
    ):
        stored = hub_name(f"{name}.{part}")
        yield _Stored(stored, dtype, part_shape, lambda part=part: blocks(part))  # type: ignore[misc]


def _plain(checkpoint: Checkpoint) -> Iterator[_Stored]:
    """Everything else, fp16, in the order of the model."""
    expected = expected_tensors(checkpoint.dims)
    shapes = {**expected.required, **expected.optional}
    quantized = {
        f"{linear_name(layer, linear)}.weight"
        for layer in range(checkpoint.dims.text.num_hidden_layers)
        for linear in LINEARS
    }
    if checkpoint.dims.text.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    for name, shape in shapes.items():
        if name not in quantized and name in checkpoint.tensors:
            stored = hub_name(name)
            yield _Stored(stored, "F16", shape, lambda name=name: _rows(checkpoint, name))  # type: ignore[misc]


def _rows(checkpoint: Checkpoint, name: str) -> Iterator[Array]:
    shape = checkpoint.tensors[name].shape
    step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield as_float16(name, checkpoint.read(name, slice(first, min(first + step, shape[0]))))


def _split(tensors: list[_Stored], max_bytes: int) -> list[list[_Stored]]:
    """Shards in order; the four tensors of a linear layer stay together."""
    shards: list[list[_Stored]] = [[]]
    used = 0
    for tensor in tensors:
        starts = not tensor.name.endswith((".qzeros", ".scales", ".g_idx"))
        if shards[-1] and starts and used + tensor.nbytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return shards


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
