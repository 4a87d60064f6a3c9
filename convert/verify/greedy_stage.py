"""Stage ``greedy``: answers of the whole runtime, loop and cache included, are the reference's.

The artifact writes its greedy answer first. The reference then reads that answer and must choose
the same token at every position where its two best are not too close to call; up to the first such
near tie that is the same as both writing on their own.

Where rounding leaves few positions that are not too close to call, that comparison says little
about the loop. So the answer is also held against the artifact's own logits, forced through the
same graph in the same chunks: there every token must be the best one, whatever the margin.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_edge.convert.verify.answer_stages import compare_choices
from llava_edge.convert.verify.gaps import GAP
from llava_edge.convert.verify.probes import NUM_STEPS, Probe
from llava_edge.convert.verify.reference_answer import Positions, Reference
from llava_edge.convert.verify.subject import Subject
from llava_edge.profiles.errors import LlavaEdgeError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact import Artifact
from llava_edge.runtime.bounds import Bounds
from llava_edge.runtime.certificate import StageResult, exact
from llava_edge.runtime.prompt import MARKS
from llava_edge.runtime.session import Array
from llava_edge.runtime.token_comparison import TokenComparison


def greedy_tokens(
    artifact: Artifact,
    probes: Sequence[Probe],
    reference: Reference,
    bounds: Bounds,
    subject: Subject,
) -> tuple[TokenComparison, StageResult]:
    """Compare the answers to some probes with the reference, and with the artifact's own logits.

    Args:
        artifact: answers.
        probes: the questions.
        reference: reads the answers.
        bounds: of the artifact's form.
        subject: the same artifact, all of its layers at once.

    Raises:
        LlavaEdgeError: the artifact does not answer.
    """
    answers: list[tuple[int, ...]] = []
    raw = artifact.manifest.prompt is None
    longest = max(len(reference.inputs(probe).ids) for probe in probes)
    context = min(artifact.manifest.context_tokens, longest + NUM_STEPS)
    with LlavaEdge.over(
        artifact, "cpu", threads=subject.options.threads, allow_slow=True, context_tokens=context
    ) as model:
        for probe in probes:
            mark = MARKS["image"] * len(probe.images) + "\n" if raw else ""
            prompt = f"{mark}{probe.question}"
            room = model.context_tokens - model.count_tokens(prompt, probe.arrays(), raw=raw)
            answer = model.generate(
                prompt, probe.arrays(), raw=raw, max_new_tokens=max(1, min(NUM_STEPS, room))
            )
            answers.append(answer.token_ids)
    found = TokenComparison(0, 0, 0)
    faults: list[str] = []
    bound = bounds.value("prefill_logits", GAP)
    for probe, tokens in zip(probes, answers, strict=True):
        if not tokens:
            raise LlavaEdgeError(f"the artifact answered {probe.name!r} with nothing")
        theirs = reference.following(reference.inputs(probe), tokens[:-1])
        name = f"answer to {probe.name!r}"
        found += compare_choices(np.array(tokens), theirs, bound, name)
        own = _own_choices(subject, probe, tokens)
        faults += [
            f"{name}, position {place}: {tokens[place]} where its own logits say {own[place]}"
            for place in np.flatnonzero(own != np.array(tokens)).tolist()
        ]
    looked = f"{sum(map(len, answers))} tokens of answers, the best of the same graph's logits"
    return found, exact("greedy", "differing_from_own_logits", faults, looked)


def _own_choices(subject: Subject, probe: Probe, tokens: Sequence[int]) -> Array:
    """Best tokens of the artifact's own graph, the answer forced: int64 [tokens]."""
    request = subject.request(probe)
    forced = np.asarray(tokens[:-1], np.int64)
    count, chunk = request.num_tokens, subject.artifact.manifest.prefill_chunk
    rows = subject.rows(subject.embed(request), request, forced)
    positions = Positions(count, len(forced), chunk, count - 1)
    choices: Array = subject.logits(rows, positions).argmax(-1)
    return choices
