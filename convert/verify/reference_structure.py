"""ReferenceStructure: what transformers' own classes make of a checkpoint's configuration.

The model is built on torch's meta device: modules with all their settings and no weights. Its
answers are the expectation that a graph is held against, so nothing of ours stands in between: not
the manifest, not ``ModelDims``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llava_edge.convert.checkpoint import Checkpoint
from llava_edge.convert.transformers_loader import meta_model

_ACTIVATIONS = {"GELUActivation": "gelu", "QuickGELUActivation": "quick_gelu"}


class ReferenceStructure:
    """Modules and configuration of the reference for one checkpoint.

    Args:
        config: ``config.json`` in the words of Hugging Face.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._model: Any = meta_model(config)
        self.config: Any = self._model.config

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ReferenceStructure:
        """The reference for an opened checkpoint."""
        return cls(checkpoint.config)

    @property
    def text(self) -> Any:
        """Configuration of the language model."""
        return self.config.text_config

    @property
    def vision(self) -> Any:
        """Configuration of the tower."""
        return self.config.vision_config

    @property
    def decoder(self) -> Any:
        """The language model: ``layers``, ``norm``, ``rotary_emb``."""
        return self._model.model.language_model

    @property
    def tower(self) -> Any:
        """The vision tower: ``embeddings``, ``pre_layrnorm``, ``encoder.layers``."""
        return self._model.model.vision_tower

    @property
    def projector(self) -> Any:
        """The projector: ``linear_1``, ``act``, ``linear_2``."""
        return self._model.model.multi_modal_projector

    @property
    def is_pooled(self) -> bool:
        """Whether frames of a video are pooled in front of the projector."""
        return hasattr(self._model.model, "vision_resampler")

    @property
    def head(self) -> Any:
        """The language model's head."""
        return self._model.lm_head

    @property
    def windows(self) -> list[int | None]:
        """Sliding window of each decoder layer; None where it sees all positions."""
        layers = self.decoder.layers
        kinds = getattr(self.text, "layer_types", None)
        if kinds is not None:
            width = getattr(self.text, "sliding_window", None)
            return [width if kind == "sliding_attention" else None for kind in kinds]
        if self.text.model_type == "llama":
            return [None] * len(layers)
        return [getattr(self.text, "sliding_window", None)] * len(layers)

    @property
    def feature_layers(self) -> list[int]:
        """Hidden states that the projector reads, as numbers of blocks in front of them."""
        raw = self.config.vision_feature_layer
        listed = [raw] if isinstance(raw, int) else list(raw)
        # As Python's own indexing of a list with one state more than there are blocks.
        states = list(range(len(self.tower.encoder.layers) + 1))
        return [states[layer] for layer in listed]

    @property
    def last_position(self) -> int:
        """Positions that the rotary embedding is made for, linear scaling included."""
        rope = self.text.rope_parameters
        factor = rope.get("factor", 1.0) if rope.get("rope_type") == "linear" else 1.0
        return int(self.text.max_position_embeddings * factor)

    def rope(self, num_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosine and sine of the first positions, float32 [num_positions, head_dim / 2]."""
        rotary = type(self.decoder.rotary_emb)(config=self.text)
        positions = torch.arange(num_positions)[None]
        with torch.no_grad():
            tables = rotary(torch.zeros(1, dtype=torch.float32), positions)
        # Both halves of the last axis are alike: rotation pairs column i with i + half.
        cosine, sine = (table[0, :, : table.shape[-1] // 2].numpy() for table in tables)
        return cosine, sine

    @staticmethod
    def activation(module: Any) -> str:
        """``gelu`` (with erf), ``quick_gelu``, or the class's name."""
        name = type(module).__name__
        return _ACTIVATIONS.get(name, name)
