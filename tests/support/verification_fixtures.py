"""Artifacts of the test models in every form, rounded to nearest where they are quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.convert.text import template_sandbox
from llava_edge.convert.verification.stages import prompt as prompt_stage
from llava_edge.profiles.boards.hardware import load_profile
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from tests.faults.models.fault_models import FaultModels
from tests.support.conversion_cache import ConversionCache

FORMS = {
    "fp16": ("cpu-16gb", "fp16", None),
    "fp16 cuda": ("a100", "fp16", None),
    "int8 integer": ("cpu-16gb", "int8", None),
    "int8 nbits": ("cpu-16gb", "int8", "none"),
    "int4": ("cpu-16gb", "int4", None),
    "int4 cuda": ("a100", "int4", None),
}
"""Board, precision, int8 instructions where they are not the board's."""

SIZES = {"hidden_size": 128, "intermediate_size": 384, "heads": 4}
BACKBONES: dict[str, dict[str, object]] = {
    "llama-mha": {"backbone": "llama", "kv_heads": 4},
    "mistral-gqa": {"backbone": "mistral", "kv_heads": 2},
    "qwen2-bias": {"backbone": "qwen2", "kv_heads": 2},
}


@pytest.fixture(scope="package", autouse=True)
def renderings_are_kept() -> Iterator[None]:
    """Equal requests to the template's process are answered once, and the time stands still.

    Hundreds of verifications here differ in weights and graphs, not in their template.
    """
    kept: dict[tuple[object, ...], bytes] = {}
    real, now = template_sandbox.run_bounded, prompt_stage.current_time()

    def run(*arguments: Any) -> bytes:
        if arguments not in kept:
            kept[arguments] = real(*arguments)
        return kept[arguments]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_sandbox, "run_bounded", run)
        patch.setattr(prompt_stage, "current_time", lambda: now)
        yield


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory, conversion_cache: ConversionCache
) -> FaultModels:
    """What faults are planted in; each is written and converted once, for all modules."""
    return FaultModels(tmp_path_factory.mktemp("faults"), cache=conversion_cache)


@pytest.fixture(scope="session")
def make_form(conversion_cache: ConversionCache) -> Callable[[Path, str], Path]:
    """``make_form(checkpoint, form)``: an artifact in one of ``FORMS``, converted once."""

    @cache
    def make(checkpoint: Path, form: str) -> Path:
        board, precision, isa = FORMS[form]
        profile = load_profile(board)
        if isa is not None:
            profile = replace(profile, int8_isa=isa)
        request = ConvertRequest(
            checkpoint=str(checkpoint),
            profile=profile,
            wishes=PlanRequest(precision=precision, context_tokens=640),
            quantization=QuantizationRequest(quantizer="rtn"),
            verify="none",
        )
        return conversion_cache.convert(request)

    return make


@pytest.fixture(scope="session")
def opened() -> Callable[[Path, Path], tuple[Artifact, Checkpoint]]:
    """``opened(artifact, checkpoint)``: both, without hashing what was just written."""
    return lambda artifact, checkpoint: (
        open_artifact(artifact, verify_digests=False),
        open_checkpoint(checkpoint),
    )
