"""All seeded faults, and those that change nothing that is ever read."""

from __future__ import annotations

import numpy as np
import pytest

from llava_edge.convert.onnx import decoder as decoder_graph
from llava_edge.profiles.models.model_dims import TextDims
from llava_edge.runtime.generation.decoder.decoder import Decoder
from tests.faults.fault import Fault
from tests.faults.models.saturation import saturate
from tests.faults.models.tamper import Tampered
from tests.faults.seeded.loop import (
    faults_limits,
    faults_options,
    faults_reuse,
    faults_sampling,
    faults_streaming,
)
from tests.faults.seeded.media import faults_clips, faults_images, faults_media, faults_video
from tests.faults.seeded.model import (
    faults_cache,
    faults_decoder,
    faults_quantized,
    faults_quantizer,
    faults_runtime,
    faults_solver,
    faults_tokenizer,
    faults_vision,
)

FAULTS: tuple[Fault, ...] = (
    *faults_images.FAULTS,
    *faults_vision.FAULTS,
    *faults_decoder.FAULTS,
    *faults_quantized.FAULTS,
    *faults_quantizer.FAULTS,
    *faults_solver.FAULTS,
    *faults_runtime.FAULTS,
    *faults_video.FAULTS,
    *faults_cache.FAULTS,
    *faults_media.FAULTS,
    *faults_media.AT_VERIFICATION,
    *faults_tokenizer.FAULTS,
    *faults_clips.FAULTS,
    *faults_clips.AT_VERIFICATION,
)

LOOP_FAULTS: tuple[Fault, ...] = (
    *faults_sampling.FAULTS,
    *faults_streaming.FAULTS,
    *faults_reuse.FAULTS,
    *faults_options.FAULTS,
    *faults_limits.FAULTS,
)
"""Those that the stage ``loop`` finds; the tests run that stage alone."""


def _rope_shifted(patch: pytest.MonkeyPatch) -> None:
    real = decoder_graph.rope_tables

    def tables(text: TextDims, num_positions: int) -> tuple[decoder_graph.Array, ...]:
        return tuple(table[1:] for table in real(text, num_positions + 1))

    patch.setattr(decoder_graph, "rope_tables", tables)


def _garbage_behind(patch: pytest.MonkeyPatch) -> None:
    real = Decoder.__init__

    def init(self: Decoder, *arguments: object, **options: object) -> None:
        real(self, *arguments, **options)  # type: ignore[arg-type]
        for buffer in self.cache._buffers.values():
            buffer.write(np.full(buffer.shape, 7.0, self._dtype))

    patch.setattr(Decoder, "__init__", init)


def _activation_zero(copy: Tampered) -> None:
    copy.change_tensor("decoder", "activation_zero", lambda zero: zero - 1)


EQUIVALENT: tuple[Fault, ...] = (
    Fault(
        "uniform rope shift",
        "decoder",
        "all positions are one later; attention reads differences of positions only",
        "conversion",
        "structure",
        _rope_shifted,
    ),
    Fault(
        "activation zero",
        "quantisation",
        "activations count from 127; rows over their largest never reach beyond 127 steps",
        "artifact",
        "structure",
        _activation_zero,
        model="int8",
    ),
    Fault(
        "saturating sums of two terms",
        "quantisation",
        "the kernel adds two products in 16 bits; those of 7 and 8 bits fit",
        "runtime",
        "",
        saturate,
        model="int8, float tower",
    ),
    Fault(
        "garbage behind the cache",
        "runtime",
        "rows behind the length hold old values; the kernel does not read them",
        "runtime",
        "",
        _garbage_behind,
    ),
)
"""Not faults: no output changes. ``stage`` says where the difference is named all the same."""
