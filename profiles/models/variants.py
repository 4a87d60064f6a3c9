"""Variant: what is published of each member of the family, and a checkpoint folder of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from llava_edge.profiles.errors import CheckpointError, RequestError, did_you_mean, plain_reason
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.profiles.models.parameters import total_parameters
from llava_edge.profiles.sizes import format_bytes

Kind = Literal["image", "video", "llava-1.5"]

_MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class Variant:
    """One checkpoint that can be planned for.

    ``parameters`` counts what the checkpoint stores, vision tower in full. ``hub_id`` is None for
    a folder; ``sources`` says where each group of facts was read and how sure it is.
    """

    name: str
    kind: Kind
    dims: ModelDims
    parameters: int
    hub_id: str | None
    original_id: str | None
    checkpoint_dtype: str
    license: str
    license_status: str
    prompt_family: str | None
    base_model: str | None
    sources: Mapping[str, str]

    @property
    def fp16_bytes(self) -> int:
        """Size of the checkpoint's weights at two bytes a parameter; what is downloaded."""
        return 2 * self.parameters


def load_variants() -> tuple[Variant, ...]:
    """All published variants, largest first; equal sizes in the data file's order."""
    file = resources.files("llava_edge.profiles").joinpath("data", "variants.json")
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    variants = (_read(name, entry, data) for name, entry in data["variants"].items())
    return tuple(sorted(variants, key=lambda v: -v.parameters))


def candidates(kind: Kind = "image") -> tuple[Variant, ...]:
    """The variants of one kind, largest first: what a plan chooses from when none is named."""
    return tuple(v for v in load_variants() if v.kind == kind)


def find_variant(name: str) -> Variant:
    """The variant with this key, hub id or original id; or the folder (or config.json) of one.

    Raises:
        RequestError: no such variant and no such folder.
        CheckpointError: the folder's configuration cannot be used.
    """
    for variant in load_variants():
        if name in (variant.name, variant.hub_id, variant.original_id):
            return variant
    path = Path(name)
    if path.is_dir():
        return read_folder(path)
    if path.name == "config.json" and path.is_file():
        return read_folder(path.parent)
    names = [v.name for v in load_variants()]
    known = [*names, *(v.hub_id for v in load_variants() if v.hub_id)]
    raise RequestError(
        f"There is no variant and no folder {name[:80]!r}{did_you_mean(name, known)}. Variants: "
        f"{', '.join(names)}. Or give a folder with a config.json."
    )


def read_folder(folder: Path) -> Variant:
    """A checkpoint folder as a variant; only its ``config.json`` is read.

    Raises:
        CheckpointError: the file is missing, damaged, or asks for what is not supported.
    """
    path = folder / "config.json"
    try:
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no config.json. Give a checkpoint folder.")
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"{path} is larger than {format_bytes(_MAX_CONFIG_BYTES)}; not a config."
            )
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {plain_reason(error)}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not an object.")
    try:
        dims = ModelDims.from_config(config)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} holds a value of another form: {error!r}.") from error
    return Variant(
        name=folder.resolve().name,
        kind=kind_of(dims),
        dims=dims,
        parameters=total_parameters(dims),
        hub_id=None,
        original_id=None,
        checkpoint_dtype=str(config.get("dtype", config.get("torch_dtype", "float16"))),
        license="see the checkpoint",
        license_status="not read",
        prompt_family=None,
        base_model=None,
        sources={"config": str(path)},
    )


def kind_of(dims: ModelDims) -> Kind:
    """What a model of these dimensions is asked about."""
    kinds: dict[str, Kind] = {"llava_next_video": "video", "llava": "llava-1.5"}
    return kinds.get(dims.model_type, "image")


def _read(name: str, entry: dict[str, Any], data: dict[str, Any]) -> Variant:
    shared = {
        "vision_config": data["vision_config"],
        "image_grid_pinpoints": data["image_grid_pinpoints"],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
    }
    dims = ModelDims.from_config({**shared, **entry["config"]})
    return Variant(
        name=name,
        kind=kind_of(dims),
        dims=dims,
        parameters=entry["parameters"],
        hub_id=entry["hub_id"],
        original_id=entry["original_id"],
        checkpoint_dtype=entry["checkpoint_dtype"],
        license=entry["license"],
        license_status=entry["license_status"],
        prompt_family=entry["prompt_family"],
        base_model=entry["base_model"],
        sources=dict(entry["sources"]),
    )
