"""The stage "quantized_layers": is what GPTQ solved as good as rounding to nearest?

    output_error           of each layer, over that of rounding; worst layer
    output_error_of_row    of each output of each layer; worst of all
    output_error_spread    worst layer over the median layer: one that is spoiled stands out
    step_ratio             median scale of a layer over that of rounding, or its inverse: a range
                           that is not used; worst layer
    step_ratio_of_median   the same of the median layer: groups that are not there
    mean_shift_steps       codes that count from another zero, or are cut off
    unmoved_codes          share of codes that are the nearest to their weights, less rows that are
                           recorded as kept so: nothing made up for anything; worst layer
    unexplained_error_of_median    errors that no other column explains, over those of rounding;
                           median layer
    scale_shift_of_median  scales that were changed once codes were found, as a share; median layer

All against the checkpoint's weights, on what the reference's own layers read (``input_sketch``),
by the verifier's own rounding (``reference_rounding``). Layers that must be exactly rounding to
nearest, and those of a GPTQ checkpoint, are compared code by code in the stage "weights" instead.

``RoundedWeights`` then lets the reference compute with that rounding: what it costs an answer is
what the artifact's own loss is measured by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.verification.quantized.graph_weights import (
    GraphCodes,
    GraphWeights,
    row_blocks,
)
from llava_edge.convert.verification.quantized.output_error import (
    OutputError,
    WeightRows,
    output_error,
)
from llava_edge.convert.verification.quantized.quantized_form import QuantizedForm, held_scales
from llava_edge.convert.verification.quantized.reference_rounding import (
    Grid,
    nearest_scales,
    rounded,
)
from llava_edge.convert.verification.reference.input_sketch import InputSketch
from llava_edge.convert.verification.reference.streamed_model import LinearSupply
from llava_edge.convert.verification.weights.tensor_mapping import linear_layers
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.certificate import StageResult, bounded
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.verification.tolerances import Bounds

STAGE = "quantized_layers"
_SMALL = 0.05
"""Median error over that of rounding, below which layers are not told apart."""


class SolvedLayers:
    """The layers of an artifact that are neither rounding to nearest nor stored as they came.

    Args:
        artifact: the one to judge.
        checkpoint: what it was made from.
        sketch: of what the reference's layers read; scales of rounding are kept in its folder, so
            that they are searched for once.
    """

    def __init__(self, artifact: Artifact, checkpoint: Checkpoint, sketch: InputSketch) -> None:
        self._artifact = artifact
        self._checkpoint = checkpoint
        self._sketch = sketch
        self._form = QuantizedForm.of(artifact.manifest)
        self._grids: dict[str, Grid] = {}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The layers; those that the graph does not hold are named by the stage "weights"."""
        if self._artifact.manifest.precision.language_model == "fp16":
            return ()
        return tuple(name for name in linear_layers(self._checkpoint) if self._is_solved(name))

    def stage(self, bounds: Bounds) -> list[StageResult]:
        """A row for each measure; none where there is no such layer."""
        if not self.names:
            return []
        found = {name: self.error(name) for name in self.names}
        median = float(np.median([error.layer for error in found.values()]))
        steps = float(np.median([error.step_ratio for error in found.values()]))
        unexplained = float(np.median([error.traces.unexplained for error in found.values()]))
        shift = abs(float(np.median([error.traces.center for error in found.values()])))
        measured: dict[str, Callable[[OutputError], float]] = {
            "output_error": lambda error: error.layer,
            "output_error_of_row": lambda error: error.output,
            "output_error_spread": lambda error: error.layer / max(median, _SMALL),
            "step_ratio": lambda error: error.step_ratio,
            "step_ratio_of_median": lambda _: steps,
            "mean_shift_steps": lambda error: error.shift,
            "unmoved_codes": lambda error: error.unmoved,
            "unexplained_error_of_median": lambda _: unexplained,
            "scale_shift_of_median": lambda _: shift,
        }
        rows: list[StageResult] = []
        for metric, of in measured.items():
            # NaN is worse than any number.
            value, name = max(
                ((of(error), name) for name, error in found.items()),
                key=lambda row: (row[0] != row[0], row[0]),
            )
            detail = f"worst of {len(found)} layers: {name}"
            if metric == "output_error_of_row":
                detail += f", output {found[name].worst}"
            bound = bounds.value(STAGE, metric)
            rows.append(bounded(STAGE, metric, value, bound, "loss", detail))
        return rows

    def error(self, name: str) -> OutputError:
        """One layer's errors over those of rounding to nearest."""
        codes = self._codes(name)
        grid = self._form.grid(codes, name)
        self._grids[name] = grid
        scale = self._weights.input_scale(name)
        inputs = self._sketch.load(name)
        if scale is not None:
            inputs = [each.divided(torch.from_numpy(scale)) for each in inputs]
        found = output_error(self._rows(name, codes, grid), grid, inputs)
        kept = min(1.0, self._form.kept_rows.get(name, 0) / len(codes.codes))
        unmoved = (found.traces.unmoved - kept) / (1 - kept) if kept < 1 else 0.0
        return replace(found, unmoved=unmoved)

    def rounded(self, name: str) -> NDArray[np.float32]:
        """A layer rounded to nearest by the verifier, float32 [N, K]."""
        grid = self._grids.get(name) or self._form.grid(self._codes(name), name)
        values = [
            self._nearest(name, rows, grid)
            for rows in row_blocks(*self._checkpoint.tensors[f"{name}.weight"].shape)
        ]
        found: NDArray[np.float32] = torch.cat(values).numpy()
        return found

    def _is_solved(self, name: str) -> bool:
        if f"{name}.qweight" in self._checkpoint.tensors or self._form.is_rounded(name):
            return False
        try:
            return self._weights.holds_codes(name)
        except ArtifactError:
            return False

    @cached_property
    def _weights(self) -> GraphWeights:
        return GraphWeights.open(self._artifact)

    def _codes(self, name: str) -> GraphCodes:
        codes = self._weights.codes(name)
        assert codes is not None
        return codes

    def _rows(self, name: str, codes: GraphCodes, grid: Grid) -> Iterator[WeightRows]:
        for rows in row_blocks(*codes.codes.shape):
            part, original = codes.cut(rows), self._original(name, rows)
            yield WeightRows(
                original,
                torch.from_numpy(part.dequantize()),
                self._scales(name, rows, original, grid),
                torch.from_numpy(held_scales(part, grid).astype(np.float32)),
            )

    def _original(self, name: str, rows: slice) -> torch.Tensor:
        """The checkpoint's rows, float32, times what the layer's input is divided by."""
        weight = self._checkpoint.read(f"{name}.weight", rows).astype(np.float32)
        scale = self._weights.input_scale(name)
        return torch.from_numpy(weight if scale is None else weight * scale)

    def _nearest(self, name: str, rows: slice, grid: Grid) -> torch.Tensor:
        original = self._original(name, rows)
        return rounded(original, self._scales(name, rows, original, grid), grid)

    def _scales(self, name: str, rows: slice, original: torch.Tensor, grid: Grid) -> torch.Tensor:
        path = self._sketch.path / f"scales-{name}-{rows.start}.npy"
        if path.is_file():
            return torch.from_numpy(np.load(path)).float()
        scales = nearest_scales(original, grid)
        np.save(path, scales.half().numpy())
        return scales


class RoundedWeights:
    """The artifact with its solved layers rounded to nearest instead; a ``LinearSupply``.

    Args:
        layers: that were solved.
        supply: the artifact's own weights, which say how activations are rounded.
    """

    def __init__(self, layers: SolvedLayers, supply: LinearSupply) -> None:
        self._layers = layers
        self._supply = supply
        self._names = set(layers.names)

    def holds(self, name: str) -> bool:
        """See ``LinearSupply.holds``."""
        return self._supply.holds(name)

    def linear(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """See ``LinearSupply.linear``."""
        if name not in self._names:
            return self._supply.linear(name, rows)
        return self._layers.rounded(name)[rows or slice(None)]

    def rounding(self, name: str) -> int | None:
        """See ``LinearSupply.rounding``."""
        return self._supply.rounding(name)

    def input_scale(self, name: str) -> NDArray[np.float32] | None:
        """See ``LinearSupply.input_scale``."""
        return self._supply.input_scale(name)
