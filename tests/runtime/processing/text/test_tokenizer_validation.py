"""What a tokenizer.json may hold, and that what it may not is refused before it is opened."""

from __future__ import annotations

import base64
import copy
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llava_edge.bench.lab.pages.training.checkpoint import SHIPPED
from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.processing.text.tokenizer_backend import encode, open_backend
from llava_edge.runtime.processing.text.tokenizer_validation import tokenizer_faults
from llava_edge.runtime.util.opened_file import OpenedFile

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def sound() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((SHIPPED / "tokenizer.json").read_text("utf-8"))
    return document


def charsmap(rule: str) -> bytes:
    """The table of a sentencepiece model with a rule of normalisation."""
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to train on", "and some more words"] * 20),
        model_writer=data,
        vocab_size=40,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        minloglevel=2,
    )
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(data.getvalue())
    return bytes(proto.normalizer_spec.precompiled_charsmap)


def changed(part: str, value: Any) -> Change:
    return lambda document: document.update({part: value})


def in_model(**values: Any) -> Change:
    return lambda document: document["model"].update(values)


def sequence(*steps: dict[str, Any]) -> Change:
    return changed("normalizer", {"type": "Sequence", "normalizers": list(steps)})


def replaces(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def splits(pattern: str) -> Change:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return changed("pre_tokenizer", step)


def precompiled(data: bytes) -> Change:
    return sequence(
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}
    )


def table(units: list[int], texts: bytes) -> bytes:
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 5,
    "pair": [],
    "special_tokens": {"x": {"id": "x", "ids": [1] * 5, "tokens": ["x"] * 5}},
}
ADDED = {"id": 1 << 31, "content": "x", "special": True}

REFUSED: dict[str, tuple[Change, str]] = {
    "no model": (changed("model", None), "holds no model"),
    "unknown part": (changed("more", {}), "unknown part 'more'"),
    "unknown step": (changed("normalizer", {"type": "Script"}), "'Script' is none of its steps"),
    "no step": (changed("decoder", {"type": 5}), "is no step"),
    "nested": (
        changed("normalizer", {"type": "Sequence", "normalizers": [{"type": "Sequence"}]}),
        "has no steps",
    ),
    "many steps": (sequence(*[{"type": "NFC"}] * 33), "more than 32"),
    "doubles": (sequence(*[replaces("e", "ee")] * 7), "may become 128"),
    "grows": (sequence(replaces("e", "e" * 65)), "may become 65"),
    "grows anywhere": (
        sequence({"type": "Replace", "pattern": {"Regex": "x?"}, "content": "y" * 64}),
        "may become 65",
    ),
    "empty text": (sequence(replaces("", "ee")), "has the pattern"),
    "decoder grows": (changed("decoder", replaces("e", "e" * 65)), "decoder: a character may"),
    "prepends": (sequence({"type": "Prepend", "prepend": "x" * 17}), "17 characters are put"),
    "strips": (changed("decoder", {"type": "Strip", "start": 1 << 62, "stop": 0}), "as start"),
    "nested repetition": (splits("(a+)+$"), "repeats a group"),
    "counted repetition": (splits("(?:a{1,1000}){1,1000}"), "repeats a group"),
    "long repetition": (splits("a{1,100000}"), "more than 1000 times"),
    "reference back": (splits(r"(a)\1"), "looks back"),
    "calls itself": (splits(r"(?<a>b\g<a>)"), "looks back"),
    "long pattern": (splits("a" * 2001), "2001 characters"),
    "template": (changed("post_processor", TEMPLATE), "25 tokens are put around"),
    "template of nothing": (
        changed("post_processor", {**TEMPLATE, "special_tokens": {}}),
        "'x' is no token",
    ),
    "no vocabulary": (in_model(vocab={}), "vocabulary is empty"),
    "high id": (in_model(vocab={"a": 1 << 31}), "id outside 0 to"),
    "id of text": (in_model(vocab={"a": "0"}), "id outside 0 to"),
    # The library panics at some of those.
    "id twice": (in_model(vocab={"a": 0, "b": 0}), "two pieces of its vocabulary have one id"),
    "id True": (in_model(vocab={"a": True}), "id outside 0 to"),
    "chance": (in_model(dropout=0.5), "dropout"),
    "other model": (in_model(type="Gpt"), "its model is 'Gpt'"),
    "unknown of unigram": (
        changed("model", {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 1}),
        "unknown token is 1 of 1",
    ),
    "unknown of words": (
        in_model(unk_token="nowhere"),
        "lacks its unknown token",
    ),
    "added high": (lambda document: document["added_tokens"].append(ADDED), "the added token"),
    "added nothing": (
        lambda document: document["added_tokens"].append({**ADDED, "id": 5, "content": ""}),
        "has no text",
    ),
    "charsmap no base64": (
        sequence({"type": "Precompiled", "precompiled_charsmap": "?"}),
        "no base64",
    ),
    "charsmap length": (precompiled(b"\xff\xff\xff\xff" + bytes(8)), "the length that it says"),
    "charsmap leads away": (precompiled(table([0] * 255, b"a\0")), "beyond its end"),
    "charsmap to no text": (
        precompiled(table([0] * 255 + [1 << 31 | 5], b"a\0b\0")),
        "leads to no text",
    ),
    "charsmap into a text": (
        precompiled(table([0] * 255 + [1 << 31 | 1], b"ab\0")),
        "leads to no text",
    ),
    "charsmap no UTF-8": (precompiled(table([0] * 256, b"\xff\0")), "no UTF-8"),
    "charsmap long text": (precompiled(table([0] * 256, b"a" * 300 + b"\0")), "300 bytes"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_let_through_is_named(
    sound: dict[str, Any], change: Change, reason: str, tmp_path: Path
) -> None:
    document = copy.deepcopy(sound)
    change(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), "utf-8")

    with pytest.raises(ArtifactError, match=f"(?s){reason}.*Copy or convert"):
        open_backend(OpenedFile(tmp_path / "tokenizer.json"))


ALLOWED = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Llama 3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "contractions at the end": r"[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}|\s+",
    "brackets": r"[()]+|\(+|\)*",
}


@pytest.mark.parametrize("pattern", ALLOWED.values(), ids=ALLOWED)
def test_patterns_of_real_tokenizers_are_let_through(sound: dict[str, Any], pattern: str) -> None:
    document = copy.deepcopy(sound)
    splits(pattern)(document)

    assert tokenizer_faults(document) == []


def test_what_the_library_writes_is_let_through(tmp_path: Path) -> None:
    backend = Backend(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0)], unk_id=0))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(charsmap("nmt_nfkc_cf")),
            normalizers.Prepend("▁"),
            normalizers.Replace(" ", "▁"),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))

    assert encode(
        open_backend(OpenedFile(tmp_path / "tokenizer.json")), "A a", add_special_tokens=True
    ).ids


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf"])
def test_tables_of_sentencepiece_are_let_through(sound: dict[str, Any], rule: str) -> None:
    document = copy.deepcopy(sound)
    precompiled(charsmap(rule))(document)

    assert tokenizer_faults(document) == []


def test_a_panic_of_the_library_is_an_error_of_ours() -> None:
    # Found by fuzzing: an evil pattern ends in a panic, which no "except Exception" sees.
    from tokenizers import Regex

    backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$|(.*)*y"), "isolated")

    with pytest.raises(ArtifactError, match="fails at this prompt"):
        encode(backend, "a" * 1000 + "!", add_special_tokens=False)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)

    with pytest.raises(ArtifactError, match="at most"):
        open_backend(OpenedFile(tmp_path / "tokenizer.json"))
