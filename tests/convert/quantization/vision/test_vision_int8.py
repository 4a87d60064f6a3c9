"""The tower at 8 bits: how near it comes, what is scaled, and what stays in float."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from llava_edge.convert.checkpoint.config.image import read_image_processing
from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.onnx.builder import GraphBuilder
from llava_edge.convert.onnx.vision import build_vision_graph
from llava_edge.convert.pipeline import convert_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.calibration.conversations import Conversation
from llava_edge.convert.quantization.calibration.synthetic import draw_conversations
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.convert.quantization.vision import int8 as vision_int8
from llava_edge.convert.quantization.vision.activations import VisionTrace
from llava_edge.convert.quantization.vision.calibration_tiles import CalibrationTiles, cut_tiles
from llava_edge.convert.quantization.vision.int8 import (
    Int8Calibration,
    Int8Vision,
    write_int8_vision,
)
from llava_edge.convert.quantization.vision.smoothquant import AT_A_COST, FREE, scale_inputs
from llava_edge.convert.testing.random_outliers import plant_outliers
from llava_edge.convert.verification.conversion import Verification
from llava_edge.profiles.boards.hardware import HardwareProfile, load_profile
from llava_edge.profiles.errors import BudgetError, ExportError, RequestError
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.artifact.manifest import GraphSpec, Manifest
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.backends.cpu_isa import sums_saturate
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.util.progress import no_progress
from llava_edge.runtime.verification.cosine import TileCosine

_BLOCK = "vision_tower.encoder.layers"


@dataclass(frozen=True)
class Tower:
    """A random checkpoint, its tiles, and what was seen on them."""

    checkpoint: Checkpoint
    tiles: CalibrationTiles
    trace: VisionTrace
    calibration: Int8Calibration
    folder: Path

    def write(self) -> dict[str, Any]:
        """Write the int8 graph into ``folder / vision``; what there is to say of it."""

        def save(graph: GraphBuilder) -> GraphSpec:
            (self.folder / "vision").mkdir()
            graph.save(self.folder / "vision")
            return graph.spec("vision/model.onnx")

        return write_int8_vision(
            self.checkpoint, self.calibration, self.tiles.pixel_values, self.folder, save
        ).facts

    def run(self, batch: int) -> np.ndarray[Any, Any]:
        """Features by the int8 graph, ``batch`` tiles at a time."""
        options = SessionOptions(wide_sums=sums_saturate())
        session = Session(self.folder / "vision" / "model.onnx", options)
        pixels = self.tiles.pixel_values
        parts = [
            session.run({"pixel_values": pixels[first : first + batch]}, ["image_features"])[0]
            for first in range(0, len(pixels), batch)
        ]
        return np.concatenate(parts)


def tiles_of(checkpoint: Checkpoint, count: int = 4) -> CalibrationTiles:
    dims = checkpoint.dims
    settings = checkpoint.preprocessor_config()
    processing = read_image_processing(settings, dims, dims.image_grid_pinpoints, "hf")
    anyres = AnyRes(processing.tile_size, processing.patch_size, processing.image_grid_pinpoints)
    return cut_tiles(*draw_conversations(anyres, 8), processing, count)


def look_at(folder: Path, out: Path) -> Tower:
    checkpoint = open_checkpoint(folder)
    tiles = tiles_of(checkpoint)
    (out / "float").mkdir()
    build_vision_graph(checkpoint.dims, checkpoint, np.float32).save(out / "float")
    trace = VisionTrace(out / "float" / "model.onnx", tiles.pixel_values)
    calibration = Int8Calibration(checkpoint, trace, no_progress)
    return Tower(checkpoint, tiles, trace, calibration, out)


@pytest.fixture
def tower(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Tower:
    return look_at(make_checkpoint("tiny"), tmp_path)


@pytest.fixture
def loud(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Tower:
    """Wide enough for outliers to be few among many."""
    folder = tmp_path / "checkpoint"
    sizes = {"vision_hidden_size": 256, "vision_intermediate_size": 1024}
    shutil.copytree(make_checkpoint("tiny", **sizes), folder)
    assert plant_outliers(folder) == 3 * (2 + 2 + 6)
    return look_at(folder, tmp_path)


def test_the_trace_ends_with_the_features_of_the_whole_graph(tower: Tower) -> None:
    session = Session(tower.folder / "float" / "model.onnx", SessionOptions())
    (whole,) = session.run({"pixel_values": tower.tiles.pixel_values}, ["image_features"])
    np.testing.assert_allclose(tower.trace.features, whole, atol=2e-6)
    names = [piece.name for piece in tower.trace.pieces()]
    assert names == ["embeddings", "layers.0", "layers.1", "projector"]


def test_ordinary_weights_need_no_layer_in_float(tower: Tower) -> None:
    facts = tower.write()
    assert facts["layers_in_float"] == {}
    assert facts["weights_in_float"] == 0
    found = TileCosine.of(tower.run(1), tower.trace.features)
    assert found.mean_loss == pytest.approx(facts["tile_cosine_loss"]["0"]["mean"])
    assert 0 < found.mean_loss < 2e-4
    graph = onnx.load(str(tower.folder / "vision" / "model.onnx"), load_external_data=False).graph
    products = {node.name for node in graph.node if node.op_type == "MatMulIntegerToFloat"}
    assert products == set(tower.calibration.layers)
    assert len(products) == 2 * 4 + 2
    forbidden = {"Conv", "DynamicQuantizeLinear", "DynamicQuantizeMatMul"}
    assert not forbidden & {node.op_type for node in graph.node}


def test_a_tile_has_the_same_features_alone_and_among_others(tower: Tower) -> None:
    tower.write()
    # Float arithmetic between the products may differ in its last bits, see docs/decisions.
    gap = np.abs(tower.run(1) - tower.run(4)).max() / np.ptp(tower.trace.features)
    assert gap < 0.01


def test_outlier_channels_are_moved_into_the_weights(loud: Tower) -> None:
    layers = loud.calibration.layers
    for block in range(2):
        for name in ("self_attn.q_proj", "mlp.fc1", "mlp.fc2"):
            layer = layers[f"{_BLOCK}.{block}.{name}"]
            assert layer.plain_error > 3 * layer.error
            assert layer.error < 0.02
            assert layer.scale is not None
            assert set(np.frexp(layer.scale)[0]) == {0.5}
            assert layer.scale.min() == 1
    facts = loud.write()
    assert facts["layers_in_float"] == {}
    found = TileCosine.of(loud.run(1), loud.trace.features)
    assert found.mean_loss < 5e-4


def test_without_scales_outliers_would_cost_ten_times_as_much(loud: Tower) -> None:
    loud.write()
    scaled = TileCosine.of(loud.run(1), loud.trace.features)
    shutil.rmtree(loud.folder / "vision")
    graph, _ = Int8Vision({}).graph(loud.checkpoint)
    (loud.folder / "vision").mkdir()
    graph.save(loud.folder / "vision")
    plain = TileCosine.of(loud.run(1), loud.trace.features)
    assert plain.mean_loss > 10 * scaled.mean_loss


def test_norms_divided_by_their_scale_are_exact(loud: Tower) -> None:
    graph, _ = Int8Vision(
        {n: s.scale for n, s in loud.calibration.layers.items() if s.scale is not None}
    ).graph(loud.checkpoint)
    (loud.folder / "exact").mkdir()
    graph.save(loud.folder / "exact")
    written = onnx.load(str(loud.folder / "exact" / "model.onnx"))
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in written.graph.initializer}
    name = f"{_BLOCK}.1.mlp.fc1"
    scale = loud.calibration.layers[name].scale
    for part in ("weight", "bias"):
        norm = f"{_BLOCK}.1.layer_norm2.{part}"
        own = loud.checkpoint.read(norm).astype(np.float32)
        assert np.array_equal(tensors[norm] * scale, own)
        assert not np.array_equal(tensors[norm], own)


def test_layers_go_back_to_float_until_the_bound_holds(
    tower: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = tower.write()["tile_cosine_loss"]["0"]["mean"]
    # A bound that ten layers at 8 bits miss by a factor of two.
    margin = free / 2 / 0.001
    monkeypatch.setattr(vision_int8, "_MARGIN", margin)
    facts = tower.write()
    left = facts["layers_in_float"]
    shares = tower.calibration.shares
    order = sorted(shares, key=lambda name: -shares[name])
    assert 0 < len(left) < len(order)
    assert set(left) == set(order[: len(left)])
    tried = facts["tile_cosine_loss"]
    assert tried[str(len(left))]["mean"] <= margin * 0.001
    assert tried[str(len(left) - 1)]["mean"] > margin * 0.001
    assert facts["weights_in_float"] == sum(
        vision_int8._parameters(tower.checkpoint, name) for name in left
    )
    graph = onnx.load(str(tower.folder / "vision" / "model.onnx"), load_external_data=False).graph
    ops = {node.name: node.op_type for node in graph.node}
    assert all(
        ops[name] == ("MatMul" if name in left else "MatMulIntegerToFloat") for name in order
    )
    found = TileCosine.of(tower.run(1), tower.trace.features)
    assert found.mean_loss == pytest.approx(tried[str(len(left))]["mean"])


@pytest.mark.parametrize("needed", range(12))
def test_the_fewest_layers_are_found(needed: int) -> None:
    asked: list[int] = []

    def works(count: int) -> bool:
        asked.append(count)
        return count >= needed

    assert vision_int8._fewest(works, 10) == min(needed, 10)
    assert len(asked) == len(set(asked)) <= 8


def test_scales_are_left_out_where_they_gain_nothing() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((64, 128)).astype(np.float32)
    weight = random.standard_normal((32, 128)).astype(np.float32)
    even = scale_inputs(rows, np.abs(rows).max(0), weight, FREE)
    assert even.scale is None
    assert even.error == even.plain_error
    rows[:, 7] *= 50
    weight[:, 7] /= 50
    uneven = scale_inputs(rows, np.abs(rows).max(0), weight, AT_A_COST)
    assert uneven.scale is not None
    assert 16 <= uneven.scale[7] <= 64
    assert uneven.error < 0.3 * uneven.plain_error


def test_inputs_that_are_always_zero_are_no_outliers() -> None:
    rows = np.zeros((4, 8), np.float32)
    layer = scale_inputs(rows, np.abs(rows).max(0), np.ones((2, 8), np.float32), FREE)
    assert layer.scale is None
    assert layer.error == 0


def test_tiles_come_from_the_images_that_can_be_read(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(make_checkpoint("tiny"))
    tiles = tiles_of(checkpoint, 3)
    assert tiles.pixel_values.shape == (3, 3, 336, 336)
    assert tiles.report["num_tiles"] == 3
    assert np.array_equal(tiles.pixel_values, tiles_of(checkpoint, 3).pixel_values)
    assert len({tile.tobytes() for tile in tiles.pixel_values}) == 3
    dims = checkpoint.dims
    settings = checkpoint.preprocessor_config()
    processing = read_image_processing(settings, dims, dims.image_grid_pinpoints, "hf")
    talk = Conversation("talk", "Why?", "So.", None)
    with pytest.raises(RequestError, match="none of 1 conversations has one that can be read"):
        cut_tiles([talk], {"source": "a test"}, processing)


RTN = QuantizationRequest(quantizer="rtn")


def convert(
    folder: Path,
    out: Path,
    asked: QuantizationRequest = RTN,
    board: HardwareProfile | None = None,
    **wishes: object,
) -> Manifest:
    request = ConvertRequest(
        checkpoint=str(folder),
        out=out,
        profile=board or load_profile("cpu-16gb"),
        wishes=PlanRequest(**{"precision": "int8", **wishes}),  # type: ignore[arg-type]
        quantization=asked,
        verify="none",
    )
    convert_checkpoint(request, no_progress, lambda _: None)
    return open_artifact(out).manifest


def test_an_artifact_says_what_its_tower_is(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint("tiny")
    manifest = convert(folder, tmp_path / "int8")
    assert manifest.precision.vision_tower == "int8"
    assert manifest.plan["vision_precision"] == "int8"
    facts = manifest.conversion["vision"]
    assert facts["precision"] == "int8"
    assert facts["calibration"]["num_tiles"] == 8
    assert f"{_BLOCK}.0.self_attn.k_proj" in manifest.conversion["weights_sha256"]
    kept = convert(folder, tmp_path / "fp16", vision_precision="fp16")
    assert kept.precision.vision_tower == "fp16"
    assert "vision" not in kept.conversion
    sizes = [m.files["vision/weights.bin"].bytes for m in (manifest, kept)]
    assert sizes[0] < sizes[1]


def test_a_folder_without_images_leaves_the_tower_to_drawn_ones(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    line = '{"question": "Why?", "answer": "Because."}'
    (tmp_path / "texts" / "some.jsonl").write_text(f"{line}\n" * 4, "utf-8")
    asked = QuantizationRequest(quantizer="rtn", calibration=tmp_path / "texts", num_samples=8)
    facts = convert(make_checkpoint("tiny"), tmp_path / "out", asked).conversion["vision"]
    assert facts["calibration"]["source"].startswith("drawn by this project")
    assert facts["calibration"]["num_tiles"] == 6


def test_layers_in_float_are_planned_for_after_calibration(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("tiny")
    before = convert(folder, tmp_path / "before").plan
    monkeypatch.setattr(vision_int8, "_MARGIN", 0.0)
    after = convert(folder, tmp_path / "after")
    left = after.conversion["vision"]["weights_in_float"]
    assert left > 0
    towers = [p["memory"]["vision_tower_bytes"] for p in (before, after.plan)]
    assert towers[1] - towers[0] == 3 * left
    assert after.plan["context_tokens"] == before["context_tokens"]


@pytest.mark.slow
def test_context_gives_way_to_layers_in_float(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, board = make_checkpoint("tiny"), load_profile("cpu-16gb")
    plan = convert(folder, tmp_path / "before").plan["memory"]
    monkeypatch.setattr(vision_int8, "_MARGIN", 0.0)
    # What the plan at 8 bits takes, to the byte: nothing is left for a layer in float.
    memory = plan["total_bytes"] + board.system_reserve_bytes
    small = replace(board, memory_bytes=memory, host_memory_bytes=None)
    narrow = convert(folder, tmp_path / "after", board=small)
    assert narrow.context_tokens == narrow.plan["context_tokens"]
    assert (
        narrow.plan["context_tokens"] < open_artifact(tmp_path / "before").manifest.context_tokens
    )
    assert narrow.plan["memory"]["total_bytes"] <= plan["total_bytes"]


def test_what_a_cut_conversion_wrote_down_is_all_there_for_the_next(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = make_checkpoint("tiny"), Verification.certify
    monkeypatch.setattr(Verification, "certify", _cut)
    with pytest.raises(ExportError, match="cut here"):
        convert(folder, tmp_path / "out")
    decoder = tmp_path / "out.partial" / "artifact" / "decoder" / "weights.bin"
    decoder.write_bytes(decoder.read_bytes()[::-1])
    monkeypatch.setattr(Verification, "certify", real)
    again = convert(folder, tmp_path / "out")
    whole = convert(folder, tmp_path / "whole")
    assert again.conversion["weights_sha256"] == whole.conversion["weights_sha256"]
    assert again.conversion["vision"] == whole.conversion["vision"]


def _cut(*_: object) -> None:
    raise ExportError("cut here")


def test_a_tower_that_was_looked_at_on_other_images_is_not_gone_on_with(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint("tiny")
    few = QuantizationRequest(quantizer="rtn", num_samples=3)
    monkeypatch.setattr(Verification, "certify", _cut)
    board = load_profile("a100")
    with pytest.raises(ExportError, match="cut here"):
        convert(folder, tmp_path / "out", few, board=board, precision="fp16")
    with pytest.raises(RequestError, match="calibration was"):
        convert(folder, tmp_path / "out", board=board, precision="fp16")


def test_a_plan_that_fitted_only_at_8_bits_is_refused_once_layers_stay_in_float(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_edge.convert.planning import replanning

    monkeypatch.setattr(vision_int8, "_MARGIN", 0.0)
    real = replanning.choose

    def small(request: ConvertRequest, wishes: PlanRequest) -> Any:
        # As if the board's budget lay between both plans.
        if wishes.vision_wide_weights:
            wishes = PlanRequest(**{**vars(wishes), "vision_wide_weights": 1 << 40})
        return real(request, wishes)

    monkeypatch.setattr(replanning, "choose", small)
    with pytest.raises(BudgetError, match="needs"):
        convert(make_checkpoint("tiny"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_planted_outliers_leave_the_function_nearly_as_it_was(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("tiny"), folder)
    plant_outliers(folder)
    found = {}
    for name, place in (("plain", make_checkpoint("tiny")), ("planted", folder)):
        checkpoint = open_checkpoint(place)
        out = tmp_path / name
        out.mkdir()
        build_vision_graph(checkpoint.dims, checkpoint, np.float32).save(out)
        session = Session(out / "model.onnx", SessionOptions(wide_sums=sums_saturate()))
        pixels = tiles_of(checkpoint, 2).pixel_values
        found[name] = session.run({"pixel_values": pixels}, ["image_features"])[0]
    assert not torch.equal(*(torch.from_numpy(f) for f in found.values()))
    assert TileCosine.of(found["planted"], found["plain"]).mean_loss < 0.05
    with pytest.raises(RequestError, match="checkpoints of one file"):
        plant_outliers(tmp_path / "nowhere")
