"""tokenizer.json in every case, equal to sentencepiece and to the reference; ids that agree."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from llava_edge.convert.text.sentencepiece import (
    SentencePieceModel,
    SentencePieceSettings,
    probe_texts,
)
from llava_edge.convert.text.tokenizer import prepare_tokenizer
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.artifact.manifest import TokenIds

ROWS = 4096
WORDS = "the a of image what is this in describe detail USER ASSISTANT INST naïve 日本 12 cats dog"


def corpus() -> list[str]:
    chance = random.Random(5)
    words = WORDS.split()
    return [" ".join(chance.choices(words, k=9)) + chance.choice(".?!") for _ in range(300)]


def train(kind: str = "bpe", **options: Any) -> bytes:
    data = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 380,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=data, model_type=kind, **settings | options
    )
    return data.getvalue()


@pytest.fixture(scope="session")
def bpe_model() -> bytes:
    return train()


def size_of(model: bytes) -> int:
    return int(sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())


def write(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif isinstance(content, Backend):
            content.save(str(folder / name))
        else:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")


def hub_config(image: int | None, **more: Any) -> dict[str, Any]:
    marks = {} if image is None else {"image_token_index": image}
    text = {"model_type": "llama", "vocab_size": 32064}
    return {"model_type": "llava_next", **marks, "text_config": text, **more}


def original(vocab: int) -> dict[str, Any]:
    return {"model_type": "llava_llama", "mm_vision_tower": "x", "vocab_size": vocab}


def prepare(
    folder: Path, config: Mapping[str, Any], said: list[str] | None = None, **more: Any
) -> tuple[TokenIds, Backend]:
    out = folder / "out.json"
    report = None if said is None else said.append
    rows = more.pop("rows", ROWS)
    tokens = prepare_tokenizer(folder, config, out, rows, report=report, **more)
    return tokens, Backend.from_file(str(out))


MODELS: dict[str, dict[str, Any]] = {
    "BPE": {},
    "unigram": {"kind": "unigram"},
    "BPE, user-defined symbols": {"user_defined_symbols": ["<|sep|>", "<|im_end|>", "cat dog"]},
    "unigram, user-defined symbols": {
        "kind": "unigram",
        "user_defined_symbols": ["<|sep|>", "<|im_end|>"],
    },
    "BPE, control symbols": {"control_symbols": ["<ctl>", "<|im_start|>"]},
    "BPE, no dummy prefix": {
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<|im_start|>", "<|im_end|>"],
    },
    "BPE, normalised": {
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
    "unigram, normalised, no bytes": {
        "kind": "unigram",
        "normalization_rule_name": "nfkc_cf",
        "remove_extra_whitespaces": True,
        "byte_fallback": False,
    },
    "BPE, digits split": {"split_digits": True, "allow_whitespace_only_pieces": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_rebuilt_model_has_the_ids_of_sentencepiece(name: str, tmp_path: Path) -> None:
    data = train(**MODELS[name])
    (tmp_path / "tokenizer.model").write_bytes(data)
    model = SentencePieceModel.open(tmp_path / "tokenizer.model")
    backend = model.build(SentencePieceSettings())
    model.compare(backend, SentencePieceSettings())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    symbols = [s for s in MODELS[name].get("user_defined_symbols", [])]
    texts = [f"what{s}is {s} this{s}" for s in symbols] + [s for s in symbols] + ["", "x", "  x "]
    for text in (*texts, *(t + "." for t in probe_texts())):
        assert backend.encode(text, add_special_tokens=False).ids == list(theirs.encode(text))
    restored = "what is this? 12 cats"
    assert backend.decode(theirs.encode(restored)) == restored


def test_two_hundred_different_strings_are_compared() -> None:
    assert len(probe_texts()) == 200
    assert len(set(probe_texts(["a", "bc"]))) > 150
    assert probe_texts() == probe_texts()


def test_a_rebuilt_model_that_differs_is_refused_with_the_string(
    bpe_model: bytes, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(bpe_model)
    model = SentencePieceModel.open(tmp_path / "tokenizer.model")
    backend = model.build(SentencePieceSettings(add_prefix_space=False))
    with pytest.raises(CheckpointError, match=r"'What is shown.*instead of"):
        model.compare(backend, SentencePieceSettings())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "word", "byte_fallback": False}, "neither unigram nor BPE"),
        ({"treat_whitespace_as_suffix": True}, "suffix"),
    ],
)
def test_models_of_other_kinds_are_refused(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    kind = options.pop("model_type", "bpe")
    (tmp_path / "tokenizer.model").write_bytes(train(kind, **options))
    with pytest.raises(CheckpointError, match=words):
        SentencePieceModel.open(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("data", [b"", b"not a model", b"\xff" * 100])
def test_a_broken_model_file_is_a_checkpoint_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError):
        SentencePieceModel.open(tmp_path / "tokenizer.model")


def test_an_original_checkpoint_gets_an_image_token_behind_its_vocabulary(
    bpe_model: bytes, tmp_path: Path
) -> None:
    size = size_of(bpe_model)
    write(tmp_path, {"tokenizer.model": bpe_model, "config.json": original(ROWS)})
    # The translated configuration names the first row behind the table; only a placeholder.
    tokens, backend = prepare(tmp_path, hub_config(ROWS))
    assert tokens == TokenIds(image=size, video=None, bos=1, stop=(2,), num_text_tokens=size)
    ids = backend.encode("[INST] <image>\nDescribe. [/INST]").ids
    assert ids[0] == 1
    assert ids.count(size) == 1
    # A blank before every run, as in training: "▁" stands behind the image as well.
    assert backend.encode("<image>\n", add_special_tokens=False).tokens == [
        "<image>",
        "▁",
        "<0x0A>",
    ]


@pytest.mark.parametrize("name", ["unigram", "BPE, no dummy prefix"])
def test_the_name_of_a_byte_in_a_text_is_no_byte(name: str, tmp_path: Path) -> None:
    data = train(**MODELS[name])
    (tmp_path / "tokenizer.model").write_bytes(data)
    backend = SentencePieceModel.open(tmp_path / "tokenizer.model").build(SentencePieceSettings())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)

    for text in ("<0x41>", "a<0x0A>b", "<0xFF><0x00>", "<0x4>", "<<0x41>>"):
        assert backend.encode(text, add_special_tokens=False).ids == theirs.encode(text), text


def test_listed_words_are_found_in_the_text_as_it_is_written(
    bpe_model: bytes, tmp_path: Path
) -> None:
    size = size_of(bpe_model)
    listed = {"<tool>": size, "<image>": size + 1, "<end>": size + 2}
    write(
        tmp_path,
        {
            "tokenizer.model": bpe_model,
            "added_tokens.json": listed,
            "special_tokens_map.json": {"additional_special_tokens": ["<end>"]},
        },
    )
    _, backend = prepare(tmp_path, hub_config(size + 1))

    # No blank stands before it, although one is put in front of each run of text.
    assert size in backend.encode("a<tool>b").ids
    flags = {i: token.special for i, token in backend.get_added_tokens_decoder().items()}
    assert (flags[size], flags[size + 2]) == (False, True)


def test_settings_of_the_checkpoint_are_honoured(bpe_model: bytes, tmp_path: Path) -> None:
    size = size_of(bpe_model)
    write(
        tmp_path,
        {
            "tokenizer.model": bpe_model,
            "tokenizer_config.json": {
                "legacy": False,
                "add_bos_token": False,
                "bos_token": "<s>",
                "eos_token": {"content": "</s>"},
                "pad_token": "<pad>",
                "added_tokens_decoder": {
                    str(size + 2): {"content": "<image>", "special": True, "normalized": False},
                    str(size + 3): {"content": "<pad>", "special": True},
                    str(size): {"content": "extra word", "special": False},
                },
            },
        },
    )
    tokens, backend = prepare(tmp_path, hub_config(size + 2))
    assert tokens.image == size + 2
    assert tokens.num_text_tokens == size + 2
    assert backend.token_to_id("extra word") == size
    # The id between them has no name in the files.
    assert backend.id_to_token(size + 1) == f"<|reserved_{size + 1}|>"
    ids = backend.encode("a<image>a").ids
    assert ids[0] != 1
    assert ids[-1] != ids[0]


def test_added_tokens_json_is_honoured(bpe_model: bytes, tmp_path: Path) -> None:
    size = size_of(bpe_model)
    write(tmp_path, {"tokenizer.model": bpe_model, "added_tokens.json": {"<image>": size + 4}})
    tokens, _ = prepare(tmp_path, hub_config(size + 4))
    assert tokens.image == size + 4


@pytest.mark.parametrize(
    "added",
    [
        pytest.param({"<image>": 5}, id="an id that is taken"),
        pytest.param({"<image>": 100_000}, id="an id far away"),
        pytest.param({"<image>": "x"}, id="no id at all"),
        pytest.param({"</s>": 7}, id="a token that has another id"),
    ],
)
def test_added_tokens_that_contradict_the_vocabulary_are_refused(
    added: dict[str, Any], bpe_model: bytes, tmp_path: Path
) -> None:
    write(tmp_path, {"tokenizer.model": bpe_model, "added_tokens.json": added})
    with pytest.raises(CheckpointError):
        prepare(tmp_path, hub_config(None))


def byte_level(specials: Sequence[str], bos: str | None = None) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator(corpus(), trainer)
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=None, special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return backend


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<image>", "<pad>")


def test_llama3_stops_at_both_of_its_ends(tmp_path: Path) -> None:
    backend = byte_level(LLAMA3, "<|begin_of_text|>")
    bos, end, turn, image, _ = (backend.token_to_id(t) for t in LLAMA3)
    write(
        tmp_path,
        {
            "tokenizer.json": backend,
            "generation_config.json": {"eos_token_id": end},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|end_of_text|>",
                "pad_token": "<pad>",
            },
            "config.json": hub_config(image),
        },
    )
    # Two is an ordinary token here; configurations often carry it as a default.
    config = hub_config(image, text_config={"vocab_size": 128256, "eos_token_id": 2})
    tokens, _ = prepare(tmp_path, config)
    assert tokens == TokenIds(image, None, bos, (end, turn), image)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": [2, 1]}, ("<|im_start|>", "<|endoftext|>", "<|im_end|>")),
        ({}, ("<|im_end|>",)),
    ],
)
def test_the_end_of_an_answer_follows_generation_config_first(
    generation: dict[str, Any], expected: Sequence[str], tmp_path: Path
) -> None:
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    backend = byte_level(specials)
    first = backend.token_to_id("<|endoftext|>")
    listed = {k: [first + i - 1 for i in v] for k, v in generation.items()}
    write(tmp_path, {"tokenizer.json": backend, "generation_config.json": listed})
    config = hub_config(backend.token_to_id("<image>"), text_config={"model_type": "qwen2"})
    tokens, written = prepare(tmp_path, config)
    assert [written.id_to_token(i) for i in tokens.stop] == list(expected)
    assert tokens.bos is None


def test_an_end_that_is_ordinary_text_is_refused_with_its_id(tmp_path: Path) -> None:
    backend = byte_level(("</s>", "<image>"))
    text = backend.token_to_id("#")
    write(tmp_path, {"tokenizer.json": backend, "generation_config.json": {"eos_token_id": text}})
    with pytest.raises(CheckpointError, match=rf"would end at {text} '#', which is ordinary text"):
        prepare(tmp_path, hub_config(backend.token_to_id("<image>")))


def test_a_tokenizer_without_any_end_is_refused(tmp_path: Path) -> None:
    backend = byte_level(("<image>",))
    write(tmp_path, {"tokenizer.json": backend})
    with pytest.raises(CheckpointError, match="No token ends an answer"):
        prepare(tmp_path, hub_config(backend.token_to_id("<image>")))


def test_the_video_model_has_two_marks(tmp_path: Path) -> None:
    backend = byte_level(("</s>", "<video>", "<image>"))
    video, image = backend.token_to_id("<video>"), backend.token_to_id("<image>")
    write(tmp_path, {"tokenizer.json": backend})
    config = hub_config(image, model_type="llava_next_video", video_token_index=video)
    tokens, _ = prepare(tmp_path, config)
    assert (tokens.image, tokens.video, tokens.num_text_tokens) == (image, video, video)
    with pytest.raises(CheckpointError, match=rf"<video> the id {image}"):
        prepare(tmp_path, config | {"video_token_index": image})


def test_both_marks_are_added_where_both_are_missing(tmp_path: Path) -> None:
    backend = byte_level(("</s>",))
    free = backend.get_vocab_size()
    write(tmp_path, {"tokenizer.json": backend})
    config = hub_config(free + 1, model_type="llava_next_video", video_token_index=free)
    tokens, written = prepare(tmp_path, config)
    assert (tokens.image, tokens.video) == (free + 1, free)
    assert written.encode("<image>a<video>").ids[::2] == [free + 1, free]


@pytest.mark.parametrize(
    ("specials", "offset", "words"),
    [
        pytest.param(("</s>", "<image>"), 1, "the tokenizer", id="another id"),
        pytest.param(("</s>", "<image>"), -1, r"is '</s>'", id="the id of another token"),
        pytest.param(("</s>",), 0, r"which is '</s>'", id="no image token, the id is taken"),
        pytest.param(("</s>",), 500, "next free id", id="no image token, an id far away"),
    ],
)
def test_config_and_tokenizer_must_agree_about_the_image_id(
    specials: Sequence[str], offset: int, words: str, tmp_path: Path
) -> None:
    backend = byte_level(specials)
    write(tmp_path, {"tokenizer.json": backend})
    last = backend.get_vocab_size() - 1
    with pytest.raises(CheckpointError, match=words) as caught:
        prepare(tmp_path, hub_config(last + offset))
    assert "one revision" in str(caught.value)


def test_an_image_token_is_added_where_the_config_expects_it(tmp_path: Path) -> None:
    backend = byte_level(("</s>",))
    size = backend.get_vocab_size()
    write(tmp_path, {"tokenizer.json": backend})
    tokens, written = prepare(tmp_path, hub_config(size))
    assert tokens.image == size
    assert written.encode("a<image>b").ids[1] == size


def test_of_two_files_the_one_that_agrees_with_the_config_is_taken(
    bpe_model: bytes, tmp_path: Path
) -> None:
    size = size_of(bpe_model)
    fast = byte_level(("</s>", "x", "y", "<image>"))
    write(
        tmp_path,
        {
            "tokenizer.json": fast,
            "tokenizer.model": bpe_model,
            "added_tokens.json": {"<image>": size},
        },
    )
    said: list[str] = []
    tokens, written = prepare(tmp_path, hub_config(size), said)
    assert tokens.image == size
    assert written.encode("what").tokens == ["<s>", "▁what"]
    assert any("tokenizer.model is taken" in s for s in said)


def test_two_files_that_disagree_are_named(bpe_model: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(bpe_model)
    model = SentencePieceModel.open(tmp_path / "tokenizer.model")
    fast = model.build(SentencePieceSettings(legacy=False))
    fast.add_special_tokens(["<image>"])
    write(tmp_path, {"tokenizer.json": fast})
    said: list[str] = []
    tokens, _ = prepare(tmp_path, hub_config(size_of(bpe_model)), said)
    assert tokens.image == size_of(bpe_model)
    assert any("disagree" in s and "tokenizer.json is taken" in s for s in said)


def test_two_files_of_which_none_agrees_are_refused(bpe_model: bytes, tmp_path: Path) -> None:
    write(
        tmp_path,
        {"tokenizer.json": byte_level(("</s>", "<image>")), "tokenizer.model": bpe_model},
    )
    with pytest.raises(CheckpointError, match=r"(?s)tokenizer\.json:.*tokenizer\.model:"):
        prepare(tmp_path, hub_config(17))


@pytest.mark.parametrize("model_type", ["llava_next", "llava_next_video"])
@pytest.mark.parametrize("legacy", [True, False])
def test_the_artifact_follows_the_reference_where_it_reads_the_files_its_own_way(
    model_type: str, legacy: bool, bpe_model: bytes, tmp_path: Path
) -> None:
    (tmp_path / "spm").mkdir()
    (tmp_path / "spm" / "tokenizer.model").write_bytes(bpe_model)
    model = SentencePieceModel.open(tmp_path / "spm" / "tokenizer.model")
    fast = model.build(SentencePieceSettings())
    fast.add_special_tokens(["<image>", "<video>"])
    size = size_of(bpe_model)
    config = hub_config(size, model_type=model_type, video_token_index=size + 1)
    write(
        tmp_path,
        {
            "tokenizer.json": fast,
            "config.json": config,
            "tokenizer_config.json": {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": legacy,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            },
        },
    )
    said: list[str] = []
    _, written = prepare(tmp_path, config, said)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    for text in (*probe_texts(), "[INST] <image>\nWhat? [/INST] a</s>[INST] b"):
        assert written.encode(text).ids == theirs(text)["input_ids"]
    # The video models' class is rebuilt from its vocabulary; the others are read as they are.
    differs = model_type == "llava_next_video" and not legacy
    assert any("follows transformers" in s for s in said) == differs or said


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"tokenizer_class": "Strange"}, True),
        ({"auto_map": {"AutoTokenizer": ["strange.Strange", None]}}, True),
        ({"auto_map": ["owner/repo--strange.Strange", None]}, True),
        (
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "auto_map": {"AutoTokenizer": ["strange.Strange", None]},
            },
            False,
        ),
    ],
)
@pytest.mark.parametrize("model_type", ["llava_next", "llava_next_video"])
def test_a_tokenizer_class_is_used_by_its_name_or_refused(
    model_type: str, settings: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    backend = byte_level(("</s>", "<video>", "<image>"))
    config = hub_config(
        backend.token_to_id("<image>"),
        model_type=model_type,
        video_token_index=backend.token_to_id("<video>"),
    )
    write(
        tmp_path,
        {"tokenizer.json": backend, "config.json": config, "tokenizer_config.json": settings},
    )
    (tmp_path / "strange.py").write_text("raise SystemExit('was run')", encoding="utf-8")
    if refused:
        with pytest.raises(CheckpointError, match=r"class 'Strange'; known are .*never run"):
            prepare(tmp_path, config)
        return
    tokens, _ = prepare(tmp_path, config)
    assert tokens.image == config["image_token_index"]


def test_vocab_and_merges_are_enough(tmp_path: Path) -> None:
    backend = byte_level(())
    document = json.loads(backend.to_str())["model"]
    size = backend.get_vocab_size()
    (tmp_path / "merges.txt").write_text(
        "\n".join(" ".join(m) for m in document["merges"]), encoding="utf-8"
    )
    write(
        tmp_path,
        {
            "vocab.json": document["vocab"],
            "tokenizer_config.json": {
                "tokenizer_class": "Qwen2Tokenizer",
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": {
                    str(size + i): {"content": c, "special": True, "normalized": False}
                    for i, c in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
                },
            },
            "config.json": original(ROWS),
        },
    )
    config = hub_config(None, text_config={"model_type": "qwen2"})
    tokens, written = prepare(tmp_path, config)
    assert (tokens.image, tokens.stop, tokens.bos) == (size + 3, (size + 2,), None)
    assert written.encode("what<|im_end|>").tokens[-1] == "<|im_end|>"


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    backend = byte_level(("</s>", "<image>"))
    write(tmp_path, {"tokenizer.json": backend})
    config = hub_config(backend.token_to_id("<image>"))
    # The image mark itself needs no row.
    tokens, _ = prepare(tmp_path, config, rows=backend.get_vocab_size() - 1)
    assert tokens.num_text_tokens == backend.get_vocab_size() - 1
    with pytest.raises(CheckpointError, match=r"rows lacks: .*</s>"):
        prepare(tmp_path, config, rows=backend.get_vocab_size() - 2)


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({}, id="no tokenizer at all"),
        pytest.param({"tokenizer.json": b"{"}, id="broken JSON"),
        pytest.param({"tokenizer.json": b"{}"}, id="no tokenizer inside"),
        pytest.param({"tokenizer.json": b"\xff\xfe"}, id="no text"),
        pytest.param({"tokenizer.model": b"nothing"}, id="broken model"),
    ],
)
def test_folders_without_a_usable_tokenizer_are_refused(
    files: Mapping[str, Any], tmp_path: Path
) -> None:
    write(tmp_path, files)
    with pytest.raises(CheckpointError):
        prepare(tmp_path, hub_config(None))
