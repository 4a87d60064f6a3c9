"""Stage ``loop``: sampling, streaming, stops, reuse and drafts, as users have them.

Decoder and tower are scripted for most of it, so that every token, every row of the cache and every
piece of text is known exactly, at any precision and any size of model. What is left, chunks, reuse,
drafts and draws on the model itself, is compared with plain runs of it
(``runtime/verification/loop/model.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from llava_edge.convert.verification.reference.answer import Reference
from llava_edge.convert.verification.reference.sampling import choose_by_reference, draw_cases
from llava_edge.convert.verification.stages.loop_texts import text_cases
from llava_edge.convert.verification.tokenizer.artifact import artifact_tokenizer
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.certificate import StageResult, exact
from llava_edge.runtime.artifact.memory_estimate import RequestMemory
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.artifact.prompt_date import COMPARED_NOW
from llava_edge.runtime.generation.components import Components
from llava_edge.runtime.generation.inputs.embedding_table import EmbeddingTable
from llava_edge.runtime.generation.inputs.prompt_encoder import PromptEmbedder
from llava_edge.runtime.processing.processor import RequestBuilder
from llava_edge.runtime.processing.text.chat_prompt import at_time
from llava_edge.runtime.util.limits import Limits
from llava_edge.runtime.verification.golden.loop import GoldenLoop, parse_loop
from llava_edge.runtime.verification.golden.probes import GOLDEN_FILE, read_golden_loop
from llava_edge.runtime.verification.loop.bench import CAPACITY
from llava_edge.runtime.verification.loop.check import check_loop
from llava_edge.runtime.verification.loop.model import STAGE, LoopOnModel, check_loop_on_model
from llava_edge.runtime.verification.loop.scripted_decoder import DigestEncoder, ScriptedDecoder
from llava_edge.runtime.vision.select import VisionBackend


def golden_loop(artifact: Artifact, reference: Reference) -> GoldenLoop:
    """What travels in the artifact about its loop."""
    return GoldenLoop(draw_cases(), text_cases(artifact, reference))


def loop_stage(artifact: Artifact, reference: Reference) -> list[StageResult]:
    """Everything that needs no graph: scripted requests, and the cases that travel."""
    loop = golden_loop(artifact, reference)
    with open_without_graphs(artifact) as model:
        rows = check_loop(model, loop, choose_by_reference)
    if GOLDEN_FILE in artifact.manifest.files:
        opened = artifact.files[GOLDEN_FILE]
        value = read_golden_loop(opened)
        if value is not None:
            found = parse_loop(value, artifact.manifest, str(opened.path))
            rows.append(_golden_row(found, loop))
    return rows


def run_loop(model: LlavaEdge) -> LoopOnModel:
    """The part that needs the model, whole or cut, with its stop tokens or without."""
    return check_loop_on_model(model, choose_by_reference)


def _golden_row(found: GoldenLoop, wanted: GoldenLoop) -> StageResult:
    """What travels is what the reference says now."""
    pairs = [
        *(
            (ours.name, ours == theirs)
            for ours, theirs in zip(found.draws, wanted.draws, strict=False)
        ),
        *(
            (ours.name, ours == theirs)
            for ours, theirs in zip(found.texts, wanted.texts, strict=False)
        ),
    ]
    faults = [f"{name}: it is not what the reference says" for name, same in pairs if not same]
    counts = [len(each.draws) + len(each.texts) for each in (found, wanted)]
    if counts[0] != counts[1]:
        faults.append(f"{counts[0]} cases travel, not {counts[1]}")
    return exact(STAGE, "differing_golden_cases", faults, f"{counts[0]} cases that travel")


@contextmanager
def open_without_graphs(artifact: Artifact) -> Iterator[LlavaEdge]:
    """A model of which all but decoder and tower is the artifact's; nothing of any size is read."""
    manifest = artifact.manifest
    if manifest.prompt is not None:
        manifest = replace(manifest, prompt=at_time(manifest.prompt, COMPARED_NOW))
        artifact = replace(artifact, manifest=manifest)
    dims, tokens = manifest.model, manifest.tokens
    dtype: type[np.float32] | type[np.float16]
    dtype = np.float32 if manifest.target == "cpu" else np.float16
    with ExitStack() as opened:
        tokenizer = artifact_tokenizer(artifact)
        table = EmbeddingTable(artifact.files[manifest.embeddings], dims)
        opened.callback(table.close)
        tower = VisionBackend(DigestEncoder(), "ort")
        decoder: Any = ScriptedDecoder(
            table.vocab_size, table.hidden_size, dtype, CAPACITY, manifest.prefill_chunk
        )
        embedder = PromptEmbedder(
            dims, tokens.image, table, tower.encoder, dtype, None, tokens.video
        )
        components = Components(
            requests=RequestBuilder(manifest, tokenizer, Limits()),
            tokenizer=tokenizer,
            tokens=tokens,
            table=table,
            tower=tower,
            embedder=embedder,
            decoder=decoder,
            dtype=dtype,
            memory=RequestMemory(manifest, "cpu", 1),
            device="cpu",
            threads=1,
            cache=manifest.precision.computes,
            least_context=manifest.context_tokens,
            opened=opened.pop_all(),
        )
    with LlavaEdge(artifact, components) as model:
        yield model
