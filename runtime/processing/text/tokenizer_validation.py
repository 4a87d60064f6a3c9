"""Judging a ``tokenizer.json`` before the tokenizers library opens it: at conversion and at load.

The library trusts the file: a normaliser that doubles the text forty times takes all memory, an
index into nothing ends in a panic, so does a pattern whose search does not end. So only steps that
tokenizers of the supported language models are made of are let through, each with the fields that
it has, and only as far as what they make of a text is bounded by the text.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

MAX_ID = 1 << 20
"""Ids are places in tables; vocabularies of today have 262,144."""
MAX_ADDED_TOKENS = 1 << 14
"""Tokens beside the vocabulary; released ones have up to 6,500."""
MAX_CONTENT = 1024
"""Characters of one piece or added token."""
MAX_GROWTH = 64.0
"""Characters that one character may become. Of Unicode's own forms the longest has 18."""
MAX_ADDED = 16
"""Tokens that are put around every text, and characters in front of it."""
MAX_STEPS = 32
_MAX_PATTERN = 2000
_MAX_SCORE = 1e9
_MAX_REPEATS = 1000
_MAX_OPEN_REPEATS = 3
"""Repetitions without an upper end in one branch of a pattern; released patterns have two."""


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_CONTENT


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_anything(value: object) -> bool:
    """For fields that are judged as a whole elsewhere."""
    return True


def _one_of(*values: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value in values


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_ADDED


def _is_character(value: object) -> bool:
    return isinstance(value, str) and len(value) == 1


_BEHAVIOURS = _one_of(
    *("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous")
)
_Fields = Mapping[str, Callable[[object], bool]]
_REPLACE: _Fields = {"pattern": _is_anything, "content": _is_text}
_BYTE_LEVEL: _Fields = {
    "add_prefix_space": _is_flag,
    "trim_offsets": _is_flag,
    "use_regex": _is_flag,
}
_METASPACE: _Fields = {
    "replacement": _is_character,
    "str_rep": _is_character,
    "prepend_scheme": _one_of("first", "never", "always"),
    "add_prefix_space": _is_flag,
    "split": _is_flag,
}
_STEPS: Mapping[str, Mapping[str, _Fields]] = {
    "normalizer": {
        **{kind: {} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")},
        "Strip": {"strip_left": _is_flag, "strip_right": _is_flag},
        "Prepend": {"prepend": _is_text},
        "Replace": _REPLACE,
        "Precompiled": {"precompiled_charsmap": _is_anything},
    },
    "pre_tokenizer": {
        "ByteLevel": _BYTE_LEVEL,
        "Split": {"pattern": _is_anything, "behavior": _BEHAVIOURS, "invert": _is_flag},
        "Metaspace": _METASPACE,
        "Digits": {"individual_digits": _is_flag},
        "Punctuation": {"behavior": _BEHAVIOURS},
    },
    "post_processor": {
        "TemplateProcessing": dict.fromkeys(("single", "pair", "special_tokens"), _is_anything),
        "ByteLevel": _BYTE_LEVEL,
    },
    "decoder": {
        "ByteLevel": _BYTE_LEVEL,
        "Replace": _REPLACE,
        **{kind: {} for kind in ("ByteFallback", "Fuse")},
        "Strip": {"content": _is_character, "start": _is_count, "stop": _is_count},
        "Metaspace": _METASPACE,
    },
}
"""Steps by part, and how each field is checked. What a conversion writes has no others."""
_OPTIONAL = frozenset({"str_rep", "add_prefix_space", "prepend_scheme", "split", "use_regex"})
"""Fields that earlier or later releases of the library leave out."""
_PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
_TOP = frozenset({"version", "truncation", "padding", "added_tokens", "model", *_STEPS})
_MODELS: Mapping[str, _Fields] = {
    "BPE": {
        "vocab": _is_anything,
        "merges": lambda value: isinstance(value, list),
        "dropout": lambda value: value in (None, 0, 0.0),
        "unk_token": lambda value: value is None or _is_text(value),
        "continuing_subword_prefix": lambda value: value in (None, ""),
        "end_of_word_suffix": lambda value: value in (None, ""),
        "fuse_unk": _is_flag,
        "byte_fallback": _is_flag,
        "ignore_merges": _is_flag,
    },
    "Unigram": {"vocab": _is_anything, "unk_id": _is_anything, "byte_fallback": _is_flag},
}
_TOKEN_FLAGS = frozenset({"single_word", "lstrip", "rstrip", "normalized", "special"})
# A group repeated more than once may match one text in many ways; the others look back or call
# themselves.
_GROUP_REPEATED = re.compile(r"\)(?:[*+]|\{)")
_LOOKS_BACK = re.compile(r"\\[1-9kg]|\(\?(?:<|P|\(|~|&|R|[0-9])")
_REPEATS = re.compile(r"\{(\d*),?(\d*)\}")
_OPEN_REPEAT = re.compile(r"[*+]|\{\d*,\}")


def tokenizer_faults(document: Any) -> list[str]:
    """Everything in a parsed ``tokenizer.json`` that forbids opening it."""
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        return ["it holds no model"]
    faults = [f"it has the unknown part {key!r:.40}" for key in sorted(set(document) - _TOP)]
    for part, allowed in _STEPS.items():
        try:
            steps = list(_flat(document.get(part), _PARTS[part]))
        except (TypeError, ValueError) as error:
            faults.append(f"{part}: {error}")
            continue
        foreign = {step["type"] for step in steps} - allowed.keys()
        faults += [f"{part}: {kind!r:.40} is none of its steps" for kind in sorted(foreign)]
        if not foreign:
            unsound = [f for step in steps for f in _field_faults(step, allowed[step["type"]])]
            faults += [f"{part}: {fault}" for fault in unsound or _step_faults(steps)]
    faults += _length_faults(document)
    return [*faults, *_model_faults(document["model"]), *_added_faults(document)]


def charsmap_faults(data: bytes) -> Iterator[str]:
    """Faults of sentencepiece's table of characters.

    A length, a double array of 32-bit units, and texts that end in a zero byte. Reading the table,
    one byte leads from a unit to one of the 256 around its offset, and a leaf to a text: both must
    be there. Source: sentencepiece ``normalizer.cc``, darts-clone ``DoubleArrayUnit``.
    """
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


def _flat(step: Any, inner_key: str, depth: int = 0) -> Iterator[dict[str, Any]]:
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
    inner = step.get(inner_key)
    if not isinstance(inner, list) or len(inner) > MAX_STEPS or len(step) != 2:
        raise ValueError(f"a sequence has no steps, or more than {MAX_STEPS}")
    for part in inner:
        if part is None:
            raise ValueError("a sequence holds null")
        yield from _flat(part, inner_key, depth + 1)


def _field_faults(step: Mapping[str, Any], fields: _Fields) -> Iterator[str]:
    kind = step["type"]
    for key in sorted(step.keys() - fields.keys() - {"type"}):
        yield f"{kind} has the unknown field {key!r:.40}"
    for key in sorted(fields.keys() - step.keys() - _OPTIONAL):
        yield f"{kind} has no {key}"
    for key, check in fields.items():
        if key in step and not check(step[key]):
            yield f"{kind} has {step[key]!r:.60} as {key}"


def _step_faults(steps: Iterable[dict[str, Any]]) -> Iterator[str]:
    growth, added, kinds = 1.0, 0, []
    for step in steps:
        kind = step["type"]
        kinds.append(kind)
        if kind in ("Replace", "Split"):
            content = step.get("content", "")
            match step["pattern"]:
                case {"String": str(text), **rest} if text and not rest and _is_text(text):
                    growth *= max(1.0, len(content) / len(text)) if kind == "Replace" else 1.0
                case {"Regex": str(text), **rest} if not rest:
                    # It may match between any two characters.
                    growth *= 1 + len(content)
                    yield from _pattern_faults(text)
                case pattern:
                    yield f"{kind} has the pattern {pattern!r:.60}"
        elif kind == "Prepend":
            added += len(step["prepend"])
        elif kind == "Precompiled":
            yield from _encoded_faults(step["precompiled_charsmap"])
        elif kind == "TemplateProcessing":
            yield from _template_faults(step)
    if growth > MAX_GROWTH:
        yield f"a character may become {growth:.3g}; at most {MAX_GROWTH:.0f}"
    if added > MAX_ADDED:
        yield f"{added} characters are put in front; at most {MAX_ADDED}"
    # Each encodes bytes as characters; once more, and a text becomes twice as long again.
    if kinds.count("ByteLevel") > 1 or kinds.count("TemplateProcessing") > 1:
        yield "a step stands there twice that is needed once"


def _pattern_faults(pattern: str) -> Iterator[str]:
    plain = re.sub(r"\\[()\[\]{}\\*+|]", "", pattern)
    outside = re.sub(r"\[[^\]]*\]", "x", plain)
    if len(pattern) > _MAX_PATTERN:
        yield f"a pattern of {len(pattern)} characters; at most {_MAX_PATTERN}"
    elif _GROUP_REPEATED.search(outside) or _LOOKS_BACK.search(plain):
        yield f"the pattern {pattern!r:.60} repeats a group or looks back; searching may not end"
    elif any(int(n or 0) > _MAX_REPEATS for pair in _REPEATS.findall(outside) for n in pair):
        yield f"the pattern {pattern!r:.60} repeats more than {_MAX_REPEATS} times"
    elif any(
        len(_OPEN_REPEAT.findall(branch)) > _MAX_OPEN_REPEATS for branch in outside.split("|")
    ):
        yield (
            f"the pattern {pattern!r:.60} repeats more than {_MAX_OPEN_REPEATS} times without end "
            "in one branch; searching may not end"
        )


def _template_faults(step: Mapping[str, Any]) -> Iterator[str]:
    tokens = step["special_tokens"]
    if not isinstance(tokens, dict):
        yield "the template has no special tokens"
        return
    for name, token in tokens.items():
        match token:
            case {"id": str(own), "ids": list(ids), "tokens": list(texts), **rest} if not rest:
                numbers = all(type(i) is int and 0 <= i < MAX_ID for i in ids)
                if own == name and numbers and len(ids) == len(texts) and all(map(_is_text, texts)):
                    continue
        yield f"the template's {name!r:.40} is malformed"
        return
    for name in ("single", "pair"):
        items = step[name]
        if not isinstance(items, list):
            yield f"the template has no {name}"
            return
        count, named = 0, []
        for item in items:
            match item:
                case {"SpecialToken": {"id": str(token), "type_id": int(kind), **more}, **rest}:
                    sound = 0 <= kind < MAX_ADDED and not more and not rest
                    if token not in tokens:
                        yield f"the template's {token!r:.40} is no token"
                        return
                    count += len(tokens[token]["ids"])
                case {"Sequence": {"id": str(token), "type_id": int(kind), **more}, **rest}:
                    sound = 0 <= kind < MAX_ADDED and not more and not rest
                    named.append(token)
                case _:
                    sound = False
            if not sound:
                yield f"the template has {item!r:.60}"
                return
        # Another name than these ends in a panic; the same one twice repeats the text.
        if sorted(named) not in ([["A"]] if name == "single" else [[], ["A"], ["A", "B"]]):
            yield f"the template's {name} holds the texts {named!r:.60}"
        if count > MAX_ADDED:
            yield f"{count} tokens are put around each text; at most {MAX_ADDED}"


def _length_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Padding and truncation: neither is used here, but the library applies them once it opens."""
    match document.get("padding"):
        case None:
            pass
        case {"strategy": "BatchLongest" | {"Fixed": _} as strategy, **rest} if all(
            value is None or isinstance(value, str) or _is_length(value)
            for value in (
                *rest.values(),
                strategy["Fixed"] if isinstance(strategy, dict) else None,
            )
        ):
            pass
        case padding:
            yield f"its padding is {padding!r:.80}"
    match document.get("truncation"):
        case None:
            pass
        case {"max_length": int(longest), "stride": int(stride), **rest} if (
            0 <= stride < longest and all(isinstance(value, str) for value in rest.values())
        ):
            pass
        case truncation:
            yield f"its truncation is {truncation!r:.80}"


def _is_length(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_ID


def _encoded_faults(encoded: Any) -> Iterator[str]:
    try:
        data = base64.b64decode(encoded, validate=True)
    except (TypeError, ValueError):
        yield "its table of characters is no base64"
        return
    yield from charsmap_faults(data)


def _model_faults(model: Mapping[str, Any]) -> Iterator[str]:
    kind, vocab = model.get("type"), model.get("vocab")
    if kind == "Unigram" and isinstance(vocab, list):
        yield from _unigram_faults(vocab, model.get("unk_id"))
    elif kind == "BPE" and isinstance(vocab, dict):
        if not all(type(i) is int and 0 <= i < MAX_ID for i in vocab.values()):
            yield f"its vocabulary holds an id outside 0 to {MAX_ID - 1}"
        elif len(set(vocab.values())) < len(vocab):
            yield "two pieces of its vocabulary have one id"
        if max(map(len, vocab), default=0) > MAX_CONTENT:
            yield f"its vocabulary holds a piece of more than {MAX_CONTENT} characters"
    else:
        yield f"its model is {kind!r:.40} with a vocabulary of type {type(vocab).__name__}"
        return
    if not vocab:
        yield "its vocabulary is empty"
    elif len(vocab) > MAX_ID:
        yield f"its vocabulary has {len(vocab)} pieces; at most {MAX_ID}"
    for key in sorted(model.keys() - _MODELS[kind].keys() - {"type"}):
        yield f"its model has the unknown field {key!r:.40}"
    for key, check in _MODELS[kind].items():
        if key in model and not check(model[key]):
            what = " (dropout)" if key == "dropout" else ""
            yield f"its model has {model[key]!r:.40} as {key}{what}"
    unknown = model.get("unk_token")
    if kind == "BPE" and unknown is not None and unknown not in vocab:
        yield "its vocabulary lacks its unknown token"


def _unigram_faults(vocab: list[Any], unknown: Any) -> Iterator[str]:
    if unknown is not None and not (type(unknown) is int and 0 <= unknown < len(vocab)):
        yield f"the model's unknown token is {unknown!r:.40} of {len(vocab)}"
    for entry in vocab:
        match entry:
            case [str(piece), int() | float() as score] if (
                len(piece) <= MAX_CONTENT
                and not isinstance(score, bool)
                and abs(score) <= _MAX_SCORE
            ):
                continue
        yield f"its vocabulary holds {entry!r:.60}"
        return


def _added_faults(document: Mapping[str, Any]) -> Iterator[str]:
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MAX_ADDED_TOKENS:
        yield f"its added tokens are no list, or more than {MAX_ADDED_TOKENS}"
        return
    for token in added:
        match token:
            case {"id": int(i), "content": str(text), **flags} if (
                i is not True
                and 0 <= i < MAX_ID
                and 0 < len(text) <= MAX_CONTENT
                and flags.keys() <= _TOKEN_FLAGS
                and all(isinstance(flag, bool) for flag in flags.values())
            ):
                continue
        yield f"the added token {token!r:.60} has no text, or an id outside 0 to {MAX_ID - 1}"
        return
