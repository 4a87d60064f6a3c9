"""Processor files as other releases and tools write them: what is kept passes its verification."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiers import slow_but

FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "nulls": ("llava_next", {"crop_size": None, "image_grid_pinpoints": None, "do_pad": None}),
    "lists and single numbers": (
        "llava_next",
        {"size": [70, 70], "crop_size": 70, "image_mean": 0.5, "image_std": 0.25},
    ),
    "single numbers of a video": ("llava_next_video", {"image_mean": 0.5, "size": 70}),
    "single numbers of one view": ("llava", {"image_std": 0.5, "size": 70, "crop_size": [70, 70]}),
}


@pytest.mark.parametrize("kind", slow_but(["lists and single numbers"], FILES))
def test_what_is_kept_of_a_processor_file_passes_its_verification(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    tmp_path: Path,
    kind: str,
) -> None:
    model_type, changes = FILES[kind]
    # Pooling halves the patches of a frame.
    sizes = {"image_size": 56} if model_type == "llava_next_video" else {}
    copy = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("odd", model_type=model_type, **sizes), copy)
    for file in copy.glob("*preprocessor_config.json"):
        settings = json.loads(file.read_text())
        sized = {k: 56 if v == 70 and sizes else v for k, v in changes.items()}
        file.write_text(json.dumps({**settings, **sized}))

    artifact = make_artifact(copy, verify="quick")

    assert json.loads((artifact / "certificate.json").read_text())["passed"]
