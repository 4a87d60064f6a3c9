"""Stage ``greedy``: answers of the whole runtime, loop and cache included, are the reference's.

The artifact writes its greedy answer first. The reference then reads that answer and must choose
the same token at every position where its two best are not too close to call; up to the first such
near tie that is the same as both writing on their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_edge.convert.verify.answer_stages import compare_choices
from llava_edge.convert.verify.gaps import GAP
from llava_edge.convert.verify.probes import NUM_STEPS, Probe
from llava_edge.convert.verify.reference_answer import Reference
from llava_edge.profiles.errors import LlavaEdgeError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact import Artifact
from llava_edge.runtime.bounds import Bounds
from llava_edge.runtime.prompt import MARKS
from llava_edge.runtime.token_comparison import TokenComparison


def greedy_tokens(
    artifact: Artifact,
    probes: Sequence[Probe],
    reference: Reference,
    bounds: Bounds,
    threads: int = 0,
) -> TokenComparison:
    """Compare the answers to some probes.

    Raises:
        LlavaEdgeError: the artifact does not answer.
    """
    answers: list[tuple[int, ...]] = []
    raw = artifact.manifest.prompt is None
    longest = max(len(reference.inputs(probe).ids) for probe in probes)
    context = min(artifact.manifest.context_tokens, longest + NUM_STEPS)
    with LlavaEdge.over(
        artifact, "cpu", threads=threads, allow_slow=True, context_tokens=context
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
    bound = bounds.value("prefill_logits", GAP)
    for probe, tokens in zip(probes, answers, strict=True):
        if not tokens:
            raise LlavaEdgeError(f"the artifact answered {probe.name!r} with nothing")
        theirs = reference.following(reference.inputs(probe), tokens[:-1])
        name = f"answer to {probe.name!r}"
        found += compare_choices(np.array(tokens), theirs, bound, name)
    return found
