"""Tokenizers of released kinds, small, in place of the one that a random checkpoint has."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.trainers import BpeTrainer

from llava_edge.convert.text.sentencepiece import SentencePieceModel, SentencePieceSettings

ROWS = 512
"""Rows of the embedding table that every tokenizer here fits into."""
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_WORDS = "the a of image what is this in describe detail USER INST don't naïve 日本 é 1234 38 cats"
_TEMPLATE = (
    "{%- for m in messages -%}{{ m['role'].upper() + ': ' }}{%- for p in m['content'] -%}"
    "{%- if p['type'] != 'text' -%}{{ '<' + p['type'] + '>\\n' }}"
    "{%- else -%}{{ p['text'] }}{%- endif -%}"
    "{%- endfor -%}{{ ' ' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
_LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
YI_SYMBOLS = ("<|im_start|>", "<|im_end|>", "<|Human|>", "cat", "catdog")


def _corpus() -> list[str]:
    chance = random.Random(5)
    words = _WORDS.split()
    return [" ".join(chance.choices(words, k=9)) + chance.choice(".?!") for _ in range(300)]


@cache
def _trained(kind: str = "bpe", symbols: Sequence[str] = (), rule: str = "identity") -> bytes:
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_writer=data,
        model_type=kind,
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
        add_dummy_prefix=not symbols,
        hard_vocab_limit=False,
        user_defined_symbols=list(symbols),
        num_threads=1,
        minloglevel=2,
    )
    return data.getvalue()


def _byte_level(folder: Path, pattern: str, *, composes: bool, bos: str | None) -> Path:
    backend = Backend(models.BPE(ignore_merges=bos is not None))
    if composes:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=420, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator(_corpus(), trainer)
    end = "<|eot_id|>" if bos else "<|im_end|>"
    special = [*([bos] if bos else ["<|im_start|>"]), end, "<|header|>", "<pad>", "<image>"]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("extra word")])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=None, special_tokens=[(bos, backend.token_to_id(bos))]
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast" if bos else "Qwen2Tokenizer",
        "eos_token": end,
        "pad_token": "<pad>",
        **({"bos_token": bos} if bos else {}),
    }
    return _placed(folder, settings, end, backend)


def _sentencepiece_json(folder: Path, kind: str) -> Path:
    """A fast tokenizer of a sentencepiece vocabulary, as released Llama checkpoints have it."""
    path = folder / "tokenizer.model"
    path.write_bytes(_trained(kind))
    backend = SentencePieceModel.open(path).build(SentencePieceSettings())
    path.unlink()
    backend.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    backend.add_special_tokens([AddedToken("<pad>", special=True, normalized=False)])
    return _placed(folder, {**_LLAMA, "pad_token": "<pad>", "legacy": True}, "</s>", backend)


def _model_alone(folder: Path, data: bytes, settings: Mapping[str, Any], end: str) -> Path:
    size = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    listed = {
        str(size): {"content": "<image>", "special": True, "normalized": False},
        str(size + 2): {"content": "<pad>", "special": True, "normalized": False, "lstrip": True},
    }
    made = {**settings, "pad_token": "<pad>", "added_tokens_decoder": listed}
    return _placed(folder, made, end, data)


def _placed(folder: Path, settings: Mapping[str, Any], end: str, made: Backend | bytes) -> Path:
    for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    if isinstance(made, bytes):
        (folder / "tokenizer.model").write_bytes(made)
        model = sentencepiece.SentencePieceProcessor(model_proto=made)
        image, stop = model.get_piece_size(), model.piece_to_id(end)
    else:
        made.save(str(folder / "tokenizer.json"))
        image, stop = made.token_to_id("<image>"), made.token_to_id(end)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "chat_template.jinja").write_text(_TEMPLATE, "utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["image_token_index"] = image
    config.pop("image_token_id", None)
    config["text_config"] |= {"bos_token_id": None, "eos_token_id": stop, "pad_token_id": None}
    path.write_text(json.dumps(config), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}), "utf-8")
    return folder


TOKENIZERS: Mapping[str, Callable[[Path], Path]] = {
    "llama3": partial(_byte_level, pattern=LLAMA3_PATTERN, composes=False, bos="<|begin_of_text|>"),
    "qwen2 tokenizer": partial(_byte_level, pattern=QWEN_PATTERN, composes=True, bos=None),
    "byte fallback": partial(_sentencepiece_json, kind="bpe"),
    "unigram": partial(_sentencepiece_json, kind="unigram"),
    "built": lambda folder: _model_alone(folder, _trained(), _LLAMA, "</s>"),
    "built, newer": lambda folder: _model_alone(
        folder, _trained(), {**_LLAMA, "legacy": False}, "</s>"
    ),
    "built, symbols": lambda folder: _model_alone(
        folder, _trained(symbols=YI_SYMBOLS), {**_LLAMA, "eos_token": YI_SYMBOLS[1]}, YI_SYMBOLS[1]
    ),
    "built, unigram": lambda folder: _model_alone(folder, _trained("unigram"), _LLAMA, "</s>"),
    "built, table": lambda folder: _model_alone(folder, _trained(rule="nmt_nfkc"), _LLAMA, "</s>"),
}
"""Byte-level BPE as Llama 3 and Qwen 2 have it; sentencepiece vocabularies as a fast tokenizer; and
built from ``tokenizer.model``."""
