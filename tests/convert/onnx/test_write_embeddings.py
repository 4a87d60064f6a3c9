"""The table is written as a stream, as float16, and only if that keeps its values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from llava_edge.convert.onnx.embeddings import write_embeddings
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.util.arrays import Array


def test_blocks_become_one_tensor_that_the_usual_library_reads(tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    rows = write_embeddings(tmp_path / "e", (table[k : k + 4] for k in (0, 4, 8)), table[0])
    read = load_file(tmp_path / "e")
    assert rows == 10
    np.testing.assert_array_equal(read["embed_tokens"], table.astype(np.float16))
    np.testing.assert_array_equal(read["image_newline"], table[0].astype(np.float16))


def test_the_same_values_in_other_blocks_give_the_same_bytes(tmp_path: Path) -> None:
    table = np.arange(20, dtype=np.float32).reshape(10, 2)
    write_embeddings(tmp_path / "a", [table], table[0])
    write_embeddings(tmp_path / "b", [table[:1], table[1:]], table[0])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_values_start_at_a_multiple_of_512_bytes(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e", [np.ones((1, 2))], None)
    data = (tmp_path / "e").read_bytes()
    assert data[512:] == np.ones((1, 2), "<f2").tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, 65520.0, -1e30], ids=str)
@pytest.mark.parametrize("name", ["embed_tokens", "image_newline"])
def test_a_value_that_float16_does_not_hold_is_refused_by_tensor(
    tmp_path: Path, name: str, value: float
) -> None:
    table, newline = np.zeros((5, 3), np.float32), np.zeros(3, np.float32)
    (table[4] if name == "embed_tokens" else newline)[1] = value
    row = 4 if name == "embed_tokens" else 0
    with pytest.raises(CheckpointError, match=f"{name} holds .* at row {row}, column 1"):
        write_embeddings(tmp_path / "e", [table[:3], table[3:]], newline)


def test_the_largest_half_is_kept(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e", [np.array([[65504.0, 65519.0]])], None)
    np.testing.assert_array_equal(load_file(tmp_path / "e")["embed_tokens"], [[65504, 65504]])


@pytest.mark.parametrize(
    ("blocks", "newline"),
    [
        ([np.zeros((2, 3)), np.zeros((2, 4))], None),
        ([np.zeros((2, 3))], np.zeros(4)),
        ([np.zeros(3)], None),
        ([], np.zeros(3)),
    ],
    ids=["ragged blocks", "other newline", "no matrix", "no rows"],
)
def test_shapes_that_do_not_go_together_are_refused(
    tmp_path: Path,
    blocks: list[Array],
    newline: Array | None,
) -> None:
    with pytest.raises(CheckpointError, match="embed_tokens"):
        write_embeddings(tmp_path / "e", blocks, newline)
