"""LoadOptions: how an artifact is loaded, checked for types; ``LlavaEdge.load`` explains them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from llava_edge.profiles.errors import RequestError
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.loading.placement import AskedCache
from llava_edge.runtime.util.limits import Limits
from llava_edge.runtime.util.validation import require_count, require_flag, require_name, settle
from llava_edge.runtime.vision.select import AskedEngine

MAX_THREADS = 1024


@dataclass(frozen=True)
class LoadOptions:
    """Options of ``LlavaEdge.load`` that say how to load, not what or where.

    Raises:
        RequestError: one is out of range or of another type.
    """

    threads: int = 0
    context_tokens: int | None = None
    cache: AskedCache = "auto"
    allow_slow: bool = False
    engine: AskedEngine = "auto"
    trust_engines: bool = False
    prefix_reuse: bool = True
    vision_cache_bytes: int = 0
    strict_device: bool = False
    cuda: CudaOptions = field(default_factory=CudaOptions)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        settle(
            self,
            threads=require_count("threads", self.threads, 0, MAX_THREADS),
            vision_cache_bytes=require_count("vision_cache_bytes", self.vision_cache_bytes, 0),
        )
        if self.context_tokens is not None:
            settle(self, context_tokens=require_count("context_tokens", self.context_tokens, 1))
        require_name("cache", "types", self.cache, get_args(AskedCache))
        require_name("engine", "engines", self.engine, get_args(AskedEngine))
        # "no" is true as well, and would let engines be opened that nobody trusts.
        for name in ("allow_slow", "trust_engines", "prefix_reuse", "strict_device"):
            settle(self, **{name: require_flag(name, getattr(self, name))})
        for name, kind in (("cuda", CudaOptions), ("limits", Limits)):
            if not isinstance(value := getattr(self, name), kind):
                raise RequestError(f"{name} is {value!r:.60}; it must be a {kind.__name__} object")
