"""A ``tokenizer.json`` against the ``tokenizer.model`` that it was built from, entry by entry.

The model file is parsed here anew, and the rules are written from sentencepiece's: a piece of BPE
is made of every two pieces that it can be cut into, the highest score first; Unigram takes the
scores as they are; what is no ordinary piece is never found in text. How runs of text are then
split is compared by what both encode. Sources: sentencepiece ``sentencepiece_model.proto``,
``bpe_model.cc``, ``unigram_model.cc``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from llava_edge.convert.verification.tokenizer.definition import (
    AddedEntry,
    Definition,
    added_faults,
    is_same_score,
    piece_faults,
)
from llava_edge.convert.verification.tokenizer.sentencepiece_reference import SentencePieceTokenizer

_FILE = "tokenizer.model"
_KINDS: Mapping[int, str] = {1: "Unigram", 2: "BPE"}
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5
_MARGIN = 100.0
"""By how much the score of what is never found must be below the least of the others."""


def sentencepiece_faults(
    ours: Definition, folder: Path, reference: SentencePieceTokenizer, control: frozenset[int]
) -> list[str]:
    """Where a definition is not that of a checkpoint's ``tokenizer.model``.

    Args:
        ours: of the artifact.
        folder: the checkpoint; the reference has judged its files.
        reference: of the same checkpoint.
        control: ids that the prompts of the model are written with.
    """
    from sentencepiece import sentencepiece_model_pb2

    generated: Any = sentencepiece_model_pb2
    model = generated.ModelProto.FromString((folder / _FILE).read_bytes())
    return [
        *_vocabulary_faults(ours, model),
        *(_merge_faults(ours, model) if model.trainer_spec.model_type == 2 else ()),
        *(_score_faults(ours, model) if model.trainer_spec.model_type == 1 else ()),
        *_added_faults(ours, model, reference, control),
    ]


def _vocabulary_faults(ours: Definition, model: Any) -> Iterator[str]:
    spec = model.trainer_spec
    yield from piece_faults(ours.pieces, {p.piece: i for i, p in enumerate(model.pieces)}, _FILE)
    unknown = model.pieces[spec.unk_id].piece
    wanted = {
        "type": _KINDS[spec.model_type],
        "byte_fallback": bool(spec.byte_fallback) or None,
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        **({"unk_token": unknown} if spec.model_type == 2 else {"unk_id": str(spec.unk_id)}),
    }
    for name, want in wanted.items():
        if (have := ours.settings.get(name)) != want:
            yield f"model, {name}: it is {have!r}; {_FILE} says {want!r}"


def _merge_faults(ours: Definition, model: Any) -> Iterator[str]:
    if any(piece.type == _UNUSED for piece in model.pieces):
        # Such a piece is built and cut up again, which no merge can say; texts decide.
        return
    score = {p.piece: p.score for p in model.pieces if p.type == _NORMAL}
    wanted = {
        (piece[:cut], piece[cut:])
        for piece in score
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    }
    have = set(ours.merges)
    if len(have) != len(ours.merges):
        yield f"merges: {len(ours.merges) - len(have)} stand there twice"
    for named, pairs in (("are missing", wanted - have), ("lead to no piece", have - wanted)):
        if pairs:
            yield f"merges: {len(pairs)} {named}: {sorted(pairs)[:3]}"
    ranks = [score.get(left + right, 0.0) for left, right in ours.merges]
    falling = [place for place, (a, b) in enumerate(pairwise(ranks)) if a < b]
    if falling:
        left, right = ours.merges[falling[0] + 1]
        yield (
            f"merges: {len(falling)} come before one of a higher score; the first is rank "
            f"{falling[0] + 1}, {left + right!r:.40}"
        )


def _score_faults(ours: Definition, model: Any) -> Iterator[str]:
    normal = [p.score for p in model.pieces if p.type == _NORMAL]
    never = min(normal, default=0.0) - _MARGIN
    for place, (piece, have) in enumerate(zip(model.pieces, ours.scores, strict=False)):
        if piece.type == _NORMAL and not is_same_score(have, piece.score):
            yield f"scores: {place} {piece.piece!r:.40} has {have}; {_FILE} {piece.score}"
        elif piece.type not in (_NORMAL, _USER_DEFINED) and have > never:
            yield f"scores: {place} {piece.piece!r:.40} has {have}, so that text may become it"


def _added_faults(
    ours: Definition, model: Any, reference: SentencePieceTokenizer, control: frozenset[int]
) -> Iterator[str]:
    wanted = dict(reference.entries)
    for content, index in reference.symbols.items():
        if index in control:
            # Turns are written with it, so it is control text, whatever the model file calls it.
            wanted.setdefault(index, AddedEntry(content, frozenset({"special"})))
    yield from added_faults(less_fillers(ours.added, wanted, len(model.pieces)), wanted, _FILE)


def less_fillers(
    ours: Mapping[int, AddedEntry], wanted: Mapping[int, AddedEntry], size: int
) -> dict[int, AddedEntry]:
    """Added tokens without those that a conversion puts at ids that no file names."""
    return {
        i: entry
        for i, entry in ours.items()
        if i in wanted
        or i < size
        or entry != AddedEntry(f"<|reserved_{i}|>", frozenset({"special"}))
    }
