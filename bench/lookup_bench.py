"""``python -m llava_edge.bench.lookup_bench``: prompt lookup beside plain decoding.

Two models. The small trained one is asked its held-out copying questions, and others. A decoder of
1.1 B random weights (the language model of a 1.4 B LLaVA-NeXT; the tower takes no part in decoding)
goes through the same loop and the same steps, but what it says is replaced: by a copy of a passage
of its prompt (*copied*), or by tokens that follow nothing (*new*), where lookup can only lose. So
the cost of checking drafts is real and their acceptance that of an answer of the kind. Plain
and drafted answers take turns. Wall time for the trained model, processor time for the large one,
which means the same with one thread. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.bench.fresh_process import program, run_fresh
from llava_edge.bench.pages.checkpoint import SHIPPED
from llava_edge.bench.pages.commands import PROFILE
from llava_edge.bench.pages.sample import Sample, held_out_sample
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact import open_artifact
from llava_edge.runtime.decode_steps import DraftedSteps, PlainSteps
from llava_edge.runtime.decoder import Decoder
from llava_edge.runtime.embeddings import EmbeddingTable
from llava_edge.runtime.generate import LoopResult, generate_tokens
from llava_edge.runtime.instructions import needs_wide_sums
from llava_edge.runtime.prompt_lookup import PromptLookup
from llava_edge.runtime.sampling import Sampler, SamplingOptions
from llava_edge.runtime.session import Array, Session, SessionOptions

_LARGE: Mapping[str, object] = {
    "backbone": "mistral",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layers": 16,
    "heads": 32,
    "kv_heads": 8,
    "vocab_size": 32064,
}
_SMALL: Mapping[str, object] = {"layers": 2, "hidden_size": 256, "intermediate_size": 512}
_CONTEXT, _PASSAGE, _SEED = 4096, 48, 0


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    options = _parser().parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        trained = _convert(SHIPPED, Path(work) / "trained", options.precisions)
        for precision, artifact in trained.items():
            rows += _ask(precision, artifact, options)
        checkpoint = Path(work) / "checkpoint"
        sizes = _SMALL if options.small else _LARGE
        changes = [f"--set={name}={value}" for name, value in sizes.items()]
        writer = [sys.executable, "-m", "llava_edge.convert.random_cli", "tiny", str(checkpoint)]
        subprocess.run([*writer, *changes], check=True)
        for precision in options.precisions:
            context = ["--context", str(_CONTEXT)]
            random = _convert(checkpoint, Path(work) / "random", [precision], context)
            rows += _force(precision, random[precision], options)
    print(_table(rows))
    asked = {"lookup": options.lookup, "rounds": options.rounds, "prompt": options.prompt}
    print(json.dumps({**asked, "rows": rows}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure prompt lookup beside plain decoding.")
    parser.add_argument("--precisions", nargs="+", default=["fp16", "int8", "int4"])
    parser.add_argument("--lookup", type=int, default=10, help="longest draft")
    parser.add_argument("--questions", type=int, default=12, help="of each sort")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens before a forced answer")
    parser.add_argument("--rounds", type=int, default=5, help="each way runs once a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a narrow decoder, to try the command")
    parser.add_argument("--work", type=Path, help="where 8 GB of models lie meanwhile")
    return parser


def _convert(
    checkpoint: Path, out: Path, precisions: Iterable[str], more: Sequence[str] = ()
) -> dict[str, Path]:
    """Through the command, as a user would: bench knows nothing of convert."""
    found = {}
    for precision in precisions:
        found[precision] = out / precision
        command = [program("llava-edge"), "convert", str(checkpoint), str(found[precision])]
        command += ["--profile", PROFILE, "--precision", precision, "--quantizer", "rtn"]
        run_fresh([*command, *more, "--verify", "none"])
    return found


@dataclass
class _Turns:
    """Seconds of plain and drafted answers in turns, and what the drafts were worth.

    ``same``: pairs with equal tokens; None where what is said is given.
    """

    plain: list[float]
    drafted: list[float]
    drafts: int = 0
    accepted: int = 0
    same: int | None = None

    def row(self, model: str, precision: str, answers: str) -> dict[str, Any]:
        pairs = [slow / fast for slow, fast in zip(self.plain, self.drafted, strict=True)]
        return {
            "model": model,
            "precision": precision,
            "answers": answers,
            "ratio": sum(self.plain) / sum(self.drafted),
            "ratio_median": statistics.median(pairs),
            "ratio_range": [min(pairs), max(pairs)],
            "draft_tokens": self.drafts,
            "accepted_tokens": self.accepted,
            "pairs": len(pairs),
            "same_tokens": self.same,
            "load_average": os.getloadavg()[0],
        }


def _ask(precision: str, artifact: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The trained model, on questions that copy and on others."""
    rows = []
    with LlavaEdge.load(artifact, threads=options.threads) as model:
        for copies in (True, False):
            turns, same = _Turns([], []), 0
            for sample in _questions(options.questions, copies=copies):
                question, images = sample.questions[0].text, [sample.image]
                # Whoever comes second finds other caches, so both do in turn.
                ways = [0, options.lookup] if len(turns.plain) % 2 else [options.lookup, 0]
                found = {
                    most: model.generate(question, images, prompt_lookup_num_tokens=most)
                    for most in ways
                }
                plain, drafted = found[0], found[options.lookup]
                turns.plain.append(plain.timings.decode_seconds)
                turns.drafted.append(drafted.timings.decode_seconds)
                turns.drafts += drafted.draft_tokens
                turns.accepted += drafted.accepted_tokens
                same += plain.token_ids == drafted.token_ids
            turns.same = same
            rows.append(turns.row("trained", precision, "copied" if copies else "other"))
    return rows


def _questions(count: int, *, copies: bool) -> Iterable[Sample]:
    found = 0
    for index in range(1000 * count):
        sample = held_out_sample(_SEED, index)
        question = sample.questions[0]
        # Answers of one sign have no decoding to measure.
        if (question.kind == "copy") == copies and len(question.answer) > 2:
            yield sample
            found += 1
        if found == count:
            return


class _Forced(Sampler):
    """Chooses as every sampler does, and then says what it was told to."""

    def __init__(self, vocab_size: int, answer: Sequence[int]) -> None:
        super().__init__(SamplingOptions(), vocab_size, vocab_size)
        self._answer = iter(answer)

    def choose(self, logits: Array) -> int:
        super().choose(logits)
        return next(self._answer)


def _force(precision: str, artifact: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The large decoder, on answers that are given."""
    opened = open_artifact(artifact)
    manifest = opened.manifest
    text = manifest.model.text
    wide_sums = needs_wide_sums(manifest.precision)
    settings = SessionOptions(threads=options.threads, wide_sums=wide_sums)
    session = Session(opened.path(manifest.decoder.file), settings)
    chunk = manifest.prefill_chunk
    decoder = Decoder(session, text, manifest.context_tokens, chunk, np.float32)
    table = EmbeddingTable(opened.path(manifest.embeddings), manifest.model)
    random = np.random.default_rng(_SEED)
    # Frequent and rare words, as in text: the r-th most frequent comes as 1 / (r + 2.7).
    words = np.arange(3, manifest.tokens.num_text_tokens)
    shares = 1 / (np.arange(len(words)) + 2.7)
    drawn = random.choice(words, options.prompt + _PASSAGE, p=shares / shares.sum())
    prompt, new = drawn[: options.prompt], drawn[options.prompt :]
    start = options.prompt // 2
    answers = {"copied": prompt[start : start + _PASSAGE], "new": new}

    def fill(first: int, stop: int, out: Array) -> None:
        out[...] = table.rows(prompt[first:stop])

    first_logits = decoder.prefill(len(prompt), fill)[0].copy()

    def embed(tokens: Sequence[int]) -> Array:
        return table.rows(np.array(tokens))

    def answer(told: Array, most: int) -> tuple[float, PlainSteps]:
        """Processor seconds, which other work on the machine changes least, and the steps."""
        decoder.rewind(len(prompt))
        steps = PlainSteps(decoder, embed)
        if most:
            steps = DraftedSteps(decoder, embed, PromptLookup(prompt.tolist()), most)
        forced = _Forced(text.vocab_size, told.tolist())
        started = time.process_time()
        list(generate_tokens(steps, first_logits, forced, frozenset(), len(told), LoopResult()))
        return time.process_time() - started, steps

    rows = []
    for name, told in answers.items():
        turns = _Turns([], [])
        for turn in range(options.rounds + 1):
            # Whoever comes second finds other caches, so both do in turn.
            if turn % 2:
                plain, _ = answer(told, 0)
                drafted, steps = answer(told, options.lookup)
            else:
                drafted, steps = answer(told, options.lookup)
                plain, _ = answer(told, 0)
            # The first turn warms up.
            if turn:
                turns.plain.append(plain)
                turns.drafted.append(drafted)
                turns.drafts += steps.drafted
                turns.accepted += steps.accepted
        rows.append(turns.row("1.1 B", precision, name))
    table.close()
    return rows


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["model    precision  answers  tokens/s ratio (median, range)   accepted     same"]
    lines += [
        f"{row['model']:8} {row['precision']:9}  {row['answers']:7}  {row['ratio']:5.2f} "
        f"({row['ratio_median']:.2f}, {row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f})"
        f"  {row['accepted_tokens']:6} of {row['draft_tokens']:4}  "
        f"{'given' if row['same_tokens'] is None else row['same_tokens']} of {row['pairs']}"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
