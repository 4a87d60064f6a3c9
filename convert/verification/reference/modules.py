"""ReferenceStructure: what transformers' own classes make of a checkpoint's configuration.

The model is built on torch's meta device: modules with all their settings and no weights. Its
answers are the expectation that a graph is held against, so nothing of ours stands in between: not
the manifest, not ``ModelDims``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.checkpoint.transformers_loader import meta_model

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

    def rotary(self) -> Any:
        """The rotary embedding as the reference makes it, with weights of its own."""
        return type(self.decoder.rotary_emb)(config=self.text)

    def frequencies(self, ulps: int) -> torch.Tensor:
        """Its frequencies, float32 [half a head], moved by so many units in the last place."""
        found: torch.Tensor = self.rotary().inv_freq.float()
        for _ in range(abs(ulps)):
            found = torch.nextafter(found, torch.tensor(float("inf") * ulps))
        return found

    @staticmethod
    def activation(module: Any) -> str:
        """``gelu`` (with erf), ``quick_gelu``, or the class's name."""
        name = type(module).__name__
        return _ACTIVATIONS.get(name, name)
