"""The stage "weights": does the artifact hold the checkpoint's weights, tensor by tensor?

    differing_tensors      floats of both graphs and of the embeddings, bit for bit
    differing_codes        codes and scales, by the digest of what was written; where a GPTQ
                           checkpoint was converted, by its own values; where a layer is rounded to
                           nearest (the head, an int8 tower, all of ``rtn``), by the verifier's own
                           rounding

What GPTQ solved has no one right answer: the stage "quantized_layers" looks at it.

One linear layer is in memory at a time, beside blocks of the checkpoint's rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from llava_edge.convert.checkpoint.files import WEIGHT_DIGESTS
from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.quantized.digested_source import weight_digest
from llava_edge.convert.onnx.graph_file import GraphFile
from llava_edge.convert.quantization.vision.int8 import packed_name, scale_digest
from llava_edge.convert.util.safetensors_io import read_header, read_tensor
from llava_edge.convert.verification.quantized.graph_weights import (
    GraphCodes,
    GraphWeights,
    row_blocks,
)
from llava_edge.convert.verification.quantized.quantized_form import QuantizedForm, held_scales
from llava_edge.convert.verification.quantized.reference_rounding import (
    Disagreement,
    Grid,
    disagreement,
)
from llava_edge.convert.verification.quantized.vanished_columns import VanishedColumns
from llava_edge.convert.verification.reference.gptq_values import GptqValues
from llava_edge.convert.verification.weights.tensor_mapping import (
    GPTQ_ENDS,
    NEWLINE,
    TABLE,
    linear_layers,
    needed_tensors,
    origin_of,
    unused,
)
from llava_edge.convert.verification.weights.vision_weights import VisionWeights, is_power_of_two
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.certificate import StageResult, exact
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.generation.inputs.embedding_table import EMBED_TOKENS, IMAGE_NEWLINE
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import Progress

STAGE = "weights"


_SMALL = 64
"""Constants of this many elements or fewer are settings, which the structure stage looks at."""
_ATTENTION = "GroupQueryAttention"


def weights_stage(
    artifact: Artifact, checkpoint: Checkpoint, progress: Progress | None = None
) -> list[StageResult]:
    """Compare every weight of an artifact with its checkpoint.

    Args:
        artifact: the one to judge.
        checkpoint: what it was made from.
        progress: told how many bytes of the artifact are done, and of how many.

    Returns:
        One row for floats; where layers are quantised, one for their codes.
    """
    return _Comparison(artifact, checkpoint, progress).rows()


class _Comparison:
    def __init__(
        self, artifact: Artifact, checkpoint: Checkpoint, progress: Progress | None
    ) -> None:
        self._artifact = artifact
        self._checkpoint = checkpoint
        self._progress = progress
        self._weights = GraphWeights.open(artifact)
        vision = artifact.path(artifact.manifest.vision.file)
        self._graphs = [GraphFile(vision, "vision"), self._weights.graph]
        self._vision: VisionWeights | None = None
        if artifact.manifest.precision.vision_tower == "int8":
            self._vision = VisionWeights(self._graphs[0], checkpoint)
        self._embeddings = read_header(artifact.path(artifact.manifest.embeddings))
        self._total = sum(ref.nbytes for ref in self._embeddings.values()) + sum(
            graph.nbytes(name) for graph in self._graphs for name in graph.initializers
        )
        self._done = 0
        self._used: set[str] = set()
        self._num_tensors = 0
        self._num_layers = 0
        self._faults: list[str] = []
        self._code_faults: list[str] = []
        self._form = QuantizedForm.of(artifact.manifest)

    def rows(self) -> list[StageResult]:
        codes = {"decoder": self._quantized(), "vision": self._quantized_vision()}
        for graph in self._graphs:
            for name in graph.initializers:
                if name not in codes[graph.label]:
                    self._float_tensor(graph, name)
        self._embedding_file()
        missing = unused(needed_tensors(self._checkpoint), self._used)
        self._faults += [f"{name} of the checkpoint is nowhere in the artifact" for name in missing]
        rows = [
            exact(STAGE, "differing_tensors", self._faults, f"{self._num_tensors} float tensors")
        ]
        if any(codes.values()):
            rows.append(exact(STAGE, "differing_codes", self._code_faults, self._codes_seen()))
        return rows

    def _codes_seen(self) -> str:
        layers = self._num_layers
        recorded = self._artifact.manifest.conversion.get(WEIGHT_DIGESTS)
        if recorded:
            return f"{layers} quantised weights by their digests"
        return f"{layers} quantised weights; the manifest has no digests of them"

    def _quantized(self) -> set[str]:
        """Compare all layers that hold codes; returns the initializers that they are made of."""
        found: set[str] = set()
        graph = self._weights.graph
        for name in linear_layers(self._checkpoint):
            try:
                codes = self._weights.codes(name)
            except ArtifactError as error:
                self._faults.append(f"decoder: {error}")
                continue
            if codes is None:
                continue
            tensors = self._weights.tensors(name)
            for tensor in tensors - found:
                self._step(graph.nbytes(tensor))
            found |= tensors
            self._num_layers += 1
            self._use_layer(name)
            self._codes(name, codes, self._weights.input_scale(name))
        return found

    def _quantized_vision(self) -> set[str]:
        """The same for the tower and the projector, whose weights may be scaled by column."""
        found: set[str] = set()
        if self._vision is None:
            return found
        facts = self._artifact.manifest.conversion.get("vision")
        stated = facts if isinstance(facts, dict) else {}
        recorded, counts = stated.get("scales_sha256"), stated.get("scaled_inputs") or {}
        if not isinstance(recorded, dict):
            self._code_faults.append("vision: the manifest has no digests of its scales")
            recorded = {}
        for name in self._vision.layers():
            tensors = self._vision.tensors(name)
            for tensor in tensors - found:
                self._step(self._vision.graph.nbytes(tensor))
            found |= tensors
            self._num_layers += 1
            self._use_layer(name)
            scale = self._vision.scale(name)
            if packed_name(name) == name:
                self._scale(name, scale, recorded.get(name))
                divided = 0 if scale is None else int(np.count_nonzero(scale != 1))
                if divided != counts.get(name, 0):
                    self._code_faults.append(
                        f"{name}: {divided} channels of its input are divided; manifest.json says "
                        f"{counts.get(name, 0)}"
                    )
            codes = self._vision.codes(name)
            assert codes is not None
            self._codes(name, codes, scale, "vision")
        return found

    def _scale(self, name: str, scale: Array | None, recorded: object) -> None:
        if scale is not None and not is_power_of_two(scale):
            self._code_faults.append(f"{name}: its input is divided by no powers of two")
        have = None if scale is None else scale_digest(scale)
        if have != recorded:
            self._code_faults.append(
                f"{name}: what its input is divided by is not what the manifest says"
            )

    def _use_layer(self, name: str) -> None:
        self._used |= {f"{name}{end}" for end in (".weight", *GPTQ_ENDS)}

    def _codes(
        self, name: str, codes: GraphCodes, scale: Array | None = None, label: str = "decoder"
    ) -> None:
        if not codes.has_default_zero:
            self._code_faults.append(f"{name}: zero points other than {2 ** (codes.bits - 1)}")
        recorded = self._artifact.manifest.conversion.get(WEIGHT_DIGESTS) or {}
        if recorded:
            fault = _digest_fault(codes, recorded.get(name))
            self._code_faults += [f"{name}: {fault}"] * (fault is not None)
        if f"{name}.qweight" in self._checkpoint.tensors:
            self._gptq(name, codes)
            return
        shape = self._checkpoint.tensors[f"{name}.weight"].shape
        if codes.codes.shape != shape:
            self._code_faults.append(f"{name}: {codes.codes.shape} codes for a weight of {shape}")
            return
        if label == "vision" or self._form.is_rounded(name):
            self._rounded(name, codes, scale, label)
        else:
            self._solved(name, codes, scale)

    def _rounded(self, name: str, codes: GraphCodes, scale: Array | None, label: str) -> None:
        """Every code and scale must be those of rounding the checkpoint's weight to nearest."""
        total = Disagreement(0, 0)
        num_columns = codes.codes.shape[1]
        # The tower has one scale an output, and its float form holds fp16 numbers.
        in_tower = label == "vision"
        grid = Grid(codes.bits, num_columns) if in_tower else self._form.grid(codes, name)
        for rows in row_blocks(*codes.codes.shape):
            original = self._checkpoint.read(f"{name}.weight", rows)
            original = as_half(original) if in_tower else original
            original = original.astype(np.float32)
            # Codes stand for the weight times what its input is divided by.
            original = original if scale is None else original * scale
            part = codes.cut(rows)
            total += disagreement(
                torch.from_numpy(original),
                torch.from_numpy(part.codes.astype(np.int16) - (1 << (codes.bits - 1))),
                torch.from_numpy(held_scales(part, grid).astype(np.float32)),
                grid,
            )
        if total.codes or total.scales:
            self._code_faults.append(
                f"{name}: {total.codes} of {codes.codes.size} codes and {total.scales} scales are "
                "not those of rounding to nearest"
            )

    def _solved(self, name: str, codes: GraphCodes, scale: Array | None) -> None:
        vanished = VanishedColumns(codes)
        for rows in row_blocks(*codes.codes.shape):
            original = self._checkpoint.read(f"{name}.weight", rows).astype(np.float32)
            vanished.add(rows, original if scale is None else original * scale)
        num_dead = self._form.dead_columns.get(name, 0)
        if vanished.count() > num_dead:
            self._code_faults.append(
                f"{name}: {vanished.count()} columns are zero and the checkpoint's are not; "
                f"recorded as never met in calibration are {num_dead}"
            )

    def _gptq(self, name: str, codes: GraphCodes) -> None:
        values = GptqValues(self._checkpoint, name)
        if values.num_rows != len(codes.codes):
            self._code_faults.append(
                f"{name}: {len(codes.codes)} outputs; the GPTQ checkpoint has {values.num_rows}"
            )
            return
        differing = 0
        for rows in row_blocks(*codes.codes.shape):
            theirs = values.rows(rows.start, rows.stop)
            differing += int(np.count_nonzero(codes.cut(rows).dequantize() != theirs))
        if differing:
            self._code_faults.append(
                f"{name}: {differing} of {codes.codes.size} values are not the GPTQ checkpoint's"
            )

    def _float_tensor(self, graph: GraphFile, name: str) -> None:
        self._step(graph.nbytes(name))
        origin = origin_of(name, self._checkpoint)
        if origin is None:
            users = {node.op_type for node in graph.consumers(name)}
            # Rotary tables and small settings are none of the checkpoint's tensors.
            if users and _ATTENTION not in users and math.prod(graph.shape(name)) > _SMALL:
                self._faults.append(f"{graph.label}, {name}: the checkpoint has no such tensor")
            return
        self._num_tensors += 1
        self._used |= set(origin.names)
        values = graph.read(name)
        if graph.label == "vision" and self._vision is not None:
            divided = self._vision.norm_scale(name)
            if divided is not None:
                values = values * divided
        refs = [self._checkpoint.tensors[part] for part in origin.names]
        flat = [(ref.shape[0], math.prod(ref.shape[1:])) for ref in refs]
        rows, inner = sum(count for count, _ in flat), flat[0][1]
        shape = (inner, rows) if origin.is_turned else (rows, inner)
        # Vectors lie flat or with axes of length 1; a matrix must have just these sides.
        if tuple(side for side in values.shape if side > 1) != tuple(s for s in shape if s > 1):
            self._faults.append(
                f"{graph.label}, {name}: its shape is {values.shape}, must be {shape}"
            )
            return
        values = values.reshape(shape)
        first = 0
        for part, (count, _) in zip(origin.names, flat, strict=True):
            held = values[:, first : first + count] if origin.is_turned else values[first:][:count]
            self._compare(f"{graph.label}, {name}", part, held, origin.is_turned)
            first += count

    def _compare(self, where: str, part: str, held: Array, is_turned: bool) -> None:
        """Note whether values [N, K] (or [K, N]) are those of a checkpoint's tensor in fp16."""
        ref = self._checkpoint.tensors[part]
        inner = math.prod(ref.shape[1:])
        differing, first = 0, ""
        for rows in row_blocks(ref.shape[0], inner):
            original = self._checkpoint.read(part, rows)
            wanted = as_half(original).reshape(-1, inner)
            have = held[:, rows] if is_turned else held[rows]
            if is_turned:
                wanted = torch.from_numpy(wanted).t().contiguous().numpy()
            other = _bits(have) != _bits(wanted.astype(held.dtype, copy=False))
            count = int(np.count_nonzero(other))
            if count and not differing:
                place = tuple(int(index) for index in np.argwhere(other)[0])
                first = f"{have[place]} for {wanted[place]}"
            differing += count
        if differing:
            total = ref.shape[0] * inner
            what = "" if where.endswith(part) else f" ({part})"
            self._faults.append(
                f"{where}{what}: {differing} of {total} values differ from the checkpoint's, the "
                f"first is {first}"
            )

    def _embedding_file(self) -> None:
        label = self._artifact.manifest.embeddings
        wanted = {EMBED_TOKENS: TABLE}
        if NEWLINE in self._checkpoint.tensors:
            wanted[IMAGE_NEWLINE] = NEWLINE
        for name in sorted(set(self._embeddings) ^ set(wanted)):
            found = "is there" if name in self._embeddings else "is missing"
            self._faults.append(f"{label}, {name}: it {found}; the checkpoint says otherwise")
        for name, part in wanted.items():
            if name not in self._embeddings:
                continue
            held, ref = self._embeddings[name], self._checkpoint.tensors[part]
            self._used.add(part)
            self._num_tensors += 1
            if held.shape != ref.shape:
                self._faults.append(
                    f"{label}, {name}: its shape is {held.shape}, must be {ref.shape}"
                )
                continue
            differing: list[int] = []
            for rows in row_blocks(ref.shape[0], math.prod(ref.shape[1:])):
                have = read_tensor(held, rows)
                wanted_half = as_half(self._checkpoint.read(part, rows)).astype(have.dtype)
                other = (_bits(have) != _bits(wanted_half)).reshape(len(have), -1).any(axis=1)
                differing += [rows.start + int(row) for row in np.flatnonzero(other)]
            self._step(held.nbytes)
            if differing:
                what = "rows" if len(ref.shape) > 1 else "values"
                self._faults.append(
                    f"{label}, {name}: {len(differing)} of {ref.shape[0]} {what} differ from the "
                    f"checkpoint's, the first is {differing[0]}"
                )

    def _step(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress("weights", self._done, self._total)


def as_half(values: Array) -> NDArray[np.float16]:
    """Round to float16, halves to even; what is too large becomes infinite and differs."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16, copy=False)


def _digest_fault(codes: GraphCodes, recorded: object) -> str | None:
    """Why codes are not those of a recorded digest; None where they are."""
    if not isinstance(recorded, str):
        return "the manifest has no digest of it"
    scales = codes.scales
    # One scale of a row or of a group, which an operator with smaller blocks holds repeated.
    candidates = [scales, *_merged(scales)]
    try:
        if any(weight_digest(codes.codes, scale) == recorded for scale in candidates):
            return None
    except ValueError as error:
        return str(error)
    return "codes or scales are not those that were written"


def _merged(scales: Array) -> Iterator[Array]:
    """Scales [N, blocks] with one for several neighbouring blocks, wherever these are equal."""
    for count in (2, 4, scales.shape[1]):
        if scales.shape[1] % count == 0:
            grouped = scales.reshape(len(scales), -1, count)
            if bool((grouped == grouped[:, :, :1]).all()):
                yield grouped[:, :, 0]


def _bits(values: Array) -> Array:
    """Numbers by their bits: -0 is not 0, and a NaN is itself."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
