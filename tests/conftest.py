"""Checkpoints and artifacts that tests share: written once a session, never changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ArtifactMaker = Callable[..., Path]
CheckpointMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointMaker:
    """``make_checkpoint(preset, **changes)``: a random checkpoint folder, written once."""
    from llava_edge.convert.random_checkpoint import write_random_checkpoint
    from llava_edge.convert.random_spec import preset

    made: dict[str, Path] = {}

    def make(name: str = "tiny", **changes: object) -> Path:
        key = repr((name, sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / name
            write_random_checkpoint(folder, preset(name, **changes), seed=1)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_artifact(tmp_path_factory: pytest.TempPathFactory) -> ArtifactMaker:
    """``make_artifact(checkpoint, profile=…, **wishes)``: an artifact of it, converted once."""
    from llava_edge.convert.pipeline import convert_checkpoint
    from llava_edge.convert.request import ConvertRequest
    from llava_edge.profiles.hardware import load_profile
    from llava_edge.profiles.planner import PlanRequest
    from llava_edge.runtime.progress import no_progress

    made: dict[str, Path] = {}

    def make(checkpoint: Path, **changes: object) -> Path:
        key = repr((checkpoint, sorted(changes.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("artifact") / "artifact"
            profile = load_profile(str(changes.get("profile", "cpu-16gb")))
            wishes = {name: value for name, value in changes.items() if name != "profile"}
            request = ConvertRequest(
                checkpoint=str(checkpoint),
                out=out,
                profile=profile,
                wishes=PlanRequest(**{"precision": "fp16", **wishes}),  # type: ignore[arg-type]
            )
            made[key] = convert_checkpoint(request, no_progress, print).folder
        return made[key]

    return make


@pytest.fixture
def picture() -> Image.Image:
    """A 3:2 picture with edges and colours, so that every tile differs."""
    image = Image.new("RGB", (600, 400), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((40, 60, 220, 240), fill="royalblue")
    pen.ellipse((260, 120, 460, 320), fill="tomato")
    pen.polygon([(480, 340), (580, 340), (530, 220)], fill="seagreen")
    return image
