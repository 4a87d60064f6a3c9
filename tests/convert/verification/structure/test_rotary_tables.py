"""Rotary tables are the reference's at every position, within one unit in the last place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.onnx.graph_file import GraphFile
from llava_edge.convert.verification.reference.modules import ReferenceStructure
from llava_edge.convert.verification.structure import rotary_tables
from llava_edge.convert.verification.structure.rotary_tables import rotary_faults
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.util.arrays import Array
from tests.faults.models.tamper import Tampered

Opened = Callable[[Path, Path], tuple[Artifact, Checkpoint]]
NAMES = ("cos_cache", "sin_cache")
THETA, HALF, ROWS = 10000.0, 8, 640


def angles(theta: float = THETA, positions: Array | None = None) -> Array:
    """float32 [positions, half], as the reference multiplies them."""
    inverse = (theta ** (-np.arange(HALF) / HALF)).astype(np.float32)
    rows = np.arange(ROWS, dtype=np.float32) if positions is None else positions
    return np.outer(rows, inverse).astype(np.float32)


def anew(make: Callable[[], Array]) -> Callable[[str, Array], Array]:
    """Both tables from other angles."""

    def change(name: str, old: Array) -> Array:
        function = np.cos if name == "cos_cache" else np.sin
        return function(make().astype(np.float64)).astype(old.dtype)

    return change


def one_position(name: str, old: Array) -> Array:
    old[-1] = old[-2]
    return old


def two_units(name: str, old: Array) -> Array:
    """One number of one position, two units in the last place away."""
    for _ in range(2):
        old[ROWS - 3, 2] = np.nextafter(old[ROWS - 3, 2], old.dtype.type(2))
    return old


def half_interleaved(name: str, old: Array) -> Array:
    """The first columns in the order of neighbouring pairs."""
    old[:, : HALF // 2] = old[:, : HALF // 2][:, [0, 2, 1, 3]]
    return old


def no_number(name: str, old: Array) -> Array:
    old[5, 0] = np.nan
    return old


def rounded_before(name: str, old: Array) -> Array:
    """Rounded to bfloat16 on the way."""
    wide = old.astype(np.float32)
    return (wide.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32).astype(old.dtype)


def cut_off(name: str, old: Array) -> Array:
    """Digits cut off in place of rounded."""
    exact = (np.cos if name == "cos_cache" else np.sin)(angles().astype(np.float64))
    found = exact.astype(old.dtype)
    return np.where(np.abs(found) > np.abs(exact), np.nextafter(found, found.dtype.type(0)), found)


FAULTS: dict[str, Callable[[str, Array], Array]] = {
    "the last position is the one before": one_position,
    "one number is two units away": two_units,
    "theta is a per mille larger": anew(lambda: angles(THETA * 1.001)),
    "theta is a millionth larger": anew(lambda: angles(THETA * 1.000001)),
    "half of the columns are interleaved": half_interleaved,
    "positions are rounded to float16": anew(
        lambda: angles(positions=(np.arange(ROWS) * 4.0 + 1).astype(np.float16) / np.float32(4))
    ),
    "frequencies are rounded to float16": anew(
        lambda: np.outer(np.arange(ROWS), angles()[1].astype(np.float16)).astype(np.float32)
    ),
    "a number is none": no_number,
}
OF_FLOAT16 = {
    **{k: v for k, v in FAULTS.items() if "units" not in k and "millionth" not in k},
    "numbers are rounded to bfloat16 first": rounded_before,
    "digits are cut off": cut_off,
}


@pytest.fixture(scope="module")
def llama(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("odd", backbone="llama")


def found(opened: Opened, artifact: Path, checkpoint: Path) -> list[str]:
    one, other = opened(artifact, checkpoint)
    graph = GraphFile(one.path(one.manifest.decoder.file), "decoder")
    return rotary_faults(graph, NAMES, one.manifest.context_tokens, ReferenceStructure.of(other))


@pytest.mark.parametrize(
    ("form", "name"),
    [("fp16", name) for name in FAULTS] + [("fp16 cuda", name) for name in OF_FLOAT16],
)
def test_a_table_that_is_not_the_references_is_found(
    llama: Path,
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    tmp_path: Path,
    form: str,
    name: str,
) -> None:
    change = (FAULTS if form == "fp16" else OF_FLOAT16)[name]
    copy = Tampered(make_form(llama, form), tmp_path / "copy")
    for table in NAMES:
        copy.change_tensor("decoder", table, lambda old, table=table: change(table, old))

    faults = found(opened, copy.seal(), llama)

    assert faults
    assert all("differ from the rotary embedding of config.json" in fault for fault in faults)


def test_a_table_that_ends_early_is_found(
    llama: Path, make_form: Callable[[Path, str], Path], opened: Opened
) -> None:
    artifact, checkpoint = opened(make_form(llama, "fp16"), llama)
    graph = GraphFile(artifact.path(artifact.manifest.decoder.file), "decoder")

    faults = rotary_faults(graph, NAMES, ROWS + 1, ReferenceStructure.of(checkpoint))

    assert ["its shape is (640, 8)" in fault for fault in faults] == [True, True]


@pytest.mark.parametrize("form", ["fp16", "fp16 cuda"])
@pytest.mark.parametrize("rows", [1, 7, 640, 4096])
def test_sound_tables_pass_however_many_positions_are_compared_at_once(
    llama: Path,
    make_form: Callable[[Path, str], Path],
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    rows: int,
) -> None:
    monkeypatch.setattr(rotary_tables, "_ROWS", rows)

    assert found(opened, make_form(llama, form), llama) == []


def test_frequencies_of_another_machine_pass_where_one_fits_a_column_in_both_tables(
    llama: Path, make_form: Callable[[Path, str], Path], opened: Opened, tmp_path: Path
) -> None:
    reference = ReferenceStructure.of(opened(make_form(llama, "fp16"), llama)[1])
    mixed = reference.frequencies(0).numpy().copy()
    mixed[1::3], mixed[2::3] = (
        reference.frequencies(step).numpy()[k::3] for k, step in ((1, 1), (2, -1))
    )
    faults = []
    for place, names in enumerate((NAMES, NAMES[:1])):
        copy = Tampered(make_form(llama, "fp16"), tmp_path / f"copy{place}")
        for name in names:
            change = anew(lambda: np.outer(np.arange(ROWS, dtype=np.float32), mixed))
            copy.change_tensor("decoder", name, lambda old, n=name, c=change: c(n, old))
        faults.append(found(opened, copy.seal(), llama))

    assert faults[0] == []
    # Cosine and sine of two frequencies turn no pair of numbers.
    assert faults[1]
