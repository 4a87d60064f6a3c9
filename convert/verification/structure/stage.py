"""The stage "structure": do the graphs do what the checkpoint's config.json says?

Everything that decides a graph's meaning beside its weights is read back from the file and compared
with transformers' own classes: counts, wiring, epsilons, attention, rotary tables, activations,
quantised operators. One sentence a fault: which graph and node, what it has, what it should have.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.onnx.graph_file import GraphFile
from llava_edge.convert.verification.reference.modules import ReferenceStructure
from llava_edge.convert.verification.structure.decoder_attributes import (
    AttentionAttributes,
    DecoderAttributes,
    DecoderLayerAttributes,
    read_decoder,
)
from llava_edge.convert.verification.structure.graph_attributes import GraphWalk, LinearAttributes
from llava_edge.convert.verification.structure.graph_comparison import (
    compare_linear,
    compare_norm,
    says,
)
from llava_edge.convert.verification.structure.int8_cache import cache_faults
from llava_edge.convert.verification.structure.manifest_record import manifest_record_faults
from llava_edge.convert.verification.structure.manifest_settings import manifest_settings_faults
from llava_edge.convert.verification.structure.node_faults import node_faults
from llava_edge.convert.verification.structure.rotary_tables import rotary_faults
from llava_edge.convert.verification.structure.vision import vision_faults
from llava_edge.profiles.errors import ArtifactError
from llava_edge.profiles.memory.formats import largest_block
from llava_edge.runtime.artifact.certificate import StageResult, exact
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.open import Artifact

STAGE = "structure"
_FORMS = {
    ("int8", "two-term"): "MatMulIntegerToFloat",
    ("int8", "integer"): "MatMulIntegerToFloat",
    ("fp16", None): "MatMul",
}
_BITS = {"fp16": 16, "int8": 8, "int4": 4}


def structure_stage(artifact: Artifact, checkpoint: Checkpoint) -> StageResult:
    """Compare both graphs and the manifest with the checkpoint's configuration.

    Args:
        artifact: the one to judge.
        checkpoint: what it was made from.

    Returns:
        One row; ``value`` counts the faults.
    """
    reference = ReferenceStructure.of(checkpoint)
    manifest = artifact.manifest
    faults = manifest_settings_faults(artifact, checkpoint, reference)
    faults += manifest_record_faults(artifact, checkpoint)
    looked_at = []
    for label, spec, find in (
        ("vision", manifest.vision, vision_faults),
        ("decoder", manifest.decoder, decoder_faults),
    ):
        try:
            graph = GraphFile(artifact.path(spec.file), label)
            faults += find(graph, manifest, reference)
        except ArtifactError as error:
            faults.append(f"{label}: {error}")
        else:
            looked_at.append(f"{len(graph.nodes)} nodes of {spec.file}")
    faults += cache_faults(artifact)
    if manifest.decoder_int8_cache is not None:
        looked_at.append(f"{manifest.decoder_int8_cache.file} beside it")
    return exact(STAGE, "faults", faults, f"{', '.join(looked_at)}, manifest.json")


def decoder_faults(
    graph: GraphFile, manifest: Manifest, reference: ReferenceStructure
) -> list[str]:
    """Where a decoder graph differs from the reference's language model.

    Args:
        graph: the decoder.
        manifest: for what no config.json says: precision, length of the rotary tables.
        reference: the expectation.
    """
    walk = GraphWalk(graph, manifest.precision.computes)
    found = read_decoder(walk)
    check = _Decoder(walk, manifest, reference)
    check.whole(found)
    walk.faults += node_faults(walk, found.is_whole)
    return walk.faults


class _Decoder:
    """One comparison; faults go into the walk's list."""

    def __init__(self, walk: GraphWalk, manifest: Manifest, reference: ReferenceStructure) -> None:
        self._walk = walk
        self._manifest = manifest
        self._reference = reference
        self._tables: set[tuple[str, str]] = set()

    def whole(self, found: DecoderAttributes) -> None:
        layers = self._reference.decoder.layers
        if found.is_whole and len(found.layers) != len(layers):
            self._walk.faults.append(
                f"decoder: it has {len(found.layers)} layers; config.json says {len(layers)}"
            )
        # Where the wiring broke off, the layers behind the break are known, counted from the end.
        first = 0 if found.is_whole else len(layers) - len(found.layers)
        for place, layer in enumerate(found.layers):
            if 0 <= first + place < len(layers):
                self._layer(first + place, layer)
        if found.final_norm is not None:
            module = self._reference.decoder.norm
            compare_norm(self._walk, found.final_norm, "language_model.norm", module)
        if found.head is not None:
            bits = _BITS[self._manifest.precision.lm_head]
            self._linear(found.head, ["lm_head"], [self._reference.head], bits)
        for cosine, sine in sorted(self._tables):
            rows = self._manifest.context_tokens
            tables = (cosine, sine)
            self._walk.faults += rotary_faults(self._walk.graph, tables, rows, self._reference)

    def _layer(self, index: int, layer: DecoderLayerAttributes) -> None:
        module, prefix = self._reference.decoder.layers[index], f"language_model.layers.{index}"
        attention, mlp = module.self_attn, module.mlp
        for norm, name in (
            (layer.input_norm, "input_layernorm"),
            (layer.post_norm, "post_attention_layernorm"),
        ):
            compare_norm(self._walk, norm, f"{prefix}.{name}", getattr(module, name))
        bits = _BITS[self._manifest.precision.language_model]
        packed = ["q_proj", "k_proj", "v_proj"]
        for have, owner, path, parts in (
            (layer.qkv, attention, "self_attn", packed),
            (layer.o, attention, "self_attn", ["o_proj"]),
            (layer.gate, mlp, "mlp", ["gate_proj"]),
            (layer.up, mlp, "mlp", ["up_proj"]),
            (layer.down, mlp, "mlp", ["down_proj"]),
        ):
            names = [f"{prefix}.{path}.{part}" for part in parts]
            self._linear(have, names, [getattr(owner, part) for part in parts], bits)
        activation = type(mlp.act_fn).__name__
        if activation != "SiLUActivation":
            self._walk.faults.append(
                f"decoder, {prefix}.mlp: it computes SiLU; config.json says {activation}"
            )
        self._attention(index, layer.attention, attention)

    def _attention(self, index: int, have: AttentionAttributes, module: Any) -> None:
        node = have.node
        text = self._reference.text
        window = self._reference.windows[index]
        implied = have.scale or module.head_dim**-0.5
        self._says(node, "num_heads", have.num_heads, text.num_attention_heads)
        self._says(node, "kv_num_heads", have.kv_num_heads, text.num_key_value_heads)
        self._says(node, "scale", np.float32(implied), np.float32(module.scaling))
        self._says(node, "do_rotary", have.do_rotary, 1)
        self._says(node, "rotary_interleaved", have.rotary_interleaved, 0)
        self._says(node, "local_window_size", have.window, -1 if window is None else window)
        self._says(node, "softcap", have.softcap, 0.0)
        names = tuple(
            f"{kind}.{index}.{part}"
            for kind in ("past_key_values", "present")
            for part in ("key", "value")
        )
        self._says(node, "cache", have.cache, names)
        self._tables.add(have.tables)

    def _linear(
        self, have: LinearAttributes, names: list[str], modules: list[Any], bits: int
    ) -> None:
        compare_linear(self._walk, have, names, modules)
        precision = self._manifest.precision
        is_head = names == ["lm_head"]
        # A head has groups of its own, whatever the layers have; where they are not recorded it
        # has the operator of the layers, or groups of any size.
        group = self._manifest.conversion.get("head_group_size" if is_head else "group_size")
        form = "MatMul"
        if bits != 16:
            form = _FORMS.get((f"int{bits}", precision.int8_route), "MatMulNBits")
            if is_head and group not in (None, -1):
                form = "MatMulNBits"
            # The standard operator is another spelling of the same numbers.
            form = have.op_type if have.op_type == "DequantizeLinear" else form
        self._states(have.node, "operator", have.op_type, form)
        self._states(have.node, "bits", have.bits, bits)
        self._states(have.node, "factor in front of it", have.input_factor, None)
        rounds = is_head or have.op_type == "MatMulIntegerToFloat"
        rounds = rounds and bits == 8 and have.op_type != "DequantizeLinear"
        terms = 2 if rounds and precision.int8_route == "two-term" else 1
        self._states(have.node, "number of codes of an activation", have.terms, terms)
        if bits != 16 and group not in (None, -1):
            largest = largest_block(precision.language_model, self._manifest.target)
            # Up to version 3 a block was a group, however large.
            block = min(group, largest) if self._manifest.schema_version > 3 else group
            self._states(have.node, "block_size", have.block_size, block)

    def _says(self, node: str, what: str, have: object, want: object) -> None:
        says(self._walk, node, what, have, want)

    def _states(self, node: str, what: str, have: object, want: object) -> None:
        says(self._walk, node, what, have, want, "manifest.json")
