"""Stage ``int8_cache``: does the int8 KV cache hold and read what it should, and what does it cost?

Layer by layer, each on what the layer before hands on with a float cache:

- the codes that lie in the cache against the float cache's own keys and values, divided by the
  scales and rounded here (``largest_code_gap``), over chunks and steps as they were written;
- what attention makes of them against attention over ``code * scale``, computed here from the
  layer's own queries (``attention_gap_of_range``), for the last of the prompt and the steps;
- how well the scales fit, worst layer: values that are cut off (``clipped_share``), the largest
  code of the median channel over the largest code there is (``range_used``: the room that
  calibration left shows there), and the error of what is read over the size of what was there
  (``relative_error``);
- each scale against the one that the rule of calibration gives for all probes, which have fewer
  tokens, and others: how many times too narrow the narrowest channel is (``scale_too_narrow``), how
  many times too wide the median of all channels (``median_scale_too_wide``), and how many times as
  wide as that the widest one (``scale_too_wide``).

Then the whole decoder: its logits with an int8 cache beside those with a float one, which is what
choosing the cache at load costs (``int8_cache_loss``). All else in the graph is the float graph's,
byte by byte; ``cache_structure`` sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llava_edge.convert.onnx.decoder import rope_tables
from llava_edge.convert.onnx.graph_file import GraphFile
from llava_edge.convert.onnx.int8_kv_cache import LARGEST_CODE
from llava_edge.convert.verification.reference.answer import Positions, ReferenceAnswer
from llava_edge.convert.verification.runner.artifact_runner import ArtifactRunner
from llava_edge.convert.verification.runner.losses import Losses
from llava_edge.convert.verification.runner.metrics import GAP, row_gaps, whole_gap
from llava_edge.convert.verification.structure.int8_cache import read_scales
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.runtime.artifact.certificate import StageResult, bounded
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.tolerances import CACHE_LOSS, Bounds

STAGE, LOSS = "int8_cache", CACHE_LOSS
_METRICS = (
    "largest_code_gap",
    "attention_gap_of_range",
    "clipped_share",
    "range_used",
    "relative_error",
)
_LEAST_CODE = -128
_ROOM, _QUIET = 2.0, 2.0
"""The rule: a channel has room for so many times its largest value, and that counts as so many
times the largest value of its head's median channel, at least."""


@dataclass
class CacheStage:
    """What was measured over the probes so far.

    Attributes:
        bounds: of the artifact's form.
        worst: of each metric, and where.
        losses: of each probe.
    """

    bounds: Bounds
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)
    losses: list[Losses] = field(default_factory=list)
    reached: dict[tuple[int, int], Array] = field(default_factory=dict)
    """Largest magnitude of each channel, by layer and part, float32 [kv_heads, head_dim]."""
    scales: Sequence[Array] = ()
    logits: tuple[float, str] = (0.0, "")

    def measure(self, subject: ArtifactRunner, answer: ReferenceAnswer) -> None:
        """Run one probe with both caches, prompt in chunks and answer in steps."""
        name, positions = answer.probe.name, answer.positions
        given = answer.embeddings.astype(subject.dtype)
        spec = subject.artifact.manifest.decoders["int8"]
        graph = GraphFile(subject.artifact.path(spec.file), "decoder with int8 cache")
        text = subject.dims.text
        scales = read_scales(graph, text.num_hidden_layers)
        rows, self.scales = given, scales
        for layer in range(text.num_hidden_layers):
            where = f"layer {layer}, {name}"
            rows = self._layer(subject, layer, rows, positions, [s[layer] for s in scales], where)
        plain = subject.logits(given, positions)
        ours = subject.logits(given, positions, int8_cache=True)
        self.logits = _larger(self.logits, float(row_gaps(ours, plain).max()), name)
        self.losses.append(Losses.of(ours, plain, answer))

    def rows(self) -> list[StageResult]:
        """Fidelity and fit, then what the cache costs."""
        found = [
            bounded(STAGE, metric, value, self.bounds.value(STAGE, metric), detail=where)
            for metric in _METRICS
            for value, where in [self.worst.get(metric, (0.0, ""))]
        ]
        for metric, (value, where) in self._widths().items():
            bound = self.bounds.value(STAGE, metric)
            found.append(bounded(STAGE, metric, value, bound, detail=where))
        value, where = self.logits
        found.append(bounded(LOSS, GAP, value, self.bounds.value(LOSS, GAP), "loss", where))
        return [*found, *Losses.rows(self.losses, LOSS, self.bounds)]

    def _widths(self) -> dict[str, tuple[float, str]]:
        """Scales over those that the rule gives for the probes: the outermost, and the median."""
        widths: dict[str, Array] = {}
        for (layer, part), reached in self.reached.items():
            floor = np.float32(_QUIET) * np.median(reached, axis=-1, keepdims=True)
            reach = np.maximum(reached, floor) * np.float32(_ROOM) / LARGEST_CODE
            where = f"{('keys', 'values')[part]} of layer {layer}"
            least = np.finfo(np.float32).tiny
            widths[where] = self.scales[part][layer] / np.maximum(reach, least)
        every = np.concatenate([each.ravel() for each in widths.values()])
        middle = float(np.median(every))
        wide, narrow = (0.0, ""), (0.0, "")
        for where, each in widths.items():
            head, channel = np.unravel_index(int(each.argmax()), each.shape)
            place = f"{where}, head {head}, channel {channel}"
            wide = _larger(wide, float(each.max()) / max(1.0, middle), place)
            head, channel = np.unravel_index(int(each.argmin()), each.shape)
            place = f"{where}, head {head}, channel {channel}"
            narrow = _larger(narrow, 1 / float(each.min()), place)
        return {
            "scale_too_wide": wide,
            "scale_too_narrow": narrow,
            "median_scale_too_wide": (middle, f"of {every.size} channels"),
        }

    def _layer(
        self,
        subject: ArtifactRunner,
        layer: int,
        rows: Array,
        positions: Positions,
        scales: Sequence[Array],
        where: str,
    ) -> Array:
        """Look at one layer; returns what it hands on with a float cache."""
        out, *plain = subject.layer_and_cache(layer, rows, positions)
        # Copies: the memory goes with its cache.
        plain = [part.astype(np.float32) for part in plain]
        _, *codes = subject.layer_and_cache(layer, rows, positions, int8_cache=True)
        read = []
        for index, (part, have, scale) in enumerate(zip(plain, codes, scales, strict=True)):
            largest = np.abs(part).max(axis=1)
            known = self.reached.get((layer, index), largest)
            self.reached[layer, index] = np.maximum(known, largest)
            steps = np.rint(part / scale[:, None])
            wanted = np.clip(steps, _LEAST_CODE, LARGEST_CODE)
            self._note("largest_code_gap", float(np.abs(wanted - have).max()), where)
            self._note("clipped_share", float((np.abs(steps) > LARGEST_CODE).mean()), where)
            used = float(np.median(np.abs(steps).max(1))) / LARGEST_CODE
            self._note("range_used", used, where)
            value = have * scale[:, None]
            read.append(value)
            size = max(float(np.linalg.norm(part)), float(np.finfo(np.float32).tiny))
            self._note("relative_error", float(np.linalg.norm(value - part)) / size, where)
        packed, mixed = subject.attention(layer, rows, positions)
        query = self._rotated(packed, positions, subject.dims.text)
        window = subject.dims.text.sliding_windows[layer]
        expected = _attend(query, read[0], read[1], positions, window)
        self._note("attention_gap_of_range", whole_gap(mixed, expected), where)
        return out

    def _rotated(self, packed: Array, positions: Positions, text: TextDims) -> Array:
        """Queries of the kept positions behind the rotary embedding, [heads, kept, head_dim]."""
        cosine, sine = (table[positions.kept] for table in rope_tables(text, positions.total))
        heads = packed[:, : text.query_size].reshape(len(packed), -1, text.head_dim)
        first, second = np.split(heads.transpose(1, 0, 2), 2, axis=-1)
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        return np.concatenate(turned, axis=-1)

    def _note(self, metric: str, value: float, where: str) -> None:
        self.worst[metric] = _larger(self.worst.get(metric, (0.0, "")), value, where)


def _attend(query: Array, keys: Array, values: Array, positions: Positions, window: int) -> Array:
    """Attention of the kept positions, float32 [kept, heads * head_dim].

    Args:
        query: rotated, float32 [heads, kept, head_dim].
        keys: rotated, float32 [kv_heads, positions, head_dim].
        values: as ``keys``.
        positions: which are kept.
        window: positions that a query sees, itself included; 0 for all before it.
    """
    heads, count, width = query.shape
    kept = np.asarray(positions.kept)
    distance = kept[:, None] - np.arange(keys.shape[1])
    hidden = (distance < 0) | ((distance >= window) if window else False)
    mixed = np.empty((count, heads, width), np.float32)
    for head in range(heads):
        group = head * len(keys) // heads
        scores = query[head].astype(np.float64) @ keys[group].T * width**-0.5
        scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed[:, head] = weights @ values[group]
    return mixed.reshape(count, heads * width)


def _larger(known: tuple[float, str], value: float, where: str) -> tuple[float, str]:
    # NaN is worse than any number.
    return known if value <= known[0] else (value, where)
