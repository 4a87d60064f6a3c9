"""The safetensors reader against the reference library, and against damaged files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from llava_edge.convert.util.safetensors_io import read_header, read_tensor, write_safetensors
from llava_edge.profiles.errors import CheckpointError


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    "dtype", ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (7, 3), (2, 1, 3, 5)], ids=str)
def test_every_type_and_shape_reads_as_the_library_wrote_it(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(3).integers(0, 100, shape).astype(dtype)
    file = tmp_path / "a.safetensors"
    save_file({"first": np.arange(3, dtype=np.uint8), "wanted": values}, file)
    ref = read_header(file)["wanted"]
    read = read_tensor(ref)
    assert ref.shape == shape
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


def test_bfloat16_comes_back_as_float32_with_the_same_values(tmp_path: Path) -> None:
    values = torch.randn(1000, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[0, :4] = torch.tensor([float("inf"), -0.0, 1e-40, 3.4e38])
    file = tmp_path / "a.safetensors"
    save_torch({"x": values}, file)
    read = read_tensor(read_header(file)["x"])
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read.view(np.uint32), values.float().numpy().view(np.uint32))


@pytest.mark.parametrize(
    "rows", [slice(0, 3), slice(4, 11), slice(10, 99), slice(5, 5), slice(-2, None)], ids=str
)
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_range_of_rows_is_that_range_of_the_whole(
    tmp_path: Path, dtype: str, rows: slice
) -> None:
    kind = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    file = tmp_path / "a.safetensors"
    save_torch({"x": torch.arange(11 * 6).reshape(11, 2, 3).to(kind)}, file)
    ref = read_header(file)["x"]
    np.testing.assert_array_equal(read_tensor(ref, rows), read_tensor(ref)[rows])


def test_rows_of_a_scalar_and_steps_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"s": np.ones((), np.float32), "v": np.zeros(4, np.float32)}, file)
    header = read_header(file)
    with pytest.raises(ValueError, match="no rows"):
        read_tensor(header["s"], slice(0, 1))
    with pytest.raises(ValueError, match="step 1"):
        read_tensor(header["v"], slice(0, 4, 2))


def test_what_is_written_in_blocks_the_library_reads_back(tmp_path: Path) -> None:
    whole = np.arange(35, dtype=np.float16).reshape(7, 5)
    values = {"a": [whole[:3], whole[3:]], "ünïcode": [np.array([7], np.int64)]}
    file = tmp_path / "a.safetensors"
    write_safetensors(
        file,
        [("a", "F16", (7, 5)), ("ünïcode", "I64", (1,))],
        lambda name: values[name],
        {"format": "pt"},
    )
    read = load_file(file)
    np.testing.assert_array_equal(read["a"], whole)
    assert read["ünïcode"].tolist() == [7]
    assert read_header(file)["a"].offset % 8 == 0


def test_tensors_written_at_once_lie_where_they_would_one_by_one(tmp_path: Path) -> None:
    listed = [(str(n), "F16", (n, 3)) for n in range(1, 9)]
    both = threading.Barrier(2, timeout=20)

    def blocks(name: str) -> Iterator[NDArray[np.float16]]:
        for row in range(int(name)):
            yield np.full(3, int(name) + row / 16, np.float16)

    def together(name: str) -> Iterator[NDArray[np.float16]]:
        if name in "12":
            both.wait()
        yield from blocks(name)

    write_safetensors(tmp_path / "1", listed, blocks)
    write_safetensors(tmp_path / "2", listed, together, threads=2)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("threads", [1, 2])
def test_writing_other_values_than_the_shape_has_is_an_error(tmp_path: Path, threads: int) -> None:
    listed = [("a", "F16", (3,)), ("b", "F16", (3,))]
    for values, said in ((2, "4 bytes were"), (4, "8 bytes or more were")):

        def blocks(name: str, count: int = values) -> list[NDArray[np.float16]]:
            return [np.zeros(count if name == "a" else 3, np.float16)]

        with pytest.raises(ValueError, match=f"^a: {said} given for shape"):
            write_safetensors(tmp_path / "a", listed, blocks, threads=threads)


DAMAGE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty file": (lambda p: (p.write_bytes(b""), p)[1], "no whole safetensors file: 0 B"),
    "git-lfs pointer": (
        lambda p: (p.write_text("version https://git-lfs.github.com/spec/v1\n"), p)[1],
        "git-lfs pointer",
    ),
    "header beyond the file": (lambda p: raw_file(p, {}, length=5000), "header length 5000"),
    "header length of 2**63": (lambda p: raw_file(p, {}, length=1 << 63), "header length"),
    "no json": (lambda p: raw_file(p, b"{'a': 1}"), "no valid JSON"),
    "no utf-8": (lambda p: raw_file(p, b'{"\xff": 1}'), "no UTF-8 text"),
    "json list": (lambda p: raw_file(p, [1, 2]), "no JSON object"),
    "deep json": (lambda p: raw_file(p, b"[" * 200_000), "no valid JSON"),
    "same key twice": (
        lambda p: raw_file(p, b'{"a": {"dtype": "U8"}, "a": {"dtype": "U8"}}'),
        "key a occurs twice",
    ),
    "entry no object": (lambda p: raw_file(p, {"a": 1}), "a: entry is no object"),
    "unknown type": (lambda p: raw_file(p, {"a": entry(0, 1, "F7")}, b"."), "unknown dtype 'F7'"),
    "type a list": (lambda p: raw_file(p, {"a": {"dtype": ["F16"]}}), "unknown dtype ['F16']"),
    "negative size": (
        lambda p: raw_file(p, {"a": entry(0, 2, shape=[-2])}, b".."),
        "malformed",
    ),
    "size a bool": (lambda p: raw_file(p, {"a": entry(0, 1, shape=[True])}, b"."), "malformed"),
    "one offset": (
        lambda p: raw_file(p, {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"."),
        "malformed",
    ),
    "offsets backwards": (lambda p: raw_file(p, {"a": entry(2, 0, shape=[2])}, b".."), "span -2"),
    "span too short": (
        lambda p: raw_file(p, {"a": entry(0, 2, "F16", [2])}, b".."),
        "needs 4 bytes, data_offsets span 2",
    ),
    "hole": (lambda p: raw_file(p, {"a": entry(0, 1), "b": entry(2, 3)}, b"..."), "leaves a hole"),
    "overlap": (lambda p: raw_file(p, {"a": entry(0, 2), "b": entry(1, 3)}, b"..."), "overlaps"),
    "first not at zero": (lambda p: raw_file(p, {"a": entry(1, 2)}, b".."), "leaves a hole"),
    "truncated": (lambda p: raw_file(p, {"a": entry(0, 9)}, b"."), "truncated: the header asks"),
    "product of many large sides": (
        lambda p: raw_file(p, {"a": entry(0, 1, shape=[1 << 39] * 500_000)}, b"."),
        "malformed",
    ),
    "product of sides of 4,000 digits": (
        lambda p: raw_file(p, {"a": entry(0, 1, shape=[int("9" * 4000)] * 100)}, b"."),
        "a number of 4000 digits",
    ),
    "side of 10,000 digits": (
        lambda p: raw_file(
            p, b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % (b"9" * 10_000), b"."
        ),
        "a number of 10000 digits",
    ),
    "largest sides": (
        lambda p: raw_file(p, {"a": entry(0, 1, shape=[1 << 40] * 8)}, b"."),
        "data_offsets span 1",
    ),
    "offsets of 90 digits": (
        lambda p: raw_file(p, {"a": entry(0, int("9" * 90), shape=[1])}, b"."),
        "malformed",
    ),
    "side not a number": (
        lambda p: raw_file(p, b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"."),
        "malformed",
    ),
    "elements that share bytes": (
        lambda p: raw_file(p, {"a": entry(0, 1, "F4", [2])}, b"."),
        "quantised weights",
    ),
    "name that a terminal obeys": (
        lambda p: raw_file(p, {"a\n\x1b[2J": entry(0, 2, shape=[1])}, b".."),
        r"a\n\x1b[2J: U8",
    ),
    "bytes behind": (lambda p: raw_file(p, {"a": entry(0, 1)}, b"..."), "2 bytes lie behind"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_with_what_is_wrong(tmp_path: Path, damage: str) -> None:
    make, said = DAMAGE[damage]
    with pytest.raises(CheckpointError) as caught:
        read_header(make(tmp_path / "bad.safetensors"))
    assert said in str(caught.value)
    assert "bad.safetensors" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2_000


def test_faults_of_several_tensors_are_reported_together(tmp_path: Path) -> None:
    file = raw_file(tmp_path / "a.safetensors", {"a": entry(0, 1, "F7"), "b": 3})
    with pytest.raises(CheckpointError, match=r"a: unknown dtype.*b: entry is no object"):
        read_header(file)


def test_a_missing_file_is_refused_and_a_folder_too(tmp_path: Path) -> None:
    for path, named in ((tmp_path / "none.safetensors", "No such file"), (tmp_path, "a folder")):
        with pytest.raises(CheckpointError, match=named):
            read_header(path)


def test_a_file_that_shrinks_after_it_was_opened_is_said(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": np.zeros(1000, np.float32)}, file)
    ref = read_header(file)["a"]
    os.truncate(file, 500)
    with pytest.raises(CheckpointError, match="ends inside tensor a"):
        read_tensor(ref)
    file.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        read_tensor(ref)


def test_eight_bit_floats_are_known_but_not_read(tmp_path: Path) -> None:
    file = raw_file(tmp_path / "a.safetensors", {"a": entry(0, 2, "F8_E4M3")}, b"..")
    ref = read_header(file)["a"]
    with pytest.raises(CheckpointError, match="F8_E4M3, which is not read"):
        read_tensor(ref)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 300))
def test_any_flipped_byte_or_cut_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    save_file({"a": np.arange(6, dtype=np.int16), "b": np.ones((2, 3), np.float32)}, file)
    data = bytearray(file.read_bytes())
    data[position % len(data)] = value
    file.write_bytes(bytes(data[: len(data) - cut if cut < len(data) else 0]))
    try:
        refs = read_header(file)
    except CheckpointError:
        return
    for ref in refs.values():
        assert read_tensor(ref).nbytes == ref.nbytes


PEAK_OF_A_ROW_RANGE = """
import sys
from pathlib import Path
from llava_edge.convert.util.safetensors_io import read_header, read_tensor

def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

ref = read_header(Path(sys.argv[1]))["x"]
read_tensor(ref, slice(0, 16))
before = peak()
for start in range(0, ref.shape[0], 4096):
    assert read_tensor(ref, slice(start, start + 16)).sum() == 0
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_reading_a_range_of_rows_needs_memory_for_that_range_only(tmp_path: Path) -> None:
    """256 MiB on disk as a hole; a mapping or a whole read would show in the peak."""
    rows, width = 1 << 16, 2048
    file = raw_file(
        tmp_path / "big.safetensors", {"x": entry(0, 2 * rows * width, "F16", [rows, width])}
    )
    os.truncate(file, file.stat().st_size + 2 * rows * width)
    grown_kib = subprocess.run(
        [sys.executable, "-c", PEAK_OF_A_ROW_RANGE, str(file)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert int(grown_kib) < 4096
