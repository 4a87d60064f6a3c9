"""RandomSpec: the sizes of a random checkpoint, named presets, and its ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llava_edge.convert.testing.random_tokenizer import Backbone
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.profiles.models.variants import find_variant

_STOCK_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_ARCHITECTURES: Mapping[str, str] = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
}


@dataclass(frozen=True)
class RandomSpec:
    """Sizes of a random checkpoint, in the words of its ``config.json``.

    ``head_dim`` and ``pinpoints`` follow from the others when left out: hidden size over heads, and
    the five released grids at this tile side, as (height, width) in pixels. ``sliding_window``
    holds for every layer of a mistral, and from ``max_window_layers`` on for a qwen2.
    """

    backbone: Backbone = "llama"
    model_type: str = "llava_next"
    image_size: int = 336
    patch_size: int = 14
    vision_hidden_size: int = 64
    vision_intermediate_size: int = 128
    vision_layers: int = 3
    vision_heads: int = 4
    vision_feature_layer: int | tuple[int, ...] = -2
    projector_bias: bool = True
    hidden_size: int = 64
    intermediate_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    vocab_size: int = 512
    max_positions: int = 4096
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    max_window_layers: int = 0
    tie_word_embeddings: bool = False
    pinpoints: tuple[tuple[int, int], ...] | None = None

    @property
    def grid_pinpoints(self) -> tuple[tuple[int, int], ...]:
        """(height, width) candidates in pixels."""
        if self.pinpoints is not None:
            return self.pinpoints
        side = self.image_size
        return tuple((rows * side, columns * side) for rows, columns in _STOCK_GRIDS)

    @classmethod
    def from_variant(cls, name: str) -> RandomSpec:
        """The spec of a published variant at its full size.

        Raises:
            RequestError: there is no such variant.
        """
        return cls.from_dims(find_variant(name).dims)

    @classmethod
    def from_dims(cls, dims: ModelDims) -> RandomSpec:
        """The spec whose checkpoint has exactly these dimensions.

        Raises:
            ValueError: the language model has sizes that a random checkpoint does not vary.
        """
        vision, text = dims.vision, dims.text
        if text.model_type == "llama":
            backbone: Backbone = "llama"
        elif text.model_type == "mistral":
            backbone = "mistral"
        else:
            backbone = "qwen2"
        windows = text.sliding_windows
        layers = vision.feature_layers
        spec = cls(
            backbone=backbone,
            model_type=dims.model_type,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            vision_hidden_size=vision.hidden_size,
            vision_intermediate_size=vision.intermediate_size,
            vision_layers=vision.num_hidden_layers,
            vision_heads=vision.num_attention_heads,
            vision_feature_layer=(
                layers[0] - vision.num_hidden_layers - 1 if len(layers) == 1 else layers
            ),
            projector_bias=vision.projector_bias,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            rope_theta=text.rope_theta,
            rope_factor=text.rope_factor,
            rms_norm_eps=text.rms_norm_eps,
            sliding_window=max(windows) or None,
            max_window_layers=next((i for i, window in enumerate(windows) if window), 0),
            tie_word_embeddings=text.tie_word_embeddings,
            pinpoints=dims.image_grid_pinpoints or None,
        )
        rebuilt = ModelDims.from_config(
            spec.config(image_token_id=dims.image_token_id, video_token_id=dims.video_token_id)
        )
        if rebuilt != dims:
            raise ValueError("these dimensions hold something that a random checkpoint cannot have")
        return spec

    def config(
        self, image_token_id: int, video_token_id: int | None = None, **text_entries: Any
    ) -> dict[str, Any]:
        """``config.json`` as the hub's LLaVA-NeXT repositories have it.

        Args:
            image_token_id: id of the image mark.
            video_token_id: id of the video mark, for the video model.
            **text_entries: further entries of the language model, such as ``bos_token_id``.
        """
        config: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "image_token_index": image_token_id,
            "image_seq_length": (self.image_size // self.patch_size) ** 2,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": self.projector_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": "float16",
            "vision_feature_layer": (
                self.vision_feature_layer
                if isinstance(self.vision_feature_layer, int)
                else list(self.vision_feature_layer)
            ),
            "vision_feature_select_strategy": "default",
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": self.vision_hidden_size,
                "intermediate_size": self.vision_intermediate_size,
                "num_hidden_layers": self.vision_layers,
                "num_attention_heads": self.vision_heads,
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "projection_dim": self.vision_hidden_size,
            },
            "text_config": {**self._text_config(), **text_entries},
        }
        if self.model_type != "llava":
            config["image_grid_pinpoints"] = [list(point) for point in self.grid_pinpoints]
        if self.model_type == "llava_next_video":
            config |= {
                "video_token_index": video_token_id,
                "spatial_pool_mode": "average",
                "spatial_pool_stride": 2,
            }
        return config

    def _text_config(self) -> dict[str, Any]:
        text: dict[str, Any] = {
            "model_type": self.backbone,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        if self.head_dim is not None and self.head_dim * self.heads != self.hidden_size:
            text["head_dim"] = self.head_dim
        if self.rope_factor != 1.0:
            text["rope_scaling"] = {"type": "linear", "factor": self.rope_factor}
        if self.backbone == "mistral":
            # Left out, the library would take 4096.
            text["sliding_window"] = self.sliding_window
        if self.backbone == "qwen2":
            text["use_sliding_window"] = self.sliding_window is not None
            text["sliding_window"] = self.sliding_window or 4096
            text["max_window_layers"] = self.max_window_layers
        return text


def _tiny() -> RandomSpec:
    return RandomSpec()


def _odd() -> RandomSpec:
    return RandomSpec(
        image_size=70,
        vision_hidden_size=48,
        vision_intermediate_size=112,
        vision_layers=4,
        vision_heads=3,
        hidden_size=96,
        intermediate_size=160,
        layers=3,
        heads=6,
        kv_heads=2,
        vocab_size=401,
        max_positions=2048,
    )


def _demo() -> RandomSpec:
    return RandomSpec(
        backbone="mistral",
        vision_hidden_size=128,
        vision_intermediate_size=512,
        vision_layers=4,
        vision_heads=4,
        hidden_size=256,
        intermediate_size=768,
        layers=4,
        heads=8,
        kv_heads=2,
        vocab_size=768,
        max_positions=8192,
        rope_theta=1e6,
    )


_PRESETS: Mapping[str, Callable[[], RandomSpec]] = {"tiny": _tiny, "odd": _odd, "demo": _demo}


def preset(name: str, **changes: Any) -> RandomSpec:
    """A named spec, with fields changed at will.

    ``tiny`` has the released tile geometry and small widths; ``odd`` has 5 x 5 patches a tile and
    widths that are no powers of two; ``demo`` has a few million parameters and wider matrices.

    Raises:
        ValueError: there is no preset of that name.
    """
    if name not in _PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(_PRESETS)}")
    return replace(_PRESETS[name](), **changes)
