"""LayerQuantizer: GPTQ on one decoder layer, its samples streamed from file to file.

hidden → input norm        → H → q, k, v          rows of hidden, some at a time
hidden → attention → inner → H → o                sample by sample
hidden + o(inner) → target
target → norm              → H → gate, up
target → gated     → inner → H → down
target + down(inner) → target
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llava_edge.convert.checkpoint.formats.rounding import (
    PER_CHANNEL,
    QuantizedWeight,
    round_to_nearest,
)
from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.quantized.source import LINEARS, linear_name
from llava_edge.convert.checkpoint.quantized.store import (
    LinearRecord,
    StoredWeight,
    linear_prefix,
    stored,
)
from llava_edge.convert.quantization.activation_file import ActivationFile
from llava_edge.convert.quantization.calibration.calibration_set import CalibrationSet
from llava_edge.convert.quantization.calibration.token_weights import (
    KINDS,
    Kinds,
    KindShares,
    spread_rows,
    token_weights,
)
from llava_edge.convert.quantization.gptq.hessian import Hessian, HessianAccumulator, plan_hessian
from llava_edge.convert.quantization.gptq.settings import QuantizeSettings
from llava_edge.convert.quantization.gptq.solver import quantize_weight
from llava_edge.convert.quantization.gptq.torch_layer import DecoderLayer, Rope
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.util.arrays import Array

_TOKENS_AT_A_TIME = 1024
_PROBES_OF_A_KIND = 256
_BLOCK_MULTIPLE = 128

Rows = Callable[[int, int], torch.Tensor]
"""Float32 inputs of a group of linear layers for tokens start to stop."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of all samples, one after another.

    Attributes:
        edges: where each sample begins, and the number of all tokens last.
        kinds: uint8 [tokens].
        weights: in the Hessians, float64 [tokens].
        probes: mask of the tokens whose errors are measured kind by kind.
    """

    edges: tuple[int, ...]
    kinds: Kinds
    weights: torch.Tensor
    probes: torch.Tensor

    @classmethod
    def of(cls, samples: CalibrationSet, shares: KindShares) -> Tokens:
        """Lay out samples and weigh their tokens."""
        kinds = np.concatenate([sample.kinds for sample in samples.samples])
        edges = np.cumsum([0, *(len(sample.kinds) for sample in samples.samples)]).tolist()
        weights = torch.from_numpy(token_weights(kinds, shares))
        probes = torch.from_numpy(spread_rows(kinds, _PROBES_OF_A_KIND))
        return cls(tuple(edges), kinds, weights, probes)

    @property
    def count(self) -> int:
        """Tokens of all samples."""
        return self.edges[-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(int(length) for length in np.diff(self.edges))

    def ranges(self) -> Iterator[tuple[int, int]]:
        """All tokens, some at a time."""
        for start in range(0, self.count, _TOKENS_AT_A_TIME):
            yield start, min(start + _TOKENS_AT_A_TIME, self.count)


class LayerQuantizer:
    """Solves layers of one checkpoint.

    Args:
        checkpoint: where weights are read from, one tensor at a time.
        settings: how.
        tokens: of the samples.
        inner: a file wide enough for what ``o_proj`` and ``down_proj`` read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: QuantizeSettings,
        tokens: Tokens,
        inner: ActivationFile,
    ) -> None:
        self._checkpoint = checkpoint
        self._settings = settings
        self._tokens = tokens
        self._inner = inner
        self._text = checkpoint.dims.text
        self._rope = Rope.of(self._text, tokens.longest)

    def solve(
        self,
        layer: int,
        source: ActivationFile,
        target: ActivationFile,
        finished: Callable[[str], None],
    ) -> tuple[dict[str, StoredWeight], dict[str, LinearRecord]]:
        """Quantise the layer's linear layers and compute its output with them.

        Args:
            layer: its number.
            source: hidden states before the layer; only read.
            target: hidden states behind it; overwritten.
            finished: told ``qkv``, ``o``, ``gate_up`` and ``down``.

        Returns:
            Packed weights and records, by name inside the layer.

        Raises:
            CheckpointError: a weight or an activation is not finite; names it.
        """
        group = _LayerTensors(self._checkpoint, layer)
        block = DecoderLayer(self._text, self._text.sliding_windows[layer], group.get)
        narrow = self._inner.of_width(self._text.query_size)
        wide = self._inner.of_width(self._text.intermediate_size)
        weights: dict[str, StoredWeight] = {}
        records: dict[str, LinearRecord] = {}

        def quantize(step: str, names: Sequence[str], rows: Rows) -> None:
            self._quantize(layer, names, rows, group, weights, records)
            finished(step)

        quantize(
            "qkv",
            LINEARS[:3],
            lambda start, stop: block.norm("input_layernorm", source.read(start, stop)),
        )
        for start, stop in zip(self._tokens.edges[:-1], self._tokens.edges[1:], strict=True):
            normed = block.norm("input_layernorm", source.read(start, stop))
            narrow.write(start, block.attention(normed, self._rope))
        group.drop(LINEARS[:3])

        quantize("o", LINEARS[3:4], narrow.read)
        for start, stop in self._tokens.ranges():
            mixed = block.linear(LINEARS[3], narrow.read(start, stop))
            target.write(start, source.read(start, stop).add_(mixed))
        group.drop(LINEARS[3:4])

        def normed_target(start: int, stop: int) -> torch.Tensor:
            return block.norm("post_attention_layernorm", target.read(start, stop))

        quantize("gate_up", LINEARS[4:6], normed_target)
        for start, stop in self._tokens.ranges():
            wide.write(start, block.gated(normed_target(start, stop)))
        group.drop(LINEARS[4:6])

        quantize("down", LINEARS[6:], wide.read)
        for start, stop in self._tokens.ranges():
            added = block.linear(LINEARS[6], wide.read(start, stop))
            target.write(start, target.read(start, stop).add_(added))
        return weights, records

    def _quantize(
        self,
        layer: int,
        names: Sequence[str],
        rows: Rows,
        group: _LayerTensors,
        weights: dict[str, StoredWeight],
        records: dict[str, LinearRecord],
    ) -> None:
        """Quantise linear layers that read the same rows; ``group`` then holds what they became."""
        num_columns = group.shape(names[0])[1]
        size = self._settings.group_size
        multiple = _BLOCK_MULTIPLE if size == PER_CHANNEL else size
        layout = plan_hessian(num_columns, self._settings.hessian_bytes, multiple)
        accumulator = HessianAccumulator(num_columns, layout) if layout.fits else None
        where = f"the inputs of {linear_name(layer, names[0])}"
        probes = self._collect(rows, accumulator, where)
        hessian = None if accumulator is None else accumulator.finish()
        for name in names:
            weight = group.load(name)
            quantized = self._round(weight, hessian, f"tensor {linear_name(layer, name)}.weight")
            exact = _aligned(quantized.dequantize())
            records[name] = LinearRecord(
                quantizer="rtn" if hessian is None else "gptq",
                report=quantized.report,
                error_by_kind=self._errors(probes, weight, exact),
                note=layout.note,
            )
            weights[name] = stored(quantized)
            group.put(name, exact)

    def _collect(
        self, rows: Rows, accumulator: HessianAccumulator | None, where: str
    ) -> torch.Tensor:
        """Add all rows to the Hessian; return those of the probes."""
        kept: list[torch.Tensor] = []
        for start, stop in self._tokens.ranges():
            part = rows(start, stop)
            if not bool(torch.isfinite(part.sum(dtype=torch.float64))):
                bad = int((~torch.isfinite(part)).any(0).nonzero()[0, 0])
                raise CheckpointError(
                    f"{where} are not finite in column {bad}: the checkpoint overflows on the "
                    "calibration samples, or a norm or bias before them is damaged"
                )
            if accumulator is not None:
                accumulator.add(part, self._tokens.weights[start:stop])
            kept.append(part[self._tokens.probes[start:stop]])
        return torch.cat(kept)

    def _round(self, weight: torch.Tensor, hessian: Hessian | None, name: str) -> QuantizedWeight:
        settings = self._settings
        if hessian is None:
            return round_to_nearest(
                weight,
                bits=settings.bits,
                group_size=settings.group_size,
                reduce_range=settings.reduce_range,
                name=name,
            )
        return quantize_weight(
            weight,
            hessian,
            bits=settings.bits,
            group_size=settings.group_size,
            damp_percent=settings.damp_percent,
            reduce_range=settings.reduce_range,
            name=name,
        )

    def _errors(
        self, probes: torch.Tensor, weight: torch.Tensor, exact: torch.Tensor
    ) -> dict[str, float]:
        """Relative output error by kind of token."""
        kinds = torch.from_numpy(self._tokens.kinds)[self._tokens.probes]
        lost = (probes @ (weight - exact).T).square_().sum(1, dtype=torch.float64)
        output = (probes @ weight.T).square_().sum(1, dtype=torch.float64)
        found: dict[str, float] = {}
        for place, kind in enumerate(KINDS):
            total = float(output[kinds == place].sum())
            if total > 0:
                found[kind] = float(lost[kinds == place].sum()) / total
        return found


class _LayerTensors:
    """Float32 tensors of one layer: small ones from the start, weights as long as they are used."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        self._checkpoint = checkpoint
        self._prefix = f"{linear_prefix(layer)}."
        self._loaded: dict[str, torch.Tensor] = {}
        for name, ref in checkpoint.tensors.items():
            if name.startswith(self._prefix) and len(ref.shape) == 1:
                values = self._read(name)
                if not bool(torch.isfinite(values).all()):
                    raise CheckpointError(
                        f"tensor {name} holds a value that is not finite; the checkpoint is damaged"
                    )
                self._loaded[name.removeprefix(self._prefix)] = values

    def get(self, name: str) -> torch.Tensor | None:
        """A tensor that is in memory."""
        return self._loaded.get(name)

    def shape(self, linear: str) -> tuple[int, ...]:
        """Of a weight, read or not."""
        return self._checkpoint.tensors[f"{self._prefix}{linear}.weight"].shape

    def load(self, linear: str) -> torch.Tensor:
        """Read a weight; it is kept by the caller alone."""
        return self._read(f"{self._prefix}{linear}.weight")

    def put(self, linear: str, weight: torch.Tensor) -> None:
        """Give the weight that the layer computes with from now on."""
        self._loaded[f"{linear}.weight"] = weight

    def drop(self, linears: Sequence[str]) -> None:
        """Let weights go."""
        for linear in linears:
            del self._loaded[f"{linear}.weight"]

    def _read(self, name: str) -> torch.Tensor:
        return _aligned(self._checkpoint.read(name))


def _aligned(array: Array) -> torch.Tensor:
    """A float32 copy in torch's own memory: constant alignment, on which kernels may depend."""
    return torch.from_numpy(array).to(torch.float32, copy=True)
