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

from llava_edge.convert.verify.answer_stages import compare_choices
from llava_edge.convert.verify.gaps import GAP
from llava_edge.convert.verify.probes import NUM_STEPS, Probe
from llava_edge.convert.verify.reference_answer import Reference
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact import Artifact
from llava_edge.runtime.bounds import Bounds
from llava_edge.runtime.certificate import StageResult, exact
from llava_edge.runtime.prompt import at_time
from llava_edge.runtime.prompt_date import COMPARED_NOW
from llava_edge.runtime.request import VideoInput
from llava_edge.runtime.token_comparison import MIN_POSITIONS, TokenComparison


def greedy_tokens(
    artifact: Artifact,
    probes: Sequence[Probe],
    reference: Reference,
    bounds: Bounds,
    threads: int = 0,
    then: Callable[[LlavaEdge], object] = lambda model: None,
) -> tuple[TokenComparison, StageResult]:
    """Compare the answers to some probes with the reference, and with the artifact's own logits.

    Every answer has ``NUM_STEPS`` tokens, or as many as the context has room for.

    Args:
        artifact: answers.
        probes: the questions.
        reference: reads the answers.
        bounds: of the artifact's form.
        threads: of the CPU provider; 0 for as many as are allowed.
        then: called with the model before it is closed.

    Raises:
        LlavaEdgeError: the artifact does not answer.
    """
    answers: list[tuple[int, ...]] = []
    faults: list[str] = []
    raw = artifact.manifest.prompt is None
    if artifact.manifest.prompt is not None:
        fixed = at_time(artifact.manifest.prompt, COMPARED_NOW)
        artifact = replace(artifact, manifest=replace(artifact.manifest, prompt=fixed))
    longest = max(len(reference.inputs(probe).ids) for probe in probes)
    context = min(artifact.manifest.context_tokens, longest + NUM_STEPS)
    with LlavaEdge.over(
        _without_stop_tokens(artifact),
        "cpu",
        threads=threads,
        allow_slow=True,
        context_tokens=context,
        cache=artifact.manifest.precision.computes,
        prefix_reuse=False,
    ) as model:
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
        theirs = reference.following(reference.inputs(probe), tokens[:-1])
        found += compare_choices(np.array(tokens), theirs, bound, _name(probe))
    count = sum(map(len, answers))
    looked = f"{count} tokens of answers, the best of the same model's logits"
    row = exact("greedy", "differing_from_own_logits", faults, looked)
    if row.verdict == "pass" and count < MIN_POSITIONS:
        row = replace(row, verdict="inconclusive", detail=f"{looked}; needed are {MIN_POSITIONS}")
    return found, row


def _without_stop_tokens(artifact: Artifact) -> Artifact:
    tokens = replace(artifact.manifest.tokens, stop=())
    return replace(artifact, manifest=replace(artifact.manifest, tokens=tokens))


def _name(probe: Probe) -> str:
    return f"answer to {probe.name!r}"
