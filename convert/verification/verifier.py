"""verify_artifact: all stages on one artifact, and the certificate that comes of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_edge.convert.checkpoint.files import SETTINGS, WEIGHT_DIGESTS
from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.transformers_loader import REFERENCE
from llava_edge.convert.onnx.graph_view import MissingNodeError
from llava_edge.convert.util.torch_threads import allowed_torch_threads
from llava_edge.convert.verification.estimate import estimate_seconds
from llava_edge.convert.verification.first_divergence import (
    first_decoder_deviation,
    first_vision_deviation,
)
from llava_edge.convert.verification.quantized.graph_weights import GraphWeights
from llava_edge.convert.verification.reference.answer import Reference
from llava_edge.convert.verification.reference.probes import (
    Probe,
    asked_again,
    probes_for,
    rounded_again,
)
from llava_edge.convert.verification.runner.artifact_runner import ArtifactRunner
from llava_edge.convert.verification.runner.loop_cut import LOOP_PRODUCTS
from llava_edge.convert.verification.runner.losses import Losses
from llava_edge.convert.verification.stages.answer import AnswerStages
from llava_edge.convert.verification.stages.golden import golden_stage
from llava_edge.convert.verification.stages.golden_writer import golden_probe
from llava_edge.convert.verification.stages.greedy import greedy_tokens, not_run
from llava_edge.convert.verification.stages.int8_cache import CacheStage
from llava_edge.convert.verification.stages.layers import LayerStage
from llava_edge.convert.verification.stages.loop import golden_loop, loop_stage, run_loop
from llava_edge.convert.verification.stages.media import media_stage
from llava_edge.convert.verification.stages.memory import memory_stage
from llava_edge.convert.verification.stages.packing import packing_stage
from llava_edge.convert.verification.stages.preprocessing import pixel_stage
from llava_edge.convert.verification.stages.prompt import prompt_stage
from llava_edge.convert.verification.stages.tokenizer import tokenizer_stage
from llava_edge.convert.verification.structure.stage import structure_stage
from llava_edge.convert.verification.weights.quantized_layers import RoundedWeights, SolvedLayers
from llava_edge.convert.verification.weights.stage import weights_stage
from llava_edge.convert.verification.weights.vision_weights import ArtifactWeights, VisionWeights
from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.runtime.artifact.certificate import (
    CERTIFICATE_VERSION,
    Certificate,
    Deviation,
    Mode,
    StageResult,
    exact,
    overall,
    utc_now,
)
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.backends.process import configure_process
from llava_edge.runtime.util.host_memory import peak_host_bytes
from llava_edge.runtime.util.progress import Progress
from llava_edge.runtime.util.versions import tool_versions
from llava_edge.runtime.verification.golden.loop import GoldenLoop
from llava_edge.runtime.verification.golden.probes import GoldenProbe
from llava_edge.runtime.verification.host import describe_host
from llava_edge.runtime.verification.tolerances import Bounds, bounds_for

_MOST_STAGES = 16
"""Of a full run that looks for a deviation."""
QUICK_BYTES = 640 << 20
"""Weights of the decoder in memory at once while ``quick`` runs it."""
_TOOLS = (
    *("llava-edge", "onnx", "onnxruntime", "tokenizers", "torch", "transformers", "pillow"),
    "sentencepiece",
)


@dataclass(frozen=True)
class VerifyOptions:
    """How much is verified.

    Attributes:
        mode: ``quick``: text and the cheapest grid; ``full``: every grid, the whole graph at once,
            and the memory of a fresh process.
        memory_bytes: what the decoder's weights may take at once in ``quick``; None for all.
        threads: of the CPU provider; 0 for as many as are allowed.
    """

    mode: Mode = "quick"
    memory_bytes: int | None = None
    threads: int = 0


class Verifier:
    """One artifact, its checkpoint, and the stages that compare them.

    Args:
        artifact: opened; its files have been compared with the manifest.
        checkpoint: what it was made from.
        options: see there.
        report: told about stages.
        reference: of the same artifact, where it was asked before; it remembers answers.
    """

    def __init__(
        self,
        artifact: Artifact,
        checkpoint: Checkpoint,
        options: VerifyOptions,
        report: Progress,
        reference: Reference | None = None,
    ) -> None:
        manifest = artifact.manifest
        self.artifact = artifact
        self.checkpoint = checkpoint
        self.options = options
        self.bounds: Bounds = bounds_for(manifest.target, manifest.precision)
        self.reference = reference or open_reference(artifact, checkpoint)
        self.probes = probes_for(manifest, options.mode)
        self.main = asked_again(self.probes)
        self._report = report
        self._stages: list[StageResult] = []
        self._done = 0

    def run(self) -> Certificate:
        """Run every stage; a stage that cannot run at all fails with its reason."""
        try:
            return self._run()
        finally:
            self.reference.close()

    def _run(self) -> Certificate:
        started = time.perf_counter()
        # What a session or a layer gives back shall leave the process, not wait for the next.
        configure_process()
        artifact, checkpoint, reference = self.artifact, self.checkpoint, self.reference
        self._stage("structure", lambda: structure_stage(artifact, checkpoint))
        self._stage("tokenizer", lambda: tokenizer_stage(artifact, checkpoint, reference.processor))
        self._stage("prompt", lambda: prompt_stage(artifact, checkpoint, reference.processor))
        self._stage("preprocessing", lambda: pixel_stage(artifact, reference.processor))
        self._stage("packing", lambda: packing_stage(artifact, reference.model))
        self._stage("weights", lambda: weights_stage(artifact, checkpoint))
        deviation = None
        whole = self.options.mode == "full"
        budget = None if whole else self.options.memory_bytes
        with ArtifactRunner(artifact, budget, self.options.threads) as subject:
            solved = SolvedLayers(artifact, checkpoint, reference.sketch)
            quantized = artifact.manifest.precision.language_model != "fp16"
            answers = AnswerStages(self.bounds, quantized=quantized, solved=bool(solved.names))
            layers = LayerStage(self.bounds, artifact.manifest.model.text)
            self._stage("files", lambda: self._files(subject))
            self._stage("tile_features", lambda: self._answers(subject, answers))
            if solved.names:
                self._stage("quantized_layers", lambda: self._solved(solved, answers))
            if self.bounds.compares_layers:
                self._stage("layers", lambda: self._layers(subject, layers))
            caches = CacheStage(self.bounds)
            if artifact.manifest.decoder_int8_cache is not None:
                self._stage("int8_cache", lambda: self._caches(subject, caches))
            if any(stage.verdict == "fail" for stage in self._stages):
                self._tell("deviation")
                deviation = self._find_deviation(subject, answers)
            self._stage("greedy", lambda: self._greedy(subject, answers, layers))
        self._stage("loop", lambda: loop_stage(artifact, reference))
        main = self.main
        self._stage("golden", lambda: golden_stage(artifact, main, reference, self.bounds))
        if whole:
            self._stage("memory", lambda: memory_stage(artifact, self._largest()))
        self._stages += answers.loss_rows()
        return self._certificate(deviation, time.perf_counter() - started)

    def _files(self, subject: ArtifactRunner) -> list[StageResult]:
        self.reference.render_ahead(self.probes)
        return media_stage(subject, self.reference.media, self.bounds)

    def _answers(self, subject: ArtifactRunner, answers: AnswerStages) -> list[StageResult]:
        names = {probe.name for probe in self.main}
        for probe in self.probes:
            answer = self.reference.answer(probe, remember=probe.name in names)
            try:
                answers.measure(subject, answer)
            except Exception as error:
                # What was measured before it stays.
                return [*answers.rows(), _broken(answers.at, error)]
        return answers.rows()

    def _solved(self, solved: SolvedLayers, answers: AnswerStages) -> list[StageResult]:
        """Layers against rounding to nearest, and what that costs the answers."""
        rows = solved.stage(self.bounds)
        assert self.reference.supply is not None
        weights = RoundedWeights(solved, self.reference.supply)
        for probe in rounded_again(self.main, self.options.mode):
            answer = self.reference.answer(probe)
            logits = self.reference.logits(answer, weights)
            answers.rounding[probe.name] = Losses.of(logits, answer.original, answer)
        return rows

    def _layers(self, subject: ArtifactRunner, layers: LayerStage) -> list[StageResult]:
        for probe in self.main:
            layers.measure(subject, self.reference, self.reference.answer(probe))
        return layers.rows()

    def _caches(self, subject: ArtifactRunner, caches: CacheStage) -> list[StageResult]:
        for probe in self.main:
            caches.measure(subject, self.reference.answer(probe))
        return caches.rows()

    def _greedy(
        self, subject: ArtifactRunner, answers: AnswerStages, layers: LayerStage
    ) -> list[StageResult]:
        found = answers.tokens
        ran: list[StageResult] = []
        try:
            more, own = greedy_tokens(
                subject,
                self.main,
                self.reference,
                self.bounds,
                self.options.threads,
                lambda model: ran.extend(run_loop(model).rows(self.bounds)),
                LOOP_PRODUCTS if self.options.mode == "quick" else None,
            )
            found += more
        except OutOfMemoryError as error:
            if subject.is_whole:
                raise
            own = not_run(error)
        if not self.bounds.compares_layers:
            return [found.row("greedy"), own, *ran]
        # End to end few positions are conclusive at the bound of the rounding; none of them may
        # differ. The evidence comes from behind the head, and for the loop from its own logits.
        return [
            layers.tokens.row("greedy"),
            found.row("greedy", needs_evidence=False),
            own,
            *ran,
        ]

    def _find_deviation(self, subject: ArtifactRunner, answers: AnswerStages) -> Deviation | None:
        """A graph may be too broken to be looked into; a node that is missing is the deviation."""
        try:
            return self._deviation(subject, answers)
        except MissingNodeError as error:
            return Deviation(error.node, float(np.finfo(np.float32).max), 0.0, {}, {})
        except Exception as error:
            # The artifact has failed already; that the place was not found is said beside it.
            self._stages.append(_broken("deviation", error))
            return None

    def _deviation(self, subject: ArtifactRunner, answers: AnswerStages) -> Deviation | None:
        failed = {stage.name for stage in self._stages if stage.verdict == "fail"}
        found = None
        if "tile_features" in failed:
            # Of tiles first; a fault of frames alone shows behind the pooling only.
            pictured = [next(probe for probe in self.probes if probe.images), *self.main[2:]]
            for answer in map(self.reference.answer, pictured):
                found = found or first_vision_deviation(
                    subject, self.reference, answer, self.bounds
                )
        if found is None and failed & {"layers", "prefill_logits", "decode_logits"}:
            # The shortest probe that fails: its tensors are the smallest.
            failing = [probe for probe in self.probes if probe.name in answers.failing]
            answer = self.reference.answer((failing or list(self.probes))[0])
            found = first_decoder_deviation(subject, self.reference, answer, self.bounds)
        return found

    def _largest(self) -> Probe:
        alone = [probe for probe in self.probes if len(probe.images) == 1]
        return max(alone, key=lambda probe: probe.images[0].width * probe.images[0].height)

    def _stage(self, name: str, run: Callable[[], Any]) -> None:
        self._tell(name)
        try:
            found = run()
        except Exception as error:
            # What is broken enough not to run is not verified either, whatever it raises, and the
            # others go on.
            found = _broken(name, error)
        if found is not None:
            self._stages += [found] if isinstance(found, StageResult) else found

    def _tell(self, name: str) -> None:
        self._done += 1
        self._report(f"verify {name}", self._done, _MOST_STAGES)

    def _certificate(self, deviation: Deviation | None, seconds: float) -> Certificate:
        manifest = self.artifact.manifest
        verdict = overall(self._stages)
        ids_by = self.reference.processor.tokenizer.name
        return Certificate(
            schema_version=CERTIFICATE_VERSION,
            passed=verdict == "pass",
            verdict=verdict,
            mode=self.options.mode,
            issued=utc_now(),
            target=manifest.target,
            host=describe_host("cpu"),
            reference=REFERENCE if ids_by == REFERENCE else f"{REFERENCE}; ids by {ids_by}",
            tools=tool_versions(_TOOLS),
            stages=tuple(self._stages),
            first_deviation=deviation,
            conversion=_quoted(manifest),
            seconds=round(seconds, 2),
            peak_host_bytes=peak_host_bytes(),
        )


def _broken(name: str, error: Exception) -> StageResult:
    return exact(name, "errors", [f"{type(error).__name__}: {error}"[:400]], "")


def open_reference(artifact: Artifact, checkpoint: Checkpoint) -> Reference:
    """The reference for an artifact, with its own weights where they are quantised."""
    precision = artifact.manifest.precision
    supply = None
    if precision.language_model != "fp16":
        int8 = precision.vision_tower == "int8"
        vision = VisionWeights.open(artifact, checkpoint) if int8 else None
        supply = ArtifactWeights(GraphWeights.open(artifact), vision)
    return Reference(artifact, checkpoint, supply)


def golden_probes(artifact: Artifact, reference: Reference) -> tuple[list[GoldenProbe], GoldenLoop]:
    """Golden probes for an artifact and cases of the loop; the reference remembers its answers."""
    configure_process()
    probes = probes_for(artifact.manifest, "quick")
    reference.render_ahead(probes)
    made = [golden_probe(reference.answer(p, remember=True)) for p in probes]
    return made, golden_loop(artifact, reference)


def verification_seconds(
    artifact: Artifact, reference: Reference, options: VerifyOptions
) -> float | None:
    """About how long verifying will take; see ``estimate_seconds``."""
    budget = None if options.mode == "full" else options.memory_bytes
    with ArtifactRunner(artifact, budget, options.threads) as subject:
        probes = probes_for(artifact.manifest, options.mode)
        solved = SolvedLayers(artifact, reference.checkpoint, reference.sketch)
        return estimate_seconds(subject, reference, solved, probes, options.mode)


@allowed_torch_threads()
def verify_artifact(
    artifact: Artifact,
    checkpoint: Checkpoint,
    options: VerifyOptions,
    report: Progress,
    reference: Reference | None = None,
) -> Certificate:
    """Compare an artifact with its checkpoint; see ``Verifier``."""
    return Verifier(artifact, checkpoint, options, report, reference).run()


def unverified(artifact: Artifact) -> Certificate:
    """The certificate of an artifact whose verification was left out."""
    return Certificate(
        schema_version=CERTIFICATE_VERSION,
        passed=False,
        verdict="inconclusive",
        mode="none",
        issued=utc_now(),
        target=artifact.manifest.target,
        host=describe_host("cpu"),
        reference=REFERENCE,
        tools=tool_versions(_TOOLS),
        conversion=_quoted(artifact.manifest),
    )


def _quoted(manifest: Manifest) -> dict[str, Any]:
    """Facts of the conversion, less digests of single weights and files."""
    facts = manifest.conversion.items()
    return {key: value for key, value in facts if key not in (WEIGHT_DIGESTS, SETTINGS)}
