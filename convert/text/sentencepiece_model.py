"""Reading a sentencepiece ``tokenizer.model``, judged and reduced before the library opens it.

The library follows the file: its table of characters is read without looking where it leads, its
self tests are run when it is loaded, a long piece brings as many merges as it has characters. So
the file is parsed as a message only, judged, and written anew with the fields that text is split
by. Sources: sentencepiece ``sentencepiece_model.proto``, ``normalizer.cc``, ``model_interface.cc``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_edge.convert.checkpoint.config.tokenizer_source import library_errors
from llava_edge.profiles.errors import CheckpointError, shorten
from llava_edge.runtime.processing.text.tokenizer_validation import (
    MAX_CONTENT,
    MAX_ID,
    charsmap_faults,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
MAX_SYMBOLS = 512
"""User-defined symbols; released models have up to some tens."""
_MAX_PIECE = 256
"""Characters of a piece that merges lead to; sentencepiece trains none of more than 16 by default,
and released vocabularies have runs of up to 48 blanks."""
_MAX_BYTES = 64 << 20
_TRAINER = (
    *("model_type", "vocab_size", "byte_fallback", "treat_whitespace_as_suffix"),
    *("unk_id", "bos_id", "eos_id", "pad_id", "unk_piece", "bos_piece", "eos_piece", "pad_piece"),
    "unk_surface",
)
_NORMALIZER = (
    *("name", "precompiled_charsmap", "add_dummy_prefix"),
    *("remove_extra_whitespaces", "escape_whitespaces"),
)


def read_sentencepiece(path: Path) -> Any:
    """The ``ModelProto`` of a file, with the fields alone that decide how text is split.

    Raises:
        CheckpointError: the file is no sentencepiece model, or holds what no trained one does.
    """
    from sentencepiece import sentencepiece_model_pb2

    # The generated module makes its classes when it is loaded; types do not know them.
    generated: Any = sentencepiece_model_pb2
    whole, reduced = generated.ModelProto(), generated.ModelProto()
    try:
        if not path.is_file() or (size := path.stat().st_size) > _MAX_BYTES:
            raise CheckpointError(
                f"{path} is no file of at most {_MAX_BYTES} bytes, as tokenizer.model is. Fetch it "
                "again."
            )
        with path.open("rb") as file:
            data = file.read(size + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch it again.") from error
    with library_errors(f"{path} is no sentencepiece model"):
        whole.ParseFromString(data)
    if faults := [*_shape_faults(whole), *_piece_faults(whole)]:
        raise CheckpointError(
            f"{path} cannot be rebuilt as tokenizer.json: {shorten(faults)}. "
            "Give a checkpoint that has a tokenizer.json."
        )
    for piece in whole.pieces:
        reduced.pieces.add(piece=piece.piece, score=piece.score, type=piece.type)
    for part, names in (("trainer_spec", _TRAINER), ("normalizer_spec", _NORMALIZER)):
        old, new = getattr(whole, part), getattr(reduced, part)
        for name in names:
            if old.HasField(name):
                setattr(new, name, getattr(old, name))
    return reduced


def _shape_faults(model: Any) -> Iterator[str]:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BPE):
        yield f"model type {trainer.model_type} is neither unigram nor BPE"
    if trainer.treat_whitespace_as_suffix:
        yield "white space is a suffix of words, not a prefix"
    if not normalizer.escape_whitespaces:
        yield "white space is not escaped"
    if not 0 < len(model.pieces) <= MAX_ID:
        yield f"it has {len(model.pieces)} pieces; 1 to {MAX_ID} are read"
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        index = getattr(trainer, name)
        if not -1 <= index < max(1, len(model.pieces)):
            yield f"{name} is {index}, which is no piece"
    if normalizer.precompiled_charsmap:
        yield from charsmap_faults(normalizer.precompiled_charsmap)


def _piece_faults(model: Any) -> Iterator[str]:
    seen: set[str] = set()
    symbols = unknown = 0
    for index, piece in enumerate(model.pieces):
        text, kind = piece.piece, piece.type
        longest = _MAX_PIECE if kind in (NORMAL, UNUSED) else MAX_CONTENT
        if not 0 < len(text) <= longest or "\0" in text:
            yield f"piece {index} has {len(text)} characters, or a zero; 1 to {longest} are read"
        elif text in seen:
            yield f"piece {text!r:.60} is there twice"
        elif kind == BYTE and not (len(text) == 6 and text.startswith("<0x") and text[-1] == ">"):
            yield f"piece {text!r:.60} is no byte"
        elif not math.isfinite(piece.score):
            yield f"piece {text!r:.60} has the score {piece.score}"
        seen.add(text)
        symbols += kind == USER_DEFINED
        unknown += kind == UNKNOWN
    if symbols > MAX_SYMBOLS:
        yield f"it has {symbols} user-defined symbols; at most {MAX_SYMBOLS} are read"
    if unknown != 1 and len(model.pieces):
        yield f"it has {unknown} pieces for the unknown; it must have one"
    if model.trainer_spec.byte_fallback and sum(p.type == BYTE for p in model.pieces) != 256:
        yield "it falls back to bytes and does not have all 256"
