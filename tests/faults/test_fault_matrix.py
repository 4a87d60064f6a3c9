"""Every seeded fault is found, by the stage that should find it, at the place where it is."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.fault import Fault
from tests.faults.models.fault_models import FaultModels
from tests.faults.seeded.faults import EQUIVALENT, FAULTS
from tests.faults.seeded.model import faults_quantizer, faults_solver
from tests.faults.seeded.model.faults_tokenizer import FAULTS as TOKENIZER_FAULTS
from tests.support.tiers import one_of_each

PARTS = {
    "image processing": 8,
    "packing": 5,
    "tower": 5,
    "projector": 2,
    "decoder": 8,
    "embeddings": 2,
    "quantisation": 6,
    "quantiser": 20,
    "runtime": 6,
    "video": 7,
    "int8 cache": 21,
    "picture files": 20,
    "video files": 13,
    "tokenizer": 60,
}
SOLVER = (*faults_quantizer.FAULTS, *faults_solver.FAULTS)
WHOLE = [fault for fault in FAULTS if fault not in TOKENIZER_FAULTS]
"""Those that need whole verification; ``test_tokenizer_faults`` runs its stage alone."""
NAMED = (*faults_quantizer.NAMED, *faults_solver.NAMED)
NIGHTLY = [fault for fault in SOLVER if fault.id not in NAMED]


def test_faults_are_many_and_of_every_part() -> None:
    assert len({fault.id for fault in FAULTS}) == len(FAULTS) >= 40
    assert {part: n for part, n in Counter(f.part for f in FAULTS).items() if n < PARTS[part]} == {}


@pytest.mark.parametrize(
    "fault",
    [
        *one_of_each(
            lambda fault: (fault.part, fault.stage), [f for f in WHOLE if f not in NIGHTLY]
        ),
        *(pytest.param(fault, marks=pytest.mark.nightly) for fault in NIGHTLY),
    ],
    ids=lambda fault: fault.id,
)
def test_a_fault_is_found_by_its_stage_and_at_its_place(fault: Fault, models: FaultModels) -> None:
    certificate = models.examine(fault)

    assert certificate.verdict == "fail"
    failing = [stage.name for stage in certificate.stages if stage.verdict == "fail"]
    assert fault.stage in failing
    # Either it is the first, or the fault says why another one is.
    assert (failing[0] == fault.stage) == (not fault.earlier)
    found = certificate.first_deviation
    if fault.tensor:
        assert found is not None
        assert found.tensor.startswith(fault.tensor)
        assert not found.value <= found.bound
    else:
        # No tensor inside a graph is wrong, so none is accused.
        assert found is None


@pytest.mark.parametrize(
    "fault", one_of_each(lambda fault: fault.stage, EQUIVALENT), ids=lambda fault: fault.id
)
def test_what_changes_no_output_fails_no_stage_that_looks_at_outputs(
    fault: Fault, models: FaultModels
) -> None:
    certificate = models.examine(fault)

    failing = {stage.name for stage in certificate.stages if stage.verdict == "fail"}
    assert failing == ({fault.stage} if fault.stage else set())
    assert certificate.first_deviation is None
