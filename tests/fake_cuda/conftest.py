"""The CUDA provider over the fake; anyone who asks for these tests without it is told so."""

from __future__ import annotations

import pytest

from tests.fake_cuda.record import FakeCuda


@pytest.fixture(scope="session", autouse=True)
def cuda() -> FakeCuda:
    try:
        return FakeCuda()
    except (OSError, AttributeError) as error:
        pytest.fail(f"these tests run by `make test-cuda`: {error}")
