"""Tokenizer files of a hostile checkpoint: refused with a message before a library opens them."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_edge.convert.checkpoint.transformers_loader import load_tokenizer
from llava_edge.convert.text.sentencepiece import SentencePieceModel
from llava_edge.convert.verification.tokenizer.reference import reference_tokenizer
from llava_edge.profiles.errors import CheckpointError
from tests.convert.text.test_tokenizer_files import byte_level, hub_config, prepare, train, write

Change = Callable[[dict[str, Any]], None]


def _set(**parts: Any) -> Change:
    return lambda document: document.update(parts)


def _in_model(**values: Any) -> Change:
    return lambda document: document["model"].update(values)


def _normalizers(*steps: dict[str, Any]) -> Change:
    return _set(normalizer={"type": "Sequence", "normalizers": list(steps)})


def _split(pattern: str) -> Change:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _set(pre_tokenizer=step)


def _template(**changes: Any) -> Change:
    sound: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    return _set(post_processor=sound | changes)


DOUBLES = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
ENTRY = {"id": "x", "ids": [5, 6], "tokens": ["x"]}
DOCUMENTS: dict[str, Change] = {
    "doubles forty times": _normalizers(*[DOUBLES] * 40),
    "doubles in the decoder": _set(decoder={"type": "Sequence", "decoders": [DOUBLES] * 40}),
    "backtracks": _split(r"(a+)+$|(.*)*y"),
    "many open repetitions": _split("a*a*a*a*a*a*a*b"),
    "no pattern at all": _split("("),
    "template of nothing": _template(single=[{"SpecialToken": {"id": "x", "type_id": 0}}]),
    "template of another text": _template(single=[{"Sequence": {"id": "B", "type_id": 0}}]),
    "template without a text": _template(single=[]),
    "template with the text often": _template(
        single=[{"Sequence": {"id": "A", "type_id": 0}}] * 1000
    ),
    "template of ids without names": _template(special_tokens={"x": ENTRY}),
    "template of no list": _template(single="A"),
    "type of a text too high": _template(single=[{"Sequence": {"id": "A", "type_id": 1 << 31}}]),
    "processor of BERT": _set(post_processor={"type": "BertProcessing", "sep": ["x", 1]}),
    "pads to a billion": _set(
        padding={
            "strategy": {"Fixed": 10**9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    ),
    "truncates to nothing": _set(
        truncation={
            "max_length": 0,
            "stride": 5,
            "direction": "Right",
            "strategy": "LongestFirst",
        }
    ),
    "id too high": _in_model(vocab={"a": 1 << 31}),
    "merges of nothing": _in_model(merges=[["nothing", "there"]]),
    "merges of a number": _in_model(merges=[5]),
    "a prefix that cuts": _in_model(continuing_subword_prefix="é" * 50),
    "long piece": _in_model(vocab={"a" * 100_000: 0}),
    "unigram scores": _set(
        model={"type": "Unigram", "unk_id": 0, "vocab": [["a", "b"]], "byte_fallback": False}
    ),
    "unigram without end": _set(
        model={"type": "Unigram", "unk_id": 0, "vocab": [["a", -1e300]], "byte_fallback": False}
    ),
    "unigram of digits": _set(
        model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 10**400]], "byte_fallback": False}
    ),
    "id of digits": _in_model(vocab={"a": 10**4000}),
    "unigram nested": _set(model={"type": "Unigram", "unk_id": 0, "vocab": [[[["a"]], 1.0]]}),
    "many added tokens": lambda document: document["added_tokens"].extend(
        {"id": 1000 + i, "content": f"<{i}>", "special": True} for i in range(20_000)
    ),
    "long added token": lambda document: document["added_tokens"].append(
        {"id": 1000, "content": "x" * 100_000, "special": True}
    ),
    "unknown step": _set(normalizer={"type": "Payload"}),
    "field of another type": _set(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": "no"}),
    "nested without end": _set(
        decoder={"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [None]}]}
    ),
}


@pytest.fixture(scope="module")
def sound() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(byte_level(("</s>", "<image>")).to_str())
    return document


@pytest.mark.parametrize("change", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_hostile_tokenizer_json_is_refused_at_once(
    sound: dict[str, Any], change: Change, tmp_path: Path
) -> None:
    document = copy.deepcopy(sound)
    image = next(t["id"] for t in document["added_tokens"] if t["content"] == "<image>")
    config = hub_config(image)
    change(document)
    write(tmp_path, {"tokenizer.json": document, "config.json": config})
    started = time.process_time()

    with pytest.raises(CheckpointError):
        prepare(tmp_path, config)
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError):
        reference_tokenizer(tmp_path, config, {})

    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "NaN", '{"model": {"vocab": {"a": 1e999}}}', '"\\ud800"', "\x00", ""],
)
def test_json_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text, "utf-8")
    with pytest.raises(CheckpointError):
        prepare(tmp_path, hub_config(None))


SMALL: dict[str, dict[str, Any]] = {
    "no list of tokens": {"tokenizer_config.json": {"added_tokens_decoder": [1, 2]}},
    "a token of a number": {"tokenizer_config.json": {"added_tokens_decoder": {"5": 7}}},
    "an id of text": {"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "a"}}}},
    "a huge id": {"added_tokens.json": {"<a>": 1 << 40}},
    "a negative id": {"added_tokens.json": {"<a>": -1}},
    "an id True": {"added_tokens.json": {"<a>": True}},
    "an id of a fraction": {"added_tokens.json": {"<a>": 1.5}},
    "a long token": {"added_tokens.json": {"<" * 5000: 400}},
    "an empty token": {"added_tokens.json": {"": 400}},
    "many tokens": {"added_tokens.json": {f"<{i}>": 400 + i for i in range(20_000)}},
    "special of numbers": {"tokenizer_config.json": {"additional_special_tokens": [1]}},
    "special of no list": {"tokenizer_config.json": {"additional_special_tokens": 5}},
    "bos of a list": {"tokenizer_config.json": {"bos_token": ["<s>"]}},
    "half a character": {"tokenizer_config.json": {"bos_token": "\ud800"}},
    "no object": {"tokenizer_config.json": [1]},
    "special map": {"special_tokens_map.json": {"eos_token": {"content": 5}}},
}


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "tokenizer.model", "vocab.json"])
@pytest.mark.parametrize("files", SMALL.values(), ids=SMALL)
def test_small_files_of_a_wrong_form_are_refused(
    files: dict[str, Any], vocabulary: str, bpe: bytes, sound: dict[str, Any], tmp_path: Path
) -> None:
    size = 0
    if vocabulary == "tokenizer.model":
        write(tmp_path, {"tokenizer.model": bpe})
    elif vocabulary == "tokenizer.json":
        write(tmp_path, {"tokenizer.json": sound})
        size = next(t["id"] for t in sound["added_tokens"] if t["content"] == "<image>")
    else:
        write(tmp_path, {"vocab.json": {"a": 0, "b": 1}})
        (tmp_path / "merges.txt").write_text("")
    config = hub_config(size or None)
    write(tmp_path, {"config.json": config, **files})

    def read() -> None:
        prepare(tmp_path, config)
        # What conversion does not read, the reference does.
        reference_tokenizer(tmp_path, config, {})

    with pytest.raises(CheckpointError):
        read()


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        ({"a": "0"}, ""),
        ({"a": -1}, ""),
        ({"a": 1 << 31}, ""),
        ({}, ""),
        ([["a", 0]], ""),
        ({"a" * 5000: 0}, ""),
        ({"a": 0, "b": 1}, "a b c"),
        ({"a": 0, "b": 1}, "a"),
        ({"a": 0, "b": 1}, "x y"),
        ({"a": 0, "b": 1}, "a b\n" * 5 + "a" * 5000 + " b"),
    ],
)
def test_vocabularies_and_merges_of_a_wrong_form_are_refused(
    vocab: Any, merges: str, tmp_path: Path
) -> None:
    write(tmp_path, {"vocab.json": vocab})
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(CheckpointError):
        prepare(tmp_path, hub_config(None))


@pytest.fixture(scope="module")
def bpe() -> bytes:
    return train(normalization_rule_name="nmt_nfkc")


def edited(data: bytes, change: Callable[[Any], Any]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    generated: Any = sentencepiece_model_pb2
    model = generated.ModelProto.FromString(data)
    change(model)
    return bytes(model.SerializeToString())


def _charsmap(data: bytes) -> Callable[[Any], Any]:
    return lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", data)


def _piece(index: int, **values: Any) -> Callable[[Any], Any]:
    return lambda model: [setattr(model.pieces[index], k, v) for k, v in values.items()]


def _trainer(**values: Any) -> Callable[[Any], Any]:
    return lambda model: [setattr(model.trainer_spec, k, v) for k, v in values.items()]


MODELS: dict[str, Callable[[Any], Any]] = {
    "table leads beyond its end": _charsmap(
        (1024).to_bytes(4, "little") + b"\xff\xff\xff\x7f" * 256 + b"a\0"
    ),
    "table is short": _charsmap(b"\xff\xff\xff\xff\0\0\0\0"),
    "table of three bytes": _charsmap(b"abc"),
    "piece of a million characters": _piece(300, piece="x" * 1_000_000),
    "piece of nothing": _piece(300, piece=""),
    "piece with a zero": _piece(300, piece="a\0b"),
    "piece twice": lambda model: setattr(model.pieces[300], "piece", model.pieces[301].piece),
    "score that is no number": _piece(300, score=float("nan")),
    "score without end": _piece(300, score=float("inf")),
    "byte that is none": _piece(300, type=6),
    "two unknown": _piece(300, type=2),
    "no unknown": _piece(0, type=1),
    "unknown elsewhere": _trainer(unk_id=10**9),
    "bos elsewhere": _trainer(bos_id=10**9),
    "bos negative": _trainer(bos_id=-(10**9)),
    "characters": _trainer(model_type=4),
    "suffix": _trainer(treat_whitespace_as_suffix=True),
    "no bytes": lambda model: model.pieces[5].__setattr__("type", 1),
    "many symbols": lambda model: [
        model.pieces.add(piece=f"<<{i}>>", score=0.0, type=4) for i in range(2000)
    ],
    "no pieces": lambda model: model.ClearField("pieces"),
}


@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS)
def test_a_hostile_tokenizer_model_is_refused_before_the_library_opens_it(
    change: Callable[[Any], Any], bpe: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sentencepiece

    def opened(**_: Any) -> None:
        pytest.fail("the library was given the model")

    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", opened)
    write(tmp_path, {"tokenizer.model": edited(bpe, change)})
    with pytest.raises(CheckpointError, match="tokenizer"):
        prepare(tmp_path, hub_config(None))
    with pytest.raises(CheckpointError, match="tokenizer"):
        reference_tokenizer(tmp_path, hub_config(None), {})


@pytest.mark.parametrize("seed", range(20))
def test_damaged_models_are_refused_or_read(seed: int, bpe: bytes, tmp_path: Path) -> None:
    import random

    chance = random.Random(seed)
    data = bytearray(bpe)
    for _ in range(chance.randint(1, 20)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    if chance.random() < 0.3:
        data = data[: chance.randrange(len(data))]
    write(tmp_path, {"tokenizer.model": bytes(data)})
    try:
        prepare(tmp_path, hub_config(None))
    except CheckpointError:
        return


def test_what_the_library_does_not_need_is_not_given_to_it(bpe: bytes, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        # Fields of releases to come are kept by the parser, and self tests are run on loading.
        test = b"\x0a\x06" + b"\x0a\x01x\x12\x01y"
        model.MergeFromString(b"\x22" + bytes([len(test)]) + test)
        model.trainer_spec.input.append("/etc/passwd")
        model.normalizer_spec.normalization_rule_tsv = "/etc/passwd"

    write(tmp_path, {"tokenizer.model": edited(bpe, change)})
    model = SentencePieceModel.open(tmp_path / "tokenizer.model")
    assert b"\x0a\x01x\x12\x01y" not in model.data
    assert b"passwd" not in model.data
