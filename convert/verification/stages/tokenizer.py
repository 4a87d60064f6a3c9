"""Stage ``tokenizer``: what ships is the checkpoint's tokenizer, entry by entry and in effect.

Three rows. The definition: every entry of ``tokenizer.json`` against the one that transformers
computes with, and vocabulary and merges against the checkpoint's own files as well; where there is
``tokenizer.model`` alone, against that (``sentencepiece_definition``). What a conversion changes on
purpose is allowed by name: marks of media at the ids that config.json gives them, and reserved
tokens at ids that no file names. Then ids of drawn texts, and texts of all ids and of drawn
sequences, whole and streamed, by the runtime's own tokenizer against the reference.

Where a checkpoint in the original layout brings a ``tokenizer.json``, and transformers' class reads
it otherwise than it stands, the file decides. Where references differ among themselves, these rules
hold: blanks are not cleaned up after decoding; control tokens are no part of an answer's text; a
run of byte pieces that is no UTF-8 becomes one placeholder a byte; one blank comes off the start of
an answer, not several.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from llava_edge.convert.checkpoint.open import Checkpoint
from llava_edge.convert.util.text_files import read_object, read_text
from llava_edge.convert.verification.reference.processor import ReferenceProcessor
from llava_edge.convert.verification.tokenizer.artifact import artifact_tokenizer
from llava_edge.convert.verification.tokenizer.comparison import TokenizerComparison
from llava_edge.convert.verification.tokenizer.definition import (
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
from llava_edge.convert.verification.tokenizer.reference import (
    FileTokenizer,
    ReferenceTokenizer,
    TransformersTokenizer,
)
from llava_edge.convert.verification.tokenizer.sentencepiece_definition import (
    less_fillers,
    sentencepiece_faults,
)
from llava_edge.convert.verification.tokenizer.sentencepiece_reference import SentencePieceTokenizer
from llava_edge.runtime.artifact.certificate import StageResult, exact
from llava_edge.runtime.artifact.manifest import Manifest, PromptFormat
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.processing.text.tokenizer import Tokenizer

_NAME = "tokenizer"


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
    tokenizer = artifact_tokenizer(artifact)
    theirs = reference.tokenizer
    control = control_ids(manifest, theirs)
    written = tokenizer.backend.to_str()
    ours = Definition.parse(written)
    faults: list[str] = []
    if isinstance(theirs, SentencePieceTokenizer):
        faults += sentencepiece_faults(ours, checkpoint.folder, theirs, control)
        pieces = theirs.pieces
        looked = "pieces, merges, scores and added tokens of tokenizer.model"
    else:
        assert isinstance(theirs, (TransformersTokenizer, FileTokenizer))
        text = theirs.definition()
        # Equal texts are read once.
        want = ours if text == written else Definition.parse(text)
        more, looked = _definition_faults(ours, want, artifact, checkpoint, theirs.name)
        faults += more
        pieces = want.pieces
    fillers = ours.added.keys() - less_fillers(ours.added, {}, len(pieces)).keys()
    faults += _control_faults(tokenizer, control, fillers, theirs)
    looked = (
        f"{len(ours.pieces)} pieces, {len(ours.merges)} merges, {len(ours.added)} added; {looked}"
    )
    compared = TokenizerComparison(tokenizer, theirs, pieces, control)
    return [
        exact(_NAME, "differing_entries", faults, looked),
        compared.ids_row(),
        compared.texts_row(),
    ]


def control_ids(manifest: Manifest, theirs: ReferenceTokenizer) -> frozenset[int]:
    """Ids that are no text: of special tokens, of the manifest, and those of the prompt format."""
    tokens = manifest.tokens
    written = "\n".join(_segments(manifest.prompt))
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
