from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.runtime.session import Buffer, _map_error

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
