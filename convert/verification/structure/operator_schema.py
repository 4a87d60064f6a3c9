"""OperatorSchema: attributes, inputs and outputs of the operators that a sound graph is made of.

Types and defaults of attributes are the standard's own (``onnx.defs``). Operators of ONNX Runtime
are not in it; theirs are written down here. An attribute that a node lacks has the operator's
default: what a reader of the graph takes for it must be that and nothing else.

Source: ``ContribOperators.md`` and ``bert_defs.cc`` of ONNX Runtime 1.32, ONNX opset 21.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
from onnx import AttributeProto, defs

STANDARD, MICROSOFT = "", "com.microsoft"
OPSETS: Mapping[str, int] = {STANDARD: 21, MICROSOFT: 1}
"""Versions of the operators by domain: another version may give an attribute another default."""

_INT, _FLOAT, _STRING = AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING
_Attributes = Mapping[str, tuple[int, Any]]

_RUNTIME: Mapping[tuple[str, str], _Attributes] = {
    (MICROSOFT, "GroupQueryAttention"): {
        "num_heads": (_INT, None),
        "kv_num_heads": (_INT, None),
        "scale": (_FLOAT, 0.0),
        "do_rotary": (_INT, 0),
        "rotary_interleaved": (_INT, 0),
        "local_window_size": (_INT, -1),
        "softcap": (_FLOAT, 0.0),
        "smooth_softmax": (_INT, -1),
        "qk_output": (_INT, 0),
        "causal": (_INT, 1),
        "sliding_window_cache": (_INT, 0),
        "k_quant_type": (_STRING, "NONE"),
        "v_quant_type": (_STRING, "NONE"),
        "kv_cache_bit_width": (_INT, None),
    },
    (MICROSOFT, "MatMulNBits"): {
        "K": (_INT, None),
        "N": (_INT, None),
        "bits": (_INT, 4),
        "block_size": (_INT, None),
        "accuracy_level": (_INT, 0),
        "weight_prepacked": (_INT, 0),
    },
    (MICROSOFT, "MatMulIntegerToFloat"): {},
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): {"epsilon": (_FLOAT, 1e-12)},
    # In the standard domain, outside the standard.
    (STANDARD, "SimplifiedLayerNormalization"): {
        "axis": (_INT, -1),
        "epsilon": (_FLOAT, 1e-5),
        "stash_type": (_INT, 1),
    },
}

_INPUTS: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "DequantizeLinear": ((0, 1), (0, 1, 2)),
    "GroupQueryAttention": ((0, 3, 4, 5, 6, 7, 8),),
    "LayerNormalization": ((0, 1), (0, 1, 2)),
    "MatMulIntegerToFloat": ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5)),
    "MatMulNBits": ((0, 1, 2),),
    "Max": ((0, 1),),
    "QuantizeLinear": ((0, 1, 2),),
    "ReduceMax": ((0, 1),),
    "ReduceMean": ((0, 1),),
    "ReduceSum": ((0, 1),),
    "SimplifiedLayerNormalization": ((0, 1),),
    "SkipSimplifiedLayerNormalization": ((0, 1, 2),),
    "Slice": ((0, 1, 2, 3), (0, 1, 2, 3, 4)),
    "Split": ((0,),),
    "Squeeze": ((0, 1),),
}
"""Places of the inputs that a node may read, where the operator leaves a choice."""
_OUTPUTS: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "GroupQueryAttention": ((0, 1, 2),),
    "SkipSimplifiedLayerNormalization": ((0,), (0, 3)),
    "Split": ((0, 1, 2),),
    "TopK": ((0, 1),),
}
"""Places of the outputs that a node may have, where they are not one."""
_ANY_NUMBER = frozenset({"Concat"})
"""Operators of any number of inputs; who follows the wiring looks at each of them."""


@dataclass(frozen=True)
class OperatorSchema:
    """One operator.

    Attributes:
        attributes: type (as ``AttributeProto``) and default by name; None for no default.
        inputs: allowed sets of places that are given; empty where any number is.
        outputs: the same of outputs.
    """

    attributes: _Attributes
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


@cache
def operator_schema(domain: str, op_type: str) -> OperatorSchema | None:
    """The schema of an operator at the versions of ``OPSETS``; None for one that is not known."""
    outputs = _OUTPUTS.get(op_type, ((0,),))
    own = _RUNTIME.get((domain, op_type))
    if own is not None:
        return OperatorSchema(own, _INPUTS[op_type], outputs)
    if domain != STANDARD or not defs.has(op_type, domain):
        return None
    standard = defs.get_schema(op_type, OPSETS[STANDARD], domain)
    attributes: dict[str, tuple[int, Any]] = {}
    for name, each in standard.attributes.items():
        # The stubs know nothing of this enumeration.
        kind: Any = each.type
        attributes[name] = (int(kind.value), value_of(each.default_value))
    inputs = _INPUTS.get(op_type, (tuple(range(standard.min_input)),))
    return OperatorSchema(attributes, () if op_type in _ANY_NUMBER else inputs, outputs)


def default_of(node: Any, name: str) -> Any:
    """What an operator takes for an attribute that a node lacks; None for nothing."""
    schema = operator_schema(node.domain, node.op_type)
    return None if schema is None else schema.attributes.get(name, (0, None))[1]


def value_of(entry: Any) -> Any:
    """An attribute's value, bytes as text; None for an entry without a value."""
    if not entry.type or entry.ref_attr_name:
        return None
    value = onnx.helper.get_attribute_value(entry)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
