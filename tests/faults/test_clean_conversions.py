"""Sound artifacts pass, whatever the backbone, the form, the geometry and the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from llava_edge.runtime.artifact.certificate import Certificate
from tests.faults.models.clean_models import CLEAN, RELEASED, solved_models
from tests.faults.models.fault_models import FaultModels, Model
from tests.support.tiers import slow_but

SOLVED: Mapping[str, Model] = {
    f"{name}, seed {seed}": model
    for seed in range(10)
    for name, model in solved_models(seed).items()
}
"""By GPTQ: three backbones, ten seeds, without and with outlier channels."""
MODELS: Mapping[str, Model] = {**CLEAN, **RELEASED, **SOLVED}
SOLVED_IN_SHORT = "mistral int4 gptq, seed 0"
IN_SHORT = "qwen2 fp16 336/14"
"""Of the released geometry; the others of it need minutes."""
QUICK = (
    "llama fp16",
    "mistral fp16 cuda",
    "qwen2 int8",
    "int4 cuda",
    "windowed",
    "gptq",
    "video int8",
)
"""Each backbone and precision once, and the rarest checkpoints."""


@pytest.fixture
def clean(tmp_path_factory: pytest.TempPathFactory) -> FaultModels:
    return FaultModels(tmp_path_factory.mktemp("clean"), MODELS)


@pytest.mark.parametrize(
    "name",
    [
        *slow_but(QUICK, [*CLEAN, IN_SHORT, SOLVED_IN_SHORT]),
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in (*RELEASED, *SOLVED)
            if name not in (IN_SHORT, SOLVED_IN_SHORT)
        ),
    ],
)
def test_a_sound_conversion_passes(name: str, clean: FaultModels) -> None:
    made = clean[name]

    certificate = made.verify(made.artifact)

    assert certificate.verdict == "pass", not_passed(certificate)
    assert certificate.first_deviation is None


@pytest.mark.parametrize(
    "name", ["qwen2 fp16", pytest.param("mistral int4", marks=pytest.mark.nightly)]
)
def test_a_sound_conversion_passes_in_full(name: str, clean: FaultModels) -> None:
    made = clean[name]

    certificate = made.verify(made.artifact, "full")

    assert certificate.verdict == "pass", not_passed(certificate)


@pytest.mark.parametrize("name", slow_but(["llama3"], ["llama3", "qwen2 tokenizer"]))
def test_special_tokens_need_no_purpose_of_their_own(name: str, models: FaultModels) -> None:
    """Their ``<|header|>`` is special and neither bos, end nor padding, as in Llama 3."""
    made = models[name]

    certificate = made.verify(made.artifact)

    assert certificate.verdict == "pass", not_passed(certificate)


def not_passed(certificate: Certificate) -> list[object]:
    return [stage for stage in certificate.stages if stage.verdict != "pass"]
