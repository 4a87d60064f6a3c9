"""Judging a ``tokenizer.json`` before the tokenizers library opens it.

The library trusts the file: a normaliser that doubles the text forty times takes all memory, an
index into nothing ends in a panic, so does a pattern whose search does not end. So only steps that
tokenizers of language models are made of are let through, and only as far as what they make of a
text is bounded by the text.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

MAX_ID = 1 << 20
"""Ids are places in tables; vocabularies of today have 262,144."""
MAX_GROWTH = 64.0
"""Characters that one character may become. Of Unicode's own forms the longest has 18."""
MAX_ADDED = 16
"""Tokens that are put around every text, and characters in front of it."""
MAX_STEPS = 32
_MAX_PATTERN = 2000
_MAX_REPEATS = 1000

_STEPS: Mapping[str, frozenset[str]] = {
    "normalizer": frozenset(
        {
            *("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents"),
            *("Prepend", "Replace", "Precompiled", "Nmt", "BertNormalizer", "ByteLevel"),
        }
    ),
    "pre_tokenizer": frozenset(
        {
            *("Sequence", "ByteLevel", "Split", "Metaspace", "Whitespace", "WhitespaceSplit"),
            *("Digits", "Punctuation", "BertPreTokenizer", "UnicodeScripts"),
        }
    ),
    "post_processor": frozenset(
        {"Sequence", "TemplateProcessing", "ByteLevel", "BertProcessing", "RobertaProcessing"}
    ),
    "decoder": frozenset(
        {
            *("Sequence", "ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"),
            *("BPEDecoder", "WordPiece"),
        }
    ),
}
_PARTS = ("normalizers", "pretokenizers", "processors", "decoders")
_KEYS = frozenset({"version", "truncation", "padding", "added_tokens", "model", *_STEPS})
# A group repeated more than once may match one text in many ways; the others look back or call
# themselves.
_GROUP_REPEATED = re.compile(r"\)(?:[*+]|\{)")
_LOOKS_BACK = re.compile(r"\\[1-9kg]|\(\?(?:<|P|\(|~|&|R|[0-9])")
_REPEATS = re.compile(r"\{(\d*),?(\d*)\}")


def tokenizer_faults(document: Any) -> list[str]:
    """Everything in a parsed ``tokenizer.json`` that forbids opening it."""
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        return ["it holds no model"]
    faults = [f"it has the unknown part {key!r:.40}" for key in sorted(set(document) - _KEYS)]
    for part, allowed in _STEPS.items():
        try:
            steps = list(_flat(document.get(part)))
        except (TypeError, ValueError) as error:
            faults.append(f"{part}: {error}")
            continue
        foreign = {step["type"] for step in steps} - allowed
        faults += [f"{part}: {kind!r:.40} is none of its steps" for kind in sorted(foreign)]
        faults += [f"{part}: {fault}" for fault in _step_faults(steps)]
    return [*faults, *_model_faults(document["model"]), *_added_faults(document)]


def _flat(step: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Steps of a sequence in order, sequences in it opened."""
    if step is None:
        return
    if not isinstance(step, dict) or not isinstance(step.get("type"), str):
        raise ValueError(f"{step!r:.60} is no step")
    if step["type"] != "Sequence":
        yield step
        return
    if depth > 4:
        raise ValueError("sequences are nested too deeply")
    inner = [step[key] for key in _PARTS if key in step]
    if len(inner) != 1 or not isinstance(inner[0], list) or len(inner[0]) > MAX_STEPS:
        raise ValueError(f"a sequence has no steps, or more than {MAX_STEPS}")
    for part in inner[0]:
        yield from _flat(part, depth + 1)


def _step_faults(steps: Iterable[dict[str, Any]]) -> Iterator[str]:
    growth, added = 1.0, 0
    for step in steps:
        kind = step["type"]
        if kind in ("Replace", "Split"):
            pattern, content = step.get("pattern"), step.get("content", "")
            if not isinstance(content, str):
                yield f"{kind} writes {content!r:.40}"
                return
            match pattern:
                case {"String": str(text), **rest} if text and not rest:
                    growth *= max(1.0, len(content) / len(text)) if kind == "Replace" else 1.0
                case {"Regex": str(text), **rest} if not rest:
                    # It may match between any two characters.
                    growth *= 1 + len(content)
                    yield from _pattern_faults(text)
                case _:
                    yield f"{kind} has the pattern {pattern!r:.60}"
        elif kind == "Prepend":
            added += len(str(step.get("prepend")))
        elif kind == "Precompiled":
            yield from _charsmap_faults(step.get("precompiled_charsmap"))
        elif kind == "Strip":
            ends = (step.get("start", 0), step.get("stop", 0))
            if not all(isinstance(end, int) and 0 <= end <= MAX_ADDED for end in ends):
                yield f"Strip takes off {ends!r:.60} characters"
        elif kind == "TemplateProcessing":
            yield from _template_faults(step)
    if growth > MAX_GROWTH:
        yield f"a character may become {growth:.3g}; at most {MAX_GROWTH:.0f}"
    if added > MAX_ADDED:
        yield f"{added} characters are put in front; at most {MAX_ADDED}"


def _pattern_faults(pattern: str) -> Iterator[str]:
    plain = re.sub(r"\\[()\[\]{}\\]", "", pattern)
    outside = re.sub(r"\[[^\]]*\]", "x", plain)
    if len(pattern) > _MAX_PATTERN:
        yield f"a pattern of {len(pattern)} characters; at most {_MAX_PATTERN}"
    elif _GROUP_REPEATED.search(outside) or _LOOKS_BACK.search(plain):
        yield f"the pattern {pattern!r:.60} repeats a group or looks back; searching may not end"
    elif any(int(n or 0) > _MAX_REPEATS for pair in _REPEATS.findall(outside) for n in pair):
        yield f"the pattern {pattern!r:.60} repeats more than {_MAX_REPEATS} times"


def _template_faults(step: Mapping[str, Any]) -> Iterator[str]:
    tokens = step.get("special_tokens")
    for name in ("single", "pair"):
        count = 0
        for item in step.get(name) or ():
            match item:
                case {"SpecialToken": {"id": str(token)}} if isinstance(tokens, dict):
                    entry = tokens.get(token)
                    ids = entry.get("ids") if isinstance(entry, dict) else None
                    if not isinstance(ids, list):
                        yield f"the template's {token!r:.40} is no token"
                        return
                    count += len(ids)
        if count > MAX_ADDED:
            yield f"{count} tokens are put around each text; at most {MAX_ADDED}"


def _charsmap_faults(encoded: Any) -> Iterator[str]:
    """Faults of sentencepiece's table of characters.

    A length, a double array of 32-bit units, and texts that end in a zero byte. Reading the table,
    one byte leads from a unit to one of the 256 around its offset, and a leaf to a text: both must
    be there. Source: sentencepiece ``normalizer.cc``, darts-clone ``DoubleArrayUnit``.
    """
    try:
        data = base64.b64decode(encoded, validate=True)
    except (TypeError, ValueError):
        yield "its table of characters is no base64"
        return
    size = int.from_bytes(data[:4], "little")
    if len(data) < 8 or size % 4 or not 4 <= size <= len(data) - 4:
        yield "its table of characters does not have the length that it says"
        return
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    texts = data[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        yield "its table of characters holds texts that are no UTF-8"
        return
    leaf = (units >> 31) != 0
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    ends = (np.arange(len(units)) ^ offsets)[~leaf] | 0xFF
    if ends.size and int(ends.max()) >= len(units):
        yield "its table of characters leads beyond its end"
    starts = np.unique(units[leaf] & 0x7FFFFFFF)
    lengths = [len(text) for text in texts.split(b"\0")]
    # A text may begin where another ends only.
    begins = np.cumsum([0, *(length + 1 for length in lengths)])[:-1]
    if starts.size and not np.isin(starts, begins).all():
        yield "its table of characters leads to no text"
    if max(lengths, default=0) > MAX_GROWTH * 4:
        yield f"its table of characters has a text of {max(lengths)} bytes"


def _model_faults(model: Mapping[str, Any]) -> Iterator[str]:
    kind, vocab = model.get("type"), model.get("vocab")
    ids: Iterable[Any]
    if kind == "Unigram" and isinstance(vocab, list):
        ids = range(len(vocab))
        unknown = model.get("unk_id")
        if unknown is not None and not (type(unknown) is int and 0 <= unknown < len(vocab)):
            yield f"the model's unknown token is {unknown!r:.40} of {len(vocab)}"
    elif kind in ("BPE", "WordLevel", "WordPiece") and isinstance(vocab, dict):
        ids = vocab.values()
    else:
        yield f"its model is {kind!r:.40} with a vocabulary of type {type(vocab).__name__}"
        return
    if not vocab:
        yield "its vocabulary is empty"
    if not all(type(i) is int and 0 <= i < MAX_ID for i in ids):
        yield f"its vocabulary holds an id outside 0 to {MAX_ID - 1}"
    if kind in ("WordLevel", "WordPiece") and model.get("unk_token") not in vocab:
        yield "its vocabulary lacks its unknown token"
    if model.get("dropout") not in (None, 0, 0.0):
        yield "its model drops merges by chance (dropout)"


def _added_faults(document: Mapping[str, Any]) -> Iterator[str]:
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MAX_ID:
        yield "its added tokens are no list"
        return
    for token in added:
        match token:
            case {"id": int(i), "content": str(text)} if 0 <= i < MAX_ID and text:
                continue
        yield f"the added token {token!r:.60} has no text, or an id outside 0 to {MAX_ID - 1}"
        return
