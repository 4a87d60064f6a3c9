"""Faults of sampling, streaming, reuse and drafts are found, by verification and on a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from llava_edge.convert.verification.reference.answer import Reference
from llava_edge.convert.verification.reference.sampling import choose_by_reference
from llava_edge.convert.verification.stages.loop import golden_loop, loop_stage
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.certificate import StageResult
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.verification.golden.loop import GoldenLoop
from llava_edge.runtime.verification.loop import model as loop_model
from llava_edge.runtime.verification.loop.check import loop_rows
from llava_edge.runtime.verification.loop.choice import Choose, choose_plainly
from llava_edge.runtime.verification.loop.model import check_loop_on_model
from llava_edge.runtime.verification.tolerances import Bounds, bounds_for
from tests.faults.fault import Fault
from tests.faults.models.fault_models import FaultModels
from tests.faults.models.tokenizer_checkpoints import TOKENIZERS
from tests.faults.seeded.faults import LOOP_FAULTS as FAULTS
from tests.support.tiers import one_of_each, slow_but

MODELS = ("qwen2", "int8", "int4")
_FIRST = {
    "sampling": "draws",
    "streaming": "answers",
    "reuse": "reuse",
    "drafts": "model",
    "limits": "limits",
}


@dataclass(frozen=True)
class Ready:
    """A model, and what is compared with it, made before anything is planted."""

    artifact: Artifact
    reference: Reference
    loop: GoldenLoop
    bounds: Bounds
    model: LlavaEdge

    def rows(self, part: str = "", choose: Choose = choose_plainly) -> Iterator[StageResult]:
        """What a device checks, row by row, beginning with what is most about a part."""
        makes = loop_rows(self.model, self.loop, choose)
        first = _FIRST.get(part, "draws")
        if first == "model":
            yield from check_loop_on_model(self.model, choose).rows(self.bounds)
        else:
            yield makes.pop(first)()
        for make in makes.values():
            yield make()
        if first != "model":
            yield from check_loop_on_model(self.model, choose).rows(self.bounds)


@pytest.fixture(scope="session")
def ready(models: FaultModels) -> Callable[[str], Ready]:
    made: dict[str, Ready] = {}

    def get(name: str) -> Ready:
        if name not in made:
            made[name] = make(models, name)
        return made[name]

    return get


def make(models: FaultModels, name: str) -> Ready:
    artifact = open_artifact(models[name].artifact, verify_digests=False)
    manifest = artifact.manifest
    reference = models[name].reference("quick")
    model = LlavaEdge.over(
        artifact,
        "cpu",
        threads=1,
        allow_slow=True,
        context_tokens=256,
        cache=manifest.precision.computes,
    )
    bounds = bounds_for(manifest.target, manifest.precision)
    return Ready(artifact, reference, golden_loop(artifact, reference), bounds, model)


def test_faults_are_many_of_every_part_and_precision() -> None:
    assert len({fault.id for fault in FAULTS}) == len(FAULTS)
    parts = Counter((fault.part, fault.model) for fault in FAULTS)
    for part, least in (
        ("sampling", 40),
        ("streaming", 40),
        ("reuse", 30),
        ("drafts", 26),
        ("limits", 15),
    ):
        assert sum(count for (name, _), count in parts.items() if name == part) >= least
        assert {model for name, model in parts if name == part} >= set(MODELS)


@pytest.mark.parametrize(
    "name",
    slow_but(
        [*MODELS, "int8 cache cuda", next(iter(TOKENIZERS))],
        [*MODELS, "int8 cache cuda", *TOKENIZERS],
    ),
)
def test_a_sound_model_passes(name: str, ready: Callable[[str], Ready]) -> None:
    sound = ready(name)

    rows = [*sound.rows(), *loop_stage(sound.artifact, sound.reference)]

    assert [row for row in rows if row.verdict != "pass"] == []


@pytest.mark.parametrize(("codes", "verdict"), [(1, "pass"), (40, "fail")])
def test_one_code_of_an_int8_cache_may_differ_between_two_paths(
    ready: Callable[[str], Ready], monkeypatch: pytest.MonkeyPatch, codes: int, verdict: str
) -> None:
    artifact = ready("int8 cache cuda").artifact
    read, plain = loop_model._first_layer, []

    def read_other(cache: Any) -> dict[str, Any]:
        found = read(cache)
        # The plain run is the first to be looked at.
        if plain:
            found["key"][0, 5, 0] += codes
        plain.append(True)
        return found

    monkeypatch.setattr(loop_model, "_first_layer", read_other)
    with LlavaEdge.over(
        artifact, "cpu", threads=1, allow_slow=True, context_tokens=256, cache="int8"
    ) as model:
        found = check_loop_on_model(model, choose_plainly)

    bounds = bounds_for(artifact.manifest.target, artifact.manifest.precision, int8_cache=True)
    rows = {row.metric: row for row in found.rows(bounds)}
    assert rows[loop_model.CACHE_GAP].verdict == verdict, rows
    assert rows["max_gap_of_range"].bound == bounds.path_gap() > 0.1


@pytest.mark.parametrize(
    "fault",
    one_of_each(lambda fault: (fault.part, fault.model), FAULTS),
    ids=lambda fault: fault.id,
)
def test_a_fault_is_found_on_a_device(fault: Fault, ready: Callable[[str], Ready]) -> None:
    found = first_failing(fault, ready(fault.model))

    assert found is not None
    assert found.name == fault.stage
    assert found.detail


@pytest.mark.nightly
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_is_found_at_every_precision(
    fault: Fault, model: str, ready: Callable[[str], Ready]
) -> None:
    chosen = ready(model if fault.model in MODELS else fault.model)

    assert first_failing(fault, chosen) is not None
    assert first_failing(fault, chosen, choose_by_reference) is not None


def first_failing(
    fault: Fault, ready: Ready, choose: Choose = choose_plainly
) -> StageResult | None:
    """The first row that fails; what comes after it is not run."""
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        rows = ready.rows(fault.part, choose)
        return next((row for row in rows if row.verdict == "fail"), None)
