"""``python -m llava_edge.bench.lab.micro.prompt_lookup``: prompt lookup beside plain decoding.

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
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.bench.common.random_models import DECODER_1B, write_random
from llava_edge.bench.common.subprocess_runner import program, run_fresh
from llava_edge.bench.lab.pages.commands import PROFILE
from llava_edge.bench.lab.pages.drawing.sample import Sample, held_out_sample
from llava_edge.bench.lab.pages.training.checkpoint import SHIPPED
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.backends.cpu_isa import needs_wide_sums
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.generation.decoder.decoding import PlainSteps, SpeculativeDecoding
from llava_edge.runtime.generation.decoder.prompt_lookup import PromptLookup
from llava_edge.runtime.generation.decoder.sampling import Sampler
from llava_edge.runtime.generation.decoder.topk_logits import TopkLogits
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.generation.inputs.embedding_table import EmbeddingTable
from llava_edge.runtime.generation.loop import LoopResult, generate_tokens
from llava_edge.runtime.util.arrays import Array

_SMALL: Mapping[str, object] = {"layers": 2, "hidden_size": 256, "intermediate_size": 512}
_CONTEXT, _PASSAGE, _SEED = 4096, 48, 0
_CHECKED = (1, 2, 3, 5, 8, 11, 17, 33)


def main(argv: list[str] | None = None) -> int:
    """Run the measurement and return the exit code."""
    options = _parser().parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        trained = _convert(SHIPPED, Path(work) / "trained", options.precisions)
        for precision, artifact in trained.items():
            rows += _ask(precision, artifact, options)
        checkpoint = Path(work) / "checkpoint"
        sizes = _SMALL if options.small else DECODER_1B
        write_random(checkpoint, sizes)
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
        run_fresh([*command, *more, "--vision-precision", "fp16", "--verify", "none"])
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
                # The one that comes second finds other caches, so both do in turn.
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
        super().__init__(GenerationConfig(), vocab_size, vocab_size)
        self._answer = iter(answer)

    def choose(self, logits: Array | TopkLogits) -> int:
        super().choose(logits)
        return next(self._answer)


class _Large:
    """The large decoder behind a prompt of made-up words."""

    def __init__(self, artifact: Path, options: argparse.Namespace) -> None:
        opened = open_artifact(artifact)
        manifest = opened.manifest
        wide_sums = needs_wide_sums(manifest.precision)
        settings = SessionOptions(threads=options.threads, wide_sums=wide_sums)
        session = Session.from_files(opened.files, manifest.decoder.file, settings)
        text, chunk = manifest.model.text, manifest.prefill_chunk
        self._vocab_size = text.vocab_size
        self._decoder = Decoder(session, text, manifest.context_tokens, chunk, np.float32)
        self._table = EmbeddingTable(opened.files[manifest.embeddings], manifest.model)
        random = np.random.default_rng(_SEED)
        # Frequent and rare words, as in text: the r-th most frequent comes as 1 / (r + 2.7).
        words = np.arange(3, manifest.tokens.num_text_tokens)
        shares = 1 / (np.arange(len(words)) + 2.7)
        drawn = random.choice(words, options.prompt + _PASSAGE, p=shares / shares.sum())
        self._prompt, self.new = drawn[: options.prompt], drawn[options.prompt :]
        start = options.prompt // 2
        self.copied = self._prompt[start : start + _PASSAGE]
        self._first = self._decoder.prefill(options.prompt, self._fill)[0].copy()

    def _fill(self, first: int, stop: int, out: Array) -> None:
        out[...] = self._embed(self._prompt[first:stop])

    def _embed(self, tokens: Sequence[int] | Array) -> Array:
        return self._table.rows(np.asarray(tokens))

    def answer(self, told: Array, most: int) -> tuple[float, PlainSteps]:
        """Processor seconds, which other work on the machine changes least, and the steps."""
        self._decoder.rewind(len(self._prompt))
        steps = PlainSteps(self._decoder, self._embed)
        if most:
            lookup = PromptLookup(self._prompt.tolist())
            steps = SpeculativeDecoding(self._decoder, self._embed, lookup, most)
        forced = _Forced(self._vocab_size, told.tolist())
        started = time.process_time()
        list(generate_tokens(steps, self._first, forced, frozenset(), len(told), LoopResult()))
        return time.process_time() - started, steps

    def checks(self, rounds: int) -> dict[str, Any]:
        """Runs of several positions beside steps: processor time, and how far logits lie apart."""
        seconds: dict[int, list[float]] = {count: [] for count in _CHECKED}
        rows = self._embed(self.new[: max(_CHECKED) + 1])
        stepped = np.stack([self._at(index, row) for index, row in enumerate(rows)])
        scale = float(stepped.max() - stepped.min())
        gap = 0.0
        for _ in range(rounds):
            for count in _CHECKED:
                self._decoder.rewind(len(self._prompt))
                started = time.process_time()
                tried = self._decoder.verify_draft(rows[:count])
                seconds[count].append(time.process_time() - started)
                gap = max(gap, float(np.abs(tried - stepped[:count]).max()) / scale)
        # A plain step behind positions that were checked together, beside one behind steps.
        for _ in range(max(_CHECKED) - 1):
            self._decoder.accept()
        behind = float(np.abs(self._decoder.step(rows[-1]) - stepped[-1]).max()) / scale
        single = min(seconds[1])
        costs = {str(count): min(took) / single for count, took in seconds.items()}
        return {"steps_by_positions": costs, "logit_gap": gap, "logit_gap_of_a_step_behind": behind}

    def _at(self, index: int, row: Array) -> Array:
        if not index:
            self._decoder.rewind(len(self._prompt))
        return self._decoder.step(row).copy()


def _force(precision: str, artifact: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The large decoder, on answers that are given."""
    large = _Large(artifact, options)
    checks = large.checks(options.rounds)
    rows = []
    for name, told in (("copied", large.copied), ("new", large.new)):
        turns = _Turns([], [])
        for turn in range(options.rounds + 1):
            # The one that comes second finds other caches, so both do in turn.
            ways = [0, options.lookup] if turn % 2 else [options.lookup, 0]
            found = {most: large.answer(told, most) for most in ways}
            # The first turn warms up.
            if turn:
                turns.plain.append(found[0][0])
                seconds, steps = found[options.lookup]
                turns.drafted.append(seconds)
                turns.drafts += steps.drafted
                turns.accepted += steps.accepted
        rows.append(turns.row("1.1 B", precision, name) | checks)
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
    for row in rows:
        if "steps_by_positions" in row and row["answers"] == "new":
            costs = ", ".join(f"{n}: {cost:.2f}" for n, cost in row["steps_by_positions"].items())
            lines.append(f"1.1 B {row['precision']}, positions of a run: cost in steps {costs}")
            lines.append(
                f"  logits {row['logit_gap']:.1e} of their range from those of steps, of a step "
                f"behind such a run {row['logit_gap_of_a_step_behind']:.1e}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
