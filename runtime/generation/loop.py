"""The loop: logits to tokens until a stop, the length or the context ends it.

Knows token ids only; text is the stream decoder's matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from llava_edge.runtime.generation.decoder.decoding import Steps
from llava_edge.runtime.generation.decoder.sampling import Sampler
from llava_edge.runtime.generation.decoder.topk_logits import TopkLogits
from llava_edge.runtime.util.arrays import Array

FinishReason = Literal["stop", "length", "context", "deadline"]


@dataclass
class LoopResult:
    """Filled while the loop runs.

    ``finish_reason``: ``stop`` a stop token came; ``length`` the number asked for was reached;
    ``context`` the cache is full; ``deadline`` the time is up; None while tokens still come. It is
    set before the last token is yielded. ``decode_seconds`` counts from the first to the last.
    """

    finish_reason: FinishReason | None = None
    first_token_at: float = 0.0
    decode_seconds: float = 0.0
    num_tokens: int = 0


def generate_tokens(
    steps: Steps,
    logits: Array | TopkLogits,
    sampler: Sampler,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    result: LoopResult,
    is_late: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yield token ids, the stop token included.

    Args:
        steps: behind the prompt; they turn a token into the logits behind it.
        logits: float32 (vocab,) of the prompt's last position.
        sampler: chooses.
        stop_ids: ids that end the answer.
        max_new_tokens: at least 1.
        result: filled as the loop goes, also when the consumer stops early.
        is_late: asked at each token; the answer ends with it.
    """
    while True:
        token = sampler.choose(logits)
        now = time.perf_counter()
        if result.num_tokens == 0:
            result.first_token_at = now
        result.decode_seconds = now - result.first_token_at
        result.num_tokens += 1
        if token in stop_ids:
            result.finish_reason = "stop"
        elif result.num_tokens >= max_new_tokens:
            result.finish_reason = "length"
        elif steps.is_full:
            result.finish_reason = "context"
        elif is_late():
            result.finish_reason = "deadline"
        else:
            yield token
            logits = steps.step(token, max_new_tokens - result.num_tokens - 1)
            continue
        yield token
        return
