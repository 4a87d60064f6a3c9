"""One model under several names of its tensors: the artifact's weights are the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.verification.reference.model import ReferenceModel
from llava_edge.profiles.models.anyres import AnyRes, grid_pinpoints
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.manifest import Reference
from llava_edge.runtime.util.progress import no_progress
from tests.support.checkpoint_layouts import as_original, renamed

IN_MEMORY = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("image_newline", "model.image_newline"),
)


@pytest.fixture(scope="module")
def hub(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("odd")


AS_5_5_SAVES = (
    ("language_model.model.", "model.language_model.model."),
    ("language_model.lm_head.", "language_model.lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("image_newline", "model.image_newline"),
)


def convert(checkpoint: Path, out: Path, reference: Reference | None = None) -> Path:
    request = ConvertRequest(
        checkpoint=str(checkpoint),
        out=out,
        wishes=PlanRequest(precision="fp16"),
        reference=reference,
        verify="none",
    )
    return convert_checkpoint(request, no_progress, print).folder


def weights(artifact: Path) -> tuple[bytes, ...]:
    names = ("vision/weights.bin", "decoder/weights.bin", "embeddings.safetensors")
    return tuple((artifact / name).read_bytes() for name in names)


def test_in_memory_names_give_the_artifact_of_hub_names(
    hub: Path, make_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    copy = renamed(hub, tmp_path / "memory", IN_MEMORY)

    assert weights(convert(copy, tmp_path / "artifact")) == weights(make_artifact(hub))


def test_what_5_5_saves_converts_and_passes_its_verification(
    hub: Path, make_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    copy = renamed(hub, tmp_path / "saved", AS_5_5_SAVES)

    artifact = make_artifact(copy, verify="quick")

    certificate = json.loads((artifact / "certificate.json").read_text())
    assert certificate["passed"]
    assert weights(artifact) == weights(make_artifact(hub))


def test_an_original_checkpoint_answers_as_its_conversion_to_hugging_face(
    hub: Path, make_artifact: Callable[..., Path], picture: Image.Image, tmp_path: Path
) -> None:
    original = as_original(hub, tmp_path / "original")
    artifact = convert(original, tmp_path / "artifact")
    reference = ReferenceModel(hub)
    inputs = reference.prepare(reference.render("What is this?", 1), [picture])

    with LlavaEdge.load(artifact, threads=1) as model:
        answer = model.generate("What is this?", [picture], max_new_tokens=16)

    assert weights(artifact) == weights(make_artifact(hub))
    assert list(answer.token_ids) == reference.greedy(inputs, 16)


def test_ties_between_grids_follow_the_order_of_the_layout(hub: Path, tmp_path: Path) -> None:
    # Both sides are within one tile, so 1x2 and 2x1 keep the whole image: a tie.
    small = Image.new("RGB", (60, 40), "white")
    original = as_original(hub, tmp_path / "original")
    by_default = convert(original, tmp_path / "default")
    as_hugging_face = convert(original, tmp_path / "hf", "hf")
    reference = ReferenceModel(hub)
    expected = reference.prepare(reference.render("Hi", 1), [small])["input_ids"].shape[1]

    with LlavaEdge.load(as_hugging_face, threads=1) as model:
        assert model.count_tokens("Hi", [small]) == expected
    with LlavaEdge.load(by_default, threads=1) as model:
        assert model.artifact.manifest.image_processing.reference == "original"
        # 60x40 in tiles of 5 patches: wide keeps 5 x 7.5, tall 3.3 x 5, rounded up to even cuts.
        assert model.count_tokens("Hi", [small]) < expected


def with_pinpoints(folder: Path, target: Path, pinpoints: list[list[int]]) -> Path:
    """The same weights under another candidate list, for model and processor alike."""
    shutil.copytree(folder, target)
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        path = target / name
        if path.exists():
            document = json.loads(path.read_text())
            for holder in (document, document.get("image_processor", {})):
                if "image_grid_pinpoints" in holder:
                    holder["image_grid_pinpoints"] = pinpoints
            path.write_text(json.dumps(document))
    return target


@pytest.mark.parametrize("grid", ["3x3", "2x6", "1x2", "base"])
def test_other_grids_give_the_tokens_of_the_reference_with_those_candidates(
    hub: Path, picture: Image.Image, tmp_path: Path, grid: str
) -> None:
    pinpoints = grid_pinpoints(grid, 70)
    large = picture.resize((400, 100 if grid == "2x6" else 400))
    request = ConvertRequest(
        checkpoint=str(hub),
        out=tmp_path / "artifact",
        wishes=PlanRequest(precision="fp16", grid=grid),
        verify="none",
    )
    artifact = convert_checkpoint(request, no_progress, print).folder

    with LlavaEdge.load(artifact, threads=1) as model:
        answer = model.generate("What is this?", [large], max_new_tokens=8)

    assert (
        answer.image_tokens == AnyRes(70, 14, pinpoints).layout(*large.size[::-1]).num_image_tokens
    )
    if not pinpoints:
        # The reference's processor takes no empty list; its packing of one tile is checked apart.
        assert answer.image_tokens == 5 * 5 + 1
        return
    changed = with_pinpoints(hub, tmp_path / "changed", [list(point) for point in pinpoints])
    reference = ReferenceModel(changed)
    inputs = reference.prepare(reference.render("What is this?", 1), [large])
    assert list(answer.token_ids) == reference.greedy(inputs, 8)
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
