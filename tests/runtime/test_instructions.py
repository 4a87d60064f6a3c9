from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.instructions import check_instructions
from llava_edge.runtime.manifest import Precision

INTEGER = Precision("int8", "int8", "fp16", "fp16", "float32", "integer")


@pytest.mark.parametrize(
    "flags", ["flags : avx2 avx512_vnni", "flags : amx_int8", "Features : fp asimd asimddp"]
)
def test_processors_with_int8_dot_products_take_the_integer_route(
    tmp_path: Path, flags: str
) -> None:
    (tmp_path / "cpuinfo").write_text(flags)

    check_instructions(INTEGER, tmp_path / "cpuinfo")


def test_others_refuse_it_and_take_everything_else(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags : sse4_2 avx2 fma\n")

    with pytest.raises(EngineError, match="would saturate and be wrong"):
        check_instructions(INTEGER, tmp_path / "cpuinfo")
    with pytest.raises(EngineError):
        check_instructions(INTEGER, tmp_path / "missing")
    check_instructions(replace(INTEGER, int8_route="nbits"), tmp_path / "cpuinfo")
    check_instructions(replace(INTEGER, int8_route=None), tmp_path / "cpuinfo")
