"""QuantizedForm: how an artifact's layers were quantised, as its manifest records it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_edge.convert.verify.graph_weights import GraphCodes
from llava_edge.convert.verify.reference_rounding import Grid
from llava_edge.runtime.manifest import Manifest

_HEAD = "lm_head"
_PER_CHANNEL = -1


@dataclass(frozen=True)
class QuantizedForm:
    """What the manifest says of the conversion; each record makes a check stricter or other.

    A layer that is recorded as rounded to nearest must be exactly that; without a record a layer is
    held against rounding by its output.

    Attributes:
        quantizer: ``rtn``, ``gptq`` or another; empty where it is not recorded.
        group_size: columns that share a scale; -1 for one scale a row.
        reduces_range: 8-bit codes keep to 7 bits.
        rounded: layers that the solver had no memory for and rounded to nearest.
        dead_columns: inputs that calibration never met and that were set to zero, by layer.
    """

    quantizer: str
    group_size: int
    reduces_range: bool
    rounded: frozenset[str]
    dead_columns: dict[str, int]

    @classmethod
    def of(cls, manifest: Manifest) -> QuantizedForm:
        """Read ``manifest.conversion``; what is not there or malformed counts as not recorded."""
        facts = manifest.conversion
        settings = facts.get("settings")
        rounded: set[str] = set()
        dead: dict[str, int] = {}
        for name, record in _linears(facts):
            report = record.get("report")
            count = report.get("dead_columns", 0) if isinstance(report, dict) else 0
            dead[name] = count if isinstance(count, int) else 0
            if record.get("quantizer") == "rtn":
                rounded.add(name)
        group_size = facts.get("group_size")
        return cls(
            quantizer=str(facts.get("quantizer", "")),
            group_size=group_size if isinstance(group_size, int) else 0,
            reduces_range=isinstance(settings, dict) and settings.get("reduce_range") is True,
            rounded=frozenset(rounded),
            dead_columns=dead,
        )

    def is_rounded(self, name: str) -> bool:
        """Whether a layer of the decoder must be rounding to nearest; the head always is."""
        return name == _HEAD or self.quantizer == "rtn" or name in self.rounded

    def grid(self, codes: GraphCodes, name: str) -> Grid:
        """What the codes of a layer may be.

        An operator with blocks holds a scale for a whole row repeated, so that only the record
        tells it from groups.
        """
        num_columns = codes.codes.shape[1]
        repeated = codes.scales.shape[1] > 1 and bool((codes.scales == codes.scales[:, :1]).all())
        whole = repeated and self.group_size == _PER_CHANNEL
        reduced = self.reduces_range and codes.bits == 8 and name != _HEAD
        group = num_columns if whole else min(codes.block_size, num_columns)
        return Grid(codes.bits - reduced, group)


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
