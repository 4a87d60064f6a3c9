"""Answer: what one request gave, what it took, and on what it ran."""

from __future__ import annotations

from dataclasses import dataclass, field

from llava_edge.runtime.generation.loop import FinishReason


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of one request.

    ``preprocess_seconds`` runs from the call until prompt and pixels are ready. ``ttft_seconds``
    runs from the call to the first token, without the waiting for other requests; attempts that
    were dropped on the way count here and nowhere else.
    ``packing_seconds`` is putting text and features in the order of the prompt; it is part of
    neither ``vision_seconds`` nor ``prefill_seconds``. ``decode_tokens_per_second`` counts the
    tokens after the first; None when there is only one.
    """

    preprocess_seconds: float
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float
    ttft_seconds: float
    decode_tokens_per_second: float | None
    packing_seconds: float = 0.0


@dataclass(frozen=True)
class PeakMemory:
    """Largest memory this process has held so far.

    ``device_bytes`` are as the driver counts them, its own context included; None on the CPU, and
    where the driver does not know this process by its number, as in some containers.
    """

    host_bytes: int
    device_bytes: int | None


@dataclass(frozen=True)
class Answer:
    """Result of one request.

    ``token_ids`` include the stop token, ``text`` does not; ``prompt_tokens`` include
    ``image_tokens`` and ``video_tokens``. ``reused_tokens`` of the prompt lay in the cache already,
    from the request before; their tiles and frames were not encoded. ``degraded`` lists what was
    lowered to make the request fit; empty if nothing. ``engine`` ran the vision tower:
    ``tensorrt``, ``tensorrt-rtx`` or ``ort``; ``other_engines`` says of each better one why it did
    not. ``draft_tokens`` were looked up in the prompt and checked, ``accepted_tokens`` of them
    became part of the answer; both 0 without prompt lookup. ``off_device`` are nodes of the graphs
    that ONNX Runtime computed on the CPU although ``device`` is another; see ``strict_device``.
    ``notes`` report what was done to an image or a video before the model saw it, for instance
    that 16-bit values were scaled; empty if nothing out of the ordinary.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    finish_reason: FinishReason
    timings: Timings
    peak_memory: PeakMemory
    device: str
    engine: str
    reused_tokens: int = 0
    degraded: tuple[str, ...] = ()
    other_engines: dict[str, str] = field(default_factory=dict)
    video_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    off_device: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
