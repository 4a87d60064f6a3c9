"""Faults of options and ways to ask that single requests of the usual kind do not show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llava_edge.runtime.chat import Chat
from llava_edge.runtime.generation.decoder.sampling import Sampler
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.model import LlavaEdge
from llava_edge.runtime.processing import processor as request_builder
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.cached_encoder import CachedEncoder
from llava_edge.runtime.vision.feature_cache import FeatureCache
from tests.faults.fault import loop_faults

_Patch = pytest.MonkeyPatch


def _generate_draws_not(patch: _Patch) -> None:
    real = LlavaEdge.generate

    def generate(self: LlavaEdge, *arguments: Any, **options: Any) -> Any:
        return real(self, *arguments, **{**options, "temperature": 0.0})

    patch.setattr(LlavaEdge, "generate", generate)


def _short_answers(patch: _Patch) -> None:
    real = GenerationConfig.__post_init__

    def settle(self: GenerationConfig) -> None:
        real(self)
        object.__setattr__(self, "max_new_tokens", min(64, self.max_new_tokens))

    patch.setattr(GenerationConfig, "__post_init__", settle)


def _seed_cut(patch: _Patch) -> None:
    real = Sampler.__init__

    def init(self: Sampler, options: Any, *rest: Any, **more: Any) -> None:
        seed = options.seed
        real(
            self,
            options if seed is None else replace(options, seed=seed & 0x7FFFFFFF),
            *rest,
            **more,
        )

    patch.setattr(Sampler, "__init__", init)


def _system_lost(patch: _Patch) -> None:
    real = Chat._pieces

    def pieces(self: Chat, *arguments: Any, **options: Any) -> Any:
        system, self._system = self._system, None
        try:
            return real(self, *arguments, **options)
        finally:
            self._system = system

    patch.setattr(Chat, "_pieces", pieces)


def _marks_always(patch: _Patch) -> None:
    real = request_builder.compose

    def compose(*arguments: Any, **options: Any) -> Any:
        return real(*arguments, **{**options, "image_marks": True})

    patch.setattr(request_builder, "compose", compose)


def _batch_turned(patch: _Patch) -> None:
    real = CachedEncoder.encode

    def encode(self: CachedEncoder, pixels: Array, out: Array, digests: Any = None) -> None:
        real(self, pixels, out, digests)
        out[...] = out[::-1].copy()

    patch.setattr(CachedEncoder, "encode", encode)


def _unknown_misplaced(patch: _Patch) -> None:
    """Of a batch of which some are known, the others' features go to the first places."""

    def encode(self: CachedEncoder, pixels: Array, indices: list[int], out: Array) -> None:
        features = np.empty((len(indices), *out.shape[1:]), out.dtype)
        if indices:
            self._encoder.encode(pixels[indices], features)
            out[: len(indices)] = features

    patch.setattr(CachedEncoder, "_encode", encode)


def _dropped_under_new_key(patch: _Patch) -> None:
    real = FeatureCache.keep

    def keep(self: FeatureCache, key: Any, features: Array) -> None:
        if self._features and self.nbytes + features.nbytes > self.capacity_bytes:
            self._features[key] = self._features.popitem(last=False)[1]
        else:
            real(self, key, features)

    patch.setattr(FeatureCache, "keep", keep)


FAULTS = loop_faults(
    "options",
    ("generate draws not", "generate() leaves the temperature out", _generate_draws_not),
    ("short answers", "answers end after 64 tokens", _short_answers),
    ("seed cut", "of a seed 31 bits count", _seed_cut),
    ("marks always", "image_marks=False does not reach the prompt", _marks_always),
    ("batch turned", "kept features of several tiles come in reverse", _batch_turned),
    ("unknown misplaced", "tiles that were not kept go to the first places", _unknown_misplaced),
    ("dropped under a new key", "features that gave way stand for others", _dropped_under_new_key),
) + loop_faults(
    "options", ("system lost", "a conversation's system turn is lost", _system_lost), model="qwen2"
)
