"""Stages that run the model on a probe: features, embeddings, logits, tokens and what was lost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llava_edge.convert.onnx.float16_emulation import emulate_float16
from llava_edge.convert.verification.reference.answer import ReferenceAnswer
from llava_edge.convert.verification.runner.artifact_runner import ArtifactRunner
from llava_edge.convert.verification.runner.losses import Losses
from llava_edge.convert.verification.runner.metrics import GAP, row_gaps, whole_gap
from llava_edge.runtime.artifact.certificate import StageResult, bounded, exact
from llava_edge.runtime.processing.request import Request
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.cosine import TileCosine
from llava_edge.runtime.verification.token_comparison import TokenComparison
from llava_edge.runtime.verification.tolerances import Bounds

HALF_LOSS = "float16_cosine_loss"
_TEXT_ROW_FAULTS = 3


@dataclass
class AnswerStages:
    """What was measured over the probes so far; ``rows`` makes stages of it.

    Attributes:
        bounds: of the artifact's form.
        tokens: choices compared at forced positions.
        worst: largest gap of each stage, and the probe that had it.
        embedding_faults: positions that differ where they must not.
        losses: of each probe, by its name.
    """

    bounds: Bounds
    tokens: TokenComparison = field(default_factory=lambda: TokenComparison(0, 0, 0))
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)
    embedding_faults: list[str] = field(default_factory=list)
    losses: dict[str, Losses] = field(default_factory=dict)
    tile_losses: list[TileCosine] = field(default_factory=list)
    """Features of each probe against the checkpoint's own, where the tower has 8 bits."""
    half_losses: list[tuple[float, str]] = field(default_factory=list)
    """One minus the cosine of each probe's worst tile, every float16 value rounded to it."""
    failing: list[str] = field(default_factory=list)
    """Probes that leave a bound on logits, in order."""
    at: str = "tile_features"
    """The stage that is being measured: an error belongs to it."""
    num_probes: int = 0
    num_text_rows: int = 0
    quantized: bool = False
    """Whether the language model holds codes."""
    solved: bool = False
    """Whether some of them are other than rounding to nearest: its losses come from elsewhere."""
    rounding: dict[str, Losses] = field(default_factory=dict)
    """What rounding to nearest costs, by probe."""

    def measure(self, subject: ArtifactRunner, answer: ReferenceAnswer) -> None:
        """Run one probe through the artifact and compare it with the reference's answer."""
        name, positions = answer.probe.name, answer.positions
        self.num_probes += 1
        self.at = "embeddings"
        request = subject.request(answer.probe)
        if not np.array_equal(request.ids, answer.inputs.ids.numpy()):
            # The stages of prompts and packing say why; here nothing would be comparable.
            self.embedding_faults.append(
                f"{name}: the prompt has {request.num_tokens} ids, {len(answer.inputs.ids)} in the "
                "reference, or others"
            )
            return
        self.at = "tile_features"
        embeddings = subject.embed(request)
        features = embeddings.features[:-1].reshape(answer.features.shape)
        if answer.features.size:
            self._note("tile_features", whole_gap(features, answer.features), name)
            if self.bounds.int8_vision:
                self.tile_losses.append(TileCosine.of(features, answer.original_features))
        if subject.dtype is np.float16 and request.pixel_values:
            self.half_losses.append((_half_loss(subject, request, answer.features), name))
        self.at = "embeddings"
        rows = subject.rows(embeddings, request, answer.forced)
        self._embeddings(subject, answer, rows)
        self.at = "prefill_logits"
        logits = subject.logits(rows, positions)
        self._logits(answer, logits)
        self.losses[name] = Losses.of(logits, answer.original, answer)
        if self.quantized and not self.solved:
            # Codes are rounding to nearest themselves, or the checkpoint's own.
            self.rounding[name] = Losses.of(answer.export, answer.original, answer)

    def rows(self) -> list[StageResult]:
        """The stages, in the order of the model."""
        found: list[StageResult] = []
        for stage in ("tile_features", "embeddings", "prefill_logits", "decode_logits"):
            if stage == "embeddings":
                looked = f"{self.num_text_rows} text rows exact, image rows as packed"
                found.append(exact(stage, "differing_positions", self.embedding_faults, looked))
            if stage in self.worst:
                value, probe = self.worst[stage]
                bound = self.bounds.value(stage, GAP)
                detail = f"worst of {self.num_probes} probes: {probe}"
                found.append(bounded(stage, GAP, value, bound, detail=detail))
            if stage == "tile_features" and self.half_losses:
                # NaN, which an overflow gives, is worse than any number.
                loss, probe = max(self.half_losses, key=lambda each: (each[0] != each[0], each[0]))
                bound = self.bounds.value(stage, HALF_LOSS)
                detail = f"every float16 value rounded to it; worst tile: {probe}"
                found.append(bounded(stage, HALF_LOSS, loss, bound, detail=detail))
        return found

    def loss_rows(self) -> list[StageResult]:
        """What the artifact lost against the checkpoint's own weights, worst probe each."""
        if not self.losses:
            return []
        stage = "quantization_loss"
        shown = {}
        if self.tile_losses:
            means, worsts = zip(
                *((t.mean_loss, t.worst_loss) for t in self.tile_losses), strict=True
            )
            shown["tile_cosine_mean_loss"] = (float(max(means)), "1 - cosine of rows, all tiles")
            shown["tile_cosine_worst_loss"] = (float(max(worsts)), "1 - cosine of rows, a tile")
        tiles = [
            bounded(
                stage,
                metric,
                value,
                self.bounds.value(stage, metric),
                "loss",
                f"{unit}; worst of {len(self.losses)} probes",
            )
            for metric, (value, unit) in shown.items()
        ]
        if self.quantized:
            rows = Losses.rows_over_rounding(self.losses, self.rounding, stage, self.bounds)
        else:
            rows = Losses.rows(list(self.losses.values()), stage, self.bounds)
        return [*rows, *tiles]

    def _note(self, stage: str, gap: float, probe: str) -> None:
        worst = self.worst.get(stage)
        # NaN is worse than any number.
        if worst is None or not gap <= worst[0]:
            self.worst[stage] = (gap, probe)

    def _embeddings(self, subject: ArtifactRunner, answer: ReferenceAnswer, rows: Array) -> None:
        """Text rows are equal; image rows are compared through the rows that they come from."""
        name = answer.probe.name
        ids = np.concatenate([answer.inputs.ids.numpy(), answer.forced])
        tokens = subject.artifact.manifest.tokens
        is_text = ~np.isin(ids, [mark for mark in (tokens.image, tokens.video) if mark is not None])
        # A mark in an answer is a token like any other.
        is_text[len(answer.inputs.ids) :] = True
        theirs = answer.embeddings.astype(subject.dtype)
        wrong = np.flatnonzero((rows[is_text] != theirs[is_text]).any(-1))
        self.num_text_rows += int(is_text.sum())
        places = np.flatnonzero(is_text)
        self.embedding_faults += [
            f"{name}: the row of token {ids[places[i]]} at position {places[i]} differs"
            for i in wrong[:_TEXT_ROW_FAULTS].tolist()
        ]
        if not is_text.all():
            self._note("embeddings", whole_gap(rows[~is_text], theirs[~is_text]), name)

    def _logits(self, answer: ReferenceAnswer, logits: Array) -> None:
        name, count = answer.probe.name, answer.positions.num_prefill
        gaps = row_gaps(logits, answer.export)
        self._note("prefill_logits", float(gaps[:count].max()), name)
        if len(gaps) > count:
            self._note("decode_logits", float(gaps[count:].max()), name)
        bound = self.bounds.value("prefill_logits", GAP)
        if not float(gaps.max()) <= bound:
            self.failing.append(name)
        self.tokens += compare_choices(logits.argmax(-1), answer.export, bound, name)


def _half_loss(subject: ArtifactRunner, request: Request, theirs: Array) -> float:
    """What float16 costs a probe's tiles; the CPU provider would not show it."""
    tiles = np.concatenate(request.pixel_values)
    ours = emulate_float16(subject.vision_path(), subject.dims, tiles)
    wanted = theirs.reshape(-1, ours.shape[-1])[: ours.shape[0] * ours.shape[1]]
    return TileCosine.of(ours, wanted.reshape(ours.shape)).worst_loss


def compare_choices(chosen: Array, theirs: Array, bound: float, name: str) -> TokenComparison:
    """Choices [positions] against the reference's logits [positions, vocab]."""
    top = np.argpartition(theirs, -2, axis=-1)[:, -2:]
    values = np.take_along_axis(theirs, top, -1)
    order = np.argsort(-values, axis=-1, kind="stable")
    top, values = np.take_along_axis(top, order, -1), np.take_along_axis(values, order, -1)
    return TokenComparison.of(chosen, top, values, np.ptp(theirs, axis=-1), bound, name)
