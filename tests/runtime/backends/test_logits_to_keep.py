"""Which positions a decoder graph gives logits for, in both forms of the input."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llava_edge.profiles.errors import ArtifactError, EngineError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.graph_inputs import LOGITS_START, LOGITS_TO_KEEP
from llava_edge.runtime.artifact.graph_signature import check_interfaces
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.backends.logits_to_keep import check_recordable, logits_input
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from tests.runtime.artifact.test_artifact import edit_manifest, relist

GRAPH = "decoder/model.onnx"


def artifact_for(profile: str, make_checkpoint: Any, make_artifact: Any) -> Path:
    found: Path = make_artifact(make_checkpoint("odd"), profile=profile, context_tokens=1024)
    return found


@pytest.mark.parametrize(
    ("profile", "name", "asked"),
    [("cpu-16gb", LOGITS_TO_KEEP, np.array(3)), ("a100", LOGITS_START, np.array([-3]))],
)
def test_each_target_has_its_input(
    profile: str,
    name: str,
    asked: Any,
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
) -> None:
    made = artifact_for(profile, make_checkpoint, make_artifact)
    session = Session(made / "decoder" / "model.onnx", SessionOptions())

    ((found, value),) = logits_input(session, 3).items()

    assert found == name
    assert value.dtype == np.int64
    np.testing.assert_array_equal(value, asked)
    assert value.shape == asked.shape


def number_instead_of_start(folder: Path, target: Path) -> Path:
    """The artifact as a converter of before would have written it, for the cuda target."""
    shutil.copytree(folder, target)
    path = target / "decoder" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    (place,) = [n for n, v in enumerate(model.graph.input) if v.name == LOGITS_START]
    number = helper.make_tensor_value_info(LOGITS_TO_KEEP, TensorProto.INT64, [])
    model.graph.input[place].CopyFrom(number)
    model.graph.initializer.append(helper.make_tensor("first_axis", TensorProto.INT64, [1], [0]))
    first = next(n for n, node in enumerate(model.graph.node) if LOGITS_START in node.input)
    nodes = [
        helper.make_node("Neg", [LOGITS_TO_KEEP], ["minus"], "Neg_0"),
        helper.make_node("Unsqueeze", ["minus", "first_axis"], ["start"], "Unsqueeze_0"),
    ]
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == LOGITS_START:
                node.input[place] = "start"
    for offset, node in enumerate(nodes):
        model.graph.node.insert(first + offset, node)
    path.write_bytes(model.SerializeToString())
    return target


def name_the_number(manifest: dict[str, Any]) -> None:
    """What the manifest of such an artifact says."""
    for tensor in manifest["decoder"]["inputs"]:
        if tensor["name"] == LOGITS_START:
            tensor.update(name=LOGITS_TO_KEEP, shape=[])


def test_a_cuda_artifact_with_the_number_still_answers(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    tmp_path: Path,
) -> None:
    made = artifact_for("a100", make_checkpoint, make_artifact)
    old = number_instead_of_start(made, tmp_path / "old")

    relist(old, GRAPH)
    edit_manifest(old, name_the_number)
    answers = []
    for folder in (made, old):
        with LlavaEdge.load(folder, device="cpu", allow_slow=True) as model:
            answers.append(model.generate("What is it?", max_new_tokens=8).token_ids)

    assert answers[0] == answers[1]


def test_the_start_is_not_an_input_of_the_cpu_target(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    tmp_path: Path,
) -> None:
    made = artifact_for("cpu-16gb", make_checkpoint, make_artifact)
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)

    def rename(manifest: dict[str, Any]) -> None:
        for tensor in manifest["decoder"]["inputs"]:
            if tensor["name"] == LOGITS_TO_KEEP:
                tensor.update(name=LOGITS_START, shape=[1])

    model = onnx.load(copy / GRAPH, load_external_data=False)
    for value in model.graph.input:
        if value.name == LOGITS_TO_KEEP:
            value.CopyFrom(helper.make_tensor_value_info(LOGITS_START, TensorProto.INT64, [1]))
    (copy / GRAPH).write_bytes(model.SerializeToString())
    relist(copy, GRAPH)
    edit_manifest(copy, rename)
    with pytest.raises(ArtifactError, match="not those of the model"):
        check_interfaces(open_artifact(copy))


def test_recording_a_graph_with_the_number_is_refused_with_what_to_do() -> None:
    check_recordable({"inputs_embeds", LOGITS_START})
    with pytest.raises(EngineError, match=r"graph .CudaOptions.* Convert the checkpoint again"):
        check_recordable({"inputs_embeds", LOGITS_TO_KEEP})
