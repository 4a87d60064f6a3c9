"""Terms of memory: what is counted, for which request on which machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from llava_edge.profiles.boards.hardware import HardwareProfile, Int8Isa, Target
from llava_edge.profiles.memory.buffers import (
    CacheType,
)

PHASES = ("load", "encode", "prefill", "decode")


PLANNED_VIDEO_PIXELS = 4096 * 2304
"""Pixels of a video's frame, the most that the runtime's limits take."""


PLANNED_IMAGE_PIXELS = 24_000_000
"""Pixels of the largest image a plan makes room for while it is decoded; a 24-megapixel photo."""


@dataclass(frozen=True)
class MemoryTerms:
    """Bytes at one moment, by what takes them. Every field is a term; ``total`` adds them up.

    Attributes:
        decoder_weights: linear layers, norms and biases of the decoder, scales included.
        lm_head: the head.
        vision_tower: the tower up to the feature layer.
        projector: both its layers.
        rope_tables: cosine and sine for the whole context.
        kv_cache: keys and values for the whole context.
        load_transient: what loading holds beside the finished weights.
        image_decoding: the largest image, or a frame of a video, while it is decoded and cut.
        pixel_values: all tiles or frames of the prompt.
        vision_activations: one batch of tiles inside the tower.
        image_features: projected features of all tiles or frames.
        prompt_embeddings: one chunk of ``inputs_embeds``.
        prefill_activations: one chunk, or one token, inside a decoder layer.
        attention_workspace: what attention needs beside its inputs and outputs.
        logits: the kept logits.
        engine_workspace: sessions, library workspaces, dequantisation scratch.
        driver_context: what the driver keeps for the process.
        process: interpreter, libraries, tokenizer.
        allocator_slack: rounding and fragments.
    """

    decoder_weights: int = 0
    lm_head: int = 0
    vision_tower: int = 0
    projector: int = 0
    embeddings: int = 0
    rope_tables: int = 0
    kv_cache: int = 0
    load_transient: int = 0
    image_decoding: int = 0
    pixel_values: int = 0
    vision_activations: int = 0
    image_features: int = 0
    prompt_embeddings: int = 0
    prefill_activations: int = 0
    attention_workspace: int = 0
    logits: int = 0
    engine_workspace: int = 0
    driver_context: int = 0
    process: int = 0
    allocator_slack: int = 0

    @property
    def total(self) -> int:
        """Sum of all terms."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        """Terms by name, in the order of the fields."""
        return {name: getattr(self, name) for name in _TERMS}

    def __add__(self, other: MemoryTerms) -> MemoryTerms:
        mine, theirs = self.as_dict(), other.as_dict()
        return MemoryTerms(**{name: mine[name] + theirs[name] for name in mine})

    def with_slack(self, slack: int, share: float) -> MemoryTerms:
        """The same with more for the allocator: a constant and a share of everything else."""
        # Parts in a million keep the sum in integers, so that it is the same on every machine.
        more = slack + self.total * round(share * 1e6) // 1_000_000
        return replace(self, allocator_slack=self.allocator_slack + more)


# Requests are planned as well, so this is asked hundreds of times before a first token.
_TERMS = tuple(field.name for field in fields(MemoryTerms))


Phases = Mapping[str, MemoryTerms]


@dataclass(frozen=True)
class MemoryEstimate:
    """Terms of each phase. ``device`` is empty on a CPU, ``unified`` says both share one memory."""

    device: Phases
    host: Phases
    unified: bool = False

    @property
    def device_bytes(self) -> int:
        """Peak of the device: its largest phase, the host's included where they share."""
        return self.device_peak.total if self.device else 0

    @property
    def host_bytes(self) -> int:
        """Peak of the host alone, however the memory is shared."""
        return _peak(self.host).total

    @property
    def device_peak(self) -> MemoryTerms:
        """Terms of the phase that needs most of the device (of the one memory, if unified)."""
        if not self.unified:
            return _peak(self.device)
        return _peak({name: self.device[name] + self.host[name] for name in PHASES})

    @property
    def host_peak(self) -> MemoryTerms:
        """Terms of the phase that needs most of the host."""
        return _peak(self.host)

    @property
    def peak(self) -> MemoryTerms:
        """Terms that the budget is compared with: the device's, or the host's on a CPU."""
        return self.device_peak if self.device else self.host_peak


def _peak(phases: Phases) -> MemoryTerms:
    return max(phases.values(), key=lambda terms: terms.total)


@dataclass(frozen=True)
class Workload:
    """What is run: context, media and how they are batched.

    Attributes:
        context_tokens: positions of the cache.
        num_images: images in one prompt.
        tiles_per_image: most tiles of one image, thumbnail included.
        num_frames: frames of one video in the prompt; 0 for none.
        cache: type of keys and values; None for the target's own.
        chunk_tokens: positions computed at once in prefill.
        batch_tiles: tiles encoded at once; None for ``tiles_per_batch``.
        image_pixels: pixels of the largest image.
        image_format: of its file, as Pillow names it; empty for any that is read by default.
    """

    context_tokens: int
    num_images: int = 1
    tiles_per_image: int = 5
    num_frames: int = 0
    cache: CacheType | None = None
    chunk_tokens: int = 512
    batch_tiles: int | None = None
    image_pixels: int = PLANNED_IMAGE_PIXELS
    image_format: str = ""

    @property
    def num_tiles(self) -> int:
        """Tiles of all images and frames of the video: one prompt may hold both."""
        return self.num_images * self.tiles_per_image + self.num_frames


@dataclass(frozen=True)
class Machine:
    """The part of a profile that memory depends on."""

    target: Target
    unified: bool = False
    int8_isa: Int8Isa = "vnni"
    compute_capability: str | None = None

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability as numbers; of an A100 where it is not known."""
        major, minor = (self.compute_capability or "8.0").split(".")
        return int(major), int(minor)

    @classmethod
    def of(cls, profile: HardwareProfile) -> Machine:
        """That part of ``profile``."""
        return cls(profile.target, profile.unified, profile.int8_isa, profile.compute_capability)
