"""Stage ``tokenizer``: what ships is the checkpoint's tokenizer, entry by entry and in effect.

Three rows. The definition: every entry of ``tokenizer.json`` against the one that transformers
computes with, and vocabulary and merges against the checkpoint's own files as well; where there is
``tokenizer.model`` alone, against that (``sentencepiece_definition``). What a conversion changes on
purpose is allowed by name: marks of media at the ids that config.json gives them, and reserved
tokens at ids that no file names. Then ids of drawn texts, and texts of all ids and of drawn
sequences, whole and streamed, by the runtime's own tokenizer against the reference.

Where a checkpoint in the original layout brings a ``tokenizer.json``, and transformers' class reads
it otherwise than it stands, the file decides. Where references differ among themselves, these rules
hold: blanks are not cleaned up after
decoding; control tokens are no part of an answer's text; a run of byte pieces that is no UTF-8
becomes one placeholder a byte; one blank comes off the start of an answer, not several.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from llava_edge.convert.checkpoint import Checkpoint
from llava_edge.convert.text_files import read_object, read_text
from llava_edge.convert.verify.reference_processor import ReferenceProcessor
from llava_edge.convert.verify.reference_tokenizer import (
    FileTokenizer,
    ReferenceTokenizer,
    SentencePieceTokenizer,
    TransformersTokenizer,
)
from llava_edge.convert.verify.sentencepiece_definition import less_fillers, sentencepiece_faults
from llava_edge.convert.verify.tokenizer_corpus import (
    code_points,
    composed,
    decompositions,
    drawn_sequences,
    drawn_texts,
)
from llava_edge.convert.verify.tokenizer_definition import (
    STEPS,
    AddedEntry,
    Definition,
    Merges,
    added_faults,
    merge_faults,
    pairs,
    piece_faults,
    score_faults,
    setting_faults,
    step_faults,
)
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact import Artifact
from llava_edge.runtime.certificate import StageResult, exact
from llava_edge.runtime.manifest import PromptFormat
from llava_edge.runtime.tokenizer import Tokenizer
from llava_edge.runtime.tokenizer_backend import mapped_errors

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


def tokenizer_stage(
    artifact: Artifact, checkpoint: Checkpoint, reference: ReferenceProcessor
) -> list[StageResult]:
    """Compare the artifact's tokenizer with the checkpoint's.

    Args:
        artifact: the one to judge.
        checkpoint: what it was made from.
        reference: its processor; its tokenizer decides.
    """
    manifest = artifact.manifest
    tokenizer = Tokenizer.open(artifact.files[manifest.tokenizer], manifest.tokens, manifest.prompt)
    theirs = reference.tokenizer
    control = _control_ids(artifact, theirs)
    written = tokenizer.backend.to_str()
    ours = Definition.parse(written)
    faults: list[str] = []
    if isinstance(theirs, SentencePieceTokenizer):
        faults += sentencepiece_faults(ours, checkpoint.folder, theirs, control)
        pieces = theirs.pieces
        looked = "pieces, merges, scores and added tokens of tokenizer.model"
    else:
        assert isinstance(theirs, TransformersTokenizer)
        text = theirs.definition()
        # Equal texts are read once.
        want = ours if text == written else Definition.parse(text)
        if checkpoint.layout == "original" and not _is_same_model(ours, want):
            theirs = FileTokenizer(checkpoint.folder, theirs)
            want = Definition.parse(theirs.definition())
        more, looked = _definition_faults(ours, want, artifact, checkpoint, theirs.name)
        faults += more
        pieces = want.pieces
    fillers = ours.added.keys() - less_fillers(ours.added, {}, len(pieces)).keys()
    faults += _control_faults(tokenizer, control, fillers, theirs)
    looked = (
        f"{len(ours.pieces)} pieces, {len(ours.merges)} merges, {len(ours.added)} added; {looked}"
    )
    compared = _Comparison(tokenizer, theirs, pieces, control)
    return [
        exact(_NAME, "differing_entries", faults, looked),
        compared.ids_row(),
        compared.texts_row(),
    ]


def _control_ids(artifact: Artifact, theirs: ReferenceTokenizer) -> frozenset[int]:
    """Ids that are no text: of special tokens, of the manifest, and those of the prompt format."""
    tokens = artifact.manifest.tokens
    written = "\n".join(_segments(artifact.manifest.prompt))
    known = {**theirs.symbols, **theirs.added}
    return frozenset(
        {
            *theirs.special,
            *tokens.stop,
            *(i for i in (tokens.image, tokens.video, _bos(theirs)) if i is not None),
            *(i for content, i in known.items() if content.strip() and content in written),
        }
    )


def _bos(theirs: ReferenceTokenizer) -> int | None:
    """The id that opens a sequence: the named one, or what the tokenizer puts first."""
    if theirs.bos is not None:
        return theirs.id_of(theirs.bos)
    return next(iter(theirs.ids("")), None)


def _segments(value: object) -> Iterator[str]:
    """All texts that a prompt format writes."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, PromptFormat):
        left_out = ("special_tokens", "source", "family", "dates", "system_place")
        yield from _segments([v for k, v in vars(value).items() if k not in left_out])
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _segments(each)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _segments(list(vars(value).values()))


def _control_faults(
    tokenizer: Tokenizer, control: frozenset[int], fillers: Set[int], theirs: ReferenceTokenizer
) -> Iterator[str]:
    if tokenizer.bos_id != (bos := _bos(theirs)):
        yield f"tokens.bos: it is {tokenizer.bos_id}; the checkpoint's tokenizer has {bos}"
    for index in sorted((tokenizer.control_ids ^ control) - fillers):
        shown = tokenizer.backend.id_to_token(index)
        where = "here and no control token of the checkpoint"
        if index in control:
            where = "of the checkpoint and ordinary text here"
        yield f"{index} {shown!r:.40} is a control token {where}"


def _definition_faults(
    ours: Definition, want: Definition, artifact: Artifact, checkpoint: Checkpoint, whose: str
) -> tuple[list[str], str]:
    """Faults of every entry, and what was compared."""
    own = _stated(checkpoint.folder)
    faults = [
        *piece_faults(ours.pieces, want.pieces, whose),
        *merge_faults(ours.merges, want.merges, whose),
        *score_faults(ours.scores, want.scores, whose),
    ]
    if not faults and own is not None:
        # A second witness: no class of transformers changes these.
        faults += piece_faults(ours.pieces, own.pieces, own.name)
        faults += merge_faults(ours.merges, own.merges, own.name)
    faults += setting_faults(ours.settings, want.settings, whose)
    looked = f"as {whose}" if own is None else f"as {whose} and {own.name}"
    for name in STEPS:
        faults += step_faults(name, ours.steps[name], want.steps[name], whose)
    wanted = {**want.added, **_marks(artifact, checkpoint, want)}
    size = max(want.ids, default=-1) + 1
    faults += added_faults(less_fillers(ours.added, wanted, size), wanted, whose)
    return faults, looked


def _is_same_model(ours: Definition, want: Definition) -> bool:
    return ours.settings == want.settings and ours.steps == want.steps


def _marks(artifact: Artifact, checkpoint: Checkpoint, want: Definition) -> dict[int, AddedEntry]:
    """Marks of media that a conversion adds, since the checkpoint's tokenizer lacks them."""
    tokens = artifact.manifest.tokens
    settings = read_object(checkpoint.folder / "tokenizer_config.json")
    found = {}
    for kind, index in (("image", tokens.image), ("video", tokens.video)):
        named = settings.get(f"{kind}_token")
        named = named.get("content") if isinstance(named, Mapping) else named
        content = named if isinstance(named, str) and named else f"<{kind}>"
        lacks = all(entry.content != content for entry in want.added.values())
        if index is not None and lacks and index not in want.added:
            found[index] = AddedEntry(content, frozenset({"special"}))
    return found


@dataclass(frozen=True)
class _Stated:
    """Vocabulary and merges as a checkpoint's own file has them."""

    name: str
    pieces: Mapping[str, int]
    merges: Merges


def _stated(folder: Path) -> _Stated | None:
    """What the files say by themselves; the reference has judged them before."""
    if (folder / "tokenizer.json").is_file():
        model = json.loads(read_text(folder / "tokenizer.json"))["model"]
        vocab = model["vocab"]
        if isinstance(vocab, list):
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        return _Stated("tokenizer.json", vocab, pairs(model.get("merges") or ()))
    if (folder / "merges.txt").is_file():
        lines = read_text(folder / "merges.txt").split("\n")
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
        return _Stated("vocab.json", json.loads(read_text(folder / "vocab.json")), pairs(merges))
    return None


class _Comparison:
    """Ids and texts of the runtime's tokenizer beside the reference's."""

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
