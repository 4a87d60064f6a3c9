"""Everything that a node has and nobody expects: attributes, inputs, outputs, nodes themselves.

``GraphWalk`` follows the wiring and notes which nodes it met and which of their attributes it
compared. What is left over when it is done is a fault, so that an operator's further switches
(``smooth_softmax``, a softcap, a bias that no layer has) are found without a list of them. An
attribute that holds the operator's own default may be written out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from onnx import AttributeProto

from llava_edge.convert.verification.structure.graph_attributes import GraphWalk
from llava_edge.convert.verification.structure.operator_schema import (
    OPSETS,
    OperatorSchema,
    operator_schema,
    value_of,
)

_SHOWN = 60
_TYPES = {int(code): name for name, code in AttributeProto.AttributeType.items()}


def node_faults(walk: GraphWalk, is_whole: bool) -> list[str]:
    """What a graph holds beside what was compared.

    Args:
        walk: over a graph that was followed to its inputs.
        is_whole: whether the wiring was followed to its end; where it broke off, nobody can tell
            which nodes were left over.
    """
    label = walk.graph.label
    faults = [f"{label}: {fault}" for fault in _model_faults(walk.graph.model)]
    followed = {id(node) for node in walk.graph.nodes}
    for node in walk.graph.model.graph.node:
        name = f"{label}, node {node.name or node.op_type}"
        schema = operator_schema(node.domain, node.op_type)
        if schema is None:
            domain = node.domain or "ai.onnx"
            faults.append(f"{name}: the operator {domain}::{node.op_type} is none of the model's")
            continue
        faults += [f"{name}: {fault}" for fault in _entry_faults(node, schema)]
        # Casts at the shores of islands are judged where the islands are; they have one attribute.
        met = id(node) not in followed or walk.has_met(node)
        if met:
            compared = walk.compared(node) if id(node) in followed else {"to"}
            faults += [f"{name}: {fault}" for fault in _unexpected(node, schema, compared)]
        elif is_whole:
            faults.append(f"{name}: it is no part of the model that config.json describes")
    return faults


def opset_faults(model: Any) -> list[str]:
    """Where a model imports other operator sets than ``OPSETS``."""
    found = sorted((entry.domain, entry.version) for entry in model.opset_import)
    if found == sorted(OPSETS.items()):
        return []
    shown, wanted = (
        ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sets)
        for sets in (found, sorted(OPSETS.items()))
    )
    return [f"the operator sets are {shown or 'none'}, must be {wanted}"]


def _model_faults(model: Any) -> Iterator[str]:
    yield from opset_faults(model)
    if model.functions:
        yield f"it has {len(model.functions)} functions of its own"
    if model.graph.sparse_initializer:
        yield f"it has {len(model.graph.sparse_initializer)} sparse tensors"


def _entry_faults(node: Any, schema: OperatorSchema) -> Iterator[str]:
    """Attributes by name and type, and which inputs and outputs a node has."""
    counts = Counter(entry.name for entry in node.attribute)
    for name, count in counts.items():
        if count > 1:
            yield f"the attribute {name} is there {count} times"
    for entry in node.attribute:
        if entry.name not in schema.attributes:
            yield f"the attribute {entry.name} is {_shown(entry)}; {node.op_type} has none such"
            continue
        kind = schema.attributes[entry.name][0]
        if entry.type != kind or entry.ref_attr_name:
            have = "a reference" if entry.ref_attr_name else _TYPES.get(entry.type, "of no type")
            yield f"the attribute {entry.name} is {have}, must be {_TYPES[kind]}"
    for what, values, allowed in (
        ("inputs", node.input, schema.inputs),
        ("outputs", node.output, schema.outputs),
    ):
        places = tuple(place for place, value in enumerate(values) if value)
        if allowed and places not in allowed:
            further = [place for place in places if place not in max(allowed, key=len)]
            if further:
                found = ", ".join(f"{place} ({values[place]})" for place in further)
                yield f"it has the unexpected {what} {found}"
            else:
                yield f"its {what} are {list(places)}, must be {_choices(allowed)}"


def _unexpected(node: Any, schema: OperatorSchema, compared: set[str]) -> Iterator[str]:
    """Attributes that nobody compared and that are not the operator's default."""
    for entry in node.attribute:
        if entry.name in compared or entry.name not in schema.attributes:
            continue
        default = schema.attributes[entry.name][1]
        have = value_of(entry)
        if have != default:
            expected = "absent" if default is None else f"absent or {default}, the default"
            yield f"the attribute {entry.name} is {_shown(entry)}, must be {expected}"


def _shown(entry: Any) -> str:
    return str(value_of(entry))[:_SHOWN]


def _choices(allowed: tuple[tuple[int, ...], ...]) -> str:
    return " or ".join(str(list(places)) for places in allowed)
