"""What a node has beside what was compared is a fault of the stage "structure", named."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_edge.convert.verification.structure.stage import structure_stage
from llava_edge.runtime.artifact.open import open_artifact
from tests.faults.fault import Fault
from tests.faults.models.fault_models import FaultModels
from tests.faults.models.tamper import Tampered
from tests.faults.seeded.model.faults_attributes import FAULTS

SAYS = {
    "smooth softmax": "attention: the attribute smooth_softmax is 1",
    "softcap of scores": "attention: softcap is 50.0; config.json says 0.0",
    "a window of the whole context": "attention: local_window_size is 1024; config.json says -1",
    "a window of none": "attention: local_window_size is 0; config.json says -1",
    "neighbours rotated": "attention: rotary_interleaved is 1; config.json says 0",
    "no rotary": "attention: do_rotary is 0; config.json says 1",
    "scale left to one": "attention: scale is 1.0; config.json says 0.25",
    "not causal": "attention: the attribute causal is 0",
    "half the key heads": "attention: kv_num_heads is 1; config.json says 2",
    "scores handed out": "attention: it has the unexpected outputs 3",
    "attention bias": "attention: it has the unexpected inputs 10",
    "head sink": "attention: it has the unexpected inputs 11",
    "positions of its own": "attention: it has the unexpected inputs 9",
    "norm of queries": "attention: it has the unexpected inputs 14",
    "a quantised float cache": "attention: the attribute k_quant_type is PER_TENSOR",
    "an attribute of nobody": "attention: the attribute alpha is 2.0; GroupQueryAttention has",
    "epsilon left out": "input_layernorm: epsilon is 1e-12; config.json says 1e-05",
    "epsilon twice": "input_layernorm: the attribute epsilon is there 2 times",
    "epsilon by reference": "input_layernorm: the attribute epsilon is a reference, must be FLOAT",
    "number of heads as a float": "attention: the attribute num_heads is FLOAT, must be INT",
    "bias of a norm": "input_layernorm: it has the unexpected inputs 3",
    "mean of a norm": "input_layernorm: it has the unexpected outputs 1",
    "axis of the first norm": "input_layernorm: axis is 1, must be -1",
    "norm in half": "input_layernorm: the attribute stash_type is 10",
    "transposed product": "down_proj: the attribute transB is 1; MatMul has none such",
    "standard opset": "decoder: the operator sets are ai.onnx 20, com.microsoft 1",
    "contributed opset": "decoder: the operator sets are ai.onnx 21, com.microsoft 2",
    "columns gathered backwards": "reordered comes from node reorder (Gather)",
    "a layer's output clipped": "clipped comes from node clip (Clip), Mul must be there",
    "a node left over": "left_over: it is no part of the model that config.json describes",
    "two tensors of one name": "model.onnx: two tensors have one name",
    "softmax over heads": "Softmax_0: axis is -2, must be -1",
    "tower gelu by tanh": "Gelu_0: activation is gelu_tanh; config.json says gelu",
    "tower norm in half": "layer_norm1: the attribute stash_type is 10",
    "tower norm over tokens": "layer_norm1: axis is 1, must be -1",
    "tower norm without epsilon": "layer_norm1: epsilon is 1e-12; config.json says 1e-05",
    "zeros of a shape kept": "Reshape_0: the attribute allowzero is 1",
    "cast saturates not": "cast: the attribute saturate is 0",
    "cast to float16 on the way": "cast: to is None, must be float32",
    "query of another block": "Squeeze_4: the Split that it reads is Split_1, must be Split_0",
    "class token by channels": "Shape_0: start and end is (1, 2), must be (0, 1)",
    "a third part of the tokens": "Concat_1: number of inputs is 3, must be 2",
    "a scale that a node makes": "Mul_0: input 1 (own_scale) is no constant of the file",
    "accuracy level": "down_proj: accuracy_level is 0, must be 4",
    "bits left out": "down_proj: bits is 2; manifest.json says 4",
    "block size": "down_proj: number of scales is 480, must be 960",
    "prepacked": "down_proj: the attribute weight_prepacked is 1",
    "bias of a product": "down_proj: it has the unexpected inputs 5",
    "axis of rounding": "QuantizeLinear_0: the attribute axis is 0",
    "blocks of rounding": "QuantizeLinear_0: the attribute block_size is 32",
    "rounding does not saturate": "QuantizeLinear_0: the attribute saturate is 0",
    "type of codes": "QuantizeLinear_0: the attribute output_dtype is 3",
    "largest over nothing": "ReduceMax_0: the attribute noop_with_empty_axes is 1",
    "rows without an axis": "ReduceMax_0: keepdims is 0, must be 1",
    "a third largest": "Max_0: it has the unexpected inputs 2",
    "bias inside an integer product": "down_proj: it has the unexpected inputs 6",
    "type of the cache twice": "attention: k_quant_type is PER_CHANNEL, PER_TENSOR",
    "smooth softmax with an int8 cache": "differs from the float graph's (smooth_softmax)",
    "opset of the int8 cache": "int8 cache: the operator sets are ai.onnx 20, com.microsoft 1",
    "bits of the cache": "attention: kv_cache_bit_width is 4, must be 8",
    "integer kernels on cuda": "down_proj: accuracy_level is 4, must be 0",
    "logits stay half": "Cast_0: to is 10, must be 1",
    "axis of the best": "TopK_0: axis is 1, must be -1",
    "pooled by tiles": "Gather_0: axis is 0, must be 1",
}
"""What the row says of each fault: the node, and what is wrong with it."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_an_unexpected_property_of_a_node_is_found_without_running_it(
    fault: Fault, models: FaultModels, tmp_path: Path
) -> None:
    made = models[fault.model]
    copy = Tampered(made.artifact, tmp_path / "copy")
    fault.plant(copy)
    folder = copy.seal()

    result = structure_stage(open_artifact(folder, verify_digests=False), made.checkpoint)

    assert result.verdict == "fail"
    assert SAYS[fault.id] in result.detail


def test_faults_of_nodes_are_many_and_each_has_its_sentence() -> None:
    assert len(FAULTS) >= 60
    assert list(SAYS) == [fault.id for fault in FAULTS]
