from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llava_edge.profiles.boards.cpu_limit import CpuLimit
from llava_edge.profiles.errors import ArtifactError, EngineError, OutOfMemoryError
from llava_edge.runtime.artifact.opened_files import OpenedFiles
from llava_edge.runtime.backends import onnxruntime as session_module
from llava_edge.runtime.backends.onnxruntime import Buffer, Session, SessionOptions, _map_error
from llava_edge.runtime.util import opened_file

_SPINNING = "session.intra_op.allow_spinning"

BEYOND_A_LIMIT = """
import json, numpy, onnxruntime as ort
from onnx import helper

kind = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR
memory = ort.OrtMemoryInfo("Cpu", kind, 0, ort.OrtMemType.DEFAULT)
ort.create_and_register_allocator(memory, ort.OrtArenaCfg(1 << 20, 1, -1, -1))
given, made = (helper.make_tensor_value_info(name, 1, ["n", "n"]) for name in "xy")
nodes = [helper.make_node("MatMul", ["x", "x"], ["y"])]
graph = helper.make_graph(nodes, "g", [given], [made])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
options = ort.SessionOptions()
options.log_severity_level = 4
options.add_session_config_entry("session.use_env_allocators", "1")
session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
try:
    session.run(None, {"x": numpy.ones((1024, 1024), numpy.float32)})
except Exception as error:
    print(json.dumps(str(error)))
"""
"""In a process of its own: an allocator is registered for all of one."""


def test_memory_beyond_the_limit_of_an_arena_has_run_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEYOND_A_LIMIT], check=True, capture_output=True, text=True
    )
    said = json.loads(done.stdout)

    assert "MatMul" in said
    error = _map_error(RuntimeError(said), "running the graph")
    assert isinstance(error, OutOfMemoryError)


def test_an_artifact_that_needs_cudnn_is_to_be_converted_again() -> None:
    """What ONNX Runtime 1.31.1 says of the mean that video towers had before."""
    said = (
        "Non-zero status code returned while running ReduceMean node. Name:'ReduceMean_0' Status "
        "Message: cuDNN is unavailable for CUDA Execution Provider: dlopen failed for libcudnn.so"
    )
    error = _map_error(RuntimeError(said), "running the graph")

    assert isinstance(error, EngineError)
    assert "Convert the checkpoint again" in str(error)


@pytest.mark.parametrize("shared", [True, False], ids=["host", "device"])
def test_the_first_rows_of_a_buffer_are_its_own_memory(shared: bool) -> None:
    whole = Buffer((1, 4, 3), np.float32, "cpu")
    if not shared:
        # Elsewhere than on the CPU no array shares the memory; ONNX Runtime copies.
        whole.array = None
    part = whole.first(2)

    part.write(np.ones((1, 2, 3), np.float32))

    np.testing.assert_array_equal(part.read(), np.ones((1, 2, 3)))
    np.testing.assert_array_equal(whole.read()[:, :2], np.ones((1, 2, 3)))
    assert part.address == whole.address
    assert part.nbytes == whole.nbytes // 2
    assert part.by_address == ("cpu", 0, np.float32, (1, 2, 3), whole.address)


def graph(name: str) -> bytes:
    """``y = x * w`` with w float32 [3], where x may have any length."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [helper.make_node("Mul", ["x", name], ["y"])],
        "toy",
        [value("x", TensorProto.FLOAT, ["n"])],
        [value("y", TensorProto.FLOAT, None)],
        [weight],
    )
    imports = [helper.make_opsetid("", 21)]
    return bytes(helper.make_model(made, ir_version=10, opset_imports=imports).SerializeToString())


@pytest.mark.parametrize("found", [b"nowhere", b"\xff\xfehere"], ids=["text", "no text"])
def test_a_graph_that_does_not_open_is_an_error_and_no_word(
    found: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Found by fuzzing: ONNX Runtime announces a second try, and its own words may be no UTF-8.
    data = graph("nowhere").replace(b"nowhere", found[:7].ljust(7, b"x"))

    with pytest.raises(EngineError, match="failed while opening"):
        Session.from_bytes(data, tmp_path, SessionOptions(threads=1))
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_run_that_fails_is_an_error_and_no_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    session = Session.from_bytes(graph("w"), tmp_path, SessionOptions(threads=1))

    with pytest.raises(EngineError, match="failed while running"):
        session.run({"x": np.ones(2, np.float32)}, ["y"])
    binding = session.binding()
    binding.input("x", Buffer((2,), np.float32, "cpu"))
    binding.output("y", Buffer((3,), np.float32, "cpu"))
    for shrink in (False, True):
        with pytest.raises(EngineError, match="failed while running"):
            binding.run(shrink=shrink)
    assert tuple(capfd.readouterr()) == ("", "")


_CROWD = """
import os, sys
from pathlib import Path
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
tasks = lambda: {int(name) for name in os.listdir("/proc/self/task")}
before = tasks()
session = Session.from_bytes(Path(sys.argv[1]).read_bytes(), Path("."), SessionOptions())
print(session.threads, len(tasks() - before), {len(os.sched_getaffinity(t)) for t in tasks()})
"""


def test_a_process_that_may_use_one_processor_gets_no_threads_that_wait_for_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "graph").write_bytes(graph("w"))
    command = [sys.executable, "-c", _CROWD, str(tmp_path / "graph")]
    done = subprocess.run(command, capture_output=True, text=True)
    # One thread, none beside it, and none that is bound to a processor outside.
    assert done.stdout == "1 0 {1}\n", done.stderr


def _opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: CpuLimit, threads: int = 0
) -> tuple[int, str]:
    """Threads of a session, and whether they wait busily (``1``, or nothing said)."""
    monkeypatch.setattr(session_module, "read_cpu_limit", lambda: limit)
    session = Session.from_bytes(graph("w"), tmp_path, SessionOptions(threads=threads))
    options = session._session.get_session_options()
    assert options.intra_op_num_threads == session.threads
    try:
        return session.threads, options.get_session_config_entry(_SPINNING)
    except RuntimeError:
        return session.threads, ""


def test_threads_are_as_many_as_are_allowed_and_more_do_not_wait_busily(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _opened(tmp_path, monkeypatch, CpuLimit(8, 8, 4)) == (4, "")
    assert _opened(tmp_path, monkeypatch, CpuLimit(8, 3, 3)) == (3, "")
    assert _opened(tmp_path, monkeypatch, CpuLimit(8, 8, 8, quota=2.0)) == (2, "")
    assert _opened(tmp_path, monkeypatch, CpuLimit(8, 2, 2, quota=4.0)) == (2, "")
    # More than that only where they were asked for.
    assert _opened(tmp_path, monkeypatch, CpuLimit(8, 8, 8, quota=1.5), 2) == (2, "0")
    assert _opened(tmp_path, monkeypatch, CpuLimit(8, 3, 3), 4) == (4, "")


def graph_over(folder: Path, values: list[float]) -> Path:
    """``y = x * w`` with w float32 [3] in ``weights.bin`` beside the graph."""
    folder.mkdir()
    model = onnx.ModelProto.FromString(graph("w"))
    weight = model.graph.initializer[0]
    weight.ClearField("float_data")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "4"), ("length", "12")):
        weight.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "weights.bin").write_bytes(np.array([0.0, *values], np.float32).tobytes())
    return folder / "model.onnx"


def product(session: Session) -> list[float]:
    (found,) = session.run({"x": np.ones(3, np.float32)}, ["y"])
    return [float(value) for value in found]


@pytest.mark.parametrize("paths", [True, False], ids=["by descriptor", "in memory"])
def test_weights_are_those_that_were_opened_whatever_their_name_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: bool
) -> None:
    if not paths:
        monkeypatch.setattr(opened_file, "DESCRIPTORS", tmp_path / "no such folder")
    graph_over(tmp_path / "one", [1.0, 2.0, 3.0])
    graph_over(tmp_path / "two", [7.0, 8.0, 9.0])
    with OpenedFiles(tmp_path) as files:
        opened = files["one/model.onnx"], files["one/weights.bin"]
        # The whole folder: ONNX Runtime would not open a file that has no name any more.
        (tmp_path / "one").rename(tmp_path / "old")
        (tmp_path / "two").rename(tmp_path / "one")
        session = Session.from_files(files, "one/model.onnx", SessionOptions(threads=1))
        assert opened[1] is files["one/weights.bin"]
    assert product(session) == [1.0, 2.0, 3.0]
    session.close()
    session.close()


def test_weights_may_lie_behind_a_link(tmp_path: Path) -> None:
    path = graph_over(tmp_path / "one", [1.0, 2.0, 3.0])
    for name in ("model.onnx", "weights.bin"):
        (path.parent / name).rename(tmp_path / name[:3])
        (path.parent / name).symlink_to(f"../{name[:3]}")
    assert product(Session(path, SessionOptions(threads=1))) == [1.0, 2.0, 3.0]
    data, folder = path.read_bytes(), path.parent
    assert product(Session.from_bytes(data, folder, SessionOptions(threads=1))) == [1.0, 2.0, 3.0]


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    path = graph_over(tmp_path / "one", [1.0, 2.0, 3.0])
    (path.parent / "weights.bin").unlink()
    with pytest.raises(ArtifactError, match=r"weights\.bin cannot be opened"):
        Session(path, SessionOptions(threads=1))


def test_opening_a_session_leaves_no_file_open(tmp_path: Path) -> None:
    path = graph_over(tmp_path / "one", [1.0, 2.0, 3.0])
    Session(path, SessionOptions(threads=1)).close()
    before = len(os.listdir("/proc/self/fd"))
    session = Session(path, SessionOptions(threads=1))
    assert len(os.listdir("/proc/self/fd")) == before
    session.close()
