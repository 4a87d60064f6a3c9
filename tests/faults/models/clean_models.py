"""Sound conversions: every backbone in every form and geometry, and the rarer checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tests.faults.models.fault_models import Model

BACKBONES: Mapping[str, Mapping[str, object]] = {
    "llama": {"kv_heads": 6},
    "mistral": {"kv_heads": 2},
    "qwen2": {"kv_heads": 2},
}
FORMS: Mapping[str, tuple[str, str, str | None]] = {
    "fp16": ("cpu-16gb", "fp16", None),
    "fp16 cuda": ("a100", "fp16", None),
    "int8": ("cpu-16gb", "int8", None),
    "int4": ("cpu-16gb", "int4", None),
}
FURTHER_FORMS: Mapping[str, tuple[str, str, str | None]] = {
    "int8 nbits": ("cpu-16gb", "int8", "none"),
    "int8 cuda": ("a100", "int8", None),
    "int4 cuda": ("a100", "int4", None),
}


VIDEO: Mapping[str, object] = {"model_type": "llava_next_video", "image_size": 56}
"""Frames of 4 x 4 patches, pooled to 2 x 2 tokens."""


def _model(
    backbone: str, form: tuple[str, str, str | None], *, seed: int = 1, **changes: object
) -> Model:
    board, precision, isa = form
    return Model(
        backbone,
        precision=precision,
        board=board,
        int8_isa=isa,
        seed=seed,
        # In float16 a random model has too many positions that are too close to call.
        alters="decided" if board == "a100" else "",
        changes={"layers": 2, **BACKBONES[backbone], **changes},
    )


def clean_models(seed: int = 1) -> dict[str, Model]:
    """All backbones and forms on tiles of 5 x 5 patches, by name."""
    forms = {**FORMS, **FURTHER_FORMS}
    return {
        f"{backbone} {name}": _model(backbone, form, seed=seed)
        for backbone in BACKBONES
        for name, form in forms.items()
    }


def solved_models(seed: int = 1) -> dict[str, Model]:
    """All backbones in all quantised forms, solved with GPTQ, without and with outlier channels.

    Heads are decided: of random ones too many positions are too close to call.
    """
    forms = {**FORMS, **FURTHER_FORMS}
    quantised = {name: form for name, form in forms.items() if form[1] != "fp16"}
    solved = {
        f"{backbone} {name} gptq": replace(
            _model(backbone, form, seed=seed), quantizer="gptq", vision="fp16", alters="decided"
        )
        for backbone in BACKBONES
        for name, form in quantised.items()
    }
    loud = {
        f"{name} loud": replace(model, alters="loud, decided")
        for name, model in solved.items()
        if model.board != "a100"
    }
    return {**solved, **loud}


CLEAN: Mapping[str, Model] = {
    **{f"{b} {f}": _model(b, form) for b in BACKBONES for f, form in FORMS.items()},
    **{f: _model("mistral", form) for f, form in FURTHER_FORMS.items()},
    "original layout": Model("llama", alters="original"),
    "bfloat16": Model("mistral", alters="bf16"),
    "windowed": Model("mistral", changes={"sliding_window": 24}),
    "rope scaling": Model("llama", changes={"rope_factor": 4.0, "max_positions": 4096}),
    "tied head": Model("qwen2", changes={"tie_word_embeddings": True}),
    "no projector bias": Model("llama", changes={"projector_bias": False}),
    "grid base": Model("qwen2", grid="base"),
    "int8 cache": Model("qwen2", cache="int8"),
    "int8 cache, windowed": Model("mistral", cache="int8", changes={"sliding_window": 24}),
    "int8 cache, cuda": Model("qwen2", cache="int8", board="a100", alters="decided"),
    "int8 cache, windowed, int4 cuda": Model(
        "mistral",
        precision="int4",
        cache="int8",
        board="a100",
        alters="decided",
        changes={"layers": 2, "sliding_window": 24},
    ),
    "int8 cache, int4": Model("mistral", precision="int4", cache="int8", changes={"layers": 2}),
    "grid 3x3": Model("mistral", grid="3x3"),
    "system turn": Model("llama", alters="system turn"),
    "gptq": Model("mistral", precision="int4", changes={"layers": 2}, alters="gptq"),
    "video": Model("llama", changes=VIDEO),
    "video bfloat16 cuda": Model(
        "llama", board="a100", alters="bf16", changes={**VIDEO, "layers": 2}
    ),
    "video int8": Model("llama", precision="int8", changes={**VIDEO, "layers": 2}),
    "video int4 cuda": Model(
        "llama", precision="int4", board="a100", changes={**VIDEO, "layers": 2}, alters="decided"
    ),
    "llava 1.5": Model("llama", changes={"model_type": "llava"}),
    "llava 1.5 int8": Model("llama", precision="int8", changes={"model_type": "llava"}),
    "loud int8": Model("mistral", precision="int8", changes={"layers": 2}, alters="loud"),
}
"""Tiles of 5 x 5 patches: quick."""

RELEASED: Mapping[str, Model] = {
    f"{backbone} {name} 336/14": Model(
        backbone,
        "tiny",
        precision=form[1],
        board=form[0],
        context_tokens=4096,
        alters="decided" if form[0] == "a100" else "",
        changes={"kv_heads": 4 if backbone == "llama" else 2},
    )
    for backbone in BACKBONES
    for name, form in FORMS.items()
}
"""The released geometry: 24 x 24 patches a tile."""
