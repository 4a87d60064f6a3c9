"""calibrate_cache: the scales of an int8 KV cache, from what the float cache holds on samples.

The artifact's own float decoder runs the calibration samples layer by layer, through the runtime's
``Decoder``; what it then has in its cache (keys behind the rotary embedding, values) is looked at
and nothing else. So the scales are those of the very weights and kernels that will fill the cache,
at every precision and however its codes were found. In memory are one layer and one sample; hidden
states lie in two files, as in ``quantize_llm``.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_edge.convert.onnx.decoder_slice import DecoderGraph
from llava_edge.convert.onnx.int8_kv_cache import LARGEST_CODE, CacheScales, scales_digest
from llava_edge.convert.quantization.activation_file import ActivationFile
from llava_edge.convert.quantization.calibration.calibration_set import CalibrationSet
from llava_edge.profiles.errors import CheckpointError
from llava_edge.profiles.models.model_dims import ModelDims, TextDims
from llava_edge.runtime.artifact.manifest import Precision
from llava_edge.runtime.backends.cpu_isa import needs_wide_sums
from llava_edge.runtime.backends.onnxruntime import SessionOptions
from llava_edge.runtime.backends.process import configure_process
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import Progress

NUM_SAMPLES = 8
"""Some 12,000 tokens on stock grids: maxima of channels need fewer than GPTQ's Hessians do."""

HEADROOM = 2.0
"""The largest code stands for so many times the largest value seen: what is cut off costs far more
than a coarser step does, see docs/decisions."""

QUIET = 2.0
"""A channel is taken to reach at least so many times what the median channel of its head reached:
what says nothing on calibration samples may speak on others. Not the loudest channel, which would
leave few codes to all others where it is far louder than they are."""

_STAGE = "calibrate cache"
_CHUNK_TOKENS = 512
# A channel that no sample moved: what comes there later is cut off, not divided by zero.
_LEAST = 1e-6


def calibrate_cache(
    graph: Path,
    dims: ModelDims,
    precision: Precision,
    samples: CalibrationSet,
    work: Path,
    report: Progress,
) -> tuple[CacheScales, dict[str, Any]]:
    """Run samples through a decoder and take the scales of its cache.

    Args:
        graph: the decoder with its float cache; its weights lie beside it.
        dims: of the model.
        precision: of the artifact; decides the type of activations and the kernels.
        samples: what the language model reads.
        work: folder for hidden states, emptied again.
        report: told about layers.

    Returns:
        Scales of all layers, and plain JSON for the manifest.

    Raises:
        CheckpointError: keys or values of a layer are not finite.
        ExportError: the disk is full.
    """
    configure_process()
    place = work / "cache-scales"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        largest = _largest(graph, dims, precision, samples, place, report)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    step = _steps(largest)
    scales = CacheScales(key=step[0], value=step[1])
    facts = {
        "scales_sha256": scales_digest(scales.key, scales.value),
        "headroom": HEADROOM,
        "quiet": QUIET,
        "calibration": samples.report,
        "idle_channels": int((largest < _LEAST).sum()),
    }
    return scales, facts


def _steps(largest: Array) -> Array:
    """Scales of channels, from their largest magnitudes float32 [..., head_dim]."""
    floor = np.float32(QUIET) * np.median(largest, axis=-1, keepdims=True)
    reach = np.maximum(np.maximum(largest, floor) * np.float32(HEADROOM), _LEAST)
    steps: Array = (reach / np.float32(LARGEST_CODE)).astype(np.float32)
    return steps


def _largest(
    graph: Path,
    dims: ModelDims,
    precision: Precision,
    samples: CalibrationSet,
    place: Path,
    report: Progress,
) -> Array:
    """Largest magnitude of every channel, float32 [2 (key, value), layers, kv_heads, head_dim]."""
    text = dims.text
    cut = DecoderGraph(graph, dims)
    compute: type[np.float32] | type[np.float16]
    compute = np.float32 if precision.computes == "float32" else np.float16
    options = SessionOptions(device="cpu", wide_sums=needs_wide_sums(precision))
    largest = np.zeros(
        (2, text.num_hidden_layers, text.num_key_value_heads, text.head_dim), np.float32
    )
    edges = np.cumsum([0, *(len(sample.kinds) for sample in samples.samples)]).tolist()
    longest = int(max(np.diff(edges)))
    with contextlib.ExitStack() as files:
        hidden = [
            files.enter_context(
                ActivationFile(place / f"hidden-{i}.rows", edges[-1], text.hidden_size)
            )
            for i in range(2)
        ]
        for start, sample in zip(edges, samples.samples, strict=False):
            hidden[0].write(start, torch.from_numpy(np.ascontiguousarray(sample.embed())))
        samples.embedded()
        for layer in range(text.num_hidden_layers):
            report(_STAGE, layer, text.num_hidden_layers)
            source, target = hidden[layer % 2], hidden[(layer + 1) % 2]
            piece = cut.slice(layer, layer + 1, head=False)
            chunk = min(_CHUNK_TOKENS, longest)
            decoder = Decoder(piece.open(options), piece.text, longest, chunk, compute)
            for start, stop in itertools.pairwise(edges):
                rows = source.read(start, stop).numpy().astype(compute)
                target.write(start, torch.from_numpy(_run(decoder, rows, piece.text, chunk)))
                for part, name in enumerate(("key", "value")):
                    seen = np.abs(decoder.cache.part(0, name)).max(axis=1).astype(np.float32)
                    np.maximum(largest[part, layer], seen, out=largest[part, layer])
                decoder.rewind(0)
            if not np.isfinite(largest[:, layer]).all():
                raise CheckpointError(
                    f"keys or values of layer {layer} are not finite on the calibration samples; "
                    "an int8 cache has no scale for them. Convert without --cache int8."
                )
        report(_STAGE, text.num_hidden_layers, text.num_hidden_layers)
    return largest


def _run(decoder: Decoder, rows: Array, text: TextDims, chunk: int) -> Array:
    """Hidden states behind the layer, float32 [tokens, hidden]."""
    out = np.empty((len(rows), text.hidden_size), np.float32)
    for first in range(0, len(rows), chunk):
        last = min(first + chunk, len(rows))

        def fill(start: int, stop: int, target: Array, first: int = first) -> None:
            target[...] = rows[first + start : first + stop]

        out[first:last] = decoder.prefill(last - first, fill, logits_to_keep=last - first)
    return out
