"""One decoder layer in float32, from raw tensors, for one sequence without padding.

Its parts stand alone, so that a caller can stop between them and change a weight: what the linear
layers read is exactly what quantisation needs to see. Memory is bounded: attention goes through
torch's fused kernel, or block by block of queries where a window masks keys.

Source: transformers 5.23.0 ``LlamaDecoderLayer``, ``MistralDecoderLayer``, ``Qwen2DecoderLayer``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from llava_edge.convert.onnx.decoder import rope_tables
from llava_edge.profiles.models.model_dims import TextDims

_QUERIES_AT_A_TIME = 512


@dataclass(frozen=True)
class Rope:
    """Cosine and sine of the rotary embedding, float32 [positions, head_dim / 2]."""

    cosine: torch.Tensor
    sine: torch.Tensor

    @classmethod
    def of(cls, text: TextDims, num_positions: int) -> Rope:
        """Tables for positions 0 to ``num_positions`` - 1."""
        cosine, sine = rope_tables(text, num_positions)
        return cls(torch.from_numpy(cosine), torch.from_numpy(sine))

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotate float32 [heads, tokens, head_dim]; the first token is at position 0."""
        tokens = heads.shape[1]
        cosine, sine = self.cosine[:tokens], self.sine[:tokens]
        first, second = heads.chunk(2, dim=-1)
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        return torch.cat(turned, dim=-1)


def rms_norm(hidden: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Rows scaled to a root mean square of one, times ``gain``."""
    mean_square = hidden.square().mean(-1, keepdim=True)
    return gain * (hidden * torch.rsqrt(mean_square + epsilon))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rope: Rope,
    head_dim: int,
    window: int = 0,
) -> torch.Tensor:
    """Causal attention of one sequence with itself.

    Args:
        query: float32 [tokens, query heads * head_dim], not yet rotated.
        key: float32 [tokens, key heads * head_dim], not yet rotated.
        value: as ``key``.
        rope: tables for at least that many positions.
        head_dim: width of a head.
        window: keys that a query sees, itself included; 0 for all before it.

    Returns:
        float32 [tokens, query heads * head_dim].
    """
    tokens, width = query.shape
    queries = rope.turn(_heads(query, head_dim))
    keys = rope.turn(_heads(key, head_dim))
    values = _heads(value, head_dim)
    # Each key head serves as many neighbouring query heads.
    grouped = queries.reshape(keys.shape[0], -1, tokens, head_dim)
    if not 0 < window < tokens:
        mixed = scaled_dot_product_attention(
            grouped,
            keys[:, None].expand_as(grouped),
            values[:, None].expand_as(grouped),
            is_causal=True,
        )
    else:
        mixed = _windowed(grouped, keys, values, window)
    return mixed.reshape(-1, tokens, head_dim).transpose(0, 1).reshape(tokens, width)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * up."""
    return silu(gate).mul_(up)


@dataclass(frozen=True)
class DecoderLayer:
    """A whole layer.

    Attributes:
        text: sizes.
        window: of its attention, 0 for none.
        tensor: float32 tensors by their name inside the layer, such as
            ``self_attn.q_proj.weight``; None where the layer has none of that name.
    """

    text: TextDims
    window: int
    tensor: Callable[[str], torch.Tensor | None]

    def norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """``input_layernorm`` or ``post_attention_layernorm``."""
        gain = self.tensor(f"{name}.weight")
        assert gain is not None
        return rms_norm(hidden, gain, self.text.rms_norm_eps)

    def linear(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """One of the layer's linear layers, such as ``self_attn.q_proj``."""
        weight = self.tensor(f"{name}.weight")
        assert weight is not None
        return linear(hidden, weight, self.tensor(f"{name}.bias"))

    def attention(self, normed: torch.Tensor, rope: Rope) -> torch.Tensor:
        """What ``o_proj`` reads: [tokens, query size], for one whole sequence."""
        query, key, value = (self.linear(f"self_attn.{part}_proj", normed) for part in "qkv")
        return attend(query, key, value, rope, self.text.head_dim, self.window)

    def gated(self, normed: torch.Tensor) -> torch.Tensor:
        """What ``down_proj`` reads: [tokens, intermediate size]."""
        gate = self.linear("mlp.gate_proj", normed)
        return gated(gate, self.linear("mlp.up_proj", normed))

    def forward(self, hidden: torch.Tensor, rope: Rope) -> torch.Tensor:
        """The layer's output [tokens, hidden size] for one sequence."""
        mixed = self.attention(self.norm("input_layernorm", hidden), rope)
        hidden = hidden + self.linear("self_attn.o_proj", mixed)
        active = self.gated(self.norm("post_attention_layernorm", hidden))
        return hidden + self.linear("mlp.down_proj", active)


def _heads(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[tokens, heads * head_dim] to [heads, tokens, head_dim]."""
    return rows.reshape(len(rows), -1, head_dim).transpose(0, 1)


def _windowed(
    grouped: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int
) -> torch.Tensor:
    tokens = keys.shape[1]
    mixed = torch.empty_like(grouped)
    for first in range(0, tokens, _QUERIES_AT_A_TIME):
        last = min(first + _QUERIES_AT_A_TIME, tokens)
        start = max(0, first - window + 1)
        distance = torch.arange(first, last)[:, None] - torch.arange(start, last)
        queries = grouped[:, :, first:last]
        shape = (*queries.shape[:2], last - start, queries.shape[-1])
        mixed[:, :, first:last] = scaled_dot_product_attention(
            queries,
            keys[:, None, start:last].expand(shape),
            values[:, None, start:last].expand(shape),
            attn_mask=(distance >= 0) & (distance < window),
        )
    return mixed
