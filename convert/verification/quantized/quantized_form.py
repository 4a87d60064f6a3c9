"""QuantizedForm: how an artifact's layers were quantised, as its manifest records it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_edge.convert.verification.quantized.graph_weights import GraphCodes
from llava_edge.convert.verification.quantized.reference_rounding import Grid
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.util.arrays import Array

_HEAD = "lm_head"
_PER_CHANNEL = -1
_HEAD_GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class QuantizedForm:
    """What the manifest says of the conversion; each record makes a check stricter or other.

    A layer that is recorded as rounded to nearest must be exactly that; without a record a layer is
    held against rounding by its output.

    Attributes:
        quantizer: ``rtn``, ``gptq`` or another; empty where it is not recorded.
        group_size: columns that share a scale; -1 for one scale a row.
        head_group_size: the same of the head; 0 where it is not recorded.
        reduces_range: 8-bit codes keep to 7 bits.
        rounded: layers that the solver had no memory for and rounded to nearest.
        dead_columns: inputs that calibration never met and that were set to zero, by layer.
        kept_rows: outputs that the solver kept as rounding to nearest has them, by layer.
    """

    quantizer: str
    group_size: int
    head_group_size: int
    reduces_range: bool
    rounded: frozenset[str]
    dead_columns: dict[str, int]
    kept_rows: dict[str, int]

    @classmethod
    def of(cls, manifest: Manifest) -> QuantizedForm:
        """Read ``manifest.conversion``; what is not there or malformed counts as not recorded."""
        facts = manifest.conversion
        settings = facts.get("settings")
        rounded: set[str] = set()
        dead: dict[str, int] = {}
        kept: dict[str, int] = {}
        for name, record in _linears(facts):
            report = record.get("report")
            report = report if isinstance(report, dict) else {}
            for counts, key in ((dead, "dead_columns"), (kept, "rows_rounded")):
                count = report.get(key, 0)
                counts[name] = count if isinstance(count, int) else 0
            if record.get("quantizer") == "rtn":
                rounded.add(name)
        sizes = [facts.get(key) for key in ("group_size", "head_group_size")]
        group_size, head_group_size = (size if isinstance(size, int) else 0 for size in sizes)
        return cls(
            quantizer=str(facts.get("quantizer", "")),
            group_size=group_size,
            head_group_size=head_group_size,
            reduces_range=isinstance(settings, dict) and settings.get("reduce_range") is True,
            rounded=frozenset(rounded),
            dead_columns=dead,
            kept_rows=kept,
        )

    def is_rounded(self, name: str) -> bool:
        """Whether a layer of the decoder must be rounding to nearest; the head always is."""
        return name == _HEAD or self.quantizer == "rtn" or name in self.rounded

    def grid(self, codes: GraphCodes, name: str) -> Grid:
        """What the codes of a layer may be.

        An operator with smaller blocks holds the scale of a group or a row repeated, so that only
        the record tells it from groups. Without a record of its own, the head has one scale a row
        where the body has, or the largest group that divides its inputs.
        """
        num_columns, block = codes.codes.shape[1], codes.block_size
        recorded = self.head_group_size if name == _HEAD else 0
        size = recorded or self.group_size
        groups = [num_columns if size == _PER_CHANNEL else size]
        if name == _HEAD and not recorded:
            groups += [size for size in _HEAD_GROUPS if num_columns % size == 0][:1]
        repeated = (size for size in groups if _repeats(codes.scales, -(-size // block)))
        group = next(repeated, min(block, num_columns))
        reduced = self.reduces_range and codes.bits == 8 and name != _HEAD
        return Grid(codes.bits - reduced, group)


def held_scales(codes: GraphCodes, grid: Grid) -> Array:
    """Scales [N, groups] of a layer, one for each group where blocks repeat it."""
    num_columns = codes.codes.shape[1]
    if grid.group >= num_columns:
        return codes.scales[:, :1]
    return codes.scales[:, :: max(1, grid.group // codes.block_size)]


def _repeats(scales: Array, count: int) -> bool:
    """Whether scales [N, blocks] are the same in each run of some neighbouring blocks."""
    if count < 2 or scales.shape[1] % count:
        return False
    grouped = scales.reshape(len(scales), -1, count)
    return bool((grouped == grouped[:, :, :1]).all())


def _linears(facts: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Records of single layers by canonical name."""
    layers = facts.get("layers")
    found: list[tuple[str, dict[str, Any]]] = []
    for layer in layers if isinstance(layers, list) else []:
        linears = layer.get("linears") if isinstance(layer, dict) else None
        if isinstance(linears, dict):
            prefix = f"language_model.layers.{layer.get('layer')}"
            found += [(f"{prefix}.{n}", r) for n, r in linears.items() if isinstance(r, dict)]
    return found
