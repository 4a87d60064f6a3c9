"""Small artifacts to fuzz: verified ones of random checkpoints, made once and kept in build/."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_edge.runtime.util.progress import Notify, no_progress

SPECS: Mapping[str, Mapping[str, Any]] = {
    "image": {"backbone": "mistral", "image_size": 56},
    "video": {"backbone": "mistral", "image_size": 56, "model_type": "llava_next_video"},
}
"""Checkpoints by name; ``odd`` ones, of a few hundred kilobytes."""


def make_artifact(name: str, folder: Path, say: Notify = print) -> Path:
    """The artifact of a spec below a folder; converted and verified unless it is there."""
    from llava_edge.convert.pipeline import convert_checkpoint
    from llava_edge.convert.planning.request import ConvertRequest
    from llava_edge.convert.testing.random_checkpoint import write_random_checkpoint
    from llava_edge.convert.testing.random_spec import preset
    from llava_edge.profiles.boards.hardware import load_profile
    from llava_edge.profiles.plan_request import PlanRequest

    out, recipe = folder / name, folder / f"{name}.json"
    text = json.dumps(SPECS[name], sort_keys=True)
    if out.exists() and recipe.exists() and recipe.read_text() == text:
        return out
    for old in (out, folder / f"{name}-checkpoint"):
        shutil.rmtree(old, ignore_errors=True)
    checkpoint = folder / f"{name}-checkpoint"
    write_random_checkpoint(checkpoint, preset("odd", **SPECS[name]), seed=1)
    wishes: dict[str, Any] = {"precision": "fp16"}
    if "video" in SPECS[name].get("model_type", ""):
        wishes["num_frames"] = 8
    request = ConvertRequest(
        checkpoint=str(checkpoint),
        out=out,
        profile=load_profile("cpu-16gb"),
        wishes=PlanRequest(**wishes),
        verify="quick",
    )
    convert_checkpoint(request, no_progress, say)
    recipe.write_text(text)
    return out
