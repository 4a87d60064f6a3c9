"""Text cases of the loop: ids that the model is made to say, and the text that they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import numpy as np

from llava_edge.convert.verification.reference.answer import Reference
from llava_edge.convert.verification.stages.tokenizer import control_ids
from llava_edge.convert.verification.tokenizer.artifact import artifact_tokenizer
from llava_edge.convert.verification.tokenizer.sentencepiece_reference import SentencePieceTokenizer
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.generation.loop import FinishReason
from llava_edge.runtime.verification.golden.loop import TextCase

_TEXTS = {
    "words": "The answer is 42, I think.",
    "characters of several bytes": "€ 5 – naïve 漢字 🙂👍 ñ",
    "blanks and lines": "  two  blanks\n\nand lines\t.",
    "joined and composed characters": "👩‍🚀🇩🇪 x² ﬁn Ａ cafe\u0301 é",
}
_MOST_STOPS = 6
_MOST_SPECIALS = 4
_DRAWN = 40
_SEED = 2026
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_SETTLED = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
"""Decoders that need no later token than the next one to know a token's text."""


def text_cases(artifact: Artifact, reference: Reference) -> tuple[TextCase, ...]:
    """Words, characters cut over tokens, control tokens, stops and lengths."""
    return tuple(_Texts(artifact, reference).cases())


def _shared(one: str, other: str) -> int:
    """Characters that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class _Texts:
    def __init__(self, artifact: Artifact, reference: Reference) -> None:
        manifest = artifact.manifest
        self._reference = reference
        self._tokens = manifest.tokens
        self._vocab_size = manifest.model.text.vocab_size
        self._stops = tuple(i for i in self._tokens.stop if i < self._vocab_size)
        tokens = self._tokens
        self._backend = artifact_tokenizer(artifact).backend
        self._theirs = reference.processor.tokenizer
        self._places = {i for i in (tokens.image, tokens.video) if i is not None}
        self._silent = control_ids(manifest, self._theirs) | self._places
        self._specials = self._silent - self._places
        parts = json.loads(self._backend.to_str())["decoder"] or {}
        kinds = {part["type"] for part in parts.get("decoders", [parts] if parts else [])}
        self._settles = kinds <= _SETTLED

    def cases(self) -> Iterator[TextCase]:
        """All of them."""
        words = self._ids(_TEXTS["words"])
        for name, text in _TEXTS.items():
            ids = self._ids(text)
            yield self._case(name, ids, len(ids), "length")
        yield from self._broken_characters(words)
        for stop in self._stops[:_MOST_STOPS]:
            yield self._case(f"stop token {stop}", [*words[:4], stop, *words[4:8]], 5, "stop", 12)
        for stop in self._stops[:1]:
            yield self._case("stop token first", [stop, *words[:3]], 1, "stop", 9)
            yield self._case("stop token last", [*words[:3], stop, *words[3:6]], 4, "stop", 4)
        for count in (1, 2, 5):
            yield self._case(f"length {count}", words[:8], min(count, len(words[:8])), "length")
        silent: tuple[tuple[str, Sequence[int]], ...] = (
            ("control tokens", sorted(self._specials - set(self._tokens.stop))[:_MOST_SPECIALS]),
            ("padding of the table", range(self._tokens.num_text_tokens, self._vocab_size)[:2]),
            ("places", sorted(self._places)),
        )
        for name, given in silent:
            said = [i for i in given if i < self._vocab_size and i not in self._tokens.stop]
            if said:
                mixed = [*words[:3], *said, *words[3:5], said[0]]
                yield self._case(name, mixed, len(mixed), "length")
        random = np.random.default_rng(_SEED)
        count = min(self._tokens.num_text_tokens, self._vocab_size)
        if isinstance(self._theirs, SentencePieceTokenizer):
            # It decodes what its model file holds; ids beyond that stand alone.
            count = min(count, len(self._theirs.pieces))
        ordinary = np.setdiff1d(np.arange(count), sorted(self._silent))
        for number in range(2):
            ids = [int(i) for i in random.choice(ordinary, _DRAWN)]
            yield self._case(f"drawn tokens {number}", ids, len(ids), "length")

    def _broken_characters(self, words: Sequence[int]) -> Iterator[TextCase]:
        """An answer that ends inside a character, and one that goes on with another."""
        ids = self._ids(_TEXTS["characters of several bytes"])
        for count in range(len(ids) - 1, 0, -1):
            if self._decode(ids[:count]).endswith(_BROKEN):
                yield self._case("half a character at the end", ids[:count], count, "length")
                mixed = [*ids[:count], *words[:3]]
                yield self._case("half a character within", mixed, len(mixed), "length")
                return

    def _case(
        self, name: str, ids: Sequence[int], count: int, reason: FinishReason, most: int = 0
    ) -> TextCase:
        answer = ids[:count]
        text = self._text(answer)
        least: list[int] = []
        for place, token in enumerate(answer):
            before = least[-1] if least else 0
            held = token in self._silent or _BYTE.fullmatch(self._backend.id_to_token(token) or "")
            if self._settles and not held:
                so_far = self._text(answer[: place + 1]).rstrip(_BROKEN)
                before = max(before, _shared(so_far, text))
            least.append(before)
        least[-1] = len(text)
        return TextCase(
            name=name,
            ids=tuple(int(i) for i in ids),
            count=count,
            finish_reason=reason,
            max_new_tokens=most or count,
            text=text,
            least=tuple(least),
        )

    def _text(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if i not in self._silent and self._backend.id_to_token(i)]
        return self._decode(known) if known else ""

    def _ids(self, text: str) -> list[int]:
        return [i for i in self._reference.answer_ids(text) if i not in self._silent]

    def _decode(self, ids: Sequence[int]) -> str:
        """Ids without control tokens to text, by the reference."""
        return self._theirs.texts_of_ids([list(ids)])[0]
