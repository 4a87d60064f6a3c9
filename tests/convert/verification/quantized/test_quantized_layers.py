"""Solved layers against rounding to nearest: sound ones are better, spoiled ones are found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_edge.convert.checkpoint.formats.rounding import QuantizationReport, QuantizedWeight
from llava_edge.convert.verification.quantized.graph_weights import GraphCodes, GraphWeights
from llava_edge.convert.verification.quantized.output_error import (
    KindInputs,
    WeightRows,
    output_error,
)
from llava_edge.convert.verification.quantized.quantized_form import QuantizedForm
from llava_edge.convert.verification.quantized.reference_rounding import (
    Grid,
    nearest_scales,
    rounded,
)
from llava_edge.convert.verification.reference.input_sketch import InputSketch
from llava_edge.convert.verification.reference.probes import probes_for
from llava_edge.convert.verification.runner.losses import Losses
from llava_edge.convert.verification.verifier import open_reference
from llava_edge.convert.verification.weights.quantized_layers import SolvedLayers
from llava_edge.runtime.artifact.certificate import StageResult
from llava_edge.runtime.artifact.manifest import Precision
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.verification.tolerances import bounds_for
from tests.faults.models.fault_models import Made, Model
from tests.faults.print_bounds import furthest, table
from tests.faults.seeded.model import faults_solver
from tests.faults.seeded.model.faults_quantizer import WEIGHTS, Change

_SOLVED = {"vision": "fp16", "changes": {"layers": 2}, "quantizer": "gptq"}
MODELS: Mapping[str, Model] = {
    "int4": Model("mistral", precision="int4", **_SOLVED),  # type: ignore[arg-type]
    "int8": Model("qwen2", precision="int8", **_SOLVED),  # type: ignore[arg-type]
    "int8 nbits": Model("llama", precision="int8", int8_isa="none", **_SOLVED),  # type: ignore[arg-type]
    "int4 cuda": Model("mistral", precision="int4", board="a100", **_SOLVED),  # type: ignore[arg-type]
}

Solved = tuple[Made, Artifact, InputSketch]


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Solved]:
    """``solved(name)``: one of ``MODELS`` converted, and what its reference's layers read."""

    @cache
    def make(name: str) -> Solved:
        made = Made(tmp_path_factory.mktemp("solved"), MODELS[name])
        artifact = open_artifact(made.artifact, verify_digests=False)
        reference = open_reference(artifact, made.checkpoint)
        for probe in probes_for(artifact.manifest, "quick"):
            reference.answer(probe, remember=True)
        return made, artifact, reference.sketch

    return make


SPOILED: Mapping[str, tuple[str, Change, str]] = {
    **WEIGHTS,
    **faults_solver.WEIGHTS,
    **faults_solver.WEIGHTS_OF_INT8,
}
OF_GROUPS = ("one scale a row", "groups shifted")
"""Need several scales a row, which int8 on a CPU has not."""


def stage(solved: Solved) -> list[StageResult]:
    made, artifact, sketch = solved
    manifest = artifact.manifest
    bounds = bounds_for(manifest.target, manifest.precision)
    return SolvedLayers(artifact, made.checkpoint, sketch).stage(bounds)


def failed(rows: list[StageResult]) -> list[str]:
    return [row.metric for row in rows if row.verdict != "pass"]


@pytest.mark.parametrize(
    "name",
    [
        "int4",
        "int8",
        *(pytest.param(n, marks=pytest.mark.nightly) for n in ("int8 nbits", "int4 cuda")),
    ],
)
def test_sound_layers_are_better_than_rounding(solved: Callable[[str], Solved], name: str) -> None:
    rows = stage(solved(name))

    assert not failed(rows)
    values = {row.metric: row.value for row in rows}
    assert 0.01 < (values["output_error"] or 0.0) < 0.4
    assert {row.question for row in rows} == {"loss"}


def spoiled(change: Change, only: str, codes: GraphCodes, name: str) -> GraphCodes:
    """Codes of a graph as a quantiser at fault would have handed them on."""
    if only not in name or name == "lm_head":
        return codes
    scales = codes.scales
    if bool((scales == scales[:, :1]).all()):
        scales = scales[:, :1]
    weight = QuantizedWeight(
        codes.codes, scales.astype(np.float16), codes.bits, codes.block_size, QuantizationReport()
    )
    wrong = change(weight, np.random.default_rng(len(name)))
    same = wrong.scales.repeat(codes.scales.shape[1] // wrong.scales.shape[1], axis=1)
    return replace(codes, codes=wrong.qweight, scales=same)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        (name, model)
        for name in SPOILED
        for model in ("int4", "int8")
        if name not in (OF_GROUPS if model == "int8" else faults_solver.WEIGHTS_OF_INT8)
    ],
)
def test_spoiled_codes_are_found_by_what_they_do(
    solved: Callable[[str], Solved], monkeypatch: pytest.MonkeyPatch, name: str, model: str
) -> None:
    _, change, only = SPOILED[name]
    made = solved(model)
    real = GraphWeights.codes

    def codes(self: GraphWeights, layer: str, rows: slice | None = None) -> GraphCodes | None:
        found = real(self, layer, rows)
        return None if found is None else spoiled(change, only, found, layer)

    monkeypatch.setattr(GraphWeights, "codes", codes)

    rows = stage(made)

    assert failed(rows)
    (worst,) = (row for row in rows if row.metric == "output_error_of_row")
    assert only in worst.detail


def test_a_layer_that_is_recorded_as_rounded_is_not_judged_by_its_output(
    solved: Callable[[str], Solved],
) -> None:
    made, artifact, sketch = solved("int4")
    conversion = {**artifact.manifest.conversion, "quantizer": "rtn"}
    manifest = replace(artifact.manifest, conversion=conversion)

    layers = SolvedLayers(replace(artifact, manifest=manifest), made.checkpoint, sketch)

    assert layers.names == ()
    assert layers.stage(bounds_for(manifest.target, manifest.precision)) == []


@pytest.mark.parametrize(
    "conversion",
    [
        {},
        {"layers": "none", "settings": [], "group_size": "all"},
        {"layers": [{"layer": 0, "linears": {"mlp.up_proj": 3}}]},
        {"layers": [7, {"layer": 0}, {"layer": 1, "linears": []}]},
    ],
)
def test_records_that_are_missing_or_malformed_loosen_nothing(
    solved: Callable[[str], Solved], conversion: dict[str, Any]
) -> None:
    _, artifact, _ = solved("int4")

    form = QuantizedForm.of(replace(artifact.manifest, conversion=conversion))

    assert not form.is_rounded("language_model.layers.0.mlp.up_proj")
    assert form.is_rounded("lm_head")
    assert not form.reduces_range
    assert not form.dead_columns
    assert not form.kept_rows


def drawn_layer(seed: int = 0) -> tuple[torch.Tensor, list[KindInputs]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(64, 128, generator=generator)
    inputs = KindInputs(rows / 8, rows.double().square().mean(0))
    return torch.randn(48, 128, generator=generator), [inputs]


def error_of(
    weight: torch.Tensor, shipped: torch.Tensor, inputs: list[KindInputs], step: int = 48
) -> tuple[float, float, int]:
    grid = Grid(4, 64)
    scales = nearest_scales(weight, grid)
    parts = [
        WeightRows(weight[rows], shipped[rows], scales[rows], scales[rows])
        for rows in (slice(first, first + step) for first in range(0, len(weight), step))
    ]
    found = output_error(parts, grid, inputs)
    return found.layer, found.output, found.worst


def test_rounding_itself_is_as_good_as_rounding_however_rows_are_cut() -> None:
    weight, inputs = drawn_layer()
    grid = Grid(4, 64)
    shipped = rounded(weight, nearest_scales(weight, grid), grid)

    whole, by_seven = (error_of(weight, shipped, inputs, step) for step in (48, 7))

    assert 0.5 < whole[0] <= 1.0
    assert whole[1] <= 1.0
    assert whole == pytest.approx(by_seven)


def test_nothing_lost_is_nothing_even_where_nothing_is_read() -> None:
    weight, inputs = drawn_layer()
    silent = [KindInputs(inputs[0].sums * 0, inputs[0].squares * 0)]

    assert error_of(weight, weight, inputs)[:2] == (0.0, 0.0)
    assert error_of(weight, weight + 1, silent)[:2] == (0.0, 0.0)


def test_a_number_that_is_none_is_worse_than_any() -> None:
    weight, inputs = drawn_layer()
    shipped = weight.clone()
    shipped[17, 3] = torch.nan

    layer, output, worst = error_of(weight, shipped, inputs)

    assert layer != layer
    assert output != output
    assert worst == 17


def test_the_better_kind_of_input_counts() -> None:
    """Samples of one kind leave the other to luck; what is wrong is wrong for both."""
    weight, inputs = drawn_layer()
    half = [
        KindInputs(inputs[0].sums * mask, inputs[0].squares * mask)
        for mask in (torch.arange(128) < 64, torch.arange(128) >= 64)
    ]
    one_sided, wrong = weight.clone(), weight.clone()
    one_sided[:, :64] += 1
    wrong += 1

    assert error_of(weight, one_sided, half)[0] < 1e-9
    assert error_of(weight, wrong, half)[0] > 10


def test_inputs_are_kept_of_the_checkpoints_own_layers_for_both_kinds(
    solved: Callable[[str], Solved],
) -> None:
    made, _, sketch = solved("int4")

    for linear in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"language_model.layers.1.{linear}"
        kinds = sketch.load(name)
        assert len(kinds) == 2
        for kind in kinds:
            assert kind.sums.shape[1] == made.checkpoint.tensors[f"{name}.weight"].shape[1]
            # Sums of random signs are as large as the tokens themselves, on average.
            ratio = float(kind.sums.double().square().sum() / kind.squares.sum())
            assert 0.5 < ratio < 2.0


def test_the_folder_of_sketches_goes_with_them() -> None:
    sketch = InputSketch()
    path: Path = sketch.path
    assert path.is_dir()

    del sketch

    assert not path.exists()


def test_the_table_of_bounds_has_a_gap_between_sound_models_and_the_smallest_fault() -> None:
    small = StageResult("quantized_layers", "output_error", 3.5, 1.5, "fail", "loss")
    large = replace(small, value=24.0)
    other = StageResult("quantized_layers", "output_error_of_row", 5.5, 5.0, "fail", "loss")
    passed = replace(other, verdict="pass", value=400.0)

    assert furthest([other, small, passed]) is small
    assert furthest([passed]) is None
    (_, _, line) = table([("noise", large), ("little noise", small)])
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["quantized_layers", "output_error"]
    assert float(cells[2]) < float(cells[3]) < float(cells[4]) == 3.5
    assert cells[5:] == ["little noise", "2"]


def test_a_loss_may_be_so_many_times_that_of_rounding_on_the_same_probe() -> None:
    precision = Precision("int4", "int8", "fp16", "fp16", "float32")
    bounds = bounds_for("cpu", precision)
    times = bounds.value("quantization_loss", "kl_divergence_over_rounding")
    beside = bounds.value("quantization_loss", "kl_divergence")
    rounding = {"text": Losses(0.1, 0.2, -0.3), "grid": Losses(1.0, 0.4, 0.9)}

    def rows(**losses: Losses) -> dict[str, StageResult]:
        found = Losses.rows_over_rounding(losses, rounding, "quantization_loss", bounds)
        return {row.metric: row for row in found}

    limit = times * 0.1 + beside
    good = rows(text=Losses(0.99 * limit, 0.2, 0.3), grid=Losses(1.0, 0.4, 0.9))
    assert {row.verdict for row in good.values()} == {"pass"}
    assert good["kl_divergence"].bound == pytest.approx(limit)
    assert "text, where rounding to nearest costs 0.1" in good["kl_divergence"].detail
    # The other probe may cost more than this one, and does not excuse it.
    bad = rows(text=Losses(1.01 * limit, 0.2, 0.3), grid=Losses(1.0, 0.4, 0.9))
    assert bad["kl_divergence"].verdict == "fail"
    assert rows(text=Losses(float("nan"), 0.2, 0.3))["kl_divergence"].verdict == "fail"
    assert rows(other=Losses(0.0, 0.0, 0.0)) == {}
