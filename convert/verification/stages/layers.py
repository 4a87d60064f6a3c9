"""Stage ``layers``: every decoder layer by itself, on exactly what the reference's layer reads.

Kernels that round activations to 8 bits turn a difference in the last float bit into a whole step
now and then, and through many layers such steps grow to the size of the rounding itself: end to end
two sound implementations are one or two per cent of the logits' range apart. Layer by layer they
are not: rows are equal to the last digits until one holds a step. Rows of a plain background are
near copies and may all hold it, so a tight bound holds for the row that one in ten is below, and
that of some steps for the worst row; tokens are compared behind the head on the reference's own
last state. A fault of the layer is in all rows, or is larger than steps are.

How many steps a row holds grows with the inputs that are rounded, and what one of them moves
shrinks with the inputs of a product. So rows of wide layers all hold some, which together stay as
small as they are in any wider layer, and a wide head is held more tightly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from llava_edge.convert.verification.reference.answer import Reference, ReferenceAnswer
from llava_edge.convert.verification.runner.artifact_runner import ArtifactRunner
from llava_edge.convert.verification.runner.metrics import row_gaps
from llava_edge.convert.verification.stages.answer import compare_choices
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.runtime.artifact.certificate import StageResult, bounded
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.token_comparison import TokenComparison
from llava_edge.runtime.verification.tolerances import Bounds

_STAGE = "layers"
_QUANTILE = 0.1
_WIDE = 16_384
"""Inputs of a layer's products, from which on rows without a step become rare."""
_NARROW_HEAD = 128
"""Inputs of the head that the table's bound was set for."""
_LEAST_HEAD_GAP = 5e-4


@dataclass
class LayerStage:
    """What was measured over the probes so far.

    Attributes:
        bounds: of the artifact's form.
        text: dimensions of the language model.
        tenth: largest of all layers' 10 % quantile of rows, and where.
        worst: worst row of any layer, and where.
        head: largest gap of the head's logits over their range.
        tokens: choices behind the head.
    """

    bounds: Bounds
    text: TextDims
    tenth: tuple[float, str] = (0.0, "")
    worst: tuple[float, str] = (0.0, "")
    head: tuple[float, str] = (0.0, "")
    tokens: TokenComparison = field(default_factory=lambda: TokenComparison(0, 0, 0))

    def measure(
        self, subject: ArtifactRunner, reference: Reference, answer: ReferenceAnswer
    ) -> None:
        """Run the layers of one probe, prompt in chunks and answer in steps."""
        count, name = subject.dims.text.num_hidden_layers, answer.probe.name
        inputs = reference.layer_inputs(answer)
        for layer in range(count):
            rows, wanted = inputs.load(layer), inputs.load(layer + 1)
            ours = subject.layer(layer, rows, answer.positions)
            gaps = _contribution_gaps(ours, wanted, rows)
            where = f"layer {layer}, {name}"
            self.tenth = _larger(self.tenth, float(np.quantile(gaps, _QUANTILE)), where)
            self.worst = _larger(self.worst, float(gaps.max()), where)
        kept = list(answer.positions.kept)
        logits = subject.head(inputs.load(count)[kept])
        gap = float(row_gaps(logits, answer.export).max())
        self.head = _larger(self.head, gap, name)
        self.tokens += compare_choices(logits.argmax(-1), answer.export, self.head_bound, name)

    @property
    def tenth_bound(self) -> float:
        """Bound on the row that one in ten is below."""
        wide = self.bounds.rounds_activations and _num_inputs(self.text) > _WIDE
        return self.bounds.value(_STAGE, "tenth_row_gap_of_wide" if wide else "tenth_row_gap")

    @property
    def head_bound(self) -> float:
        """Bound on the gap of the head's logits over their range."""
        bound = self.bounds.value(_STAGE, "head_gap_of_range")
        if not self.bounds.rounds_activations:
            return bound
        narrower = math.sqrt(min(1.0, _NARROW_HEAD / self.text.hidden_size))
        return min(bound, max(_LEAST_HEAD_GAP, bound * narrower))

    def rows(self) -> list[StageResult]:
        """The row that one in ten is below, worst row, logits behind the head."""
        found = {
            "tenth_row_gap": (self.tenth, self.tenth_bound),
            "worst_row_gap": (self.worst, self.bounds.value(_STAGE, "worst_row_gap")),
            "head_gap_of_range": (self.head, self.head_bound),
        }
        return [
            bounded(_STAGE, metric, value, bound, detail=where)
            for metric, ((value, where), bound) in found.items()
        ]


def _num_inputs(text: TextDims) -> int:
    """Inputs that the products of one layer round for one row, each product's counted."""
    attention = text.num_attention_heads * text.head_dim
    return 5 * text.hidden_size + attention + text.intermediate_size


def _contribution_gaps(ours: Array, theirs: Array, given: Array) -> Array:
    """Difference of each row over what the reference's layer added to it, float64 [rows]."""
    lost = np.linalg.norm(ours.astype(np.float64) - theirs, axis=-1)
    added = np.linalg.norm(theirs.astype(np.float64) - given, axis=-1)
    gaps: Array = lost / np.maximum(added, np.finfo(np.float32).tiny)
    return gaps


def _larger(known: tuple[float, str], value: float, where: str) -> tuple[float, str]:
    # NaN is worse than any number.
    return known if value <= known[0] else (value, where)
