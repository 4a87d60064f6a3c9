"""Ids and texts of the runtime's tokenizer beside the reference's, on drawn texts and sequences."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

from llava_edge.convert.verification.tokenizer.corpus import (
    code_points,
    composed,
    decompositions,
    drawn_sequences,
    drawn_texts,
)
from llava_edge.convert.verification.tokenizer.reference import ReferenceTokenizer
from llava_edge.convert.verification.tokenizer.sentencepiece_reference import SentencePieceTokenizer
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.certificate import StageResult, exact
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from llava_edge.runtime.processing.text.tokenizer_backend import mapped_errors

_NAME = "tokenizer"
_TEXTS = 1200
_SEQUENCES = 300
_STREAMED_TEXTS = 200
_WHOLE = 64
"""Texts that are encoded with what the tokenizer puts around them as well."""
_STREAM = 512
"""Ids of one streamed answer that goes through the vocabulary."""
_SHARE = 8
"""Where definitions are compared whole, one line of code points in so many is enough."""


class TokenizerComparison:
    """An artifact's tokenizer and the reference, asked the same.

    Args:
        tokenizer: the runtime's, of the artifact.
        theirs: the reference.
        pieces: the vocabulary that the reference has, by piece.
        control: ids that are no text to the reference.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        theirs: ReferenceTokenizer,
        pieces: Mapping[str, int],
        control: frozenset[int],
    ) -> None:
        self._ours = tokenizer
        self._theirs = theirs
        self._sentencepiece = isinstance(theirs, SentencePieceTokenizer)
        self._pieces = pieces
        # What the reference calls control is no text, whatever the artifact calls it.
        self._inside = sorted({*pieces.values()} - control)
        self._added = sorted({*theirs.added.values()} - control - {*pieces.values()})
        self._marks = [content for content in (*theirs.added, *theirs.symbols) if content]

    def ids_row(self) -> StageResult:
        """Ids of drawn texts and code points; of every piece where definitions have two forms."""
        texts = self._compared_texts()
        looked = f"{len(texts)} texts; {self._theirs.name}"
        return exact(_NAME, "differing_ids", _failures(self._id_faults(texts)), looked)

    def texts_row(self) -> StageResult:
        """Texts of every id alone, of drawn sequences, and of all ids in long streamed answers."""
        alone = [[i] for i in (*self._inside, *self._added)]
        if self._sentencepiece:
            # Beside an ordinary piece nothing is taken off the start or the end.
            letters = (self._pieces[p] for p in sorted(self._pieces) if len(p) == 1 and p.isalpha())
            usual = next((i for i in letters if i in self._inside), self._inside[-1])
            alone += [[usual, i, usual] for i in self._inside]
            alone += [[usual, i] for i in self._inside]
        sequences = [*self._sequences()]
        faults = _failures(self._alone_faults(alone), self._sequence_faults(sequences))
        looked = f"{len(alone)} of one id, {len(sequences)} sequences whole and streamed"
        return exact(_NAME, "differing_texts", faults, f"{looked}; {self._theirs.name}")

    def _id_faults(self, texts: Sequence[str]) -> Iterator[str]:
        with mapped_errors("the artifact's tokenizer fails at a text"):
            plain = self._ours.backend.encode_batch([*texts], add_special_tokens=False)
            around = self._ours.backend.encode_batch([*texts[:_WHOLE]], add_special_tokens=True)
        ours = [e.ids for e in (*plain, *around)]
        theirs = [
            *self._theirs.ids_of_texts(texts),
            *(self._theirs.ids(text) for text in texts[:_WHOLE]),
        ]
        for text, a, b in zip((*texts, *texts[:_WHOLE]), ours, theirs, strict=True):
            if list(a) != b:
                yield f"{text!r:.60} has the ids {_shown(a)}, the reference's {_shown(b)}"

    def _alone_faults(self, sequences: Sequence[Sequence[int]]) -> Iterator[str]:
        with mapped_errors("the artifact's tokenizer fails at an id"):
            ours = self._ours.backend.decode_batch([*sequences], skip_special_tokens=True)
        yield from _text_faults(sequences, ours, self._texts(sequences), "decoded alone")

    def _sequence_faults(self, sequences: Sequence[Sequence[int]]) -> Iterator[str]:
        theirs = self._texts(sequences)
        whole = [self._ours.decode(ids) for ids in sequences]
        yield from _text_faults(sequences, whole, theirs, "decoded")
        # Control tokens among the ids are no part of the text.
        control = sorted(self._ours.control_ids)
        salted = [_salted(ids, control) for ids in sequences]
        streamed = [self._stream(ids) for ids in salted]
        yield from _text_faults(salted, streamed, theirs, "streamed")

    def _compared_texts(self) -> list[str]:
        chance = random.Random(3)
        words = self._texts([[i] for i in chance.choices(self._inside, k=4096)])
        texts = drawn_texts(words, self._marks, _TEXTS)
        if not self._sentencepiece:
            return [*texts, *code_points(_SHARE), *decompositions(_SHARE)]
        assert isinstance(self._theirs, SentencePieceTokenizer)
        plain = [piece.replace("▁", " ") for piece in self._pieces]
        texts += [*plain, *(f"a{piece}b" for piece in plain)]
        if self._theirs.normalises:
            return composed([*texts, *(" ".join(line) for line in code_points())])
        return [*texts, *code_points(), *decompositions()]

    def _sequences(self) -> Iterator[list[int]]:
        rare = [i for p, i in self._pieces.items() if len(p) == 6 and p.startswith("<0x")]
        rare += [*self._theirs.symbols.values()]
        inside = set(self._inside)
        rare = [i for i in rare if i in inside]
        yield from drawn_sequences(self._inside, rare, _SEQUENCES)
        texts = drawn_texts((), (), _STREAMED_TEXTS)
        for ids in self._theirs.ids_of_texts(texts):
            yield [i for i in ids if i in inside]
        order = list(self._inside)
        random.Random(5).shuffle(order)
        for start in range(0, len(order), _STREAM):
            yield order[start : start + _STREAM]

    def _texts(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return self._theirs.texts_of_ids(sequences)

    def _stream(self, ids: Iterable[int]) -> str:
        stream = self._ours.stream()
        return "".join([*map(stream.push, ids), stream.finish()])


def _failures(*groups: Iterable[str]) -> Iterator[str]:
    """Faults of each group; a library that fails ends its group alone."""
    for group in groups:
        try:
            yield from group
        except ArtifactError as error:
            yield str(error)


def _salted(ids: Sequence[int], control: Sequence[int]) -> list[int]:
    chance = random.Random(len(ids))
    found = list(ids)
    for _ in range(min(3, len(control))):
        found.insert(chance.randint(0, len(found)), chance.choice(control))
    return found


def _text_faults(
    ids: Sequence[Sequence[int]], ours: Sequence[str], theirs: Sequence[str], how: str
) -> Iterator[str]:
    for sequence, a, b in zip(ids, ours, theirs, strict=True):
        if a != b:
            place = next(
                (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                min(len(a), len(b)),
            )
            start = max(0, place - 8)
            yield (
                f"{_shown(sequence)} {how} is {a[start : place + 16]!r} from character {start}, "
                f"the reference's {b[start : place + 16]!r}"
            )


def _shown(ids: Sequence[int]) -> str:
    return json.dumps(list(ids[:8])) + " …" * (len(ids) > 8)
