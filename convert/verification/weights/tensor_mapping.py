"""Which tensors of a checkpoint stand behind a tensor of a graph, and how they were turned.

Written from what the operators compute, not from the builders: a MatMul takes [K, N] where a linear
layer is [N, K]; the patch embedding's kernel [N, 3, p, p] becomes [3 p p, N]; query, key and value
lie side by side along N.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.verification.reference.modules import ReferenceStructure

_PACKED = ".self_attn.q_proj."
GPTQ_ENDS = (".qweight", ".qzeros", ".scales", ".g_idx")
"""Endings of the tensors that a GPTQ checkpoint has for one linear layer."""
POSITIONS = "vision_tower.embeddings.position_embedding.weight"
TABLE = "language_model.embed_tokens.weight"
NEWLINE = "image_newline"


@dataclass(frozen=True)
class Origin:
    """Where a graph's tensor comes from.

    ``names`` are canonical names of the checkpoint, one after another along their first axis;
    ``is_turned`` says that the graph has the transpose of that (axes behind the first as one).
    """

    names: tuple[str, ...]
    is_turned: bool


def origin_of(name: str, checkpoint: Checkpoint) -> Origin | None:
    """Tensors behind the initializer ``name``; None where the checkpoint has none of them."""
    names: tuple[str, ...] = (name,)
    if _PACKED in name:
        names = tuple(name.replace(_PACKED, f".self_attn.{part}_proj.") for part in "qkv")
    if not all(part in checkpoint.tensors for part in names):
        return None
    rank = len(checkpoint.tensors[name].shape)
    return Origin(names, rank > 1 and name != POSITIONS)


def needed_tensors(checkpoint: Checkpoint) -> set[str]:
    """Tensors that an artifact must hold in one form or another.

    Not among them: blocks of the tower behind the deepest feature layer and its last norm, which
    nothing reads, and biases of zeros that some tools write beside GPTQ codes.
    """
    reference = ReferenceStructure.of(checkpoint)
    used, every = max(reference.feature_layers), len(reference.tower.encoder.layers)
    idle: tuple[str, ...] = (
        *(f"vision_tower.encoder.layers.{block}." for block in range(used, every)),
        "vision_tower.post_layernorm.",
    )
    return {
        name
        for name in checkpoint.tensors
        if not name.startswith(idle) and not _is_empty_bias(name, checkpoint)
    }


def linear_layers(checkpoint: Checkpoint) -> list[str]:
    """Canonical names of the decoder's linear layers in order, the head last."""
    ends = (".weight", ".qweight")
    names = dict.fromkeys(
        name.removesuffix(end)
        for name in checkpoint.tensors
        for end in ends
        if name.startswith("language_model.layers.") and name.endswith(f"_proj{end}")
    )
    return [*sorted(names, key=_in_order), "lm_head"]


def _in_order(name: str) -> tuple[int, str]:
    return int(name.split(".")[2]), name


def _is_empty_bias(name: str, checkpoint: Checkpoint) -> bool:
    layer = name.removesuffix(".bias")
    if checkpoint.gptq is None or f"{layer}.qweight" not in checkpoint.tensors or layer == name:
        return False
    return not checkpoint.read(name).any()


def unused(names: Iterable[str], used: set[str]) -> list[str]:
    """Names of a checkpoint that no tensor of the artifact stands for, sorted."""
    return sorted(set(names) - used)
