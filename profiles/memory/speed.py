"""The speed model: rooflines for tower, prompt and decode. Every figure here is a prediction.

    time = work / (peak of the profile · share that kind of work reaches)

Tower and prompt are bound by arithmetic, decode by the bytes that each token streams. The shares
are constants with their sources; see ``data/speed_constants.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llava_edge.profiles.boards.hardware import HardwareProfile, Int8Isa, Target
from llava_edge.profiles.memory.buffers import CacheType, default_cache_type, kv_cache_bytes
from llava_edge.profiles.memory.constants import Constants, speed_constants
from llava_edge.profiles.memory.formats import VisionFormat, default_vision, weight_bytes
from llava_edge.profiles.models.model_dims import ModelDims, TextDims
from llava_edge.profiles.models.parameters import (
    decoder_matrices,
    head_parameters,
    projector_parameters,
)

QUESTION_TOKENS = 64
"""Text beside the media in the prompt that predictions speak of."""

ANSWER_TOKENS = 128
"""Answer that predictions speak of; decode is taken in its middle."""

_XQA_HEAD_DIMS = (64, 128, 256)
_XQA_INT8_GROUPS = (4, 8, 16, 32)
"""Query heads a head of keys and values."""


@dataclass(frozen=True)
class Prediction:
    """Predicted, not measured; None where the profile states no rate.

    Attributes:
        vision_seconds: all tiles through tower and projector.
        prefill_seconds: the prompt through the decoder.
        decode_tokens_per_second: in the middle of an answer of ``ANSWER_TOKENS``.
    """

    vision_seconds: float | None
    prefill_seconds: float | None
    decode_tokens_per_second: float | None

    @property
    def ttft_seconds(self) -> float | None:
        """Time to the first token, image processing on the host not counted."""
        if self.vision_seconds is None or self.prefill_seconds is None:
            return None
        return self.vision_seconds + self.prefill_seconds

    @property
    def answer_seconds(self) -> float | None:
        """Time of a whole answer of ``ANSWER_TOKENS``."""
        if self.ttft_seconds is None or self.decode_tokens_per_second is None:
            return None
        return self.ttft_seconds + ANSWER_TOKENS / self.decode_tokens_per_second


def predict_speed(
    dims: ModelDims,
    precision: str,
    profile: HardwareProfile,
    *,
    media_tokens: int,
    num_tiles: int,
    cache: CacheType | None = None,
    num_devices: int = 1,
    constants: Mapping[str, Constants] | None = None,
    vision: VisionFormat | None = None,
    stored_isa: Int8Isa | None = None,
) -> Prediction:
    """Predict one answer: media and a short question in, ``ANSWER_TOKENS`` out.

    Args:
        dims: the model.
        precision: of the language model.
        profile: the board.
        media_tokens: image and video tokens of the prompt.
        num_tiles: tiles and frames that go through the tower.
        cache: type of the cache; None for the target's own.
        num_devices: devices that share every layer.
        constants: groups as ``speed_constants`` gives them; None for the shipped ones.
        vision: format of the tower; None for ``formats.default_vision``.
        stored_isa: instructions that int8 weights are laid out for; None for the board's.
    """
    groups = speed_constants() if constants is None else constants
    target = profile.target
    shares = groups[target]
    scale = 1.0 + (num_devices - 1) * groups["cuda"]["link"]
    prompt = media_tokens + QUESTION_TOKENS
    kind = cache or default_cache_type(target)

    tower = vision or default_vision(precision, target, profile.int8_isa)
    encode = prefill = None
    float_rate = profile.peak_fp16
    rate = _matmul_rate(profile, precision, shares)
    if float_rate is not None and rate is not None:
        tiles_rate = float_rate * shares["vision"]
        if tower.precision == "int8" and profile.peak_int8 is not None:
            tiles_rate = profile.peak_int8 * shares["vision_int8"]
        encode = vision_operations(dims) * num_tiles / tiles_rate
        linear = prefill_operations(dims.text, prompt) / rate
        scores = attention_operations(dims.text, prompt) / (float_rate * shares["attention"])
        prefill = (linear + scores) / scale
    decode = None
    if profile.bandwidth is not None:
        context = prompt + ANSWER_TOKENS // 2
        isa = stored_isa or profile.int8_isa
        streamed = streamed_bytes(dims, precision, target, isa, context, kind)
        if target == "cuda" and kind == "int8" and not steps_read_codes(dims.text):
            # Codes become float16, which is written and read, at every step.
            streamed += 2 * kv_cache_bytes(dims.text, context, "float16")
        quantised = target == "cuda" and precision == "int4"
        share = shares["bandwidth_int4" if quantised else "bandwidth"]
        seconds = streamed / (profile.bandwidth * share * scale) + shares["step"]
        if target == "cpu" and float_rate is not None:
            # One row against the cache is bound by arithmetic there, not by bytes.
            one = attention_operations(dims.text, context) / context * 2
            seconds += one / (float_rate * shares["attention_decode"])
        decode = 1 / seconds
    return Prediction(encode, prefill, decode)


def steps_read_codes(text: TextDims) -> bool:
    """Whether a decode step on a GPU reads an int8 cache as it is, without making float16 of it.

    Prompts never do. Source: kernels of ONNX Runtime's XQA in the CUDA provider of 1.31.1, and what
    it launches for the groups of all variants (1, 4, 7 and 8 of 128; ``make test-cuda``). Below
    compute capability 8.0 it runs no int8 cache at all.
    """
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    return text.head_dim in _XQA_HEAD_DIMS and heads in {n * kv_heads for n in _XQA_INT8_GROUPS}


def streamed_bytes(
    dims: ModelDims,
    precision: str,
    target: Target,
    int8_isa: Int8Isa,
    context_tokens: int,
    cache: CacheType | None = None,
) -> int:
    """Bytes that one decode step reads: weights of decoder and head, and the cache so far."""
    weights = weight_bytes(dims, precision, target, int8_isa, resident=True)
    kind = cache or default_cache_type(target)
    return weights.decoder + weights.lm_head + kv_cache_bytes(dims.text, context_tokens, kind)


def vision_operations(dims: ModelDims) -> int:
    """Operations (a multiply and an add are two) of one tile through tower and projector."""
    v = dims.vision
    tokens = v.num_patches + 1
    block = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    scores = 2 * tokens * tokens * v.hidden_size
    tower = v.num_blocks_used * (tokens * block + scores)
    patches = v.num_patches * 3 * v.patch_size**2 * v.hidden_size
    return 2 * (tower + patches + v.num_patches * projector_parameters(dims))


def prefill_operations(text: TextDims, tokens: int) -> int:
    """Operations of the linear layers for ``tokens`` positions and the head for one."""
    body = sum(matrix.parameters for matrix in decoder_matrices(text))
    return 2 * (tokens * body + head_parameters(text))


def attention_operations(text: TextDims, tokens: int) -> int:
    """Operations of causal attention over ``tokens`` positions: scores and mix, half of each."""
    return 2 * tokens * tokens * text.query_size * text.num_hidden_layers


def _matmul_rate(profile: HardwareProfile, precision: str, shares: Constants) -> float | None:
    if profile.target == "cuda":
        # Weight-only kernels: prompts run as float16 products whatever the weights are stored in.
        return None if profile.peak_fp16 is None else profile.peak_fp16 * shares["matmul"]
    if precision == "fp16" or profile.int8_isa == "none" or profile.peak_int8 is None:
        return None if profile.peak_fp16 is None else profile.peak_fp16 * shares["matmul_fp16"]
    return profile.peak_int8 * shares[f"matmul_{precision}"]
