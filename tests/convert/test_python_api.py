"""``convert`` and ``verify`` for Python users: the same as the commands, without a command line."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_edge.bench.lab.pages.training.checkpoint import SHIPPED
from llava_edge.convert import convert, verify
from llava_edge.convert.planning.request import ConvertRequest
from llava_edge.convert.quality.request import QualityRequest
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.profiles.errors import LlavaEdgeError, OutputExistsError, RequestError
from llava_edge.profiles.plan_request import PlanRequest
from llava_edge.runtime import open_artifact

_MADE_INSIDE = {
    # Fields that are made of arguments of other names, or of none.
    ("variants", "model"),
    ("vision_wide_weights", None),
    ("wishes", None),
    ("quantization", None),
    ("file", "quality"),
    ("max_new_tokens", None),
}


def test_a_checkpoint_is_converted_verified_and_certified(tmp_path: Path) -> None:
    said: list[str] = []

    conversion = convert(
        SHIPPED,
        tmp_path / "artifact",
        profile="cpu-16gb",
        precision="fp16",
        context_tokens=1024,
        verify="none",
        notify=said.append,
    )
    with pytest.raises(OutputExistsError):
        convert(SHIPPED, tmp_path / "artifact", profile="cpu-16gb")
    certificate = verify(conversion.folder, SHIPPED, notify=said.append)

    assert conversion.manifest.context_tokens == 1024
    assert certificate.verdict == "pass"
    kept = open_artifact(conversion.folder, require_verified=True).certificate
    assert kept is not None
    assert kept.stages == certificate.stages
    assert any(line.startswith("verifying (quick)") for line in said)


@pytest.mark.parametrize("request_class", [ConvertRequest, PlanRequest, QuantizationRequest])
def test_every_field_of_a_request_is_an_argument(request_class: type[Any]) -> None:
    arguments = inspect.signature(convert).parameters
    names = {field.name for field in dataclasses.fields(request_class)}
    other = {field: argument for field, argument in _MADE_INSIDE if field in names}

    assert {other.get(name, name) for name in names} - {None} <= set(arguments)


def test_every_argument_of_questions_is_one_of_convert() -> None:
    arguments = inspect.signature(convert).parameters
    own = {f.name for f in dataclasses.fields(QualityRequest) if f.init}
    other = dict(_MADE_INSIDE)

    assert {other.get(name, name) for name in own} - {None} <= set(arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        {"precision": "int3"},
        {"vision_precision": "int4"},
        {"grid": "9x9"},
        {"context_tokens": -1},
        {"context_tokens": "8k"},
        {"num_images": 0},
        {"cache": "int4"},
        {"prefer": "slowest"},
        {"engine": "torch"},
        {"quantizer": "awq"},
        {"num_samples": 0},
        {"reference": "mine"},
        {"verify": "slowly"},
        {"max_loss": 0.1},
        {"model": "llava-v1.6-mistral-7b"},
        {"profile": "a1000"},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_a_wrong_argument_is_refused_before_anything_is_written(
    wrong: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "artifact"

    with pytest.raises(LlavaEdgeError) as raised:
        convert(SHIPPED, out, **{"profile": "cpu-16gb", **wrong})

    assert str(next(iter(wrong.values()))) in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_mode_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="mode 'none' is unknown; modes are quick, full"):
        verify(tmp_path, SHIPPED, mode="none")  # type: ignore[arg-type]


def test_importing_the_functions_imports_no_torch() -> None:
    code = (
        "import sys; from llava_edge.convert import convert, verify; print('torch' in sys.modules)"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "False"
