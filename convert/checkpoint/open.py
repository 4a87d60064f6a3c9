"""Checkpoint: a folder of weights and configuration, opened, checked and read tensor by tensor.

Opening reads headers and JSON only. Whatever is wrong with the folder is said here, so that no
later stage meets a missing shard or a tensor of another shape after an hour of work.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_edge.convert.checkpoint.config import original as original_config
from llava_edge.convert.checkpoint.files import hash_checkpoint_files
from llava_edge.convert.checkpoint.formats.gptq_settings import GptqSettings, read_gptq_settings
from llava_edge.convert.checkpoint.formats.quantized_formats import find_format
from llava_edge.convert.checkpoint.layouts import ORIGINAL, canonical_tensors, is_buffer, read_name
from llava_edge.convert.checkpoint.unmerged import (
    ADAPTER_CONFIG,
    adapter_message,
    describe_parts,
    is_adapter_tensor,
    refuse_adapter,
)
from llava_edge.convert.util.safetensors_io import TensorRef, read_header, read_tensor
from llava_edge.convert.util.text_files import exists, open_file, read_object, size_limit
from llava_edge.profiles.errors import CheckpointError, printable, shorten
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.profiles.sizes import format_above, format_bytes
from llava_edge.runtime.artifact.manifest import FileEntry
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import Progress

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
QUANTIZE_CONFIG_FILE = "quantize_config.json"
READ_BY_NAME = (
    CONFIG_FILE,
    INDEX_FILE,
    QUANTIZE_CONFIG_FILE,
    ADAPTER_CONFIG,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Text files of a checkpoint that this project or transformers opens by their names."""

_MAX_FILES = 4096
_MAX_TENSORS = 1 << 17
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: where it lies.
        config: configuration in the words of Hugging Face, also for original checkpoints.
        dims: sizes read from it; ``tie_word_embeddings`` says whether the head really is shared.
        layout: what its tensors' names are like, ``original`` where they and ``config.json`` are
            those of the LLaVA repositories.
        tensors: canonical names (see ``layouts``) to places in files.
        weight_files: files that hold the weights, sorted by name.
        source_id: hub id where the folder lies in a hub cache, else the folder's name.
        revision: commit of the hub repository, where known.
        gptq: settings of a GPTQ checkpoint, read by ``gptq_checkpoint``; None for plain weights.
    """

    folder: Path
    config: Mapping[str, Any]
    dims: ModelDims
    layout: str
    tensors: Mapping[str, TensorRef]
    weight_files: tuple[Path, ...]
    source_id: str
    revision: str | None
    gptq: GptqSettings | None = None

    def read(self, name: str, rows: slice | None = None) -> Array:
        """Read one tensor by canonical name; bfloat16 comes back as float32.

        Args:
            name: canonical name.
            rows: range of the first axis, all when left out.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or its file changed.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}")
        return read_tensor(self.tensors[name], rows)

    def digest(self, progress: Progress | None = None) -> str:
        """Digest of everything that decides what the model computes.

        SHA-256, in hex, over one line a file, sorted by name: ``<sha256 of the file>  <bytes>
        <name>`` and a newline, for ``config.json`` and all weight files. Names are those inside the
        folder, so a copy of the folder has the same digest.

        Args:
            progress: told how many bytes are done after each block.

        Raises:
            CheckpointError: a file can no longer be read.
        """
        found = hash_checkpoint_files((self.folder / CONFIG_FILE, *self.weight_files), progress)
        return self.digest_of({file.name: entry for file, entry in found.items()})

    def digest_of(self, found: Mapping[str, FileEntry]) -> str:
        """``digest``, where bytes and SHA-256 of these files are known by name."""
        whole = hashlib.sha256()
        for name in sorted((CONFIG_FILE, *(file.name for file in self.weight_files))):
            whole.update(f"{found[name].sha256}  {found[name].bytes}  {name}\n".encode())
        return whole.hexdigest()

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as stored, a shared head counted once."""
        return sum(
            ref.nbytes for ref in {(r.file, r.offset): r for r in self.tensors.values()}.values()
        )

    def preprocessor_config(self) -> dict[str, Any]:
        """Values of the image processor.

        Taken from ``preprocessor_config.json``, else from ``image_processor`` in the
        ``processor_config.json`` that transformers 5 writes. Checkpoints in the original layout
        have neither; theirs are those of the CLIP processor at the tower's tile size.

        Raises:
            CheckpointError: a Hugging Face checkpoint has neither file, or one is no JSON object.
        """
        if exists(file := self.folder / "preprocessor_config.json"):
            return _without_idle_crop(read_object(file))
        nested = read_object(self.folder / "processor_config.json").get("image_processor")
        if isinstance(nested, dict):
            return _without_idle_crop(nested)
        if self.layout != ORIGINAL:
            raise CheckpointError(
                f"{self.folder} has neither preprocessor_config.json nor an image_processor entry "
                "in processor_config.json; without them the pixel values are a guess. Copy the "
                "file from the model's repository."
            )
        side = self.dims.vision.image_size
        return {
            "image_processor_type": "LlavaNextImageProcessor",
            "crop_size": {"height": side, "width": side},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_grid_pinpoints": [list(point) for point in self.dims.image_grid_pinpoints],
            "image_mean": list(_CLIP_MEAN),
            "image_std": list(_CLIP_STD),
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": side},
        }

    def video_preprocessor_config(self) -> dict[str, Any]:
        """Values of the video processor.

        Taken from ``video_processor`` in ``processor_config.json``, else from
        ``video_preprocessor_config.json``, else they are those of the image processor: the order in
        which transformers looks for them.

        Raises:
            CheckpointError: there is none of them, or one is no JSON object.
        """
        nested = read_object(self.folder / "processor_config.json").get("video_processor")
        if isinstance(nested, dict):
            return nested
        file = self.folder / "video_preprocessor_config.json"
        return read_object(file) if exists(file) else self.preprocessor_config()

    def generation_config(self) -> dict[str, Any]:
        """``generation_config.json``, or nothing where there is none.

        Raises:
            CheckpointError: the file is no JSON object.
        """
        return read_object(self.folder / "generation_config.json")


def open_checkpoint(
    folder: Path, source_id: str | None = None, revision: str | None = None
) -> Checkpoint:
    """Open a checkpoint folder and check it against its own configuration.

    Args:
        folder: holds ``config.json`` and safetensors files.
        source_id: what to call it; read from the path or taken as the folder's name otherwise.
        revision: hub commit; read from the path of a hub cache otherwise.

    Raises:
        CheckpointError: the folder is no LLaVA-NeXT checkpoint, is incomplete, damaged, unsafe
            (pickle files, names that leave the folder), or contradicts its configuration.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"{printable(str(folder))} is no folder. Give a folder with config.json and "
            "safetensors files."
        )
    _check_files(folder)
    refuse_adapter(folder)
    if not exists(folder / CONFIG_FILE):
        raise CheckpointError(
            describe_parts(folder)
            or f"{folder} has no {CONFIG_FILE}. Give the folder that holds it next to the weights."
        )
    raw = read_object(folder / CONFIG_FILE)
    config = original_config.to_hugging_face(raw) if original_config.is_original(raw) else raw
    dims = ModelDims.from_config(config)
    files, index = _weight_files(folder)
    stored = _read_headers(folder, files, index)
    gptq = read_gptq_settings(
        raw,
        read_object(folder / QUANTIZE_CONFIG_FILE),
        plain=find_format(stored, {ref.dtype for ref in stored.values()}) is None,
    )
    layout, tensors = canonical_tensors(stored, dims, gptq)
    if (layout == ORIGINAL) != original_config.is_original(raw):
        raise CheckpointError(
            f"{folder} has weights in the {layout} layout and a config.json of the other kind. "
            "Take both from one repository."
        )
    head, table = tensors["lm_head.weight"], tensors["language_model.embed_tokens.weight"]
    # A stored head wins over the flag, as it does in transformers.
    text = replace(dims.text, tie_word_embeddings=head == table)
    known_id, known_revision = _hub_origin(folder)
    return Checkpoint(
        folder=folder,
        config=config,
        dims=replace(dims, text=text),
        layout=layout,
        tensors=tensors,
        weight_files=tuple(sorted(files)),
        source_id=source_id or known_id or folder.resolve().name,
        revision=revision or known_revision,
        gptq=gptq,
    )


def _without_idle_crop(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose ``crop_size`` is null crop nothing, whatever ``do_center_crop`` says.

    Releases before 5 read null that way; later ones refuse the pair before they look at an image.
    """
    if "crop_size" in settings and settings["crop_size"] is None:
        return {**settings, "do_center_crop": False}
    return settings


def _check_files(folder: Path) -> None:
    """Pipes, devices and files of no bounded size, all together, before anything is opened.

    Libraries open the same files by their names, without looking first.
    """
    faults: list[str] = []
    templates = folder / "additional_chat_templates"
    for file in (*(folder / name for name in READ_BY_NAME), *sorted(templates.glob("*.jinja"))):
        if not exists(file):
            continue
        try:
            with open_file(file) as descriptor:
                size, limit = os.fstat(descriptor).st_size, size_limit(file.name)
                if size > limit:
                    faults.append(
                        f"{file.name} has {format_above(size, limit)}; such files have at most "
                        f"{format_bytes(limit)}"
                    )
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        listed = "\n  - ".join(faults)
        raise CheckpointError(f"{folder} cannot be read:\n  - {listed}")


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files that make up the model, in transformers' order, and their index."""
    if exists(folder / SINGLE_FILE):
        return [folder / SINGLE_FILE], {}
    if exists(folder / INDEX_FILE):
        index = _weight_map(folder)
        return _indexed_files(folder, index), index
    # Copies from a Mac bring a "._" file for each file.
    found = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("."))
    if not found:
        raise CheckpointError(describe_parts(folder) or _no_weights(folder))
    _check_shard_count(folder, found)
    return found, {}


def _indexed_files(folder: Path, index: Mapping[str, str]) -> list[Path]:
    names = sorted(set(index.values()))
    outside = [name for name in names if not _is_plain_name(name)]
    if outside:
        raise CheckpointError(
            f"{INDEX_FILE} names files outside the folder: {shorten(outside)}. Weight files are "
            "plain names next to the index; do not use this checkpoint unless you know why."
        )
    if len(names) > _MAX_FILES:
        raise CheckpointError(
            f"{INDEX_FILE} names {len(names)} files; at most {_MAX_FILES} are read. Fetch it again."
        )
    missing = [name for name in names if not exists(folder / name)]
    if missing:
        raise CheckpointError(
            f"{folder} is incomplete: {INDEX_FILE} names {len(names)} files, missing are "
            f"{shorten(missing)}. Fetch them into the folder."
        )
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    mapping = read_object(folder / INDEX_FILE).get("weight_map")
    if (
        not isinstance(mapping, dict)
        or not mapping
        or not all(isinstance(value, str) for value in mapping.values())
    ):
        raise CheckpointError(
            f"{folder / INDEX_FILE} has no weight_map of tensor names to files. Fetch it again."
        )
    return mapping


def _is_plain_name(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and not any(mark in name for mark in ("/", "\\", "\0"))
        and name not in {".", ".."}
    )


def _check_shard_count(folder: Path, found: Sequence[Path]) -> None:
    """Without an index the names still say how many shards there must be."""
    matches = [match for file in found if (match := _SHARD.fullmatch(file.name))]
    wanted = {
        f"{match['stem']}-{number:05}-of-{match['count']}.safetensors"
        for match in matches
        if int(match["count"]) <= 10_000
        for number in range(1, int(match["count"]) + 1)
    }
    missing = sorted(wanted - {file.name for file in found})
    if missing:
        raise CheckpointError(
            f"{folder} is incomplete: its shards say there are more, missing are "
            f"{shorten(missing)}. Fetch them into the folder."
        )


def _no_weights(folder: Path) -> str:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if not pickles:
        return f"{folder} holds no *.safetensors file. Give a folder with the model's weights."
    return (
        f"{folder} holds its weights as pickle files only ({shorten(pickles)}). Pickle runs code "
        "while it loads, so it is never read. Fetch a safetensors revision of the model, or "
        "convert it where you trust it: load it with transformers' from_pretrained and call "
        "save_pretrained(folder, safe_serialization=True)."
    )


def _read_headers(
    folder: Path, files: Sequence[Path], index: Mapping[str, str]
) -> dict[str, TensorRef]:
    stored: dict[str, TensorRef] = {}
    faults: list[str] = []
    for file in files:
        try:
            header = read_header(file)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        faults += [
            f"tensor {name} lies in both {stored[name].file.name} and {file.name}"
            for name in header
            if name in stored
        ]
        stored.update(header)
        if len(stored) > _MAX_TENSORS:
            raise CheckpointError(
                f"{folder} holds more than {_MAX_TENSORS} tensors, which no such model has."
            )
    if not faults:
        absent = [
            f"{printable(name)} (in {file})"
            for name, file in index.items()
            if (name not in stored or stored[name].file.name != file) and not _may_be_absent(name)
        ]
        if absent:
            faults.append(f"{INDEX_FILE} names tensors that are not there: {shorten(absent)}")
    if faults:
        listed = "\n  - ".join(faults)
        raise CheckpointError(f"{folder} cannot be read:\n  - {listed}")
    if adapters := [name for name in stored if is_adapter_tensor(name)]:
        raise CheckpointError(adapter_message(folder, f"tensors are named {shorten(adapters, 2)}"))
    return stored


def _may_be_absent(name: str) -> bool:
    """Indexes of old tools list computed buffers and the second name of a shared head."""
    read = read_name(name)
    return is_buffer(name) or (read is not None and read.part == "head")


def _hub_origin(folder: Path) -> tuple[str | None, str | None]:
    """Id and commit, where the folder is a snapshot in a Hugging Face cache."""
    absolute = folder.absolute()
    if absolute.parent.name != "snapshots":
        return None, None
    match = _SNAPSHOT.fullmatch(absolute.parent.parent.name)
    return (f"{match['owner']}/{match['name']}", absolute.name) if match else (None, None)
