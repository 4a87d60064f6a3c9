from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
)

from llava_edge.convert.quantization.gptq import torch_layer as decoder_layer
from llava_edge.convert.quantization.gptq.torch_layer import DecoderLayer, Rope, attend, rms_norm
from llava_edge.profiles.models.model_dims import ModelDims

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
}
_MODELS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama, one key head a query head": (LlamaConfig, LlamaModel, {"num_key_value_heads": 6}),
    "llama with biases, linear rope": (
        LlamaConfig,
        LlamaModel,
        {
            "num_key_value_heads": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
    "mistral, window 24": (
        MistralConfig,
        MistralModel,
        {"num_key_value_heads": 3, "sliding_window": 24},
    ),
    "mistral, head_dim 32": (
        MistralConfig,
        MistralModel,
        {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 32},
    ),
    "qwen2, window from layer 1 on": (
        Qwen2Config,
        Qwen2Model,
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 10,
            "max_window_layers": 1,
        },
    ),
}


@pytest.mark.parametrize("tokens", [1, 25, 61])
@pytest.mark.parametrize("model", _MODELS)
def test_two_layers_give_the_hidden_states_of_the_reference(
    model: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_layer, "_QUERIES_AT_A_TIME", 16)
    config_class, model_class, changes = _MODELS[model]
    torch.manual_seed(3)
    config = config_class(**{**_SIZES, **changes})
    reference = model_class(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.3)
    text = config.to_dict()
    text.setdefault("model_type", config.model_type)
    dims = ModelDims.from_config(
        {
            "model_type": "llava_next",
            "image_token_index": 3,
            "text_config": text,
            "vision_config": {
                "model_type": "clip_vision_model",
                "image_size": 336,
                "patch_size": 14,
            },
        }
    ).text
    hidden = torch.randn(tokens, 96)
    with torch.no_grad():
        expected = reference(inputs_embeds=hidden[None], output_hidden_states=True).hidden_states
        rope = Rope.of(dims, tokens)
        found = hidden
        for index, module in enumerate(reference.layers):
            tensors = dict(module.state_dict())
            layer = DecoderLayer(dims, dims.sliding_windows[index], tensors.get)
            found = layer.forward(found, rope)
            if index == 0:
                torch.testing.assert_close(found, expected[1][0], rtol=2e-5, atol=5e-5)
        final = rms_norm(found, reference.norm.weight, dims.rms_norm_eps)
    # The last hidden state of the reference has passed the final norm.
    torch.testing.assert_close(final, expected[2][0], rtol=2e-5, atol=5e-5)


def test_a_window_sees_itself_and_the_keys_right_before_it() -> None:
    rope = Rope(torch.ones(4, 1), torch.zeros(4, 1))
    value = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0], [9.0, 0.0]])
    still = torch.zeros(4, 2)
    # Equal scores: the mean of the two values that a window of two holds.
    assert attend(still, still, value, rope, 2, window=2)[:, 0].tolist() == [1.0, 2.0, 4.0, 7.0]
    assert attend(still, still, value, rope, 2)[:, 0].tolist() == [1.0, 2.0, 3.0, 4.5]


def test_attention_of_a_long_prompt_does_not_hold_all_scores() -> None:
    # 8 heads of 3000 x 3000 float32 scores would be 288 MB.
    import resource

    rope = Rope(torch.ones(3000, 16), torch.zeros(3000, 16))
    rows = torch.randn(3000, 8 * 32)
    attend(rows[:64], rows[:64], rows[:64], rope, 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attend(rows, rows, rows, rope, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024
