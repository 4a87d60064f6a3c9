"""A ``tokenizers`` tokenizer made from a sentencepiece ``tokenizer.model``, compared with it.

Llama style: byte fallback, a dummy blank in front, control symbols as special tokens. Sources:
sentencepiece ``sentencepiece_model.proto``, ``bpe_model.cc``, ``unigram_model.cc``,
``normalizer.cc``; the slow Llama tokenizer of transformers 4.47.1 (``legacy``).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from llava_edge.convert.checkpoint.config.tokenizer_source import library_errors
from llava_edge.convert.text.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_sentencepiece,
)
from llava_edge.profiles.errors import CheckpointError

_NEVER = -1e6
_BLANK = "▁"
_BYTE_NAME = r"<(?=0x[0-9A-F]{2}>)"


@dataclass(frozen=True)
class SentencePieceSettings:
    """What ``tokenizer_config.json`` says about a sentencepiece tokenizer.

    ``legacy`` puts a blank before every run between special tokens, as the training code of the
    LLaVA models did; else only the start of the prompt gets one. ``add_prefix_space`` None leaves
    it to the model file.
    """

    legacy: bool = True
    add_prefix_space: bool | None = None
    add_bos: bool = True


@dataclass(frozen=True)
class SentencePieceModel:
    """A parsed ``tokenizer.model``."""

    data: bytes
    proto: Any

    @classmethod
    def open(cls, path: Path) -> SentencePieceModel:
        """Read and parse.

        Raises:
            CheckpointError: the file is no sentencepiece model of a kind that can be rebuilt.
        """
        proto = read_sentencepiece(path)
        return cls(proto.SerializeToString(), proto)

    @property
    def bos(self) -> str | None:
        """The beginning-of-sequence piece, where the model has one."""
        return self._piece(self.proto.trainer_spec.bos_id)

    @property
    def eos(self) -> str | None:
        """The end-of-sequence piece, where the model has one."""
        return self._piece(self.proto.trainer_spec.eos_id)

    def _piece(self, index: int) -> str | None:
        return str(self.proto.pieces[index].piece) if 0 <= index < len(self.proto.pieces) else None

    def build(self, settings: SentencePieceSettings) -> Backend:
        """The same tokenizer in the form of the ``tokenizers`` library.

        Raises:
            CheckpointError: the library cannot be given this model.
        """
        with library_errors("tokenizer.model cannot be rebuilt as tokenizer.json"):
            return self._build(settings)

    def _build(self, settings: SentencePieceSettings) -> Backend:
        prefix = settings.add_prefix_space
        if prefix is None:
            prefix = bool(self.proto.normalizer_spec.add_dummy_prefix)
        symbols = [p.piece for p in self.proto.pieces if p.type == USER_DEFINED]
        bpe = self.proto.trainer_spec.model_type == BPE
        backend = Backend(self._bpe(bool(symbols)) if bpe else self._unigram())
        backend.normalizer = self._normalizer(prefix and settings.legacy)
        splits: list[Any] = []
        if prefix and not settings.legacy:
            splits.append(pre_tokenizers.Metaspace(_BLANK, prepend_scheme="first", split=False))
        if bpe and symbols:
            # A user-defined symbol is a word of its own, and no blank follows it.
            longest_first = sorted(symbols, key=len, reverse=True)
            pattern = Regex("|".join(map(re.escape, longest_first)))
            splits.append(pre_tokenizers.Split(pattern, behavior="isolated"))
        if (symbols or not bpe) and self._cuts_byte_names():
            # Such models find whole words by name; the name of a byte in a text is no byte.
            splits.append(pre_tokenizers.Split(Regex(_BYTE_NAME), behavior="merged_with_previous"))
        if splits:
            backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
        steps: list[Any] = [
            decoders.Replace(_BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
        backend.decoder = decoders.Sequence(
            [*steps, decoders.Strip(" ", 1, 0)] if prefix else steps
        )
        special = [p.piece for p in self.proto.pieces if p.type in (CONTROL, UNKNOWN)]
        backend.add_special_tokens([AddedToken(p, normalized=False) for p in special])
        bos = self.bos
        if settings.add_bos and bos is not None:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B",
                special_tokens=[(bos, self.proto.trainer_spec.bos_id)],
            )
        return backend

    def _cuts_byte_names(self) -> bool:
        """Whether text can be cut within the name of a byte: no piece goes across the cut."""
        crossing = any("<0" in p.piece for p in self.proto.pieces if p.type != BYTE)
        return bool(self.proto.trainer_spec.byte_fallback) and not crossing

    def _bpe(self, words: bool) -> models.BPE:
        pieces = self.proto.pieces
        vocab = {p.piece: i for i, p in enumerate(pieces)}
        score = {p.piece: p.score for p in pieces if p.type == NORMAL}
        merges = [
            (-value, vocab[piece], vocab[piece[:cut]], vocab[piece[cut:]])
            for piece, value in score.items()
            for cut in range(1, len(piece))
            if piece[:cut] in score and piece[cut:] in score
        ]
        names = [p.piece for p in pieces]
        unk = self._piece(self.proto.trainer_spec.unk_id)
        return models.BPE(
            vocab=vocab,
            merges=[(names[left], names[right]) for _, _, left, right in sorted(merges)],
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=bool(self.proto.trainer_spec.byte_fallback),
            # Only whole user-defined symbols need it: no merges lead to them.
            ignore_merges=words,
        )

    def _unigram(self) -> models.Unigram:
        pieces = self.proto.pieces
        best = max((p.score for p in pieces if p.type == NORMAL), default=0.0)

        def score(piece: Any) -> float:
            if piece.type == USER_DEFINED:
                return float(len(piece.piece) * best - 0.1)
            return float(piece.score) if piece.type == NORMAL else _NEVER

        return models.Unigram(
            [(p.piece, score(p)) for p in pieces],
            unk_id=int(self.proto.trainer_spec.unk_id),
            byte_fallback=bool(self.proto.trainer_spec.byte_fallback),
        )

    def _normalizer(self, prepend: bool) -> Any:
        spec = self.proto.normalizer_spec
        steps: list[Any] = []
        if spec.precompiled_charsmap:
            steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
        if spec.remove_extra_whitespaces:
            steps += [
                normalizers.Replace(Regex(r"\A +| +\z"), ""),
                normalizers.Replace(Regex(" {2,}"), " "),
            ]
        if prepend:
            steps.append(normalizers.Prepend(_BLANK))
        steps.append(normalizers.Replace(" ", _BLANK))
        return normalizers.Sequence(steps)

    def compare(self, backend: Backend, settings: SentencePieceSettings) -> None:
        """Compare the ids of 200 strings with those of sentencepiece itself.

        Raises:
            CheckpointError: they differ; shows the first such string.
        """
        from sentencepiece import SentencePieceProcessor

        with library_errors("sentencepiece cannot open tokenizer.model"):
            original = SentencePieceProcessor(model_proto=self.data)
        pieces = self.proto.pieces
        special = [p.piece for p in pieces if p.type not in (NORMAL, UNUSED, BYTE)]
        normal = [p.piece for p in pieces if p.type in (NORMAL, USER_DEFINED)]
        implied = self.proto.normalizer_spec.add_dummy_prefix
        for text in probe_texts([p.replace(_BLANK, " ") for p in normal]):
            if any(s in text for s in special if s not in normal):
                continue
            # Where the settings overrule the model file there is nothing to compare at the start;
            # the newer rule also takes a leading blank for the dummy one.
            overruled = settings.add_prefix_space not in (None, bool(implied))
            if overruled or (not settings.legacy and text.startswith((" ", _BLANK))):
                continue
            ours = backend.encode(text, add_special_tokens=False).ids
            theirs = list(original.encode(text))
            if ours != theirs:
                raise CheckpointError(
                    "tokenizer.model was rebuilt as tokenizer.json and 200 strings were compared "
                    f"with sentencepiece: {text!r} gives {ours} instead of {theirs}. Give a "
                    "checkpoint that has a tokenizer.json of its own."
                )


_PHRASES = (
    "What is shown in this image?",
    "Describe this image in detail.",
    " leading and  double   blanks ",
    "\n",
    "\n\nlines\n  indented\n",
    "\t tabs\tand\r\nreturns",
    "x",
    " ",
    "1234567890 3.14159 1,000,000 0x1F",
    "don't I'll we've it's HELLO World",
    "def f(x): return x**2  # note",
    '{"key": [1, 2.5, null], "b": "c"}',
    "Größe naïve façade Ångström",
    "日本語のテキスト、漢字とかな。",
    "한국어 문장입니다.",
    "Русский текст, кириллица.",
    "עברית وعربي",
    "🦙🔥👩‍🔬 emoji 🇩🇪",
    "e\u0301 combining, \u200bzero width, \ufeffmark, \u00a0no break",
    "ﬁ ligature ① ½ Ａ",
    "a" * 70,
    "<b>markup</b> &amp; [link](http://example.org/?q=1&r=2)",
    "[INST] USER: ASSISTANT: <<SYS>>",
    "\x00\x01 \x7f",
)


def probe_texts(pieces: Sequence[str] = (), count: int = 200) -> tuple[str, ...]:
    """Strings on which tokenizers are compared; the same ones every time.

    Args:
        pieces: pieces of a vocabulary to be mixed in, so that rare ones are met as well.
        count: how many.
    """
    chance = random.Random(2024)
    words = [w for phrase in _PHRASES for w in phrase.split(" ")]
    texts = list(_PHRASES)
    while len(texts) < count:
        pool = pieces if pieces and len(texts) % 2 else words
        joint = " " if chance.random() < 0.7 else ""
        texts.append(joint.join(chance.choices(pool, k=chance.randint(1, 12))))
    return tuple(texts[:count])
