"""Estimate: about how long verifying will take, from parts of it that are run beforehand.

One decoder layer of the reference and one of the artifact are run on this machine as it is now,
with whatever else it does, and both towers on one tile; what a probe needs is so many of them.
Rates that were measured elsewhere say little: kernels, precision and the reading of weights decide,
and all of them are in what is run here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from llava_edge.convert.util.progress import spoken_seconds
from llava_edge.convert.util.torch_threads import allowed_torch_threads
from llava_edge.convert.verification.reference.answer import Positions, Reference
from llava_edge.convert.verification.reference.probes import (
    NUM_STEPS,
    Probe,
    asked_again,
    rounded_again,
)
from llava_edge.convert.verification.reference.streamed_model import StreamedModel
from llava_edge.convert.verification.runner.artifact_runner import ArtifactRunner
from llava_edge.convert.verification.runner.loop_cut import (
    LOOP_PRODUCTS,
    layer_weights,
    loop_layers,
)
from llava_edge.convert.verification.weights.quantized_layers import RoundedWeights, SolvedLayers
from llava_edge.runtime.artifact.certificate import Mode
from llava_edge.runtime.backends.process import configure_process
from llava_edge.runtime.verification.loop.bench import SENTENCE
from llava_edge.runtime.verification.tolerances import bounds_for

_FIXED_SECONDS = 2.5
"""Text, pixels, packing, files and the scripted loop: the same for a model of any size."""
_VOCABULARY_SECONDS = 4e-5
"""For each entry of the vocabulary, in the tokenizer's stage and in logits of scripted answers."""
_PROCESS_SECONDS = 0.4
"""A fresh process, until it loads the artifact."""
_WEIGHT_PASSES = 1.0
"""The stage of weights, over one reading of all weights by the reference."""
_CACHE_RUNS = 5
"""Runs of the decoder in the stage of an int8 cache: three layer by layer, two as a whole."""
_PATH_PROMPTS, _PATH_STEPS = 11.5, 62
"""Sentences and single tokens that the paths of the loop compute on the model (``loop_model``)."""
_LOOP_RUNS = 2
"""Runs of the decoder in the loop: an answer, and the same answer forced."""
_FEW, _MANY, _STEPS = 32, 256, 8
"""Positions of a run of one layer: two numbers, so that beginning and positions come apart."""
_REPEATS, _ENOUGH_SECONDS = 3, 0.05


@dataclass(frozen=True)
class _Line:
    """Seconds of what is begun once and then done for every position."""

    begin: float = 0.0
    each: float = 0.0

    @classmethod
    def through(cls, run: Callable[[int], object]) -> _Line:
        """The line through two runs."""
        few, many = _seconds(lambda: run(_FEW)), _seconds(lambda: run(_MANY))
        each = max(0.0, many - few) / (_MANY - _FEW)
        return cls(max(0.0, few - each * _FEW), each)

    def of(self, positions: float) -> float:
        """Seconds for so many positions."""
        return self.begin + self.each * positions


@dataclass(frozen=True)
class _Probe:
    """What one probe asks for, and whether the reference has answered it before."""

    tokens: int
    tiles: int
    is_remembered: bool
    is_asked_again: bool
    is_rounded_again: bool


class _Estimate:
    """One artifact; measures when it is made."""

    def __init__(
        self,
        subject: ArtifactRunner,
        reference: Reference,
        solved: SolvedLayers,
        probes: Sequence[Probe],
        mode: Mode,
    ) -> None:
        manifest, text = subject.artifact.manifest, subject.dims.text
        self._layers = text.num_hidden_layers
        self._vocabulary = text.vocab_size
        self._has_codes = manifest.decoder_int8_cache is not None
        self._has_process = mode == "full" and manifest.target == "cpu"
        self._is_half = subject.dtype is np.float16
        bounds = bounds_for(manifest.target, manifest.precision)
        self._by_layer = bounds.compares_layers
        # The head is a linear layer too, and read as those of the layers are.
        self._head = text.vocab_size * text.hidden_size / layer_weights(text)
        self._path = _PATH_PROMPTS * len(reference.answer_ids(SENTENCE))
        self._media_tiles = reference.media.num_tiles
        self._probes = []
        again = asked_again(probes)
        rounded = rounded_again(again, mode) if solved.names else ()
        for probe in probes:
            inputs = reference.inputs(probe)
            frames = 0 if inputs.frame_pixels is None else len(inputs.frame_pixels)
            tiles = sum(len(each) for each in inputs.pixel_values) + frames
            self._probes.append(
                _Probe(
                    len(inputs.ids),
                    tiles,
                    reference.remembers(probe),
                    probe in again,
                    probe in rounded,
                )
            )
        asked = sum(probe.tokens + NUM_STEPS for probe in self._probes if probe.is_asked_again)
        products = LOOP_PRODUCTS if mode == "quick" else None
        self._cut = loop_layers(subject, asked, products)
        self._measure(subject, reference, solved, probes)

    def _measure(
        self,
        subject: ArtifactRunner,
        reference: Reference,
        solved: SolvedLayers,
        probes: Sequence[Probe],
    ) -> None:
        hidden = subject.dims.text.hidden_size
        rows = np.random.default_rng(0).normal(0, 1, (_MANY + _STEPS, hidden)).astype(np.float32)
        given = torch.from_numpy(rows)
        pictured = next(probe for probe in probes if probe.images)
        tile = reference.inputs(pictured).pixel_values[0][:1]
        (model, supply), *own = reference.models
        model.use(supply)
        first = partial(_first_layer, model, given)
        # The first run of all prepares what later ones find.
        first(1)
        self._reads = [_Line.through(first)]
        # Reading weights counts for each tile: beside what a tile computes it is little.
        self._towers = [_seconds(partial(model.tile_features, tile))]
        for other, weights in own:
            # The same arithmetic over other weights: only reading them differs.
            other.use(weights)
            begin = _seconds(partial(_first_layer, other, given, _FEW)) - self._reads[0].each * _FEW
            self._reads.append(replace(self._reads[0], begin=max(0.0, begin)))
            self._towers *= 2
        self._rounding, self._search = _Line(), 0.0
        if solved.names:
            assert supply is not None
            model.use(RoundedWeights(solved, supply))
            # The first run searches for scales, which are kept.
            searched, found = (_once(partial(_first_layer, model, given, _FEW)) for _ in range(2))
            begin = max(0.0, found - self._reads[0].each * _FEW)
            self._rounding = replace(self._reads[0], begin=begin)
            self._search = max(0.0, searched - found)
            model.use(supply)

        def run(prompt: int, steps: int = 0) -> object:
            positions = Positions(prompt, steps, prompt, 0)
            return subject.layer(0, rows[: positions.total], positions)

        run(1)
        self._run = _Line.through(run)
        stepped = _seconds(lambda: run(_FEW, _STEPS)) - _seconds(lambda: run(_FEW))
        self._step = max(0.0, stepped) / _STEPS
        pixels = tile.numpy().astype(subject.dtype)
        features = np.empty((1, subject.dims.vision.num_patches, hidden), subject.dtype)
        self._tower = _seconds(lambda: subject.encoder().encode(pixels, features))

    def seconds(self) -> float:
        """Of all stages."""
        reading = sum(line.begin for line in self._reads)
        seconds = _FIXED_SECONDS + _VOCABULARY_SECONDS * self._vocabulary
        seconds += _WEIGHT_PASSES * self._layers * reading
        if self._has_process:
            seconds += _PROCESS_SECONDS + max(map(self._run_seconds, self._probes))
        seconds += self._layers * (self._search + _WEIGHT_PASSES * self._rounding.begin)
        seconds += self._cut * (self._run.each * self._path + self._step * _PATH_STEPS)
        # The reference's tower runs with the artifact's weights alone.
        theirs, ours = self._media_tiles
        seconds += self._towers[0] * theirs + self._tower * ours
        return seconds + sum(map(self._of_probe, self._probes))

    def _of_probe(self, probe: _Probe) -> float:
        reads = [self._read(line, probe.tokens) for line in self._reads]
        towers = [tower * probe.tiles for tower in self._towers]
        own_tower, run = self._tower * probe.tiles, self._run_seconds(probe)
        seconds = run + own_tower * (2 if self._is_half else 1)
        if not probe.is_remembered:
            seconds += sum(reads) + sum(towers)
        if not probe.is_asked_again:
            return seconds
        if self._by_layer:
            # What layers read is kept of an answer that is not known yet.
            seconds += run + (reads[0] if probe.is_remembered else 0.0)
        if probe.is_rounded_again:
            seconds += self._read(self._rounding, probe.tokens)
        if self._has_codes:
            seconds += _CACHE_RUNS * run
        part = (self._cut + self._head) / (self._layers + self._head)
        seconds += part * (_LOOP_RUNS * run + reads[0])
        # Features are kept for the second run, and the reference remembers its own.
        return seconds + own_tower

    def _run_seconds(self, probe: _Probe) -> float:
        """The artifact's decoder, opened and run over a prompt and its forced tokens."""
        positions = self._run.each * probe.tokens + self._step * NUM_STEPS
        return (self._layers + self._head) * self._run.begin + self._layers * positions

    def _read(self, line: _Line, prompt: int) -> float:
        """The reference over a prompt and its forced tokens, whose logits it gives."""
        kept = 2 * NUM_STEPS
        return self._layers * line.of(prompt + NUM_STEPS) + self._head * line.of(kept)


@allowed_torch_threads()
def estimate_seconds(
    subject: ArtifactRunner,
    reference: Reference,
    solved: SolvedLayers,
    probes: Sequence[Probe],
    mode: Mode,
) -> float | None:
    """Seconds of verifying, the reference's answers included as far as it does not remember them.

    Args:
        subject: the artifact, in the memory that it will be run in.
        reference: of the artifact.
        solved: its layers that are held against rounding to nearest.
        probes: all that will be asked.
        mode: ``full`` has a fresh process answer as well.

    Returns:
        None for an artifact that does not run; verifying it says why.
    """
    configure_process()
    try:
        # Together, since each call of its own starts a child process.
        reference.render_ahead(probes)
        return _Estimate(subject, reference, solved, probes, mode).seconds()
    except Exception:
        return None


def spoken(seconds: float | None) -> str:
    """``about 83 s``, ``about 12 min``, or that it is not known."""
    if seconds is None:
        return "for how long cannot be told"
    return f"about {spoken_seconds(seconds)}"


def _first_layer(model: StreamedModel, rows: torch.Tensor, count: int) -> torch.Tensor:
    return model.layer(0, rows[:count])


def _seconds(run: Callable[[], object]) -> float:
    """Of one run: the middle of several, where they are short and the first warms caches."""
    found: list[float] = []
    while len(found) < _REPEATS and sum(found) < _ENOUGH_SECONDS:
        found.append(_once(run))
    return sorted(found)[len(found) // 2]


def _once(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
