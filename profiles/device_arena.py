"""Device arena: what a run of tower or decoder takes in ONNX Runtime's arena of a GPU.

Told to grow by what is asked (``CudaOptions.exact_arena``), an arena takes a region for whatever no
free piece of another region holds, and gives none back. So what it takes follows from the sizes of
tensors, largest last, and from how many of each live at once, not from the largest moment.

Counted by what ONNX Runtime 1.31.1's own CUDA provider took, tensor by tensor; the cases are in
DECISIONS.md. Sizes are bytes of float16 values.
"""

from __future__ import annotations

from llava_edge.profiles.device_pages import paged
from llava_edge.profiles.formats import head_matrix
from llava_edge.profiles.model_dims import ModelDims, TextDims
from llava_edge.profiles.parameters import decoder_matrices

_HALF = 2
_FLOAT = 4
CUBLAS_HANDLES = 4
"""One for each session and one for each stream that a session runs on."""


def tower_bytes(dims: ModelDims, tiles: int) -> int:
    """One batch inside tower and projector.

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


def layer_bytes(text: TextDims, tokens: int) -> int:
    """One chunk inside the decoder: what is planned to stay beside what kernels ask for.

    Residual, normed, attention's output and what is added to the residual; queries, keys and values
    packed; gate, up and their product.
    """
    width = max(text.hidden_size, text.query_size)
    packed = text.query_size + 2 * text.key_value_size
    pieces = (*4 * [width], packed, *3 * [text.intermediate_size])
    return sum(paged(tokens * size * _HALF) for size in pieces)


def kernel_bytes(
    text: TextDims,
    tokens: int,
    context_tokens: int,
    *,
    int8_cache: bool,
    dequantised: int,
    compute_capability: tuple[int, int],
) -> int:
    """What kernels ask for while a prompt is computed, one after another.

    Attention rotates queries, and keys and values where it does not write them straight into the
    cache; before 8.0 it expands keys and values to every head of queries, over the whole capacity.
    An int8 cache is dequantised into float16, one layer at a time and its whole capacity, wherever
    XQA does not read the codes themselves: for every prompt behind its first chunk, and for steps
    where the provider's release, the heads or the scales do not suit it.

    Source: ONNX Runtime, docs/contrib_ops/cuda/gqa.md (order of back ends), and
    ``GQABufferRequirements`` of its CUDA provider.

    Args:
        text: the language model.
        tokens: of a chunk.
        context_tokens: positions of the cache.
        int8_cache: whether it holds codes.
        dequantised: bytes of the largest weight that is dequantised for its product; 0 for none.
        compute_capability: of the GPU.
    """
    query, key_value = text.query_size, 2 * text.key_value_size
    packed = paged(tokens * (query + key_value) * _HALF)
    sums = tokens * text.num_attention_heads * _FLOAT
    rotated = paged(tokens * query * _HALF) + sums
    if compute_capability < (8, 0):
        expanded = 2 * paged(context_tokens * query * _HALF)
        return dequantised + expanded + 2 * packed + rotated
    if not int8_cache:
        return max(dequantised, rotated)
    first = max(dequantised, packed + sums)
    # One region, which no smaller one serves.
    later = paged((tokens * query + context_tokens * key_value) * _HALF)
    return first + later if later > first else first


def dequantised_bytes(text: TextDims, limit: int) -> int:
    """The largest weight of a layer as float16: MatMulNBits dequantises it for prompts.

    Args:
        text: the language model.
        limit: bytes above which it goes part by part.
    """
    packed = (text.query_size + 2 * text.key_value_size) * text.hidden_size
    largest = max(packed, *(matrix.rows * matrix.columns for matrix in decoder_matrices(text)))
    return paged(min(largest * _HALF, limit))


def head_bytes(text: TextDims, tokens: int, precision: str, limit: int) -> int:
    """What the head of a quantised model takes for a token and its draft, beside its logits.

    One token's product reads codes; several dequantise the head, the largest weight of all.
    """
    logits = paged(tokens * text.vocab_size * _HALF)
    if precision == "fp16":
        return logits
    whole = paged(min(head_matrix(text).parameters * _HALF, limit))
    # Where a layer's weight is as large, its region serves.
    return logits + (whole if whole > dequantised_bytes(text, limit) else 0)


def cublas_bytes(compute_capability: tuple[int, int]) -> int:
    """Workspaces of cuBLAS: 32 MiB a handle on 9.0 and 10.x, 12 on 12.x, 4 before.

    Source: cuBLAS documentation, ``cublasSetWorkspace``.
    """
    major = compute_capability[0]
    mebibytes = 4 if major < 9 else 12 if major >= 12 else 32
    return CUBLAS_HANDLES * (mebibytes << 20)
