"""What a decoder with an int8 KV cache may differ in from the one with a float cache.

Its caches are int8, each GroupQueryAttention has scales and says so, and the scales are the only
further tensors. All else is equal to the last byte, so that whatever other stages find of the float
graph holds for this one too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import helper

from llava_edge.convert.onnx.graph_file import GraphFile
from llava_edge.convert.onnx.graph_view import GraphView
from llava_edge.convert.onnx.int8_kv_cache import (
    ATTENTION,
    CACHE_ATTRIBUTES,
    CACHE_NAMES,
    SCALE_INPUTS,
    scales_digest,
)
from llava_edge.convert.verification.structure.node_faults import opset_faults
from llava_edge.convert.verification.structure.operator_schema import value_of
from llava_edge.profiles.errors import ArtifactError
from llava_edge.profiles.memory.buffers import cache_scale_shape
from llava_edge.runtime.artifact.graph_signature import scale_names
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.util.arrays import Array

_INT8 = 3
_FIRST_EXTRA = 9
"""GroupQueryAttention of the float graph ends with its rotary tables, inputs 7 and 8."""


def read_scales(graph: GraphFile, num_layers: int) -> tuple[Array, Array]:
    """Scales of keys and of values, float32 [layers, kv_heads, head_dim] each."""
    keys, values = zip(
        *([graph.read(name)[0, :, 0] for name in scale_names(n)] for n in range(num_layers)),
        strict=True,
    )
    return np.stack(keys), np.stack(values)


def cache_faults(artifact: Artifact) -> list[str]:
    """One sentence for everything in the second graph that is not as it must be."""
    spec, manifest = artifact.manifest.decoder_int8_cache, artifact.manifest
    if spec is None:
        return []
    try:
        plain = GraphView(artifact.path(manifest.decoder.file), "decoder")
        graph = GraphView(artifact.path(spec.file), "decoder with int8 cache")
        faults = [*opset_faults(graph.model), *_faults(plain, graph)]
        faults += _scale_faults(graph, artifact)
    except ArtifactError as error:
        return [f"decoder with int8 cache: {error}"]
    return [f"decoder with int8 cache: {fault}" for fault in faults]


def _faults(plain: GraphView, graph: GraphView) -> Iterator[str]:
    if len(plain.nodes) != len(graph.nodes):
        yield f"it has {len(graph.nodes)} nodes, the float graph {len(plain.nodes)}"
        return
    layer = 0
    for have, want in zip(graph.nodes, plain.nodes, strict=True):
        if want.op_type == ATTENTION == have.op_type:
            yield from _attention_faults(have, layer)
            layer += 1
            have = _without_scales(have)
        if have != want:
            name = have.name or want.name
            yield f"node {name} differs from the float graph's{_where(have, want)}"
    further = {name for number in range(layer) for name in scale_names(number)}
    for name in sorted(plain.initializers.keys() | graph.initializers.keys()):
        ours, theirs = graph.initializers.get(name), plain.initializers.get(name)
        if ours is None or (theirs is None and name not in further):
            yield f"tensor {name} is in one of both graphs only"
        elif theirs is not None and ours != theirs:
            yield f"tensor {name} differs from the float graph's"
    yield from _value_faults(plain, graph)


def _where(have: Any, want: Any) -> str:
    """Names of the attributes that differ; empty where it is something else."""
    ours, theirs = ({e.name: e for e in node.attribute} for node in (have, want))
    names = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    return f" ({', '.join(names)})" if names else ""


def _attention_faults(node: Any, layer: int) -> Iterator[str]:
    found = [*node.input, *[""] * (SCALE_INPUTS[-1] + 1)][_FIRST_EXTRA : SCALE_INPUTS[-1] + 1]
    wanted = ["", "", "", *scale_names(layer)]
    if found != wanted or len(node.input) > SCALE_INPUTS[-1] + 1:
        yield f"node {node.name} reads {found} from input {_FIRST_EXTRA} on, must be {wanted}"
    for name, value in CACHE_ATTRIBUTES.items():
        # As entries: one of them may be there twice, or be of another type.
        entries = [entry for entry in node.attribute if entry.name == name]
        if entries != [helper.make_attribute(name, value)]:
            have = ", ".join(str(value_of(entry)) for entry in entries) or None
            yield f"node {node.name}: {name} is {have}, must be {value}"


def _without_scales(node: Any) -> Any:
    plain = type(node)()
    plain.CopyFrom(node)
    del plain.input[_FIRST_EXTRA:]
    kept = [entry for entry in node.attribute if entry.name not in CACHE_ATTRIBUTES]
    del plain.attribute[:]
    plain.attribute.extend(kept)
    return plain


def _value_faults(plain: GraphView, graph: GraphView) -> Iterator[str]:
    ours, theirs = ([*view.model.graph.input, *view.model.graph.output] for view in (graph, plain))
    if len(ours) != len(theirs):
        yield f"{len(ours)} values go in and out, in the float graph {len(theirs)}"
        return
    for have, want in zip(ours, theirs, strict=True):
        expected = type(want)()
        expected.CopyFrom(want)
        if want.name.startswith(CACHE_NAMES):
            expected.type.tensor_type.elem_type = _INT8
        if have != expected:
            yield f"{want.name} goes in or out as something else than in the float graph"


def _scale_faults(graph: GraphFile, artifact: Artifact) -> Iterator[str]:
    text = artifact.manifest.model.text
    for layer in range(text.num_hidden_layers):
        for name in scale_names(layer):
            shape = graph.shape(name)
            if shape != cache_scale_shape(text) or graph.dtype(name) != "float32":
                yield f"tensor {name} is {graph.dtype(name)}{shape}"
                return
            values = graph.read(name)
            if not (np.isfinite(values).all() and (values > 0).all()):
                yield f"tensor {name} holds a scale that is not above zero"
    facts = artifact.manifest.conversion.get("int8_cache")
    stated = facts.get("scales_sha256") if isinstance(facts, dict) else None
    if scales_digest(*read_scales(graph, text.num_hidden_layers)) != stated:
        yield "its scales are not those that were calibrated (scales_sha256 of manifest.json)"
