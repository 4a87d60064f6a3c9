from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.artifact.manifest import Precision
from llava_edge.runtime.backends.cpu_isa import needs_wide_sums

INTEGER = Precision("int8", "int8", "fp16", "fp16", "float32", "integer")


@pytest.mark.parametrize(
    "flags", ["flags : avx2 avx512_vnni", "flags : amx_int8", "Features : fp asimd asimddp"]
)
def test_processors_with_int8_dot_products_take_their_fastest_kernel(
    tmp_path: Path, flags: str
) -> None:
    (tmp_path / "cpuinfo").write_text(flags)

    assert not needs_wide_sums(INTEGER, tmp_path / "cpuinfo")


def test_x86_without_them_sums_in_32_bits(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags : sse4_2 avx2 fma\n")

    assert needs_wide_sums(INTEGER, tmp_path / "cpuinfo", "x86_64")
    assert needs_wide_sums(INTEGER, tmp_path / "missing", "x86_64")


def test_other_architectures_without_them_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("Features : fp asimd\n")

    with pytest.raises(EngineError, match="not known to be exact"):
        needs_wide_sums(INTEGER, tmp_path / "cpuinfo", "aarch64")


@pytest.mark.parametrize("route", ["nbits", None])
def test_other_routes_need_nothing(tmp_path: Path, route: str | None) -> None:
    precision = replace(INTEGER, int8_route=route)  # type: ignore[arg-type]

    assert not needs_wide_sums(precision, tmp_path / "missing", "aarch64")
