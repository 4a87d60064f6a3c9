"""StreamDecoder: text of an answer while its ids come in, never a broken character."""

from __future__ import annotations

import codecs
import json
import re

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from llava_edge.runtime.processing.text.tokenizer_backend import decode


class StreamDecoder:
    """Turns ids into text as they come; all text together is ``Tokenizer.decode`` of all ids.

    Text is held back only as long as a later id could change it: an unfinished UTF-8 character
    in byte-level vocabularies; a run of byte tokens in sentencepiece vocabularies, which the
    library decodes as a whole and replaces as a whole when it is not UTF-8. Each id is decoded
    three times at most, so the work per id does not grow with the answer. Decoders that are
    neither kind give all their text at the end.
    """

    def __init__(self, backend: Backend, control: frozenset[int]) -> None:
        self._backend = backend
        self._control = control
        self._bytes = (
            codecs.getincrementaldecoder("utf-8")("replace")
            if isinstance(backend.decoder, decoders.ByteLevel)
            else None
        )
        self._settles = _settles(backend)
        self._pending: list[int] = []
        self._context: list[int] = []

    def push(self, token_id: int) -> str:
        """Text that is settled now that this id has come; may be empty."""
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._control:
            return ""
        if self._bytes is not None:
            return self._bytes.decode(_token_bytes(token))
        self._pending.append(token_id)
        held = not self._settles or _BYTE_TOKEN.fullmatch(token)
        return "" if held else self._flush()

    def finish(self) -> str:
        """What was held back; call once, after the last id."""
        return self._flush() if self._bytes is None else self._bytes.decode(b"", final=True)

    def _flush(self) -> str:
        if not self._pending:
            return ""
        # What precedes decides about leading blanks, so the last id is decoded again as context.
        before = self._decode(self._context)
        text = self._decode(self._context + self._pending)[len(before) :]
        self._context, self._pending = self._pending[-1:], []
        return text

    def _decode(self, ids: list[int]) -> str:
        return decode(self._backend, ids) if ids else ""


_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_alphabet() -> dict[str, int]:
    """Characters of byte-level vocabularies to bytes.

    Source: GPT-2. Printable Latin-1 stands for itself, the other bytes follow from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_NO_BYTE = "\N{REPLACEMENT CHARACTER}"
_ALPHABET = {number: _NO_BYTE for number in range(256)} | {
    ord(character): chr(byte) for character, byte in _byte_alphabet().items()
}
"""For ``str.translate``: to characters of Latin-1, and to none of them what is no byte."""


def _token_bytes(token: str) -> bytes:
    try:
        return token.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8")


_SETTLED_DECODERS = {"Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def _settles(backend: Backend) -> bool:
    """Whether a token's text depends on its neighbours only in ways that the window covers."""
    if backend.decoder is None:
        return True
    state = json.loads(backend.decoder.__getstate__())
    parts = state.get("decoders", [state])
    return all(part.get("type") in _SETTLED_DECODERS and not part.get("stop", 0) for part in parts)
