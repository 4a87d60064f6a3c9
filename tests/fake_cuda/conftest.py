"""The CUDA provider over the stand-in; anyone who asks for these tests without it is told so."""

from __future__ import annotations

import pytest

from tests.cuda_stand_in.record import StandIn


@pytest.fixture(scope="session", autouse=True)
def cuda() -> StandIn:
    try:
        return StandIn()
    except (OSError, AttributeError) as error:
        pytest.fail(f"these tests run by `make test-cuda`: {error}")
