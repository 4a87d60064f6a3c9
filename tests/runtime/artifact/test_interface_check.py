from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact import graph_signature
from llava_edge.runtime.util.checksummed_json import seal

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def artifact(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path], tmp_path: Path
) -> Path:
    """A copy to be changed."""
    folder = tmp_path / "artifact"
    shutil.copytree(make_artifact(make_checkpoint("odd", backbone="mistral")), folder)
    return folder


def reseal(folder: Path, change: Change) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(seal(document))


def more_layers(m: dict[str, Any]) -> None:
    m["model"]["text"]["num_hidden_layers"] += 1
    m["model"]["text"]["sliding_windows"].append(0)


def swapped_graphs(m: dict[str, Any]) -> None:
    m["vision"], m["decoder"] = m["decoder"], m["vision"]


def longer_context(m: dict[str, Any]) -> None:
    m["context_tokens"] += 1


def other_heads(m: dict[str, Any]) -> None:
    m["model"]["text"]["num_key_value_heads"] = 3


def other_tile(m: dict[str, Any]) -> None:
    for holder, key in ((m["model"]["vision"], "image_size"), (m["image_processing"], "tile_size")):
        holder[key] = 84
    m["image_processing"]["image_grid_pinpoints"] = [[84, 168]]


def other_vocabulary(m: dict[str, Any]) -> None:
    m["model"]["text"]["vocab_size"] += 1


def too_many_tiles(m: dict[str, Any]) -> None:
    m["image_processing"]["image_grid_pinpoints"] = [[70 * 1000, 70 * 1000]]


def impossible_mean(m: dict[str, Any]) -> None:
    m["image_processing"]["image_mean"][0] = 1e300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (more_layers, r"past_key_values\.3\.key"),
        (swapped_graphs, "vision inputs are not those of the model"),
        (longer_context, "the manifest promises"),
        (other_heads, r"call for float32\[1, 3, None, 16\]"),
        (other_tile, "pixel_values is float32"),
        (other_vocabulary, "logits is float32|embed_tokens"),
        (too_many_tiles, "tiles"),
        (impossible_mean, "mean, deviation or factor"),
    ],
)
def test_a_manifest_whose_numbers_are_not_its_graphs_is_refused_at_load(
    artifact: Path, change: Change, message: str
) -> None:
    reseal(artifact, change)

    with pytest.raises(ArtifactError, match=message):
        LlavaEdge.load(artifact)


def test_outputs_of_the_best_logits_have_the_names_of_the_format() -> None:
    # Artifacts that exist have them: another name would make all of them unreadable.
    assert graph_signature._BEST == ("best_logits", "best_ids")
