"""Faults of the tokenizer: in the file that ships, in the conversion, in the runtime."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, normalizers
from tokenizers import Tokenizer as Backend

from llava_edge.convert.checkpoint.config.tokenizer_source import open_tokenizer_json
from llava_edge.convert.text import sentencepiece as sentencepiece_tokenizer
from llava_edge.convert.text import tokenizer as tokenizer_files
from llava_edge.convert.text.sentencepiece import SentencePieceModel, SentencePieceSettings
from llava_edge.runtime.processing.text.detokenizer import StreamDecoder
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from tests.faults.fault import Fault, Where
from tests.faults.models.tamper import Tampered

_Document = dict[str, Any]
_Patch = pytest.MonkeyPatch
_PART = "tokenizer"


def shipped(change: Callable[[_Document], None]) -> Callable[[Tampered], None]:
    """Plants a change of ``tokenizer.json``."""

    def plant(copy: Tampered) -> None:
        path = copy.folder / copy.manifest["tokenizer"]
        document = json.loads(path.read_text("utf-8"))
        before = json.dumps(document)
        change(document)
        assert json.dumps(document) != before
        path.write_text(json.dumps(document, ensure_ascii=False), "utf-8")

    return plant


def _exchange(document: _Document, one: str, other: str) -> None:
    vocab = document["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab[one], vocab[other] = vocab[other], vocab[one]
        return
    places = {piece: i for i, (piece, _) in enumerate(vocab)}
    a, b = places[one], places[other]
    vocab[a][0], vocab[b][0] = other, one


def _words_exchanged_and_no_decoder(document: _Document) -> None:
    _exchange(document, "Ġimage", "Ġwhat")
    document["decoder"] = None


def _digits(document: _Document) -> None:
    _exchange(document, "3", "8")


def _set(*path: str | int, value: Any) -> Callable[[_Document], None]:
    def change(document: _Document) -> None:
        at: Any = document
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


def _merges(change: Callable[[list[Any]], list[Any]]) -> Callable[[_Document], None]:
    def apply(document: _Document) -> None:
        document["model"]["merges"] = change(document["model"]["merges"])

    return apply


def _exchanged_ranks(merges: list[Any]) -> list[Any]:
    middle = len(merges) // 2
    return [*merges[:middle], merges[middle + 1], merges[middle], *merges[middle + 2 :]]


def _normaliser(step: Mapping[str, Any], first: bool = False) -> Callable[[_Document], None]:
    def change(document: _Document) -> None:
        have = document["normalizer"]
        steps = [] if have is None else have.get("normalizers", [have])
        made = [step, *steps] if first else [*steps, step]
        document["normalizer"] = {"type": "Sequence", "normalizers": made}

    return change


def _steps(part: str, kind: str, change: Callable[[_Document], Any]) -> Callable[[_Document], None]:
    """Change the steps of one kind in a part; None leaves one out."""
    inner = {"pre_tokenizer": "pretokenizers", "decoder": "decoders", "normalizer": "normalizers"}

    def apply(document: _Document) -> None:
        have = document[part]
        steps = have.get(inner[part], [have])
        made = [change(dict(step)) if step["type"] == kind else step for step in steps]
        kept = [step for step in made if step is not None]
        document[part] = {"type": "Sequence", inner[part]: kept} if kept else None

    return apply


def _left_out(step: _Document) -> None:
    return None


def _flag(content: str, **flags: bool) -> Callable[[_Document], None]:
    def change(document: _Document) -> None:
        (token,) = (t for t in document["added_tokens"] if t["content"] == content)
        token.update(flags)

    return change


def _renamed(document: _Document) -> None:
    vocab = document["model"]["vocab"]
    vocab["Ġimаge"] = vocab.pop("Ġimage")
    document["model"]["merges"] = [m for m in document["model"]["merges"] if "".join(m) != "Ġimage"]


def _one_more(document: _Document) -> None:
    vocab = document["model"]["vocab"]
    free = max(vocab.values()) + 1
    taken = {token["id"] for token in document["added_tokens"]}
    while free in taken:
        free += 1
    vocab["ĠimageĠwhat"] = free


def _added_exchanged(one: str, other: str) -> Callable[[_Document], None]:
    def change(document: _Document) -> None:
        entries = {t["content"]: t for t in document["added_tokens"]}
        entries[one]["content"], entries[other]["content"] = other, one

    return change


def _bytes_exchanged(document: _Document) -> None:
    _exchange(document, "<0xE6>", "<0xE7>")


def _scores(change: Callable[[list[Any]], None]) -> Callable[[_Document], None]:
    return lambda document: change(document["model"]["vocab"])


def _scores_exchanged(vocab: list[Any]) -> None:
    low, high = vocab[-1], max(vocab[259:], key=lambda entry: entry[1])
    low[1], high[1] = high[1], low[1]


def _scores_rounded(vocab: list[Any]) -> None:
    for entry in vocab:
        entry[1] = float(np.float16(entry[1])) if entry[1] > -1e4 else entry[1]


def _control_pieces_findable(vocab: list[Any]) -> None:
    for entry in vocab:
        if entry[0].startswith("<0x"):
            entry[1] = -1.0


def _no_template(document: _Document) -> None:
    document["post_processor"] = None


def _ends_as_well(document: _Document) -> None:
    single = document["post_processor"]["single"]
    single.append(json.loads(json.dumps(single[0])))


def _foreign_bos(copy: Tampered) -> None:
    copy.manifest["tokens"]["bos"] = 90


# Conversion


def _unchecked(patch: _Patch) -> None:
    """Let the converter's own comparison pass: this fault is one that it does not see."""
    patch.setattr(SentencePieceModel, "compare", lambda self, backend, settings: None)


def _built(change: Callable[[Backend], Backend | None]) -> Callable[[_Patch], None]:
    """Change what ``tokenizer.model`` is rebuilt as."""
    real = SentencePieceModel._build

    def plant(patch: _Patch) -> None:
        def build(self: SentencePieceModel, settings: SentencePieceSettings) -> Backend:
            made = real(self, settings)
            return change(made) or made

        _unchecked(patch)
        patch.setattr(SentencePieceModel, "_build", build)

    return plant


def _rewritten(change: Callable[[_Document], None]) -> Callable[[Backend], Backend]:
    def apply(backend: Backend) -> Backend:
        document = json.loads(backend.to_str())
        change(document)
        return Backend.from_str(json.dumps(document))

    return apply


def _no_strip(backend: Backend) -> None:
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def _blank_always(backend: Backend) -> None:
    """Blanks come off by the legacy rule although the newer one holds."""
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )


def _ascending(patch: _Patch) -> None:
    _built(_rewritten(_merges(lambda merges: merges[::-1])))(patch)


def _settings_ignored(**fixed: Any) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        real = SentencePieceModel._build
        _unchecked(patch)
        patch.setattr(
            SentencePieceModel,
            "_build",
            lambda self, settings: real(self, replace(settings, **fixed)),
        )

    return plant


def _half_scores(patch: _Patch) -> None:
    _built(_rewritten(_scores(_scores_rounded)))(patch)


def _no_table(patch: _Patch) -> None:
    _built(_rewritten(_steps("normalizer", "Precompiled", _left_out)))(patch)


def _pattern(change: Callable[[list[str]], list[str]]) -> Callable[[_Document], None]:
    """Change the alternatives of the pattern that finds user-defined symbols."""

    def apply(document: _Document) -> None:
        for step in document["pre_tokenizer"]["pretokenizers"]:
            if "cat" in (text := step["pattern"]["Regex"]):
                step["pattern"] = {"Regex": "|".join(change(re.split(r"(?<!\\)\|", text)))}

    return apply


def _without_cats(parts: list[str]) -> list[str]:
    return [part for part in parts if "cat" not in part]


def _flags_lost(patch: _Patch) -> None:
    def add(backend: Backend, token: AddedToken) -> None:
        backend.add_special_tokens([AddedToken(token.content, normalized=False)])

    patch.setattr(tokenizer_files, "_add", add)


def _all_ordinary(patch: _Patch) -> None:
    def add(backend: Backend, token: AddedToken) -> None:
        backend.add_tokens([AddedToken(token.content, special=False, normalized=False)])

    patch.setattr(tokenizer_files, "_add", add)


def _opened(change: Callable[[_Document], None]) -> Callable[[_Patch], None]:
    """Every tokenizer.json is changed as the converter opens it, so that both its sides agree."""

    def plant(patch: _Patch) -> None:
        def opened(text: str, where: str) -> Backend:
            document = json.loads(text)
            change(document)
            return open_tokenizer_json(json.dumps(document), where)

        patch.setattr(tokenizer_files, "open_tokenizer_json", opened)

    return plant


def _decoder_of_another(document: _Document) -> None:
    document["decoder"] = {"type": "Fuse"}


def _never_as_words(patch: _Patch) -> None:
    patch.setattr(sentencepiece_tokenizer, "_NEVER", -1.0)
    _unchecked(patch)


def _byte_names_found(patch: _Patch) -> None:
    patch.setattr(SentencePieceModel, "_cuts_byte_names", lambda self: False)


# Runtime


def _forgets_context(patch: _Patch) -> None:
    real = StreamDecoder._flush

    def flush(self: StreamDecoder) -> str:
        self._context = []
        return real(self)

    patch.setattr(StreamDecoder, "_flush", flush)


def _byte_by_byte(patch: _Patch) -> None:
    real = StreamDecoder.push

    def push(self: StreamDecoder, token_id: int) -> str:
        return real(self, token_id) + self._flush()

    patch.setattr(StreamDecoder, "push", push)


def _never_finished(patch: _Patch) -> None:
    patch.setattr(StreamDecoder, "finish", lambda self: "")


def _controls_shown(patch: _Patch) -> None:
    real = StreamDecoder.__init__
    patch.setattr(
        StreamDecoder, "__init__", lambda self, backend, control: real(self, backend, frozenset())
    )


def _stripped(patch: _Patch) -> None:
    real = Tokenizer.decode
    patch.setattr(Tokenizer, "decode", lambda self, ids: real(self, ids).strip())


def _fault(
    id_: str,
    model: str,
    wrong: str,
    plant: Callable[[Any], None],
    where: Where = "artifact",
    earlier: str = "",
) -> Fault:
    return Fault(f"{_PART}: {id_}", _PART, wrong, where, "tokenizer", plant, model, earlier=earlier)


_LLAMA3, _QWEN, _BYTES, _UNIGRAM = "llama3", "qwen2 tokenizer", "byte fallback", "unigram"
_BUILT, _NEWER, _SYMBOLS = "built", "built, newer", "built, symbols"
_CONVERSION: Where = "conversion"
_COUNTED = "the manifest's words and control tokens no longer fit the file, which structure counts"
_RUNTIME: Where = "runtime"
_SPLIT = "pre_tokenizer", "pretokenizers", 0

NAMED: tuple[Fault, ...] = (
    _fault(
        "no decoder, words exchanged",
        _LLAMA3,
        "the decoder is gone and two words have each other's id",
        shipped(_words_exchanged_and_no_decoder),
    ),
    _fault("digits", _LLAMA3, "3 and 8 have each other's id", shipped(_digits)),
    _fault("digits, bytes", _BYTES, "3 and 8 have each other's id", shipped(_digits)),
    _fault("digits, unigram", _UNIGRAM, "3 and 8 have each other's id", shipped(_digits)),
    _fault("digits, built", _BUILT, "3 and 8 have each other's id", shipped(_digits)),
    _fault("no merges", _LLAMA3, "all merges are gone", shipped(_merges(lambda _: []))),
    _fault("no merges, bytes", _BYTES, "all merges are gone", shipped(_merges(lambda _: []))),
    _fault("no merges, built", _BUILT, "all merges are gone", shipped(_merges(lambda _: []))),
    _fault("NFC", _LLAMA3, "characters are composed", shipped(_normaliser({"type": "NFC"}))),
    _fault("NFC, bytes", _BYTES, "characters are composed", shipped(_normaliser({"type": "NFC"}))),
    _fault("NFC, built", _BUILT, "characters are composed", shipped(_normaliser({"type": "NFC"}))),
    _fault(
        "another sign",
        _BYTES,
        "the decoder writes _ for a blank",
        shipped(_steps("decoder", "Replace", lambda step: {**step, "content": "_"})),
    ),
    _fault(
        "another sign, built",
        _BUILT,
        "the decoder writes a no-break space for a blank",
        shipped(_steps("decoder", "Replace", lambda step: {**step, "content": "\u00a0"})),
    ),
)
"""Faults that artifacts were certified with before there was this stage."""

SHIPPED: tuple[Fault, ...] = (
    _fault("ranks", _LLAMA3, "two merges have changed places", shipped(_merges(_exchanged_ranks))),
    _fault("last merge", _QWEN, "the last merge is gone", shipped(_merges(lambda m: m[:-1]))),
    _fault(
        "last first",
        _BUILT,
        "the last merge comes first",
        shipped(_merges(lambda m: [m[-1], *m[:-1]])),
    ),
    _fault(
        "reversed merges, built",
        _BUILT,
        "merges come in reverse order",
        shipped(_merges(lambda m: m[::-1])),
    ),
    _fault(
        "prefix space",
        _LLAMA3,
        "a blank is put before each prompt",
        shipped(_set("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True)),
    ),
    _fault(
        "single digits",
        _LLAMA3,
        "numbers are split into digits, not into groups of three",
        shipped(
            _steps(
                "pre_tokenizer",
                "Split",
                lambda s: {**s, "pattern": {"Regex": s["pattern"]["Regex"].replace("{1,3}", "")}},
            )
        ),
    ),
    _fault(
        "contractions",
        _QWEN,
        "'LL and 'D are no contractions any more",
        shipped(
            _steps(
                "pre_tokenizer",
                "Split",
                lambda s: {**s, "pattern": {"Regex": s["pattern"]["Regex"].replace("(?i:", "(?:")}},
            )
        ),
    ),
    _fault("no NFC", _QWEN, "characters stay decomposed", shipped(_set("normalizer", value=None))),
    _fault(
        "lower case",
        _LLAMA3,
        "one capital letter is read as small",
        shipped(
            _normaliser({"type": "Replace", "pattern": {"String": "Ǆ"}, "content": "ǆ"}),
        ),
    ),
    _fault("no bos", _LLAMA3, "bos does not open a sequence", shipped(_no_template)),
    _fault("two bos", _LLAMA3, "bos ends a sequence as well", shipped(_ends_as_well)),
    _fault("no bos, built", _BUILT, "bos does not open a sequence", shipped(_no_template)),
    _fault(
        "special lost", _LLAMA3, "a control token is text", shipped(_flag("<pad>", special=False))
    ),
    _fault(
        "special gained", _LLAMA3, "a word is control text", shipped(_flag("<tool>", special=True))
    ),
    _fault(
        "special lost, built",
        _BUILT,
        "unk is ordinary text",
        shipped(_flag("<unk>", special=False)),
    ),
    _fault(
        "rstrip",
        _QWEN,
        "the image mark swallows the line end",
        shipped(_flag("<image>", rstrip=True)),
    ),
    _fault(
        "lstrip lost", _LLAMA3, "blanks before a mark stay", shipped(_flag("<mask>", lstrip=False))
    ),
    _fault(
        "lstrip, built", _BUILT, "blanks before a token go", shipped(_flag("</s>", lstrip=True))
    ),
    _fault(
        "normalized",
        _LLAMA3,
        "a word is looked for later",
        shipped(_flag("extra word", normalized=False)),
    ),
    _fault(
        "normalized, built",
        _BUILT,
        "a token is looked for later",
        shipped(_flag("</s>", normalized=True)),
    ),
    _fault(
        "single word",
        _LLAMA3,
        "a mark counts only where it stands alone",
        shipped(_flag("<tool>", single_word=True)),
    ),
    _fault(
        "ignore merges",
        _LLAMA3,
        "whole words go through merges",
        shipped(_set("model", "ignore_merges", value=False)),
    ),
    _fault(
        "ignore merges, bytes",
        _BYTES,
        "whole texts are looked up",
        shipped(_set("model", "ignore_merges", value=True)),
    ),
    _fault(
        "added exchanged",
        _QWEN,
        "two control tokens have each other's id",
        shipped(_added_exchanged("<|header|>", "<pad>")),
    ),
    _fault("renamed", _QWEN, "a word has a letter of another script", shipped(_renamed)),
    _fault(
        "one piece more", _QWEN, "a piece stands at a free id", shipped(_one_more), earlier=_COUNTED
    ),
    _fault(
        "no byte fallback",
        _BYTES,
        "unknown characters become unk",
        shipped(_set("model", "byte_fallback", value=False)),
    ),
    _fault(
        "no byte fallback, built",
        _BUILT,
        "unknown characters become unk",
        shipped(_set("model", "byte_fallback", value=False)),
    ),
    _fault("bytes exchanged", _BYTES, "two bytes have each other's id", shipped(_bytes_exchanged)),
    _fault(
        "bytes exchanged, built",
        _BUILT,
        "two bytes have each other's id",
        shipped(_bytes_exchanged),
    ),
    _fault(
        "no strip",
        _BYTES,
        "an answer begins with a blank",
        shipped(_steps("decoder", "Strip", _left_out)),
    ),
    _fault(
        "two blanks off, built",
        _BUILT,
        "two blanks come off an answer",
        shipped(_steps("decoder", "Strip", lambda step: {**step, "start": 2})),
    ),
    _fault(
        "strip at the end",
        _BUILT,
        "a blank at the end of an answer goes",
        shipped(_steps("decoder", "Strip", lambda step: {**step, "stop": 1})),
    ),
    _fault(
        "bytes as names",
        _BUILT,
        "the decoder writes <0xE6> for a byte",
        shipped(_steps("decoder", "ByteFallback", _left_out)),
    ),
    _fault(
        "no dummy blank",
        _BYTES,
        "no blank is put in front",
        shipped(_steps("normalizer", "Prepend", _left_out)),
    ),
    _fault(
        "blanks joined",
        _BUILT,
        "two blanks become one",
        shipped(
            _normaliser(
                {"type": "Replace", "pattern": {"String": "▁▁▁"}, "content": "▁▁"},
            )
        ),
    ),
    _fault(
        "full width",
        _BUILT,
        "one wide letter becomes a narrow one",
        shipped(
            _normaliser(
                {"type": "Replace", "pattern": {"String": "\uff21"}, "content": "A"}, first=True
            )
        ),
    ),
    _fault(
        "scores exchanged",
        _UNIGRAM,
        "two pieces have each other's score",
        shipped(_scores(_scores_exchanged)),
    ),
    _fault("scores rounded", _UNIGRAM, "scores as float16", shipped(_scores(_scores_rounded))),
    _fault(
        "scores exchanged, built",
        "built, unigram",
        "two pieces have each other's score",
        shipped(_scores(_scores_exchanged)),
    ),
    _fault(
        "names of bytes as words",
        "built, unigram",
        "text may become a byte by its name",
        shipped(_scores(_control_pieces_findable)),
    ),
    _fault("unk", _UNIGRAM, "another piece is unk", shipped(_set("model", "unk_id", value=1))),
    _fault(
        "fuse unk",
        _BYTES,
        "unknown characters stay apart",
        shipped(_set("model", "fuse_unk", value=False)),
    ),
    _fault(
        "offsets",
        _LLAMA3,
        "offsets of words hold their blank, by which control text is told from text",
        shipped(_set("pre_tokenizer", "pretokenizers", 1, "trim_offsets", value=False)),
    ),
    _fault("foreign bos", _QWEN, "an ordinary id counts as bos", _foreign_bos),
)
"""New ones, in the file that ships."""

PLANTED: tuple[Fault, ...] = (
    _fault("ascending", _BUILT, "merges of low scores come first", _ascending, _CONVERSION),
    _fault(
        "fewer merges",
        _BUILT,
        "each piece is made of one pair only",
        _built(_rewritten(_merges(lambda m: list({"".join(p): p for p in m}.values())))),
        _CONVERSION,
    ),
    _fault("not stripped", _BUILT, "an answer begins with a blank", _built(_no_strip), _CONVERSION),
    _fault(
        "legacy forgotten",
        _BUILT,
        "one blank for the whole prompt, not one for each run",
        _settings_ignored(legacy=False),
        _CONVERSION,
    ),
    _fault("legacy always", _NEWER, "a blank for each run", _built(_blank_always), _CONVERSION),
    _fault(
        "prefix forgotten",
        _BUILT,
        "no blank in front",
        _settings_ignored(add_prefix_space=False),
        _CONVERSION,
    ),
    _fault(
        "bos forgotten", _BUILT, "no bos in front", _settings_ignored(add_bos=False), _CONVERSION
    ),
    _fault(
        "symbol forgotten",
        _SYMBOLS,
        "a user-defined symbol is found by merges alone",
        _built(_rewritten(_pattern(_without_cats))),
        _CONVERSION,
    ),
    _fault(
        "shortest symbol",
        _SYMBOLS,
        "of two symbols the shorter is found first",
        _built(_rewritten(_pattern(lambda parts: sorted(parts, key=len)))),
        _CONVERSION,
    ),
    _fault(
        "names of bytes, symbols",
        _SYMBOLS,
        "the name of a byte in a text becomes the byte",
        _byte_names_found,
        _CONVERSION,
    ),
    _fault(
        "table forgotten", "built, table", "characters stay as they are", _no_table, _CONVERSION
    ),
    _fault("half scores", "built, unigram", "scores as float16", _half_scores, _CONVERSION),
    _fault(
        "never found",
        "built, unigram",
        "what is no piece of text has a score like one",
        _never_as_words,
        _CONVERSION,
    ),
    _fault("flags lost", _BUILT, "listed tokens lose their flags", _flags_lost, _CONVERSION),
    _fault(
        "ordinary", _BUILT, "listed tokens are ordinary text", _all_ordinary, _CONVERSION, _COUNTED
    ),
    _fault(
        "composed",
        _LLAMA3,
        "every tokenizer composes characters",
        _opened(_normaliser({"type": "NFC"})),
        _CONVERSION,
    ),
    _fault(
        "another decoder",
        _QWEN,
        "tokens are written as they are spelled in the vocabulary",
        _opened(_decoder_of_another),
        _CONVERSION,
    ),
    _fault(
        "merges cut",
        _BYTES,
        "merges to pieces of many letters are not read",
        _opened(_merges(lambda merges: [m for m in merges if len("".join(m)) < 5])),
        _CONVERSION,
    ),
)
"""New ones, in the conversion."""

RUN: tuple[Fault, ...] = (
    _fault("context", _BYTES, "blanks of a streamed answer go", _forgets_context, _RUNTIME),
    _fault("byte by byte", _BYTES, "characters of several bytes break", _byte_by_byte, _RUNTIME),
    _fault("unfinished", _QWEN, "the end of a streamed answer is lost", _never_finished, _RUNTIME),
    _fault(
        "controls shown", _QWEN, "control tokens are streamed as text", _controls_shown, _RUNTIME
    ),
    _fault("stripped", _LLAMA3, "blanks around an answer go", _stripped, _RUNTIME),
)
"""New ones, in how the runtime decodes."""

FAULTS = (*NAMED, *SHIPPED, *PLANTED, *RUN)
