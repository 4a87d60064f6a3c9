"""golden_probe: an answer of the reference, cut to the tensors that travel in the artifact."""

from __future__ import annotations

import hashlib

import numpy as np

from llava_edge.convert.verification.reference.answer import ReferenceAnswer
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.verification.golden.probes import GoldenProbe

_FEATURE_NUMBERS = 32768
"""Features kept of a probe; 128 KiB."""
_SPREAD_IDS = 48
"""Ids spread over the vocabulary whose logits are kept, besides every best two."""


def golden_probe(answer: ReferenceAnswer) -> GoldenProbe:
    """What a board without torch compares itself with."""
    # The kept positions begin within the prompt; its last one foretells the first forced token.
    logits = answer.export[answer.positions.num_prefill - 1 :]
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :2]
    vocab = logits.shape[-1]
    spread = np.linspace(0, vocab - 1, min(_SPREAD_IDS, vocab)).astype(np.int64)
    ids = np.unique(np.concatenate([spread, order.reshape(-1)]))
    features = answer.features.reshape(-1, answer.features.shape[-1])
    rows = _some_rows(features)
    digest = hashlib.sha256()
    frames = answer.inputs.frame_pixels
    for pixels in (*answer.inputs.pixel_values, *(() if frames is None else (frames,))):
        digest.update(np.ascontiguousarray(pixels.numpy(), "<f4").data)
    return GoldenProbe(
        name=answer.probe.name,
        prompt=answer.probe.question,
        images=answer.probe.arrays(),
        ids=answer.inputs.ids.numpy().astype(np.int64),
        pixel_sha256=digest.hexdigest(),
        feature_rows=rows,
        features=features[rows].astype(np.float32),
        forced=answer.forced.astype(np.int64),
        logit_ids=ids,
        logits=logits[:, ids].astype(np.float32),
        top_ids=order.astype(np.int64),
        top_logits=np.take_along_axis(logits, order, -1).astype(np.float32),
        ranges=np.ptp(logits, axis=-1).astype(np.float32),
        video=answer.probe.frames(),
    )


def _some_rows(features: Array) -> Array:
    """Rows spread over all tiles."""
    if not features.size:
        return np.empty(0, np.int64)
    count = max(1, min(len(features), _FEATURE_NUMBERS // features.shape[1]))
    return np.unique(np.linspace(0, len(features) - 1, count).astype(np.int64))
