"""The tower and projector at 8 bits, with those layers in float that calibration tiles ask for.

Every linear layer behind the patch embedding takes the integer route of the decoder: signed codes,
one scale an output, one scale a row of activations. The graph is then run on calibration tiles.
Where its features leave their bound, layers go back to float, the one that costs most first: its
output error as a share of the stream that it adds to. As many as are needed go, found by halving.

The patch embedding reads pixels once and stays in float, as do norms, biases and attention itself.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_edge.convert.checkpoint.formats.rounding import (
    PER_CHANNEL,
    QuantizedWeight,
    round_to_nearest,
)
from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.quantized.digested_source import DigestedSource
from llava_edge.convert.checkpoint.weights import as_float16
from llava_edge.convert.onnx.builder import GraphBuilder
from llava_edge.convert.onnx.graph_part import GraphPart
from llava_edge.convert.onnx.linear import QuantizedLayers, QuantizedLinear
from llava_edge.convert.onnx.vision import build_vision_graph
from llava_edge.convert.quantization.vision.activations import Additions, Piece, VisionTrace
from llava_edge.convert.quantization.vision.smoothquant import (
    AT_A_COST,
    FREE,
    ScaledLayer,
    scale_inputs,
)
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.artifact.manifest import GraphSpec
from llava_edge.runtime.backends.cpu_isa import sums_saturate
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import Progress
from llava_edge.runtime.verification.cosine import TileCosine
from llava_edge.runtime.verification.tolerances import VISION_INT8, bound_value
from llava_edge.runtime.vision.encoder import VisionEncoder

_LOG = logging.getLogger(__name__)

_ROWS_PER_TILE = 32
_MARGIN = 0.5
"""Share of the bound that calibration tiles may take: other images come later."""
_NORMS = {".self_attn.q_proj": ".layer_norm1", ".mlp.fc1": ".layer_norm2"}
"""Layers that read a layer norm alone, by how their names end."""

Save = Callable[[GraphBuilder], GraphSpec]


@dataclass(frozen=True)
class Int8Vision:
    """Which layers hold codes, and what their inputs are divided by.

    Attributes:
        scales: float32 [K] by layer; layers that need none are left out.
        float_layers: layers left in fp16; packed ones by the name of the first.
    """

    scales: Mapping[str, Array]
    float_layers: frozenset[str] = frozenset()

    def graph(self, checkpoint: Checkpoint) -> tuple[GraphBuilder, DigestedSource]:
        """The graph, and the source whose digests are complete once it is saved."""
        used = {n: scale for n, scale in self.scales.items() if n not in self.float_layers}
        codes = DigestedSource(_VisionCodes(checkpoint, used))
        norms, inputs = {}, {}
        for name, scale in used.items():
            norm = norm_of(name)
            if norm is None:
                inputs[name] = scale
            else:
                norms[norm] = scale
        layers = QuantizedLayers(
            codes,
            head=_no_head,
            int8_route="integer",
            float_layers=self.float_layers,
            input_scales=inputs,
        )
        linears = QuantizedLinear(checkpoint, layers)
        return build_vision_graph(checkpoint.dims, checkpoint, np.float32, linears, norms), codes


def norm_of(name: str) -> str | None:
    """The layer norm whose output a layer alone reads; None where there is none."""
    for end, norm in _NORMS.items():
        if name.endswith(end):
            return name.removesuffix(end) + norm
    return None


@dataclass(frozen=True)
class _VisionCodes:
    """Tower and projector rounded to nearest at 8 bits, columns multiplied by their scale first."""

    checkpoint: Checkpoint
    scales: Mapping[str, Array]
    bits: int = 8
    group_size: int = PER_CHANNEL

    def linear(self, name: str) -> QuantizedWeight:
        weight = stored_weight(self.checkpoint, name)
        scale = self.scales.get(packed_name(name))
        if scale is not None:
            weight *= torch.from_numpy(scale)
        return round_to_nearest(weight, bits=8, group_size=PER_CHANNEL, name=f"tensor {name}")


def packed_name(name: str) -> str:
    """The layer that a query, key or value projection of the tower is packed into."""
    for part in ("k_proj", "v_proj"):
        name = name.replace(f".self_attn.{part}", ".self_attn.q_proj")
    return name


def stored_weight(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A weight as the float graph holds it: fp16 values, as float32 [N, K]."""
    half = as_float16(f"{name}.weight", checkpoint.read(f"{name}.weight"))
    return torch.from_numpy(half.astype(np.float32))


def _no_head() -> QuantizedWeight:
    raise AssertionError("the tower has no head")


class Int8Calibration:
    """What calibration tiles say of each linear layer.

    Args:
        checkpoint: the model.
        trace: of the float graph, over the tiles.

    Attributes:
        layers: by name, in the graph's order.
        shares: estimated error that a layer adds, as a share of the stream behind it.
        features: of the float graph, float32 [tiles, patches, hidden].
    """

    def __init__(self, checkpoint: Checkpoint, trace: VisionTrace, report: Progress) -> None:
        self.layers: dict[str, ScaledLayer] = {}
        self.shares: dict[str, float] = {}
        self._checkpoint = checkpoint
        self._trace = trace
        pieces = trace.pieces()
        seen: _Seen | None = None
        for piece, _, values in trace.walk(self._ask):
            if seen is None or seen.piece.name != piece.name:
                self._judge(seen)
                seen = _Seen(piece, trace)
                report("look at tiles", [p.name for p in pieces].index(piece.name), len(pieces))
            seen.add(values)
        self._judge(seen)
        self.features = trace.features

    def _ask(self, piece: Piece) -> Additions:
        wanted: list[str] = []
        for name, node in self._trace.linears(piece).items():
            wanted.append(node.input[0])
            wanted += _branch_and_sum(self._trace, name)
        return Additions(wanted)

    def _judge(self, seen: _Seen | None) -> None:
        if seen is None:
            return
        for name, rows in seen.rows.items():
            names = [name]
            if name.endswith(".q_proj"):
                names = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
            weight = torch.cat([stored_weight(self._checkpoint, each) for each in names])
            worthwhile = AT_A_COST if norm_of(name) is None else FREE
            found = scale_inputs(
                np.concatenate(rows), seen.largest[name], weight.numpy(), worthwhile
            )
            self.layers[name] = found
            self.shares[name] = found.error * seen.share(name)


class _Seen:
    """Sums over the tiles of one piece."""

    def __init__(self, piece: Piece, trace: VisionTrace) -> None:
        self.piece = piece
        self._inputs = {name: node.input[0] for name, node in trace.linears(piece).items()}
        self._ends = {name: _branch_and_sum(trace, name) for name in self._inputs}
        self.rows: dict[str, list[Array]] = {name: [] for name in self._inputs}
        self.largest: dict[str, Array] = {}
        self._squares: dict[str, float] = {}

    def add(self, values: Mapping[str, Array]) -> None:
        for name, value in self._inputs.items():
            rows = values[value].reshape(-1, values[value].shape[-1])
            step = max(1, len(rows) // _ROWS_PER_TILE)
            self.rows[name].append(rows[::step][:_ROWS_PER_TILE].copy())
            most = np.abs(rows).max(0)
            self.largest[name] = np.maximum(self.largest.get(name, most), most)
        for value in {end for ends in self._ends.values() for end in ends}:
            square = float(np.square(values[value], dtype=np.float64).sum())
            self._squares[value] = self._squares.get(value, 0.0) + square

    def share(self, name: str) -> float:
        """Size of the branch that a layer belongs to, over the stream that it is added to."""
        ends = self._ends[name]
        if not ends:
            return 1.0
        branch, total = (self._squares[end] for end in ends)
        return float(np.sqrt(branch / total)) if total else 1.0


def _branch_and_sum(trace: VisionTrace, name: str) -> tuple[str, ...]:
    """Output of a layer's branch and the residual sum behind it; empty for the projector."""
    last = {"self_attn.q_proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc2"}
    for first, second in last.items():
        name = name.replace(first, second)
    if not name.endswith(("out_proj", "fc2")):
        return ()
    branch = trace.view.linear(name)
    return branch, str(trace.view.consumers(branch)[0].output[0])


def write_int8_vision(
    checkpoint: Checkpoint,
    calibration: Int8Calibration,
    pixel_values: Array,
    folder: Path,
    save: Save,
) -> GraphPart:
    """Write the graph with layers in float until the features keep their bound.

    From the layer that is thought to cost most downwards, so where an estimate is wrong there may
    be more of them than are needed.

    Args:
        checkpoint: the model.
        calibration: what was seen on the tiles.
        pixel_values: the tiles, float32 [tiles, 3, T, T].
        folder: where ``save`` puts the graph's own folder ``vision``.
        save: writes a graph.

    Returns:
        The last graph; its facts are layers in float and why, what they cost, how near the features
        are, digests.
    """
    scales = {n: layer.scale for n, layer in calibration.layers.items() if layer.scale is not None}
    order = sorted(calibration.shares, key=lambda name: -calibration.shares[name])
    tried: dict[int, TileCosine] = {}
    last: list[Any] = [None, None, -1]

    def attempt(count: int) -> bool:
        vision = Int8Vision(scales, frozenset(order[:count]))
        shutil.rmtree(folder / "vision", ignore_errors=True)
        graph, source = vision.graph(checkpoint)
        last[:] = [save(graph), source, count]
        found = _features(folder / "vision" / "model.onnx", checkpoint.dims, pixel_values)
        tried[count] = TileCosine.of(found, calibration.features)
        _LOG.info("%d layers in float: %s", count, tried[count])
        return _is_near(tried[count])

    count = _fewest(attempt, len(order))
    if last[2] != count:
        attempt(count)
    vision = Int8Vision(scales, frozenset(order[:count]))
    return GraphPart(last[0], _facts(checkpoint, calibration, vision, tried, last[1].digests))


def _fewest(works: Callable[[int], bool], most: int) -> int:
    """The smallest count that works, by doubling and halving; ``most`` where none does."""
    if works(0):
        return 0
    low, high = 0, 1
    while high < most and not works(high):
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if works(middle):
            high = middle
        else:
            low = middle
    return high


def _is_near(found: TileCosine) -> bool:
    mean = bound_value("quantization_loss", "tile_cosine_mean_loss", VISION_INT8)
    worst = bound_value("quantization_loss", "tile_cosine_worst_loss", VISION_INT8)
    return found.mean_loss <= _MARGIN * mean and found.worst_loss <= _MARGIN * worst


def _features(path: Path, dims: ModelDims, pixel_values: Array) -> Array:
    session = Session(path, SessionOptions(device="cpu", wide_sums=sums_saturate()))
    shape = (len(pixel_values), dims.vision.num_patches, dims.text.hidden_size)
    features = np.empty(shape, np.float32)
    VisionEncoder(session, dims, 1, np.float32).encode(pixel_values, features)
    return features


def _facts(
    checkpoint: Checkpoint,
    calibration: Int8Calibration,
    vision: Int8Vision,
    tried: Mapping[int, TileCosine],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    sizes = {name: _parameters(checkpoint, name) for name in calibration.layers}
    left = [name for name in calibration.layers if name in vision.float_layers]
    in_float = sum(sizes[name] for name in left)
    scales = {n: scale for n, scale in vision.scales.items() if n not in vision.float_layers}
    return {
        "precision": "int8",
        "layers_in_float": {
            name: {
                "output_error": calibration.layers[name].error,
                "share_of_the_stream": calibration.shares[name],
            }
            for name in left
        },
        "weights_in_float": in_float,
        "share_of_products_in_float": in_float / sum(sizes.values()),
        "tile_cosine_loss": {
            str(count): {"mean": found.mean_loss, "worst": found.worst_loss}
            for count, found in sorted(tried.items())
        },
        "scaled_inputs": {n: int(np.count_nonzero(scale != 1)) for n, scale in scales.items()},
        "scales_sha256": {name: scale_digest(scale) for name, scale in scales.items()},
        "weights_sha256": dict(digests),
    }


def _parameters(checkpoint: Checkpoint, name: str) -> int:
    rows, columns = checkpoint.tensors[f"{name}.weight"].shape
    return int(rows * columns * (3 if name.endswith(".q_proj") else 1))


def scale_digest(scale: Array) -> str:
    """SHA-256 of what an input is divided by, as little-endian float32 [K]."""
    return hashlib.sha256(np.ascontiguousarray(scale, "<f4").tobytes()).hexdigest()
