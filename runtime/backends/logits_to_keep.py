"""How a decoder graph is told which positions to give logits for: the last ones, by their number.

The cpu target has the reference's input, the number itself. The cuda target has the place where
the kept positions start, counted from the end: what cuts rows reads it as it is in host memory.
Working it out of the number would be nodes of the graph, and ONNX Runtime runs those on the GPU,
with a copy there and one back in every run; it does not record a graph that has such copies.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.artifact.graph_inputs import LOGITS_START, LOGITS_TO_KEEP
from llava_edge.runtime.backends.onnxruntime import Session
from llava_edge.runtime.util.arrays import Array


def logits_input(session: Session, count: int) -> dict[str, Array]:
    """The input that asks for logits of the last ``count`` positions, by its name.

    Args:
        session: a decoder graph, or a part of one.
        count: 0 asks for all positions.
    """
    if session.has_input(LOGITS_START):
        return {LOGITS_START: np.array([-count], np.int64)}
    return {LOGITS_TO_KEEP: np.array(count, np.int64)}


def check_recordable(inputs: Collection[str]) -> None:
    """Refuse to record the steps of a decoder graph that works the place out itself.

    Args:
        inputs: names of the graph's inputs.

    Raises:
        EngineError: it does.
    """
    if LOGITS_START not in inputs:
        raise EngineError(
            "graph (CudaOptions) asks for decode steps to be recorded; ONNX Runtime does not "
            f"record the decoder of this artifact, which has the input {LOGITS_TO_KEEP} in place "
            f"of {LOGITS_START}. Convert the checkpoint again, or load without graph."
        )
