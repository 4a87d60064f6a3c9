"""Definition: what a ``tokenizer.json`` says, part by part, and where two of them differ.

Vocabulary, merges, added tokens with all flags, normaliser, pre-tokenizer, post-processor, decoder
and the settings of the model. Both sides are what the library read and wrote again, so that forms
of earlier releases count as equal; truncation and padding are left out, since no prompt is
truncated or padded here. Source of the form: tokenizers 0.23 ``Tokenizer.to_str``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")
_SHOWN = 3
_MISSING = object()

Merges = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class AddedEntry:
    """An added token: its text, and which of ``FLAGS`` it has."""

    content: str
    flags: frozenset[str]


@dataclass(frozen=True)
class Definition:
    """A parsed ``tokenizer.json``.

    Attributes:
        pieces: ids of the model's vocabulary by piece.
        scores: of a Unigram model, by id; empty for others.
        merges: pairs in order of rank; empty where the model has none.
        settings: the other fields of the model. What is empty, zero or null means off.
        steps: single steps of each of ``STEPS``, sequences opened.
        added: added tokens by id.
    """

    pieces: Mapping[str, int]
    scores: Sequence[float]
    merges: Merges
    settings: Mapping[str, Any]
    steps: Mapping[str, Sequence[Any]]
    added: Mapping[int, AddedEntry]

    @classmethod
    def parse(cls, text: str) -> Definition:
        """Parse what the library wrote."""
        document = json.loads(text)
        model = document["model"]
        vocab = model["vocab"]
        listed = isinstance(vocab, list)
        settings = {k: v or None for k, v in model.items() if k not in ("vocab", "merges", "type")}
        if model.get("unk_id") is not None:
            settings["unk_id"] = str(model["unk_id"])
        return cls(
            pieces={piece: i for i, (piece, _) in enumerate(vocab)} if listed else vocab,
            scores=[score for _, score in vocab] if listed else (),
            merges=pairs(model.get("merges", ())),
            settings={**settings, "type": model["type"]},
            steps={name: [*_steps(document.get(name))] for name in STEPS},
            added={
                token["id"]: AddedEntry(token["content"], frozenset(f for f in FLAGS if token[f]))
                for token in document["added_tokens"]
            },
        )

    @property
    def ids(self) -> list[int]:
        """All ids, sorted."""
        return sorted({*self.pieces.values(), *self.added})


def pairs(merges: Sequence[Any]) -> Merges:
    """Merges as pairs; earlier releases wrote ``left right``."""
    halves = (m.split(" ", 1) if isinstance(m, str) else m for m in merges)
    return [(left, right) for left, right in halves]


def piece_faults(ours: Mapping[str, int], theirs: Mapping[str, int], whose: str) -> Iterator[str]:
    """Pieces that have another id, are missing, or stand there besides."""
    if ours == theirs:
        return
    moved = [p for p, i in theirs.items() if ours.get(p, _MISSING) != i]
    extra = [p for p in ours if p not in theirs]
    if moved:
        shown = ", ".join(
            f"{p!r:.40} is {theirs[p]} there and {ours.get(p, 'missing')} here"
            for p in moved[:_SHOWN]
        )
        yield f"vocabulary: {len(moved)} pieces have another id than in {whose}: {shown}"
    if extra:
        shown = ", ".join(f"{ours[p]} {p!r:.40}" for p in extra[:_SHOWN])
        yield f"vocabulary: {len(extra)} pieces are none of {whose}: {shown}"


def merge_faults(ours: Merges, theirs: Merges, whose: str) -> Iterator[str]:
    """Merges that are missing, of another rank, or there besides."""
    if ours == theirs:
        return
    have, want = set(ours), set(theirs)
    rank = next(
        (r for r, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    here, there = (list(m[rank : rank + 1]) or "the end" for m in (ours, theirs))
    yield (
        f"merges: {len(want - have)} of {whose} are missing, {len(have - want)} are none of them; "
        f"the first that differs is rank {rank}: {there!s:.60} there, {here!s:.60} here"
    )


def score_faults(ours: Sequence[float], theirs: Sequence[float], whose: str) -> Iterator[str]:
    """Scores of a Unigram model that differ."""
    both = zip(ours, theirs, strict=False)
    if differing := [i for i, (a, b) in enumerate(both) if not is_same_score(a, b)]:
        first = differing[0]
        yield (
            f"scores: {len(differing)} differ from {whose}; id {first} has {ours[first]}, "
            f"{theirs[first]} there"
        )


def is_same_score(one: float, other: float) -> bool:
    """Equal but for the last digit, which the library may change each time it reads a number."""
    return math.isclose(one, other, rel_tol=1e-12)


def setting_faults(ours: Mapping[str, Any], theirs: Mapping[str, Any], whose: str) -> Iterator[str]:
    """Settings of the model that differ."""
    for name in sorted({*ours, *theirs}):
        if (have := ours.get(name)) != (want := theirs.get(name)):
            yield f"model, {name}: it is {have!r:.60}; in {whose} {want!r:.60}"


def step_faults(name: str, ours: Sequence[Any], theirs: Sequence[Any], whose: str) -> Iterator[str]:
    """Whether a part has other steps."""
    if ours != theirs:
        yield f"{name}: {_shown(ours)} here, {_shown(theirs)} in {whose}"


def added_faults(
    ours: Mapping[int, AddedEntry], theirs: Mapping[int, AddedEntry], whose: str
) -> Iterator[str]:
    """Added tokens that differ in place, text or flags.

    Args:
        ours: of the artifact.
        theirs: what is expected.
        whose: who expects it, for messages.
    """
    for index in sorted({*ours, *theirs}):
        have, want = ours.get(index), theirs.get(index)
        if have == want:
            continue
        if want is None or have is None:
            where = f"is none of {whose}" if want is None else "is missing"
            entry = have or want
            assert entry is not None
            yield f"added token {index} {entry.content!r:.40} {where}"
        elif have.content != want.content:
            yield f"added token {index} is {have.content!r:.40}; in {whose} {want.content!r:.40}"
        else:
            flags = [
                f"{flag} is {flag in have.flags}, {flag in want.flags} there"
                for flag in sorted(have.flags ^ want.flags)
            ]
            yield f"added token {index} {have.content!r:.40}: {', '.join(flags)}"


def _steps(step: Any) -> Iterator[Any]:
    if step is None:
        return
    inner = next((step[key] for key in _SEQUENCES if key in step), None)
    if step.get("type") != "Sequence" or inner is None:
        yield step
        return
    for each in inner:
        yield from _steps(each)


def _shown(steps: Sequence[Any]) -> str:
    return "nothing" if not steps else f"{json.dumps(steps, ensure_ascii=False):.160}"
