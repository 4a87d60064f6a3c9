from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.session import Buffer, Session, SessionOptions


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
