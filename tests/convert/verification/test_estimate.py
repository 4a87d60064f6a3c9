"""How long verifying will take follows from runs of its parts on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_edge.convert.verification import estimate, verifier
from llava_edge.convert.verification.reference.streamed_model import StreamedModel, _PassThrough
from llava_edge.convert.verification.verifier import (
    VerifyOptions,
    open_reference,
    verification_seconds,
    verify_artifact,
)
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.util.progress import no_progress
from llava_edge.runtime.vision.encoder import VisionEncoder
from tests.faults.models.fault_models import FaultModels
from tests.faults.models.tamper import Tampered
from tests.support.tiers import one_of_each, slow_but


class Clock:
    """Seconds that pass where parts of the model run, and nowhere else."""

    def __init__(self, patch: pytest.MonkeyPatch, **cost: float) -> None:
        self.now = 0.0
        self._cost = cost
        patch.setattr(estimate, "time", self)
        # Of nothing that is run here.
        for name in ("FIXED_SECONDS", "VOCABULARY_SECONDS", "WEIGHT_PASSES", "PROCESS_SECONDS"):
            patch.setattr(estimate, f"_{name}", 0.0)
        self._after(patch, StreamedModel, "hidden", self._hidden)
        self._after(patch, StreamedModel, "head", self._head)
        self._after(patch, StreamedModel, "embed", self._embed)
        self._after(patch, StreamedModel, "tile_features", self._tiles)
        self._after(patch, Decoder, "__init__", self._opened)
        self._after(patch, Decoder, "prefill", self._prefilled)
        self._after(patch, Decoder, "step", self._stepped)
        self._after(patch, VisionEncoder, "encode", self._encoded)

    def perf_counter(self) -> float:
        return self.now

    def _after(self, patch: pytest.MonkeyPatch, owner: Any, name: str, passes: Any) -> None:
        real = getattr(owner, name)

        def run(this: Any, *given: Any, **named: Any) -> Any:
            found = real(this, *given, **named)
            self.now += passes(this, *given)
            return found

        patch.setattr(owner, name, run)

    def _hidden(self, model: Any, rows: Any, layers: int | None = None) -> float:
        run = [x for x in model._language.layers if not isinstance(x, _PassThrough)][:layers]
        return len(run) * (self._cost["read"] + self._cost["row"] * len(rows))

    def _embed(self, _: Any, inputs: Any) -> float:
        tiles = sum(map(len, inputs.pixel_values))
        frames = 0 if inputs.frame_pixels is None else len(inputs.frame_pixels)
        return self._cost["tile"] * (tiles + frames)

    def _tiles(self, _: Any, pixels: Any) -> float:
        return self._cost["tile"] * len(pixels)

    def _opened(self, _: Any, session: Any, text: Any, *__: Any) -> float:
        # A slice without a head hands its hidden states out as logits.
        head = head_layers(text) if text.vocab_size != text.hidden_size else 0.0
        return self._cost["open"] * (int(text.num_hidden_layers) + head)

    def _head(self, model: Any, rows: Any) -> float:
        text = model._checkpoint.dims.text
        return head_layers(text) * (self._cost["read"] + self._cost["row"] * len(rows))

    def _prefilled(self, decoder: Any, count: int, *_: Any) -> float:
        return self._cost["prompt"] * count * int(decoder._text.num_hidden_layers)

    def _stepped(self, decoder: Any, *_: Any) -> float:
        return self._cost["step"] * int(decoder._text.num_hidden_layers)

    def _encoded(self, _: Any, pixels: Any, *__: Any) -> float:
        return self._cost["own_tile"] * len(pixels)


def head_layers(text: TextDims) -> float:
    """A head in layers, by their weights."""
    attention = 2 * text.query_size + 2 * text.key_value_size
    return text.vocab_size / (attention + 3 * text.intermediate_size)


_PARTS = ("read", "row", "tile", "open", "prompt", "step", "own_tile")
READING, COMPUTING, SEEING = (
    dict(zip(_PARTS, costs, strict=True))
    for costs in (
        (50.0, 0.01, 1.0, 20.0, 0.01, 0.1, 1.0),
        (1.0, 0.5, 30.0, 1.0, 0.4, 2.0, 20.0),
        (1.0, 0.01, 300.0, 1.0, 0.01, 0.1, 300.0),
    )
)
"""Where weights are most of the time, where products are, and where towers are."""


@pytest.mark.parametrize(
    ("name", "memory_bytes", "mode", "cost"),
    [
        *one_of_each(
            lambda given: (given[1], given[2]),
            (
                (*made, cost)
                for cost in (READING, COMPUTING)
                for made in (
                    ("qwen2", None, "quick"),
                    ("qwen2", 1, "quick"),
                    ("int8", None, "quick"),
                    ("int8", 1, "quick"),
                    ("int8 cache", None, "quick"),
                    ("int4 gptq", None, "quick"),
                    ("int4 gptq", None, "full"),
                    ("video", None, "full"),
                )
            ),
        ),
        *slow_but((), [("int8", None, "quick", SEEING), ("video", None, "full", SEEING)]),
    ],
)
def test_an_estimate_is_within_thirty_per_cent_whatever_parts_cost(
    models: FaultModels,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    memory_bytes: int | None,
    mode: Any,
    cost: dict[str, float],
) -> None:
    made = models[name]
    artifact = open_artifact(made.artifact, verify_digests=False)
    monkeypatch.setattr(verifier, "memory_stage", lambda *_: None)
    options = VerifyOptions(mode, memory_bytes, threads=1)
    clock = Clock(monkeypatch, **cost)
    reference = open_reference(artifact, made.checkpoint)

    estimated = verification_seconds(artifact, reference, options)
    began = clock.now
    verify_artifact(artifact, made.checkpoint, options, no_progress, reference)

    assert estimated is not None
    print(name, memory_bytes, estimated / (clock.now - began), began / clock.now)
    assert 0.7 < estimated / (clock.now - began) < 1.3


def test_answers_that_are_remembered_are_not_counted_again(
    models: FaultModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = models["qwen2"]
    artifact = open_artifact(made.artifact, verify_digests=False)
    options = VerifyOptions("quick", None, threads=1)
    Clock(monkeypatch, **COMPUTING)

    fresh, known = (
        verification_seconds(artifact, reference, options)
        for reference in (open_reference(artifact, made.checkpoint), made.reference("quick"))
    )

    assert fresh is not None
    assert known is not None
    assert known < 0.9 * fresh


def test_an_estimate_sees_one_tile_by_each_tower(
    models: FaultModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model of the released size a whole picture takes a twentieth of verifying."""
    made = models["int8"]
    artifact = open_artifact(made.artifact, verify_digests=False)
    # A second for anything, so that nothing is run again for a better clock.
    clock = Clock(monkeypatch, **dict.fromkeys(_PARTS, 1.0))
    tiles = [0, 0]
    for place, (owner, name) in enumerate(
        ((VisionEncoder, "encode"), (StreamedModel, "tile_features"))
    ):
        real = getattr(owner, name)

        def run(this: Any, pixels: Any, *rest: Any, real: Any = real, place: int = place) -> Any:
            tiles[place] += len(pixels)
            return real(this, pixels, *rest)

        monkeypatch.setattr(owner, name, run)
    monkeypatch.setattr(StreamedModel, "embed", lambda *_: pytest.fail("a whole picture"))

    seconds = verification_seconds(
        artifact,
        open_reference(artifact, made.checkpoint),
        VerifyOptions("quick", None, threads=1),
    )

    assert seconds is not None
    assert clock.now > 0
    assert tiles == [1, 1]


def test_an_artifact_that_does_not_run_has_no_estimate(models: FaultModels, tmp_path: Path) -> None:
    made = models["qwen2"]
    copy = Tampered(made.artifact, tmp_path / "copy")
    copy.node("decoder", "language_model.layers.0.input_layernorm").name = "another"
    artifact: Artifact = open_artifact(copy.seal(), verify_digests=False)
    reference = open_reference(artifact, made.checkpoint)

    seconds = verification_seconds(artifact, reference, VerifyOptions("quick", None, threads=1))

    assert seconds is None
    assert estimate.spoken(seconds) == "for how long cannot be told"
    assert [estimate.spoken(s) for s in (83.2, 754.0)] == ["about 83 s", "about 13 min"]
