"""GpuModel: what the check on a GPU measures, and what it asks for parity.

Weights of random models say nothing of speed or memory, so released shapes are written where they
are measured. The small trained model comes first: whether its answers are right is known soon.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image

from llava_edge.bench.common.random_models import CLIP_L
from llava_edge.bench.lab.conversion.memory import MISTRAL_7B
from llava_edge.bench.lab.pages.drawing.sample import held_out_sample
from llava_edge.bench.speed.cases import draw_picture

PRECISIONS = ("fp16", "int8", "int4")
QUESTION_SEED = 2
_SIDE = 640
_TOWER = 350_000_000
"""Weights of CLIP-L and a projector."""
_POSITIONS = 16384
"""Of random models whose released twins have 4,096: three full images take 8,784."""


@dataclass(frozen=True)
class GpuModel:
    """One model; ``sizes`` are fields of a random checkpoint, none for the trained one.

    Attributes:
        name: unique.
        context: positions of the artifacts' cache; None for the plan's.
        num_questions: asked of the reference and of artifacts for parity.
        answer_tokens: of each, at most.
        has_choices: choices are measured on it; its artifacts then lie on the disk together.
    """

    name: str
    sizes: Mapping[str, int | float | str] = field(default_factory=dict)
    context: int | None = None
    num_questions: int = 4
    answer_tokens: int = 16
    has_choices: bool = False

    @property
    def is_trained(self) -> bool:
        """Whether it is the model that ships with the project."""
        return not self.sizes

    @property
    def parameters(self) -> int:
        """About; what is known before there is a configuration. 0 for the trained one."""
        if self.is_trained:
            return 0
        sizes = {name: value for name, value in self.sizes.items() if isinstance(value, int)}
        hidden, layers = sizes["hidden_size"], sizes["layers"]
        shared = 2 * hidden * hidden * sizes["kv_heads"] // sizes["heads"]
        layer = 2 * hidden * hidden + shared + 3 * hidden * sizes["intermediate_size"]
        tower = _TOWER if "vision_hidden_size" in sizes else 0
        return layers * layer + 2 * sizes["vocab_size"] * hidden + tower

    def questions(self) -> list[tuple[Image.Image, str]]:
        """Pictures and what is asked about them, the same ones every time."""
        if self.is_trained:
            samples = (held_out_sample(QUESTION_SEED, n) for n in range(self.num_questions))
            return [(sample.image, sample.questions[0].text) for sample in samples]
        pictures = (draw_picture((n,), _SIDE, _SIDE + 160) for n in range(self.num_questions))
        return [
            (Image.open(io.BytesIO(data)).convert("RGB"), f"What is in picture {n}?")
            for n, data in enumerate(pictures)
        ]


GPU_MODELS: Mapping[str, GpuModel] = {
    model.name: model
    for model in (
        GpuModel("pages", num_questions=64, answer_tokens=48),
        GpuModel("7b", {**MISTRAL_7B, "layers": 32}, context=10240, has_choices=True),
        GpuModel(
            "13b",
            {
                **{"backbone": "llama", "hidden_size": 5120, "intermediate_size": 13824},
                **{"layers": 40, "heads": 40, "kv_heads": 40, "vocab_size": 32064},
                **{"max_positions": _POSITIONS},
                **CLIP_L,
            },
            context=10240,
        ),
        GpuModel(
            "34b",
            {
                **{"backbone": "llama", "hidden_size": 7168, "intermediate_size": 20480},
                **{"layers": 60, "heads": 56, "kv_heads": 8, "vocab_size": 64064},
                **{"max_positions": _POSITIONS, "rope_theta": 5e6},
                **CLIP_L,
            },
            context=10240,
        ),
        GpuModel(
            "tiny",
            {
                **{"backbone": "mistral", "hidden_size": 128, "intermediate_size": 256},
                **{"layers": 2, "heads": 4, "kv_heads": 2, "vocab_size": 512},
                **{"image_size": 56, "max_positions": 2048},
            },
            context=2048,
            answer_tokens=6,
            has_choices=True,
        ),
    )
}
"""``tiny`` proves the way on any machine and says nothing of speed."""
