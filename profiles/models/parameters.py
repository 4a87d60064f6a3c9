"""How many parameters each part has, from its dimensions alone. No bytes, no precision."""

from __future__ import annotations

from dataclasses import dataclass

from llava_edge.profiles.models.model_dims import ModelDims, TextDims, VisionDims


@dataclass(frozen=True)
class Matrix:
    """``count`` weight matrices of ``rows`` outputs and ``columns`` inputs each."""

    rows: int
    columns: int
    count: int

    @property
    def parameters(self) -> int:
        """Weights in all of them."""
        return self.rows * self.columns * self.count


def decoder_matrices(text: TextDims) -> tuple[Matrix, ...]:
    """The seven linear layers of each decoder layer; what a precision applies to."""
    hidden, layers = text.hidden_size, text.num_hidden_layers
    return (
        Matrix(text.query_size, hidden, layers),
        Matrix(text.key_value_size, hidden, 2 * layers),
        Matrix(hidden, text.query_size, layers),
        Matrix(text.intermediate_size, hidden, 2 * layers),
        Matrix(hidden, text.intermediate_size, layers),
    )


def decoder_vectors(text: TextDims) -> int:
    """Norm gains (two a layer and the last one) and biases; never quantised."""
    layer = 2 * text.hidden_size
    if text.qkv_bias:
        layer += text.query_size + 2 * text.key_value_size
    if text.o_bias:
        layer += text.hidden_size
    if text.mlp_bias:
        layer += 2 * text.intermediate_size + text.hidden_size
    return text.num_hidden_layers * layer + text.hidden_size


def head_parameters(text: TextDims) -> int:
    """The language model head; the embedding table has as many."""
    return text.vocab_size * text.hidden_size


def vision_parameters(vision: VisionDims, blocks: int | None = None) -> int:
    """The tower with ``blocks`` encoder blocks and no last norm; None for all of it as stored.

    What is computed needs ``vision.num_blocks_used`` blocks.
    """
    hidden, inner = vision.hidden_size, vision.intermediate_size
    embeddings = 3 * vision.patch_size**2 * hidden + hidden + (vision.num_patches + 1) * hidden
    block = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    if blocks is None:
        return embeddings + 2 * hidden + vision.num_hidden_layers * block + 2 * hidden
    return embeddings + 2 * hidden + blocks * block


def vision_matrices(dims: ModelDims) -> tuple[Matrix, ...]:
    """Linear layers of the blocks that are used; what 8 bits apply to. Not the patch embedding."""
    v = dims.vision
    hidden, inner, blocks = v.hidden_size, v.intermediate_size, v.num_blocks_used
    return (
        Matrix(3 * hidden, hidden, blocks),
        Matrix(hidden, hidden, blocks),
        Matrix(inner, hidden, blocks),
        Matrix(hidden, inner, blocks),
    )


def projector_matrices(dims: ModelDims) -> tuple[Matrix, ...]:
    """Both linear layers of the projector."""
    hidden = dims.text.hidden_size
    return Matrix(hidden, dims.vision.feature_size, 1), Matrix(hidden, hidden, 1)


def projector_parameters(dims: ModelDims) -> int:
    """Both linear layers of the projector."""
    hidden = dims.text.hidden_size
    bias = 2 * hidden if dims.vision.projector_bias else 0
    return dims.vision.feature_size * hidden + hidden * hidden + bias


def total_parameters(dims: ModelDims) -> int:
    """What a checkpoint stores; ``image_newline`` is there for all but LLaVA-1.5."""
    text = dims.text
    decoder = sum(m.parameters for m in decoder_matrices(text)) + decoder_vectors(text)
    heads = head_parameters(text) * (1 if text.tie_word_embeddings else 2)
    newline = text.hidden_size if dims.takes_tiles else 0
    tower = vision_parameters(dims.vision)
    return decoder + heads + tower + projector_parameters(dims) + newline
