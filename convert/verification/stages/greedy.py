"""Stage ``greedy``: answers of the whole runtime, loop and cache included, are the reference's.

The artifact writes its greedy answer first. The reference then reads that answer and must choose
the same token at every position where its two best are not too close to call; up to the first such
near tie that is the same as both writing on their own.

Where rounding leaves few positions that are not too close to call, that comparison says little
about the loop. So the answer is also held against the artifact's own logits, forced through the
same model by the same path: there every token must be the best one, whatever the margin.

A trained model may stop after a word, or at once, and so short an answer is no evidence about the
loop. So the artifact answers without its stop tokens: each answer goes on past them to the same
length, and the tokens up to the first stop token are the ones that a user would get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llava_edge.convert.verification.reference.answer import Reference
from llava_edge.convert.verification.reference.probes import NUM_STEPS, Probe
from llava_edge.convert.verification.runner.artifact_runner import ArtifactRunner
from llava_edge.convert.verification.runner.loop_cut import loop_cut, loop_layers
from llava_edge.convert.verification.runner.metrics import GAP
from llava_edge.convert.verification.stages.answer import compare_choices
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.certificate import StageResult, exact
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.artifact.prompt_date import COMPARED_NOW
from llava_edge.runtime.processing.request import VideoInput
from llava_edge.runtime.processing.text.chat_prompt import at_time
from llava_edge.runtime.verification.token_comparison import MIN_POSITIONS, TokenComparison
from llava_edge.runtime.verification.tolerances import Bounds

_FEATURE_BYTES = 128 << 20


def greedy_tokens(
    subject: ArtifactRunner,
    probes: Sequence[Probe],
    reference: Reference,
    bounds: Bounds,
    threads: int = 0,
    then: Callable[[LlavaEdge], object] = lambda model: None,
    products: float | None = None,
) -> tuple[TokenComparison, StageResult]:
    """Compare the answers to some probes with the reference, and with the artifact's own logits.

    Every answer has ``NUM_STEPS`` tokens, or as many as the context has room for. Where the
    decoder does not fit the subject's memory, or costs too much, both sides answer with its first
    layers.

    Args:
        subject: the artifact, which answers.
        probes: the questions.
        reference: reads the answers.
        bounds: of the artifact's form.
        threads: of the CPU provider; 0 for as many as are allowed.
        then: called with the model before it is closed.
        products: see ``loop_layers``.

    Raises:
        LlavaEdgeError: the artifact does not answer.
    """
    answers: list[tuple[int, ...]] = []
    faults: list[str] = []
    manifest = subject.artifact.manifest
    raw = manifest.prompt is None
    lengths = [len(reference.inputs(probe).ids) + NUM_STEPS for probe in probes]
    context = min(manifest.context_tokens, max(lengths))
    with (
        loop_cut(subject, loop_layers(subject, sum(lengths), products)) as cut,
        cut.load(
            _comparable,
            threads=threads,
            context_tokens=context,
            cache=manifest.precision.computes,
            prefix_reuse=False,
            # The same pictures are asked about twice.
            vision_cache_bytes=_FEATURE_BYTES,
        ) as model,
    ):
        for probe in probes:
            prompt, images, frames = probe.prompt(raw=raw), probe.arrays(), probe.frames()
            asked: dict[str, Any] = {"video": frames, "raw": raw}
            room = model.context_tokens - model.count_tokens(prompt, images, **asked)
            answer = model.generate(
                prompt, images, **asked, max_new_tokens=max(1, min(NUM_STEPS, room))
            )
            tokens = answer.token_ids
            answers.append(tokens)
            video = None if frames is None else VideoInput(frames)
            own = model.teacher_forced_logits(
                prompt, images, tokens[:-1], video=video, raw=raw
            ).argmax(-1)
            faults += [
                f"{_name(probe)}, position {place}: {tokens[place]} where its own logits say "
                f"{own[place]}"
                for place in np.flatnonzero(own != np.array(tokens)).tolist()
            ]
        then(model)
    found = TokenComparison(0, 0, 0)
    bound = bounds.value("prefill_logits", GAP)
    for probe, tokens in zip(probes, answers, strict=True):
        inputs = reference.inputs(probe)
        theirs = reference.following(inputs, tokens[:-1], cut.reference_layers)
        found += compare_choices(np.array(tokens), theirs, bound, _name(probe))
    count = sum(map(len, answers))
    looked = f"{count} tokens of answers, the best of the same model's logits; {cut}"
    row = exact("greedy", "differing_from_own_logits", faults, looked)
    if row.verdict == "pass" and count < MIN_POSITIONS:
        row = replace(row, verdict="inconclusive", detail=f"{looked}; needed are {MIN_POSITIONS}")
    return found, row


def not_run(reason: Exception) -> StageResult:
    """The row of a loop for which there was no memory: nothing is claimed of it."""
    detail = f"the loop was not run: {reason}"[:400]
    return StageResult("greedy", "loop_not_run", None, None, "pass", "export", detail)


def _comparable(manifest: Manifest) -> Manifest:
    """The same without stop tokens, and at the time that references are asked at."""
    prompt = manifest.prompt and at_time(manifest.prompt, COMPARED_NOW)
    return replace(manifest, prompt=prompt, tokens=replace(manifest.tokens, stop=()))


def _name(probe: Probe) -> str:
    return f"answer to {probe.name!r}"
