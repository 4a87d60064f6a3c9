"""Rows come from the file by position, in any order, and are the stored float16 values."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llava_edge.convert.onnx.embeddings import write_embeddings
from llava_edge.profiles.errors import ArtifactError, PromptError
from llava_edge.profiles.models.model_dims import ModelDims, TextDims, VisionDims
from llava_edge.runtime.generation.inputs.embedding_table import EmbeddingTable
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.opened_file import OpenedFile

VOCAB, HIDDEN = 11, 6
TABLE = (np.arange(VOCAB * HIDDEN).reshape(VOCAB, HIDDEN) / 8).astype(np.float16)
NEWLINE = np.full(HIDDEN, -1, np.float16)


def model(model_type: str = "llava_next", vocab: int = VOCAB) -> ModelDims:
    vision = VisionDims(4, 8, 2, 2, 28, 14, 1e-5, "quick_gelu", (1,), "gelu", True)
    text = TextDims(
        "llama",
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=HIDDEN,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        rope_factor=1.0,
        max_position_embeddings=64,
        hidden_act="silu",
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        sliding_windows=(0,),
        tie_word_embeddings=False,
    )
    return ModelDims(model_type, vision, text, (), 0, None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_embeddings(tmp_path / "e.safetensors", [TABLE[:4], TABLE[4:]], NEWLINE)
    return tmp_path / "e.safetensors"


@pytest.fixture
def table(path: Path) -> Iterator[EmbeddingTable]:
    with EmbeddingTable(OpenedFile(path), model()) as opened:
        yield opened


IDS = pytest.mark.parametrize(
    "ids",
    [[], [3], [0, VOCAB - 1], [5, 5, 5], [4, 3, 2, 1], [1, 2, 3, 7, 8, 10], [10, 0, 10, 0]],
    ids=str,
)


@IDS
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_are_the_stored_values_in_the_type_asked_for(
    table: EmbeddingTable, ids: list[int], dtype: type[np.float32] | type[np.float16]
) -> None:
    rows = table.rows(np.array(ids, np.int64), dtype=dtype)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows, TABLE[np.array(ids, np.int64)])


@IDS
def test_rows_fill_a_buffer_that_need_not_be_contiguous(
    table: EmbeddingTable, ids: list[int]
) -> None:
    buffer = np.zeros((len(ids), 2 * HIDDEN), np.float32)
    out = buffer[:, ::2]
    assert table.rows(np.array(ids, np.int32), out=out) is out
    np.testing.assert_array_equal(buffer[:, ::2], TABLE[np.array(ids, np.int64)])
    assert not buffer[:, 1::2].any()


def test_a_long_prompt_is_read_in_blocks(table: EmbeddingTable) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, 5000)
    np.testing.assert_array_equal(table.rows(ids), TABLE[ids])


def test_neighbours_and_repetitions_take_one_read(
    table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, int]] = []
    real = os.pread

    def spy(descriptor: int, length: int, offset: int) -> bytes:
        reads.append((length, offset))
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", spy)
    table.rows(np.array([4, 3, 5, 4, 9, 5]))
    assert [length for length, _ in reads] == [3 * 2 * HIDDEN, 2 * HIDDEN]


def test_the_newline_comes_whole_and_cannot_be_changed(table: EmbeddingTable) -> None:
    assert table.image_newline is not None
    np.testing.assert_array_equal(table.image_newline, NEWLINE)
    with pytest.raises(ValueError, match="read-only"):
        table.image_newline[0] = 0


@pytest.mark.parametrize("ids", [[-1], [VOCAB], [0, 10**12]], ids=str)
def test_an_id_without_a_row_is_refused_by_number(table: EmbeddingTable, ids: list[int]) -> None:
    with pytest.raises(PromptError, match=f"{ids[-1]} have no embedding.*0 to 10"):
        table.rows(np.array(ids))


@pytest.mark.parametrize(
    "ids", [np.zeros((1, 2), np.int64), np.zeros(2, np.float32)], ids=["matrix", "floats"]
)
def test_ids_that_are_no_list_of_integers_are_refused(table: EmbeddingTable, ids: Array) -> None:
    with pytest.raises(ValueError, match="list of integers"):
        table.rows(ids)


def test_a_buffer_of_another_shape_is_refused(table: EmbeddingTable) -> None:
    with pytest.raises(ValueError, match=r"out must be .* \[2, 6\]"):
        table.rows(np.array([1, 2]), out=np.zeros((2, 5), np.float32))


def test_threads_share_one_table(table: EmbeddingTable) -> None:
    failures: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(50):
            ids = rng.integers(0, VOCAB, 20)
            if not np.array_equal(table.rows(ids), TABLE[ids]):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_closed_table_says_so_and_holds_no_descriptor(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    table = EmbeddingTable(OpenedFile(path), model())
    table.close()
    table.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ArtifactError, match="is closed"):
        table.rows(np.array([1]))


def test_a_file_cut_after_opening_is_an_error_not_a_crash(
    table: EmbeddingTable, path: Path
) -> None:
    os.truncate(path, path.stat().st_size - 2 * HIDDEN - 1)
    with pytest.raises(ArtifactError, match="ends before its last row"):
        table.rows(np.array([VOCAB - 1]))


def test_a_table_from_the_usual_library_is_read_too(tmp_path: Path) -> None:
    save_file({"image_newline": NEWLINE, "embed_tokens": TABLE}, tmp_path / "e.safetensors")
    with EmbeddingTable(OpenedFile(tmp_path / "e.safetensors"), model()) as table:
        np.testing.assert_array_equal(table.rows(np.array([10, 2])), TABLE[[10, 2]])


def test_a_model_without_tiles_has_no_newline(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e.safetensors", [TABLE], None)
    with EmbeddingTable(OpenedFile(tmp_path / "e.safetensors"), model("llava")) as table:
        assert table.image_newline is None
        np.testing.assert_array_equal(table.rows(np.array([10])), TABLE[[10]])


def test_a_table_of_another_model_is_refused(path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"not F16 \[12, 6\]"):
        EmbeddingTable(OpenedFile(path), model(vocab=12))
    with pytest.raises(ArtifactError, match="holds embed_tokens, image_newline, not embed_tokens"):
        EmbeddingTable(OpenedFile(path), model("llava"))


def entry(**changes: object) -> dict[str, object]:
    table = {"dtype": "F16", "shape": [VOCAB, HIDDEN], "data_offsets": [0, 132]}
    newline = {"dtype": "F16", "shape": [HIDDEN], "data_offsets": [132, 144]}
    return {"embed_tokens": {**table, **changes}, "image_newline": newline}


@pytest.mark.parametrize(
    "header",
    [
        entry(dtype="F32"),
        entry(shape=[VOCAB, HIDDEN + 1]),
        entry(data_offsets=[0, 131]),
        entry(data_offsets=[-132, 0]),
        entry(data_offsets=[1 << 62, (1 << 62) + 132]),
        entry(data_offsets=[13, 145]),
        entry(data_offsets=[0]),
        {"embed_tokens": 1, "image_newline": 2},
        {**entry(), "another": entry()["image_newline"]},
        {},
        [],
        "text",
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(144)
    (tmp_path / "e.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="does not fit the model"):
        EmbeddingTable(OpenedFile(tmp_path / "e.safetensors"), model())


@pytest.mark.parametrize(
    "data",
    [b"", b"\x01", b"\xff" * 8, (1 << 17).to_bytes(8, "little") + bytes(1 << 18), bytes(8)],
    ids=["empty", "cut", "huge", "long", "zero"],
)
def test_a_file_without_a_bounded_header_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "e.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError):
        EmbeddingTable(OpenedFile(tmp_path / "e.safetensors"), model())
