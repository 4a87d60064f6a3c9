"""Faults are found in weights of realistic scale as well: slow, since the model is a wide one."""

from __future__ import annotations

import pytest

from tests.faults.fault import Fault
from tests.faults.models.fault_models import FaultModels
from tests.faults.models.realistic import REALISTIC_MODELS, realistic_faults

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> FaultModels:
    return FaultModels(tmp_path_factory.mktemp("realistic"), REALISTIC_MODELS)


@pytest.mark.parametrize("name", REALISTIC_MODELS)
def test_a_sound_conversion_does_not_fail(name: str, models: FaultModels) -> None:
    made = models[name]

    certificate = made.verify(made.artifact)

    failing = [stage for stage in certificate.stages if stage.verdict == "fail"]
    assert failing == []


@pytest.mark.parametrize("fault", realistic_faults(), ids=lambda fault: fault.id)
def test_a_fault_is_found_by_its_stage(fault: Fault, models: FaultModels) -> None:
    certificate = models.examine(fault)

    failing = [stage.name for stage in certificate.stages if stage.verdict == "fail"]
    assert fault.stage in failing
    assert (failing[0] == fault.stage) == (not fault.earlier)
    if fault.tensor:
        assert certificate.first_deviation is not None
        assert certificate.first_deviation.tensor.startswith(fault.tensor)
