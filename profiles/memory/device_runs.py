"""Device runs: what tower and decoder take in their arenas on a GPU, by the order of their nodes.

The decoder's nodes are gone through as ONNX Runtime plans them, so that its arena comes out region
by region as the CUDA provider 1.31.1 takes it; the tower's tensors are summed. docs/decisions has
what was measured. Activations are float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from llava_edge.profiles.memory.device_arena import DeviceArena, Piece
from llava_edge.profiles.memory.device_pages import paged
from llava_edge.profiles.models.model_dims import ModelDims, TextDims

_HALF, _FLOAT = 2, 4
_SMALL = 256
"""Lengths of sequences and the like, a piece each."""
_PART_ROWS = 32_768
"""Rows that are dequantised at once of a weight with more than twice as many, and too many bytes.

Source: ONNX Runtime, docs/contrib_ops/cuda/matmul_nbits.md, "Chunked variant"."""
_CUBLAS_HANDLES = 4
"""One for each session and one for each stream that a session runs on."""


@dataclass(frozen=True)
class DecoderRuns:
    """Runs of the decoder, one after another, in one arena.

    Attributes:
        text: sizes.
        chunk_tokens: positions of a chunk; two whole ones are run.
        step_tokens: positions of the largest step: a token and its draft; 0 for no step at all.
        context_tokens: positions of the cache; only an int8 cache and cards before 8.0 ask.
        has_int8_cache: whether the cache holds codes.
        dequantises: whether weights are quantised: products of several rows bring a whole weight
            into float16.
        most_dequantised: bytes above which a weight of many rows is dequantised part by part.
        attends: whether attention's own memory is counted.
        compute_capability: of the GPU.
    """

    text: TextDims
    chunk_tokens: int
    step_tokens: int
    context_tokens: int
    has_int8_cache: bool
    dequantises: bool
    most_dequantised: int
    compute_capability: tuple[int, int]
    attends: bool = True

    def by_cause(self) -> tuple[int, int, int]:
        """Bytes that activations take, more that dequantised weights do, and attention beside."""
        # What does not matter is left out, so that plans of many contexts are counted once.
        matters = self.has_int8_cache or self.compute_capability < (8, 0)
        known = self if matters else replace(self, context_tokens=0)
        products = replace(known, context_tokens=0, has_int8_cache=False, attends=False)
        bare = _arena_bytes(replace(products, dequantises=False))
        # More tensors may happen to fit better, which is no reason to count less.
        whole = max(bare, _arena_bytes(products))
        return bare, whole - bare, max(0, _arena_bytes(known) - whole)


@lru_cache(maxsize=256)
def _arena_bytes(runs: DecoderRuns) -> int:
    arena, chunk = DeviceArena(), runs.chunk_tokens
    # In the order in which the runtime warms up; prompts of every length find room then.
    run_once(arena, runs, chunk, is_first=True)
    run_once(arena, runs, chunk)
    if runs.step_tokens:
        run_once(arena, runs, runs.step_tokens, kept=runs.step_tokens)
    return arena.nbytes


def run_once(
    arena: DeviceArena, runs: DecoderRuns, tokens: int, *, is_first: bool = False, kept: int = 1
) -> None:
    """Let an arena grow by one run: two layers and the head; later layers find all they need.

    ONNX Runtime plans tensors of one shape into one buffer and holds it until the last of them has
    been used, so buffers stay from the layer that first needs them to the end: four of the
    residual's width, one of packed queries, keys and values, three inner ones. What a kernel asks
    for beside its output comes and goes.

    Args:
        arena: as earlier runs left it.
        runs: what runs.
        tokens: positions of this run.
        is_first: whether nothing lies in the cache yet.
        kept: positions whose logits are computed.
    """
    text = runs.text
    hidden, inner, query = text.hidden_size, text.intermediate_size, text.query_size
    packed = query + 2 * text.key_value_size
    held: list[Piece] = []

    def take(*widths: int) -> None:
        held.extend(arena.take(tokens * width * _HALF) for width in widths)

    def weight(rows: int, columns: int, count: int) -> None:
        # One row is multiplied with the codes themselves.
        if runs.dequantises and count > 1:
            nbytes = rows * columns * _HALF
            in_parts = nbytes > runs.most_dequantised and rows > 2 * _PART_ROWS
            arena.pass_through(_PART_ROWS * columns * _HALF if in_parts else nbytes)

    def attention() -> None:
        if runs.attends:
            arena.pass_through(*_attention_pieces(runs, tokens, is_first=is_first))

    def product(rows: int, columns: int) -> None:
        weight(rows, columns, tokens)

    take(hidden, packed)
    product(packed, hidden)
    if query != hidden:
        take(query)
    attention()
    # What is added to the residual, normed and the new residual; the first norm's buffer serves
    # attention's output where it has the same shape.
    take(hidden)
    product(hidden, query)
    take(*(hidden,) * (1 if query == hidden else 2))
    for _ in range(2):
        take(inner)
        product(inner, hidden)
    take(inner)
    product(hidden, inner)
    take(hidden)
    product(packed, hidden)
    attention()
    for rows, columns in ((hidden, query), (inner, hidden), (inner, hidden), (hidden, inner)):
        product(rows, columns)
    held.append(arena.take(kept * text.vocab_size * _HALF))
    weight(text.vocab_size, hidden, kept)
    for piece in held:
        arena.give(piece)


def _attention_pieces(runs: DecoderRuns, tokens: int, *, is_first: bool) -> Sequence[int]:
    """What one GroupQueryAttention asks for, all at once.

    Flash attention: a float32 sum a head and row, and rotated queries. An int8 cache is dequantised
    into float16, one layer at a time and its whole capacity, wherever XQA does not read the codes
    themselves: for every prompt behind its first chunk, and for steps where the provider's release,
    the heads or the scales do not suit it. The first chunk's keys and values are rotated beside its
    queries instead. Before 8.0 keys and values are expanded to every head of queries, over the
    whole capacity.

    Source: ONNX Runtime, docs/contrib_ops/cuda/gqa.md (order of back ends), and
    ``GQABufferRequirements`` of its CUDA provider.
    """
    text, context = runs.text, runs.context_tokens
    query, both = text.query_size, 2 * text.key_value_size
    if runs.compute_capability < (8, 0):
        expanded = context * query * _HALF
        return _SMALL, _SMALL, expanded, expanded, tokens * (query + both) * _HALF
    rotated = tokens * query
    if runs.has_int8_cache:
        rotated += (tokens if is_first else context) * both
    return tokens * text.num_attention_heads * _FLOAT, _SMALL, _SMALL, rotated * _HALF


def tower_bytes(dims: ModelDims, tiles: int) -> int:
    """One batch inside tower and projector, as float16.

    Pixels in the order of patches; residual, normed and the tokens before them; queries, keys and
    values packed and, after their bias, again; scores before and after softmax; the features that
    are handed on. Inner tensors of the MLP and the projector, two of each, lie where scores were,
    unless they are larger.
    """
    v = dims.vision
    tokens, hidden = v.num_patches + 1, v.hidden_size
    pieces = [3 * v.image_size**2, *3 * [tokens * hidden], *2 * [3 * tokens * hidden]]
    pieces.append(v.num_patches * v.feature_size)
    pieces += (len(v.feature_layers) - 1) * [tokens * hidden]
    largest = 0
    for size in (
        v.num_attention_heads * tokens * tokens,
        tokens * v.intermediate_size,
        v.num_patches * dims.text.hidden_size,
    ):
        if size > largest:
            pieces += 2 * [size]
            largest = size
    return sum(paged(tiles * size * _HALF) for size in pieces)


def cublas_bytes(compute_capability: tuple[int, int]) -> int:
    """Workspaces of cuBLAS: 32 MiB a handle on 9.0 and 10.x, 12 on 12.x, 4 before.

    Source: cuBLAS documentation, ``cublasSetWorkspace``.
    """
    major = compute_capability[0]
    mebibytes = 4 if major < 9 else 12 if major >= 12 else 32
    return _CUBLAS_HANDLES * (mebibytes << 20)
