"""ModelDims: the sizes of tower, projector and language model, read from a ``config.json``.

Knows nothing of weights or graphs. Every later stage (plan, graphs, runtime buffers) computes from
these numbers, so whatever cannot be kept faithfully is refused here, all reasons together.

Source of the defaults: transformers ``CLIPVisionConfig``, ``LlamaConfig``, ``MistralConfig``,
``Qwen2Config`` and ``LlavaNextConfig`` 5.23.0; hub configs leave out whatever equals them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_edge.profiles.errors import CheckpointError

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
                f"config.json has model_type {model_type!r}; supported are "
                f"{', '.join(sorted(_MODEL_TYPES))}. Give a LLaVA-NeXT checkpoint."
            )
        faults: list[str] = []
        vision = _read_vision(config, faults)
        text = _read_text(config, faults)
        pinpoints = _read_pinpoints(config, model_type, vision, faults)
        image_token = _token(config, ("image_token_index", "image_token_id"), 32000)
        video_token = _token(config, ("video_token_index", "video_token_id"), None)
        if config.get("vision_feature_select_strategy", "default") != "default":
            faults.append(
                "vision_feature_select_strategy is "
                f"{config['vision_feature_select_strategy']!r}; only 'default' has a reference"
            )
        if faults:
            listed = "\n  - ".join(faults)
            raise CheckpointError(f"config.json cannot be converted faithfully:\n  - {listed}")
        assert vision is not None
        assert text is not None
        assert image_token is not None
        return cls(
            model_type=model_type,
            vision=vision,
            text=text,
            image_grid_pinpoints=pinpoints,
            image_token_id=image_token,
            video_token_id=video_token if model_type == "llava_next_video" else None,
        )


_MODEL_TYPES = frozenset({"llava_next", "llava_next_video", "llava"})
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
    },
}


def _token(config: Config, keys: Sequence[str], default: int | None) -> int | None:
    for key in keys:
        if config.get(key) is not None:
            return int(config[key])
    return default


def _read_vision(config: Config, faults: list[str]) -> VisionDims | None:
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        vision = {}
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        faults.append(
            f"vision tower is {vision['model_type']!r}; only clip_vision_model is exported"
        )
        return None
    num_layers = int(vision.get("num_hidden_layers", 24))
    raw_layers = config.get("vision_feature_layer", -2)
    listed = list(raw_layers) if isinstance(raw_layers, Sequence) else [raw_layers]
    # hidden_states has one entry more than there are blocks: entry 0 is the embedding output.
    layers = tuple(int(k) + num_layers + 1 if int(k) < 0 else int(k) for k in listed)
    dims = VisionDims(
        hidden_size=int(vision.get("hidden_size", 1024)),
        intermediate_size=int(vision.get("intermediate_size", 4096)),
        num_hidden_layers=num_layers,
        num_attention_heads=int(vision.get("num_attention_heads", 16)),
        image_size=int(vision.get("image_size", 336)),
        patch_size=int(vision.get("patch_size", 14)),
        layer_norm_eps=float(vision.get("layer_norm_eps", 1e-5)),
        hidden_act=str(vision.get("hidden_act", "quick_gelu")),
        feature_layers=layers,
        projector_hidden_act=str(config.get("projector_hidden_act", "gelu")),
        projector_bias=bool(config.get("multimodal_projector_bias", True)),
    )
    if not layers or any(not 0 < k <= num_layers for k in layers):
        faults.append(f"vision_feature_layer {raw_layers} is outside the {num_layers} blocks")
    if dims.image_size % dims.patch_size:
        faults.append(f"image_size {dims.image_size} is no multiple of patch {dims.patch_size}")
    if dims.hidden_size % dims.num_attention_heads:
        faults.append(
            f"vision hidden_size {dims.hidden_size} is no multiple of "
            f"{dims.num_attention_heads} heads"
        )
    if dims.hidden_act not in {"quick_gelu", "gelu"}:
        faults.append(f"vision hidden_act {dims.hidden_act!r} is not one of quick_gelu, gelu")
    if dims.projector_hidden_act != "gelu":
        faults.append(f"projector_hidden_act {dims.projector_hidden_act!r} is not gelu")
    return dims


def _read_text(config: Config, faults: list[str]) -> TextDims | None:
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        text = {}
    model_type = str(text.get("model_type", "llama"))
    defaults = _TEXT_DEFAULTS.get(model_type)
    if defaults is None:
        faults.append(
            f"language model is {model_type!r}; exported are {', '.join(sorted(_TEXT_DEFAULTS))}"
        )
        return None

    def get(key: str) -> Any:
        value = text.get(key)
        return defaults.get(key) if value is None else value

    heads = int(get("num_attention_heads"))
    kv_heads = get("num_key_value_heads")
    num_layers = int(get("num_hidden_layers"))
    theta, factor = _read_rope(text, faults)
    attention_bias = bool(text.get("attention_bias", False))
    head_dim = text.get("head_dim")
    dims = TextDims(
        model_type=model_type,
        vocab_size=int(get("vocab_size")),
        hidden_size=int(get("hidden_size")),
        intermediate_size=int(get("intermediate_size")),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=int(heads if kv_heads is None else kv_heads),
        head_dim=int(get("hidden_size")) // heads if head_dim is None else int(head_dim),
        rms_norm_eps=float(get("rms_norm_eps")),
        rope_theta=theta,
        rope_factor=factor,
        max_position_embeddings=int(get("max_position_embeddings")),
        hidden_act=str(text.get("hidden_act", "silu")),
        qkv_bias=model_type == "qwen2" or (model_type == "llama" and attention_bias),
        o_bias=model_type == "llama" and attention_bias,
        mlp_bias=model_type == "llama" and bool(text.get("mlp_bias", False)),
        sliding_windows=_read_windows(text, defaults, model_type, num_layers),
        tie_word_embeddings=bool(
            config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        ),
    )
    if dims.num_attention_heads % dims.num_key_value_heads:
        faults.append(f"{heads} query heads are no multiple of {dims.num_key_value_heads}")
    if dims.head_dim % 16:
        faults.append(
            f"head_dim {dims.head_dim} is no multiple of 16, which GroupQueryAttention's rotary "
            "embedding needs"
        )
    if dims.hidden_act != "silu":
        faults.append(f"hidden_act {dims.hidden_act!r} is not silu")
    return dims


def _read_rope(text: Config, faults: list[str]) -> tuple[float, float]:
    """Theta and linear factor; transformers 5 nests both in ``rope_parameters``."""
    scaling: Config = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", text.get("rope_theta", 10000.0)))
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind == "linear":
        return theta, float(scaling["factor"])
    if kind != "default":
        faults.append(f"rope scaling {kind!r} is not one of default, linear")
    partial = float(text.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0)))
    if partial != 1.0:
        faults.append(f"partial_rotary_factor {partial} is not 1")
    return theta, 1.0


def _read_windows(
    text: Config, defaults: dict[str, Any], model_type: str, num_layers: int
) -> tuple[int, ...]:
    if model_type == "mistral":
        # An explicit null means no window; an absent key means the library's 4096.
        window = text["sliding_window"] if "sliding_window" in text else defaults["sliding_window"]
        return (int(window or 0),) * num_layers
    if model_type == "qwen2" and text.get("use_sliding_window", False):
        window = int(text.get("sliding_window") or 0)
        full = int(text.get("max_window_layers", 28))
        types = text.get("layer_types")
        if types is not None:
            return tuple(window if kind == "sliding_attention" else 0 for kind in types)
        return tuple(window if layer >= full else 0 for layer in range(num_layers))
    return (0,) * num_layers


def _read_pinpoints(
    config: Config, model_type: str, vision: VisionDims | None, faults: list[str]
) -> tuple[tuple[int, int], ...]:
    if model_type == "llava":
        return ()
    raw = config.get("image_grid_pinpoints")
    pinpoints = STOCK_PINPOINTS if raw is None else tuple((int(h), int(w)) for h, w in raw)
    if vision is not None and any(
        side % vision.image_size for point in pinpoints for side in point
    ):
        faults.append(
            f"image_grid_pinpoints {[list(p) for p in pinpoints]} are not all multiples of the "
            f"tile side {vision.image_size}"
        )
    return pinpoints
