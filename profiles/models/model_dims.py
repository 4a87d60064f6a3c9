"""ModelDims: the sizes of tower, projector and language model, read from a ``config.json``.

Knows nothing of weights or graphs. Every later stage (plan, graphs, runtime buffers) computes from
these numbers, so whatever cannot be kept faithfully is refused here, all reasons together.

Source of the defaults: transformers ``CLIPVisionConfig``, ``LlamaConfig``, ``MistralConfig``,
``Qwen2Config`` and ``LlavaNextConfig`` 5.23.0; hub configs leave out whatever equals them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_edge.profiles.errors import CheckpointError
from llava_edge.profiles.models.config_section import MAX_SIZE, Section

Config = Mapping[str, Any]

STOCK_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""(height, width) candidates of all nine released variants, in the order of their configs."""


@dataclass(frozen=True)
class VisionDims:
    """CLIP vision tower and the projector behind it.

    ``feature_layers`` are indices into the hidden states: 0 is the embedding output, k the output
    of block k. ``num_blocks_used`` blocks are needed to compute them.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    hidden_act: str
    feature_layers: tuple[int, ...]
    projector_hidden_act: str
    projector_bias: bool

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one tile, without the class token."""
        return self.patches_per_side**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the tower."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_blocks_used(self) -> int:
        """Encoder blocks up to the deepest feature layer; the rest is never computed."""
        return max(self.feature_layers)

    @property
    def feature_size(self) -> int:
        """Width of the projector's input."""
        return self.hidden_size * len(self.feature_layers)


@dataclass(frozen=True)
class TextDims:
    """The decoder-only language model.

    ``rope_factor`` divides positions (linear scaling; 1.0 means none). ``sliding_windows`` holds
    one window a layer, 0 for full attention.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float
    max_position_embeddings: int
    hidden_act: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    sliding_windows: tuple[int, ...]
    tie_word_embeddings: bool

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def max_positions(self) -> int:
        """Positions that the rotary embedding covers after linear scaling."""
        return int(self.max_position_embeddings * self.rope_factor)


@dataclass(frozen=True)
class ModelDims:
    """Everything about a checkpoint that sizes depend on."""

    model_type: str
    vision: VisionDims
    text: TextDims
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    image_token_id: int
    video_token_id: int | None

    @property
    def takes_video(self) -> bool:
        """Whether the tower's features can be pooled for frames of a video."""
        return self.model_type == "llava_next_video"

    @property
    def takes_tiles(self) -> bool:
        """Whether images are tiled (AnyRes); LLaVA-1.5 sees one view of each, and no newline."""
        return self.model_type != "llava"

    @classmethod
    def from_config(cls, config: Config) -> ModelDims:
        """Read a Hugging Face ``config.json`` of a LLaVA-NeXT model.

        Raises:
            CheckpointError: the architecture is unknown or asks for something that the exported
                graphs do not do; all reasons are listed.
        """
        model_type = str(config.get("model_type", ""))
        if model_type not in _MODEL_TYPES:
            raise CheckpointError(
                f"config.json has model_type {model_type!r:.80}; supported are "
                f"{', '.join(sorted(_MODEL_TYPES))}. Give a LLaVA-NeXT checkpoint."
            )
        faults: list[str] = []
        is_video = model_type == "llava_next_video"
        top = Section("", config, {}, faults)
        vision = _read_vision(top, faults)
        text = _read_text(top, model_type, faults)
        pinpoints = _read_pinpoints(config, model_type, vision, faults)
        image_token = _read_token(top, "image_token", 32001 if is_video else 32000)
        video_token = _read_token(top, "video_token", 32000) if is_video else None
        strategy = top.word("vision_feature_select_strategy", "default")
        if strategy != "default":
            faults.append(
                f"vision_feature_select_strategy is {strategy!r:.80}; only 'default' has a "
                "reference"
            )
        if is_video:
            _check_video_pooling(top, vision, faults)
        if faults:
            listed = "\n  - ".join(faults)
            raise CheckpointError(f"config.json cannot be converted faithfully:\n  - {listed}")
        assert vision is not None
        assert text is not None
        return cls(
            model_type=model_type,
            vision=vision,
            text=text,
            image_grid_pinpoints=pinpoints,
            image_token_id=image_token,
            video_token_id=video_token,
        )


_MODEL_TYPES = frozenset({"llava_next", "llava_next_video", "llava"})
_MAX_LAYERS = 1024
_MAX_FEATURE_LAYERS = 64
# LlavaNextConfig fills in CLIP-L at 336 pixels only where there is no vision_config at all; a
# vision_config that is there gets the (smaller) defaults of CLIPVisionConfig.
_ABSENT_VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
}


def _read_token(top: Section, name: str, default: int) -> int:
    key = f"{name}_index" if top.values.get(f"{name}_index") is not None else f"{name}_id"
    return top.integer(key, default, minimum=0)


def _check_video_pooling(top: Section, vision: VisionDims | None, faults: list[str]) -> None:
    mode, stride = top.word("spatial_pool_mode", "average"), top.integer("spatial_pool_stride", 2)
    if (mode, stride) != ("average", 2):
        faults.append(
            f"video pooling is {mode!r:.80} with stride {stride}; exported is average with 2"
        )
    if vision is not None and vision.patch_size and vision.patches_per_side % 2:
        # The reference's processor counts a quarter of all patches, its model drops the odd row.
        faults.append(
            f"a frame has {vision.patches_per_side} patches a side; pooling by 2 needs an even "
            "number"
        )


def _read_vision(top: Section, faults: list[str]) -> VisionDims | None:
    absent = top.values.get("vision_config") is None
    vision = top.section("vision_config", _ABSENT_VISION if absent else _VISION_DEFAULTS)
    kind = vision.word("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        faults.append(f"vision tower is {kind!r:.80}; only clip_vision_model is exported")
        return None
    num_layers = vision.integer("num_hidden_layers", maximum=_MAX_LAYERS)
    dims = VisionDims(
        hidden_size=vision.integer("hidden_size"),
        intermediate_size=vision.integer("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=vision.integer("num_attention_heads"),
        image_size=vision.integer("image_size"),
        patch_size=vision.integer("patch_size"),
        layer_norm_eps=vision.number("layer_norm_eps", 1e-5),
        hidden_act=vision.word("hidden_act", "quick_gelu"),
        feature_layers=_read_feature_layers(top.values, num_layers, faults),
        projector_hidden_act=top.word("projector_hidden_act", "gelu"),
        projector_bias=top.flag("multimodal_projector_bias", True),
    )
    channels = vision.integer("num_channels", 3)
    if channels != 3:
        faults.append(f"vision_config.num_channels is {channels}; images have 3")
    if dims.image_size % dims.patch_size:
        faults.append(f"image_size {dims.image_size} is no multiple of patch {dims.patch_size}")
    if dims.hidden_size % dims.num_attention_heads:
        faults.append(
            f"vision hidden_size {dims.hidden_size} is no multiple of "
            f"{dims.num_attention_heads} heads"
        )
    if dims.hidden_act not in {"quick_gelu", "gelu"}:
        faults.append(f"vision hidden_act {dims.hidden_act!r:.80} is not one of quick_gelu, gelu")
    if dims.projector_hidden_act != "gelu":
        faults.append(f"projector_hidden_act {dims.projector_hidden_act!r:.80} is not gelu")
    return dims


def _read_feature_layers(config: Config, num_layers: int, faults: list[str]) -> tuple[int, ...]:
    raw = config.get("vision_feature_layer", -2)
    listed = raw if isinstance(raw, (list, tuple)) else [raw]
    if not 0 < len(listed) <= _MAX_FEATURE_LAYERS or not all(type(n) is int for n in listed):
        faults.append(
            f"vision_feature_layer is {raw!r:.80}, not an integer or a list of up to "
            f"{_MAX_FEATURE_LAYERS} of them"
        )
        return (num_layers,)
    # hidden_states has one entry more than there are blocks: entry 0 is the embedding output.
    layers = tuple(layer + num_layers + 1 if layer < 0 else layer for layer in listed)
    if any(not 0 < layer <= num_layers for layer in layers):
        faults.append(f"vision_feature_layer {raw!r:.80} is outside the {num_layers} blocks")
        return (num_layers,)
    return layers


def _read_text(top: Section, model_type: str, faults: list[str]) -> TextDims | None:
    raw = top.values.get("text_config")
    kind = raw.get("model_type", "llama") if isinstance(raw, Mapping) else "llama"
    defaults = _TEXT_DEFAULTS.get(kind) if isinstance(kind, str) else None
    if defaults is None:
        faults.append(
            f"language model is {kind!r:.80}; exported are {', '.join(sorted(_TEXT_DEFAULTS))}"
        )
        return None
    text = top.section("text_config", defaults)
    heads = text.integer("num_attention_heads")
    hidden_size = text.integer("hidden_size")
    num_layers = text.integer("num_hidden_layers", maximum=_MAX_LAYERS)
    theta, factor = _read_rope(text, faults)
    attention_bias = kind == "llama" and text.flag("attention_bias", False)
    dims = TextDims(
        model_type=kind,
        vocab_size=text.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=text.integer("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=_read_key_value_heads(text, heads),
        head_dim=text.integer("head_dim", hidden_size // heads),
        rms_norm_eps=text.number("rms_norm_eps"),
        rope_theta=theta,
        rope_factor=factor,
        max_position_embeddings=text.integer("max_position_embeddings"),
        hidden_act=text.word("hidden_act", "silu"),
        qkv_bias=kind == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=kind == "llama" and text.flag("mlp_bias", False),
        sliding_windows=_read_windows(text, kind, num_layers),
        tie_word_embeddings=_read_tie(top, text, model_type),
    )
    if hidden_size % heads:
        faults.append(f"hidden_size {hidden_size} is no multiple of {heads} heads")
    if dims.num_attention_heads % dims.num_key_value_heads:
        faults.append(f"{heads} query heads are no multiple of {dims.num_key_value_heads}")
    if dims.head_dim % 16:
        faults.append(
            f"head_dim {dims.head_dim} is no multiple of 16, which GroupQueryAttention's rotary "
            "embedding needs"
        )
    if dims.hidden_act != "silu":
        faults.append(f"hidden_act {dims.hidden_act!r:.80} is not silu")
    return dims


def _read_key_value_heads(text: Section, heads: int) -> int:
    """An explicit null means one a query head; an absent key, the library's default."""
    if "num_key_value_heads" in text.values and text.values["num_key_value_heads"] is None:
        return heads
    return text.integer("num_key_value_heads", int(text.defaults.get("num_key_value_heads", heads)))


def _read_tie(top: Section, text: Section, model_type: str) -> bool:
    """LlavaNextConfig looks at the top level only; its two sisters at the language model, too."""
    tied = top.flag("tie_word_embeddings", False)
    inner = text.flag("tie_word_embeddings", False)
    return tied or (inner and model_type != "llava_next")


def _read_rope(text: Section, faults: list[str]) -> tuple[float, float]:
    """Theta and linear factor; transformers 5 nests both in ``rope_parameters``."""
    key = "rope_scaling" if text.values.get("rope_scaling") else "rope_parameters"
    rope = text.section(key, {})
    theta = rope.number("rope_theta", text.number("rope_theta", 10000.0))
    partial = rope.number("partial_rotary_factor", text.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        faults.append(f"partial_rotary_factor {partial} is not 1")
    kind = rope.word("rope_type", rope.word("type", "default"))
    if kind == "linear":
        return theta, rope.number("factor")
    if kind != "default":
        faults.append(f"rope scaling {kind!r:.80} is not one of default, linear")
    return theta, 1.0


def _read_windows(text: Section, kind: str, num_layers: int) -> tuple[int, ...]:
    full = (0,) * num_layers
    # An explicit null means no window; an absent key means the library's 4096.
    has_window = text.values.get("sliding_window", text.defaults.get("sliding_window")) is not None
    if not has_window or kind == "llama":
        return full
    if kind == "mistral":
        return (text.integer("sliding_window"),) * num_layers
    if not text.flag("use_sliding_window", False):
        return full
    window = text.integer("sliding_window")
    types = text.values.get("layer_types")
    if types is None:
        first = text.integer("max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        text.faults.append(f"text_config.layer_types does not name the {num_layers} layers")
        return full
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _read_pinpoints(
    config: Config, model_type: str, vision: VisionDims | None, faults: list[str]
) -> tuple[tuple[int, int], ...]:
    if model_type == "llava":
        return ()
    raw = config.get("image_grid_pinpoints")
    pinpoints: tuple[tuple[int, int], ...] = STOCK_PINPOINTS
    if raw is not None:
        if not _are_pairs(raw):
            faults.append(
                f"image_grid_pinpoints is {raw!r:.80}, not a list of (height, width) pairs"
            )
            return ()
        pinpoints = tuple((height, width) for height, width in raw)
    if vision is not None and any(
        side % vision.image_size for point in pinpoints for side in point
    ):
        faults.append(
            f"image_grid_pinpoints {[list(p) for p in pinpoints]!s:.300} are not all multiples of "
            f"the tile side {vision.image_size}"
        )
    return pinpoints


def _are_pairs(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and 0 < len(value) <= 1024
        and all(
            isinstance(point, (list, tuple))
            and len(point) == 2
            and all(type(side) is int and 0 < side <= MAX_SIZE for side in point)
            for point in value
        )
    )
