"""run_self_test: golden prompts and files of an artifact, by the production path.

What the reference said of them travels in the artifact (``golden/probes.py``), so this needs no
torch. The bounds are the tool's own and those of verification.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llava_edge.profiles.errors import ArtifactError, ImageError, PromptError, VideoError
from llava_edge.runtime.artifact.certificate import StageResult, bounded, exact
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.artifact.prompt_date import COMPARED_NOW
from llava_edge.runtime.processing.request import PromptOptions, VideoInput
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.image_formats import READABLE_FORMATS
from llava_edge.runtime.util.progress import Progress, no_progress
from llava_edge.runtime.verification.golden.loop import parse_loop
from llava_edge.runtime.verification.golden.media import GoldenChat
from llava_edge.runtime.verification.golden.probes import (
    GOLDEN_FILE,
    GoldenProbe,
    read_golden,
    read_golden_loop,
    read_golden_media,
)
from llava_edge.runtime.verification.loaded_model import LoadedModel
from llava_edge.runtime.verification.loop.check import check_loop
from llava_edge.runtime.verification.loop.choice import choose_plainly
from llava_edge.runtime.verification.loop.model import check_loop_on_model
from llava_edge.runtime.verification.media_reader import (
    MediaReader,
    first_difference,
    missing_here,
    pixel_digest,
)
from llava_edge.runtime.verification.token_comparison import TokenComparison
from llava_edge.runtime.verification.tolerances import GAP, Bounds, bounds_for


def has_golden(artifact: Artifact) -> bool:
    """Whether golden prompts travel in the artifact."""
    return GOLDEN_FILE in artifact.manifest.files


def run_self_test(
    model: LoadedModel,
    progress: Progress = no_progress,
    formats: Sequence[str] = READABLE_FORMATS,
) -> list[StageResult]:
    """Run every golden prompt, open every file, and compare with what the reference said.

    Args:
        model: loaded where it is to run.
        progress: told about prompts.
        formats: picture files of others are left out.

    Returns:
        Rows for prompt, preprocessing, tile_features, prefill_logits, decode_logits and greedy. A
        row for which nothing could be looked at is inconclusive. Rows for the loop follow where
        the artifact carries its cases.

    Raises:
        ArtifactError: the artifact has no golden prompts, or they are malformed.
        EngineError: ONNX Runtime failed.
    """
    artifact = model.artifact
    manifest = artifact.manifest
    if not has_golden(artifact):
        raise ArtifactError(
            f"{artifact.folder} holds no {GOLDEN_FILE}, so there is nothing to compare this "
            "machine with. Verify it with its checkpoint (llava-edge verify --against), or "
            "convert again with verification."
        )
    bounds = bounds_for(manifest.target, manifest.precision, int8_cache=model.cache == "int8")
    probes = read_golden(artifact.files[GOLDEN_FILE], manifest)
    seen: list[_Seen] = []
    for index, probe in enumerate(probes):
        progress("golden prompts", index, len(probes))
        seen.append(_look(model, probe, bounds))
    progress("golden prompts", len(probes), len(probes))
    media = read_golden_media(artifact.files[GOLDEN_FILE], manifest)
    with model._open_files() as reader:
        files = [file for file in media.files if not missing_here([file.source], formats)]
        faults = reader.faults(files)
        seen += (
            _look_at_chat(model, reader, chat)
            for chat in media.chats
            if not missing_here(chat.sources, formats)
        )
    return [*_rows(seen, _FileFaults(len(files), faults), bounds), *_loop_rows(model, bounds)]


def _loop_rows(model: LoadedModel, bounds: Bounds) -> list[StageResult]:
    opened = model.artifact.files[GOLDEN_FILE]
    value = read_golden_loop(opened)
    if value is None:
        return []
    loop = parse_loop(value, model.artifact.manifest, str(opened.path))
    return [*check_loop(model, loop), *check_loop_on_model(model, choose_plainly).rows(bounds)]


@dataclass(frozen=True)
class _FileFaults:
    """How many picture and video files were looked at, and what differs."""

    count: int
    faults: list[str]


@dataclass(frozen=True)
class _Gap:
    """A difference as a share of the reference's range, and where it is."""

    value: float
    where: str


@dataclass(frozen=True)
class _Seen:
    """What one probe showed; None where it was not reached."""

    left_out: str = ""
    prompt: str = ""
    pixels: str | None = None
    features: _Gap | None = None
    prefill: _Gap | None = None
    decode: _Gap | None = None
    tokens: TokenComparison | None = None


def _look(model: LoadedModel, probe: GoldenProbe, bounds: Bounds) -> _Seen:
    name, steps = probe.name, len(probe.forced)
    needed = len(probe.ids) + max(1, steps)
    if needed > model.context_tokens:
        return _Seen(
            left_out=f"{name} needs a context of {needed} tokens, loaded are {model.context_tokens}"
        )
    logits = np.empty(probe.logits.shape, np.float32)
    chosen = np.empty(1 + steps, np.int64)

    def keep(position: int, row: Array) -> None:
        logits[position] = row[probe.logit_ids]
        chosen[position] = row.argmax()

    # Without a template the probe's prompt is a finished one.
    options = PromptOptions(raw=model.artifact.manifest.prompt is None, now=COMPARED_NOW)
    try:
        replay = model.replay(
            probe.prompt,
            probe.images,
            [int(token) for token in probe.forced],
            keep,
            options,
            None if probe.video is None else VideoInput(probe.video, len(probe.video)),
        )
    except (PromptError, ImageError, VideoError) as error:
        return _Seen(prompt=f"{name} is refused: {error}")
    ids = replay.request.ids
    if not np.array_equal(ids, probe.ids):
        return _Seen(prompt=f"{name}: {first_difference(ids, probe.ids)}")
    digest = pixel_digest((*replay.request.pixel_values, *replay.request.frame_pixels))
    return _Seen(
        pixels=None
        if not probe.images and probe.video is None
        else f"{name} has other pixels" * (digest != probe.pixel_sha256),
        features=_feature_gap(replay.features, probe),
        prefill=_logit_gap(logits, probe, slice(0, 1)),
        decode=_logit_gap(logits, probe, slice(1, None)),
        tokens=TokenComparison.of(
            chosen, probe.top_ids, probe.top_logits, probe.ranges, _logit_bound(bounds), name
        ),
    )


def _look_at_chat(model: LoadedModel, reader: MediaReader, chat: GoldenChat) -> _Seen:
    seen = reader.look(chat, model._embed_rows, model.context_tokens)
    gap = None if seen.gap is None else _Gap(seen.gap, f"{chat.name}, its last tiles")
    pixels = None if seen.ids else seen.pixels
    return _Seen(prompt=seen.ids or seen.packing, pixels=pixels, features=gap)


def _feature_gap(features: Array, probe: GoldenProbe) -> _Gap | None:
    if not len(probe.feature_rows):
        return None
    gaps = np.abs(features[probe.feature_rows].astype(np.float32) - probe.features)
    spread = float(probe.features.max() - probe.features.min())
    # nanargmax would hide what is not a number; argmax finds it first.
    row = int(gaps.max(axis=1).argmax())
    return _Gap(
        _share(float(gaps[row].max()), spread),
        f"{probe.name}, row {int(probe.feature_rows[row])}",
    )


def _logit_gap(logits: Array, probe: GoldenProbe, positions: slice) -> _Gap | None:
    gaps = np.abs(logits[positions] - probe.logits[positions])
    if not len(gaps):
        return None
    shares = gaps.max(axis=1) / probe.ranges[positions]
    at = int(shares.argmax())
    start = positions.start or 0
    token = int(probe.logit_ids[int(gaps[at].argmax())])
    return _Gap(float(shares[at]), f"{probe.name}, position {start + at}, id {token}")


def _share(gap: float, spread: float) -> float:
    if spread > 0:
        return gap / spread
    return 0.0 if gap == 0 else float("inf")


def _logit_bound(bounds: Bounds) -> float:
    return max(bounds.answer_gap(stage) for stage in ("prefill_logits", "decode_logits"))


def _rows(seen: Sequence[_Seen], files: _FileFaults, bounds: Bounds) -> list[StageResult]:
    return [
        _prompt_row(seen),
        _pixel_row(seen, files),
        _gap_row("tile_features", (each.features for each in seen), bounds),
        _gap_row("prefill_logits", (each.prefill for each in seen), bounds),
        _gap_row("decode_logits", (each.decode for each in seen), bounds),
        _token_row(seen, bounds),
    ]


def _prompt_row(seen: Sequence[_Seen]) -> StageResult:
    row = exact(
        "prompt", "differing_prompts", [s.prompt for s in seen if s.prompt], f"{len(seen)} prompts"
    )
    left_out = [each.left_out for each in seen if each.left_out]
    if row.verdict == "fail" or not left_out:
        return row
    return _unseen("prompt", "differing_prompts", 0.0, "; ".join(left_out))


def _pixel_row(seen: Sequence[_Seen], files: _FileFaults) -> StageResult:
    looked_at = [each.pixels for each in seen if each.pixels is not None]
    if not looked_at and not files.count:
        return _unseen("preprocessing", "differing_prompts", 0.0)
    faults = [*files.faults, *filter(None, looked_at)]
    looked = f"{len(looked_at)} prompts and {files.count} files, SHA-256"
    return exact("preprocessing", "differing_prompts", faults, looked)


def _gap_row(stage: str, gaps: Iterable[_Gap | None], bounds: Bounds) -> StageResult:
    bound = bounds.answer_gap(stage)
    found = [gap for gap in gaps if gap is not None]
    if not found:
        return _unseen(stage, GAP, bound)
    # Not a number is the worst, wherever it stands.
    worst = max(found, key=lambda gap: (gap.value != gap.value, gap.value))
    return bounded(stage, GAP, worst.value, bound, detail=f"largest at {worst.where}")


def _token_row(seen: Sequence[_Seen], bounds: Bounds) -> StageResult:
    total = TokenComparison(0, 0, 0)
    for each in seen:
        if each.tokens is not None:
            total += each.tokens
    few_decide = bounds.compares_layers or bounds.int8_cache
    needs_evidence = not (few_decide and total.positions)
    return total.row("greedy", needs_evidence=needs_evidence)


def _unseen(stage: str, metric: str, bound: float, detail: str = "") -> StageResult:
    return StageResult(
        stage, metric, None, bound, "inconclusive", detail=detail or "no prompt came so far"
    )
