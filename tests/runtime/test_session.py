from __future__ import annotations

import numpy as np
import pytest

from llava_edge.runtime.session import Buffer


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
