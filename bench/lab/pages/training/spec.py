"""Spec: the configuration of the small model, as transformers' own classes take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from llava_edge.bench.lab.pages.drawing.geometry import PATCH_SIZE, PROCESSING, TILE_SIZE
from llava_edge.bench.lab.pages.training.tokenizer import BOS, EOS, IMAGE, PAD


@dataclass(frozen=True)
class Spec:
    """Sizes. Widths of the decoder are multiples of 128, so that groups of GPTQ divide them."""

    vision_hidden_size: int = 128
    vision_intermediate_size: int = 384
    vision_layers: int = 4
    vision_heads: int = 4
    hidden_size: int = 256
    intermediate_size: int = 384
    layers: int = 5
    heads: int = 8
    kv_heads: int = 2
    max_positions: int = 2048

    def config(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """``config.json`` of the checkpoint."""
        ids = {name: tokenizer.token_to_id(name) for name in (IMAGE, BOS, EOS, PAD)}
        return {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            "image_token_index": ids[IMAGE],
            "image_grid_pinpoints": [list(point) for point in PROCESSING.image_grid_pinpoints],
            "image_seq_length": (TILE_SIZE // PATCH_SIZE) ** 2,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
            "dtype": "float16",
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": self.vision_hidden_size,
                "intermediate_size": self.vision_intermediate_size,
                "num_hidden_layers": self.vision_layers,
                "num_attention_heads": self.vision_heads,
                "image_size": TILE_SIZE,
                "patch_size": PATCH_SIZE,
                "projection_dim": self.vision_hidden_size,
            },
            "text_config": {
                "model_type": "mistral",
                "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "max_position_embeddings": self.max_positions,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "sliding_window": None,
                "tie_word_embeddings": False,
                "bos_token_id": ids[BOS],
                "eos_token_id": ids[EOS],
                "pad_token_id": ids[PAD],
            },
        }
