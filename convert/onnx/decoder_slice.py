"""DecoderSlice: some layers cut out of an artifact's own decoder graph, runnable by themselves.

The nodes are those of the artifact and the weights are read from its file in place; nothing is
built anew. What lies before the first layer is replaced by the residual stream as an input (named
``inputs_embeds``), what lies behind the last one by the residual stream as an output (named
``logits``), so that the runtime's own ``Decoder`` runs a slice as it runs the whole, with its
cache, chunks and steps. With the head in it the output really is logits.

A slice of a few layers needs the memory of a few layers; so does a cut, the first layers with the
head right behind them, which the whole runtime runs as a smaller model (``loop_cut``). And a slice
of one layer, with its inner tensors as further outputs, shows where an artifact leaves the
reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from llava_edge.convert.onnx.graph_view import GraphView
from llava_edge.profiles.errors import ArtifactError
from llava_edge.profiles.models.model_dims import ModelDims, TextDims
from llava_edge.runtime.artifact.graph_inputs import LOGITS_START, LOGITS_TO_KEEP
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions

_INPUT_NORM = "language_model.layers.{}.input_layernorm"
_FINAL_NORM = "language_model.norm"
_KEPT = (LOGITS_TO_KEEP, LOGITS_START)


@dataclass(frozen=True)
class DecoderSlice:
    """Layers ``first`` to ``stop`` (exclusive) as a model of their own.

    Attributes:
        model: serialised ONNX, its weights in ``folder``.
        folder: of the artifact's decoder.
        text: dimensions as the runtime's decoder takes them: as many layers as there are, and the
            hidden size for the vocabulary where there is no head.
        has_head: whether final norm and head are in it.
        values: names of what goes in and comes out.
    """

    model: bytes
    folder: Path
    text: TextDims
    has_head: bool
    values: frozenset[str]

    def open(self, options: SessionOptions) -> Session:
        """Load it.

        Raises:
            EngineError: ONNX Runtime refuses it.
        """
        return Session.from_bytes(self.model, self.folder, options)


class DecoderGraph:
    """The decoder graph of an artifact, without its weights.

    Args:
        path: the graph; with a float or an int8 cache.
        dims: of the model.

    Raises:
        ArtifactError: the graph does not have the layers that the manifest says.
    """

    def __init__(self, path: Path, dims: ModelDims) -> None:
        self._view = GraphView(path, "decoder")
        self._dims = dims
        for layer in range(self._count):
            self._view.place(_INPUT_NORM.format(layer))
        self._view.place(_FINAL_NORM)

    def slice(
        self, first: int, stop: int, extra: Sequence[str] = (), *, head: bool | None = None
    ) -> DecoderSlice:
        """Cut layers out.

        Args:
            first: first layer; their number for none of them and the head alone.
            stop: layer after the last.
            extra: names of inner values that become further outputs.
            head: whether final norm and head come with it, right behind the last of the layers;
                left out, they come with the last layer of all.
        """
        text = self._dims.text
        has_head = stop == text.num_hidden_layers if head is None else head
        body = self._view.nodes[self._start(first) : self._start(stop)]
        closing = self._head_nodes(stop) if has_head else self._closing(stop)
        nodes = [*self._opening(first), *body, *closing]
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in node.input}
        graph = self._view.model.graph
        layers = range(first, stop)
        inputs = [
            value
            for value in graph.input
            if value.name in read and (value.name not in made) and value.name != "inputs_embeds"
        ]
        embeds = next(value for value in graph.input if value.name == "inputs_embeds")
        keep = next(value for value in graph.input if value.name in _KEPT)
        outputs = [value for value in graph.output if value.name in made and value.name != "logits"]
        width = text.vocab_size if has_head else text.hidden_size
        logits = helper.make_tensor_value_info(
            "logits", TensorProto.FLOAT, [1, "logits_to_keep", width]
        )
        others = [helper.make_empty_tensor_value_info(name) for name in extra if name != "logits"]
        if keep.name not in [value.name for value in inputs]:
            inputs.append(keep)
        small = helper.make_graph(
            nodes,
            f"layers {first} to {stop}",
            [embeds, *inputs],
            [logits, *outputs, *others],
            [tensor for tensor in graph.initializer if tensor.name in read],
        )
        _renumber(small, layers)
        opsets = list(self._view.model.opset_import)
        model = helper.make_model(
            small, opset_imports=opsets, ir_version=self._view.model.ir_version
        )
        sizes = replace(
            text,
            num_hidden_layers=stop - first,
            vocab_size=width,
            sliding_windows=text.sliding_windows[first:stop],
        )
        names = frozenset(value.name for value in (*small.input, *small.output))
        return DecoderSlice(model.SerializeToString(), self._view.folder, sizes, has_head, names)

    def layer_values(self, layer: int) -> dict[str, str]:
        """Names of the inner values of a layer, in order, by what the reference calls them.

        Keys are canonical module names; ``…self_attn.qkv`` stands for the three projections side by
        side, ``…self_attn`` for what the output projection reads. The last layer brings the final
        norm and the head, whose rows are those that are asked for.
        """
        prefix = f"language_model.layers.{layer}"
        attention = self._view.node(f"{prefix}.self_attn.attention")
        second = self._view.node(f"{prefix}.post_attention_layernorm")
        found = {
            f"{prefix}.input_layernorm": self._view.node(f"{prefix}.input_layernorm").output[0],
            f"{prefix}.self_attn.qkv": attention.input[0],
            f"{prefix}.self_attn": attention.output[0],
            f"{prefix}.self_attn.o_proj": second.input[1],
            f"{prefix}.post_attention_layernorm": second.output[0],
        }
        for part in ("gate", "up"):
            name = f"{prefix}.mlp.{part}_proj"
            found[name] = self._view.linear(name)
        found[f"{prefix}.mlp.down_proj"] = self._contributions(layer + 1)[1]
        if layer + 1 == self._count:
            found[_FINAL_NORM] = self._view.node(_FINAL_NORM).output[0]
            found["lm_head"] = "logits"
        return found

    @property
    def _count(self) -> int:
        return self._dims.text.num_hidden_layers

    def _start(self, layer: int) -> int:
        """Index of a layer's first node; of the head's first where layer is their number."""
        if layer < self._count:
            return self._view.place(_INPUT_NORM.format(layer))
        return self._view.place(self._maker(self._contributions(layer)[1]).name) + 1

    def _contributions(self, layer: int) -> tuple[str, str]:
        """Residual stream and last contribution that meet before a layer, or before the head."""
        if layer < self._count:
            names = self._view.node(_INPUT_NORM.format(layer)).input[:2]
        else:
            # The head picks rows of both before its norm adds them.
            final = self._view.node(_FINAL_NORM)
            names = [self._maker(name).input[0] for name in final.input[:2]]
        return str(names[0]), str(names[1])

    def _maker(self, value: str) -> Any:
        maker = self._view.producer(value)
        if maker is None:
            raise ArtifactError(f"nothing in the decoder graph makes {value!r}")
        return maker

    def _opening(self, first: int) -> list[Any]:
        """Nodes that hand the input to the first norm as residual and contribution."""
        if first == 0:
            return []
        residual, delta = self._contributions(first)
        # x and x − x: the graph's own node, which adds the two, stays as it is.
        return [
            helper.make_node("Identity", ["inputs_embeds"], [residual]),
            helper.make_node("Sub", ["inputs_embeds", "inputs_embeds"], [delta]),
        ]

    def _head_nodes(self, stop: int) -> list[Any]:
        """The graph's own head, reading what lies in front of a layer, or of the head itself."""
        nodes = self._view.nodes[self._start(self._count) :]
        if stop == self._count:
            return nodes
        theirs = dict(zip(self._contributions(self._count), self._contributions(stop), strict=True))
        moved = []
        for node in nodes:
            fresh = type(node)()
            fresh.CopyFrom(node)
            fresh.input[:] = [theirs.get(name, name) for name in node.input]
            moved.append(fresh)
        return moved

    def _closing(self, stop: int) -> list[Any]:
        """Nodes that add up the residual stream and pick its last rows, as the head would."""
        residual, delta = self._contributions(stop)
        numbers = {
            "slice_axis": np.array([1], np.int64),
            "slice_end": np.array([np.iinfo(np.int64).max], np.int64),
        }
        given = any(value.name == LOGITS_START for value in self._view.model.graph.input)
        if not given:
            numbers["slice_zero"] = np.array([0], np.int64)
        constants = [
            helper.make_node("Constant", [], [name], value=_tensor(array, name))
            for name, array in numbers.items()
        ]
        start, place = [], LOGITS_START
        if not given:
            place = "slice_start"
            start = [
                helper.make_node("Neg", [LOGITS_TO_KEEP], ["slice_minus"]),
                helper.make_node("Unsqueeze", ["slice_minus", "slice_zero"], [place]),
            ]
        return [
            *constants,
            helper.make_node("Add", [residual, delta], ["slice_sum"]),
            *start,
            helper.make_node(
                "Slice", ["slice_sum", place, "slice_end", "slice_axis"], ["slice_rows"]
            ),
            helper.make_node("Cast", ["slice_rows"], ["logits"], to=TensorProto.FLOAT),
        ]


def _renumber(graph: Any, layers: range) -> None:
    """Caches of the slice count from zero, as the runtime's cache does."""
    names = {
        f"{kind}.{layer}.{part}": f"{kind}.{layer - layers.start}.{part}"
        for layer in layers
        for kind in ("past_key_values", "present")
        for part in ("key", "value")
    }
    if layers.start == 0:
        return
    # Two steps, since old and new names overlap.
    for step in (
        {old: f"{new}." for old, new in names.items()},
        {f"{v}.": v for v in names.values()},
    ):
        for node in graph.node:
            node.input[:] = [step.get(name, name) for name in node.input]
            node.output[:] = [step.get(name, name) for name in node.output]
        for value in (*graph.input, *graph.output):
            value.name = step.get(value.name, value.name)


def _tensor(array: np.ndarray[Any, Any], name: str) -> TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, array.shape, array.tolist())
