"""Device pages: what a GPU's driver takes beyond what was asked.

Large allocations take whole pages of 2 MiB; small ones share pages. The KV cache and every weight
are allocations of their own, so a deep and narrow model leaves more unused than a wide one.
"""

from __future__ import annotations

import math

from llava_edge.profiles.memory.buffers import CacheType, cache_value_bytes, kv_cache_shape
from llava_edge.profiles.memory.formats import VisionFormat, weight_tensors
from llava_edge.profiles.models.model_dims import ModelDims, TextDims

PAGE = 2 << 20
"""Bytes of a page, the granularity of ``cudaMalloc``."""


def paged(nbytes: int) -> int:
    """Bytes that one allocation takes: whole pages from half a page on."""
    return nbytes if nbytes < PAGE // 2 else -(-nbytes // PAGE) * PAGE


def unused_weight_bytes(dims: ModelDims, precision: str, vision: VisionFormat) -> int:
    """What all weights together leave unused in their pages; ``precision`` as in a plan."""
    tensors = weight_tensors(dims, precision, vision)
    return sum(count * (paged(nbytes) - nbytes) for nbytes, count in tensors)


def unused_cache_bytes(text: TextDims, context_tokens: int, cache: CacheType) -> int:
    """What keys and values, a tensor each a layer, leave unused in their pages."""
    nbytes = math.prod(kv_cache_shape(text, context_tokens)) * cache_value_bytes(cache)
    return 2 * text.num_hidden_layers * (paged(nbytes) - nbytes)
