"""Stage ``golden``: the prompts that travel in the artifact say what the reference says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llava_edge.convert.verification.reference.answer import Reference
from llava_edge.convert.verification.reference.probes import Probe
from llava_edge.convert.verification.runner.metrics import GAP, whole_gap
from llava_edge.convert.verification.stages.golden_writer import golden_probe
from llava_edge.convert.verification.stages.media import golden_media_faults
from llava_edge.runtime.artifact.certificate import StageResult, exact
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.verification.golden.probes import (
    GOLDEN_FILE,
    GoldenProbe,
    read_golden,
    read_golden_media,
)
from llava_edge.runtime.verification.tolerances import Bounds

_EXACT = ("ids", "feature_rows", "forced", "logit_ids", "top_ids")
_CLOSE = {
    "features": "tile_features",
    "logits": "prefill_logits",
    "top_logits": "prefill_logits",
    "ranges": "prefill_logits",
}
"""Numbers, and the stage whose bound they keep: another machine rounds otherwise."""


def golden_stage(
    artifact: Artifact, probes: Sequence[Probe], reference: Reference, bounds: Bounds
) -> StageResult | None:
    """Compare every golden probe with the reference's answer to the same question.

    Returns:
        None where the artifact carries none.
    """
    if GOLDEN_FILE not in artifact.manifest.files:
        return None
    asked = {probe.name: probe for probe in probes}
    faults: list[str] = []
    found = read_golden(artifact.files[GOLDEN_FILE], artifact.manifest)
    for ours in found:
        if ours.name not in asked:
            faults.append(f"{ours.name}: this tool asks no such question")
            continue
        theirs = golden_probe(reference.answer(asked[ours.name], remember=True))
        faults += [f"{ours.name}: {what} differ" for what in _differences(ours, theirs, bounds)]
    media = read_golden_media(artifact.files[GOLDEN_FILE], artifact.manifest)
    faults += golden_media_faults(media, reference.media, bounds)
    looked = f"{len(found)} prompts, {len(media.files)} files, {len(media.chats)} conversations"
    return exact("golden", "differing_tensors", faults, looked)


def _differences(ours: GoldenProbe, theirs: GoldenProbe, bounds: Bounds) -> Iterator[str]:
    same_images = len(ours.images) == len(theirs.images) and all(
        np.array_equal(one, other) for one, other in zip(ours.images, theirs.images, strict=True)
    )
    frames = [each.video is not None for each in (ours, theirs)]
    same_images = same_images and frames[0] == frames[1]
    if same_images and ours.video is not None and theirs.video is not None:
        same_images = np.array_equal(ours.video, theirs.video)
    if (ours.prompt, ours.pixel_sha256) != (theirs.prompt, theirs.pixel_sha256) or not same_images:
        yield "question, images or pixels"
        return
    for name in _EXACT:
        if not np.array_equal(getattr(ours, name), getattr(theirs, name)):
            yield name
            return
    for name, stage in _CLOSE.items():
        have, want = getattr(ours, name), getattr(theirs, name)
        if want.size and not whole_gap(have, want) <= bounds.value(stage, GAP):
            yield name
