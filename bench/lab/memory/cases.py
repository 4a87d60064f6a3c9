"""MemoryCase: models, contexts and images drawn from a seed, to measure memory on."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

from llava_edge.bench.common.random_models import CLIP_L
from llava_edge.profiles.memory.buffers import CacheType
from llava_edge.profiles.memory.terms import Workload
from llava_edge.profiles.models.anyres import AnyRes, grid_pinpoints
from llava_edge.profiles.models.model_dims import ModelDims

TEXT_TOKENS = 512
"""Room beside one full image that a conversion asks of a context."""

_CLIP_L = {
    "image_size": 336,
    "patch_size": 14,
    **CLIP_L,
}
_GRIDS = ("1x2", "2x2", "2x3", "3x3")
_LARGE_GRIDS = ("base", "1x2", "2x2")
_MILLION = 1_000_000


@dataclass(frozen=True)
class MemoryCase:
    """One model and what it is asked.

    Attributes:
        name: unique among the cases of a seed.
        seed: of the checkpoint's weights.
        sizes: fields of a random checkpoint by name.
        grid: ``--grid`` of the conversion.
        context: ``--context`` of the conversion.
        prompt_tokens: the prompt is filled with text up to so many tokens.
        num_images: images in the prompt, all of one size.
        image_height: pixels of each.
        image_width: pixels of each.
        cache: type of the KV cache; None for the target's own.
        precision: of the language model, rounded to nearest where quantised; the tower is float.
    """

    name: str
    seed: int
    sizes: dict[str, int | str]
    grid: str
    context: int
    prompt_tokens: int
    num_images: int
    image_height: int
    image_width: int
    cache: CacheType | None = None
    precision: str = "fp16"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, to compare with what a file of results was measured on."""
        return asdict(self)

    def workload(self, dims: ModelDims, chunk_tokens: int = 512) -> Workload:
        """What the memory model is asked about this case.

        Args:
            dims: of the model.
            chunk_tokens: positions computed at once in prefill.
        """
        vision = dims.vision
        pinpoints = grid_pinpoints(self.grid, vision.image_size)
        layout = AnyRes(vision.image_size, vision.patch_size, pinpoints).layout(
            self.image_height, self.image_width
        )
        return Workload(
            context_tokens=self.context,
            num_images=self.num_images,
            tiles_per_image=layout.num_tiles,
            image_pixels=self.image_height * self.image_width,
            image_format="JPEG",
            cache=self.cache,
            chunk_tokens=chunk_tokens,
        )


def draw_cases(seed: int) -> tuple[MemoryCase, ...]:
    """Twelve cases: four tiny, four of some ten million parameters, four with a CLIP-L tower.

    Heads, grouping, widths, tile geometry, context, grid and images are drawn. The four large ones
    grow to about 1.4 billion parameters; those are asked little, for the sake of time, while the
    smaller ones fill their contexts.
    """
    cases = [_tiny(seed, number) for number in range(4)]
    cases += [_small(seed, number) for number in range(4)]
    cases += [_large(seed, number) for number in range(4)]
    return tuple(cases)


_WIDE: tuple[dict[str, int | str], ...] = (
    {"backbone": "mistral", "hidden_size": 4096, "heads": 32, "kv_heads": 8},
    {"backbone": "llama", "hidden_size": 4096, "heads": 32, "kv_heads": 32},
    {"backbone": "qwen2", "hidden_size": 3584, "heads": 28, "kv_heads": 4},
    {"backbone": "llama", "hidden_size": 5120, "heads": 40, "kv_heads": 40},
)
_INNER = (14_336, 11_008, 18_944, 13_824)
_VOCABULARY = (32_064, 32_064, 152_064, 32_064)


def draw_wide_cases(seed: int) -> tuple[MemoryCase, ...]:
    """Four cases for a GPU, whose memory follows widths.

    They are those of Mistral 7B, Vicuna 7B, Qwen2 7B and Vicuna 13B, with two layers, and of CLIP-L
    with three: depth costs time in conversion and nothing on the device but its weights.
    """
    return tuple(_wide(seed, number) for number in range(len(_WIDE)))


def _wide(seed: int, number: int) -> MemoryCase:
    draw = random.Random(f"{seed}/wide/{number}")
    sizes: dict[str, int | str] = {
        **_CLIP_L,
        "vision_layers": 3,
        **_WIDE[number],
        "intermediate_size": _INNER[number],
        "layers": 2,
        "vocab_size": _VOCABULARY[number],
    }
    return _finish(draw, f"wide-{number}", sizes, ("1x2", "2x2"), draw.randint(1, 3), 0.9)


def _tiny(seed: int, number: int) -> MemoryCase:
    draw = random.Random(f"{seed}/tiny/{number}")
    image_size, patch_size = ((70, 14), (336, 14), (224, 16), (196, 28))[number]
    sizes = {
        "image_size": image_size,
        "patch_size": patch_size,
        **_tower(draw, heads=draw.randint(2, 5), head_dim=draw.choice((16, 24, 32))),
        "vision_layers": draw.randint(3, 6),
        **_attention(draw, heads=draw.choice((4, 6)), head_dim=draw.choice((16, 32))),
        "layers": draw.randint(2, 5),
        "vocab_size": draw.randint(400, 4000),
    }
    return _finish(draw, f"tiny-{number}", sizes, _GRIDS, draw.randint(1, 3), 0.9)


def _small(seed: int, number: int) -> MemoryCase:
    draw = random.Random(f"{seed}/small/{number}")
    sizes = {
        "image_size": 336,
        "patch_size": 14,
        **_tower(draw, heads=draw.randint(3, 8), head_dim=64),
        "vision_layers": draw.randint(4, 10),
        **_attention(draw, heads=draw.choice((6, 8, 12)), head_dim=draw.choice((48, 64, 96))),
        "layers": draw.randint(4, 10),
        "vocab_size": draw.choice((32_000, 64_000, 128_256, 151_936)),
    }
    return _finish(draw, f"small-{number}", sizes, _GRIDS, draw.randint(1, 3), 0.9)


def _large(seed: int, number: int) -> MemoryCase:
    millions = (120, 300, 550, 950)[number]
    draw = random.Random(f"{seed}/large/{number}")
    heads, head_dim = ((12, 64), (16, 80), (16, 96), (16, 128))[number]
    sizes: dict[str, int | str] = {
        **_CLIP_L,
        **_attention(draw, heads=heads, head_dim=head_dim),
        "vocab_size": draw.choice((32_000, 32_064)),
    }
    sizes["layers"] = max(2, round(millions * _MILLION / _layer_parameters(sizes)))
    images, grids = ((3, _LARGE_GRIDS), (2, _LARGE_GRIDS), (1, _LARGE_GRIDS), (1, ("1x2",)))[number]
    return _finish(draw, f"large-{number}", sizes, grids, draw.randint(1, images), 0.0)


def _tower(draw: random.Random, heads: int, head_dim: int) -> dict[str, int | str]:
    width = heads * head_dim
    return {
        "vision_heads": heads,
        "vision_hidden_size": width,
        "vision_intermediate_size": draw.choice((2, 3, 4)) * width,
    }


def _attention(draw: random.Random, heads: int, head_dim: int) -> dict[str, int | str]:
    width = heads * head_dim
    groups = [count for count in range(1, heads + 1) if heads % count == 0]
    return {
        "backbone": draw.choice(("llama", "mistral", "qwen2")),
        "heads": heads,
        # Every other model has a head of keys and values for each head of queries.
        "kv_heads": heads if draw.random() < 0.5 else draw.choice(groups),
        "hidden_size": width,
        "intermediate_size": 16 * round(width * draw.uniform(2.0, 4.0) / 16),
    }


def _layer_parameters(sizes: dict[str, int | str]) -> int:
    hidden, inner = int(sizes["hidden_size"]), int(sizes["intermediate_size"])
    grouped = hidden * int(sizes["kv_heads"]) // int(sizes["heads"])
    return hidden * (2 * hidden + 2 * grouped + 3 * inner)


def _finish(
    draw: random.Random,
    name: str,
    sizes: dict[str, int | str],
    grids: tuple[str, ...],
    num_images: int,
    prompt_share: float,
) -> MemoryCase:
    """Add grid, context and images. An image fills the largest candidate of the grid."""
    grid = draw.choice(grids)
    tile, patch = int(sizes["image_size"]), int(sizes["patch_size"])
    anyres = AnyRes(tile, patch, grid_pinpoints(grid, tile))
    least = num_images * anyres.max_image_tokens + TEXT_TOKENS
    context = least + draw.choice((0, 700, 1500, 6000))
    prompt_tokens = int(context * prompt_share)
    if sizes["backbone"] == "mistral" and draw.random() < 0.5:
        sizes["sliding_window"] = draw.choice((512, 2048, 4096))
    scale = draw.uniform(1.0, 3.0)
    height, width = max(anyres.candidates, key=lambda c: c[0] * c[1], default=(tile, tile))
    return MemoryCase(
        name=name,
        seed=draw.randrange(1 << 16),
        sizes={**sizes, "max_positions": 32_768},
        grid=grid,
        context=context,
        prompt_tokens=prompt_tokens,
        num_images=num_images,
        image_height=round(height * scale),
        image_width=round(width * scale),
    )
