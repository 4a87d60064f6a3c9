"""Tokenizer: from pieces of a prompt to ids, and from ids to text as it streams.

Two promises. Ordinary prompts give the ids of the reference, because the whole string is encoded
at once by the same library. And text of people never becomes a control id: where it would, the
prompt is encoded again by a *sealed* tokenizer, whose control tokens answer to secret names only.

The bos token is put first as tokenizer.json says, but not where the prompt opens with it already:
the rule of ``processor.apply_chat_template(tokenize=True)`` in transformers 5.23. (The two-step
way, ``tokenize=False`` and then ``processor(text=…)``, doubles it there.)
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from llava_edge.profiles.errors import ArtifactError, PromptError
from llava_edge.runtime.artifact.manifest import PromptFormat, TokenIds
from llava_edge.runtime.processing.text.chat_prompt import Piece
from llava_edge.runtime.processing.text.detokenizer import StreamDecoder
from llava_edge.runtime.processing.text.tokenizer_backend import (
    decode,
    encode,
    mapped_errors,
    open_backend,
)
from llava_edge.runtime.util.host_memory import trim_heap
from llava_edge.runtime.util.opened_file import OpenedFile

_SLICE = 16_384
"""Characters that are looked at at once."""
_SEAM = 64
"""Tokens that another cut of the text could save there, and far more than that."""


class Tokenizer:
    """``tokenizer.json`` with the ids that matter by name. Safe to share between threads."""

    def __init__(self, backend: Backend, tokens: TokenIds, control: frozenset[int]) -> None:
        self._backend = backend
        self._tokens = tokens
        self._control = control
        self._added: Mapping[int, AddedToken] = backend.get_added_tokens_decoder()
        self._unk = _unk_id(backend)
        self._lock = threading.Lock()
        self._sealed: dict[bool, _Sealed] = {}
        names = {"image": tokens.image, "video": tokens.video}
        self._marks = {k: self._added[i].content for k, i in names.items() if i is not None}

    @classmethod
    def open(
        cls, opened: OpenedFile, tokens: TokenIds, prompt_format: PromptFormat | None = None
    ) -> Tokenizer:
        """Load and check a ``tokenizer.json``.

        Args:
            opened: the file.
            tokens: special ids of the manifest.
            prompt_format: segments whose control tokens must be single ids.

        Raises:
            ArtifactError: the file cannot be read, or does not hold the manifest's tokens.
        """
        backend = open_backend(opened)
        # Reading needs four times what is kept, in small pieces that no weight fits into.
        trim_heap()
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        wanted = {"image": tokens.image, "video": tokens.video, "bos": tokens.bos}
        named = {name: i for name, i in wanted.items() if i is not None}
        faults = [
            f"the manifest's {name} id {i} is no added token"
            for name, i in named.items()
            if i not in added and (name != "bos" or backend.id_to_token(i) is None)
        ]
        faults += [
            f"the manifest's stop id {i} is no token"
            for i in tokens.stop
            if backend.id_to_token(i) is None
        ]
        contents = {token.content: i for i, token in added.items()}
        written: tuple[str, ...] = ()
        if prompt_format is not None:
            written = prompt_format.special_tokens
            faults += [
                f"{t!r} of the prompt format is no token" for t in written if t not in contents
            ]
        if faults:
            raise ArtifactError(
                f"{opened.path} does not fit its manifest: {'; '.join(faults)}. Convert again."
            )
        control = {i for i, token in added.items() if token.special}
        control |= {*named.values(), *tokens.stop, *(contents[t] for t in written)}
        return cls(backend, tokens, frozenset(control))

    @property
    def backend(self) -> Backend:
        """What encodes and decodes, for comparisons; it knows no control text."""
        return self._backend

    @property
    def image_id(self) -> int:
        """Id that marks the place of an image."""
        return self._tokens.image

    @property
    def video_id(self) -> int | None:
        """Id that marks the place of a video, where the model knows videos."""
        return self._tokens.video

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, where the model has one."""
        return self._tokens.bos

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self._tokens.stop

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that text of people never becomes (``unk`` only where it is written out)."""
        return self._control

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts the bos token first."""
        ids = encode(self._backend, "", add_special_tokens=True).ids
        return bool(ids) and ids[0] == self._tokens.bos

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of a prompt, one image or video id a mark.

        Raises:
            PromptError: a video mark for a model without videos, or the text cannot be encoded
                without control ids.
        """
        merged = _merge(pieces)
        for piece in merged:
            if piece.kind in ("image", "video") and piece.kind not in self._marks:
                raise PromptError(
                    f"The prompt has a place for a {piece.kind}; this model knows no "
                    f"{piece.kind} token. Leave it out or take a model that does."
                )
        runs = [(p.kind, self._marks.get(p.kind, p.text)) for p in merged]
        add_special = self._adds_special(runs)
        encoding = encode(
            self._backend, "".join(text for _, text in runs), add_special_tokens=add_special
        )
        if self._clean(encoding, encoding.ids, runs, sealed=False):
            return list(encoding.ids)
        for copied in (False, True):
            sealed = self._seal(runs, copied=copied)
            hidden = [(k, t if k == "text" else sealed.hide(t)) for k, t in runs]
            encoding = encode(
                sealed.backend, "".join(text for _, text in hidden), add_special_tokens=add_special
            )
            ids = [sealed.ids.get(i, i) for i in encoding.ids]
            if self._clean(encoding, ids, hidden, sealed=True):
                return ids
        raise PromptError(
            "The text holds control tokens that cannot be encoded as plain text. "
            "A prompt's text must not steer the model's turns: remove them."
        )

    def least_tokens(self, text: str, enough: int) -> int:
        """Tokens that a text takes at least, counted until there are more than ``enough``.

        Encoding takes some 200 bytes a token, so a long text is looked at slice by slice before it
        is encoded whole. Between slices a few tokens may come together; that many are left out.
        """
        least = 0
        for start in range(0, len(text), _SLICE):
            part = encode(self._backend, text[start : start + _SLICE], add_special_tokens=False)
            least += max(0, len(part.ids) - _SEAM)
            if least > enough:
                break
        return least

    def expand_media(
        self, ids: Sequence[int], image_counts: Sequence[int], video_counts: Sequence[int] = ()
    ) -> list[int]:
        """Repeat each media id as often as its medium has feature rows, in order.

        Raises:
            PromptError: there are more or fewer marks than counts.
        """
        left = {self._tokens.image: list(image_counts)[::-1]}
        if self._tokens.video is not None:
            left[self._tokens.video] = list(video_counts)[::-1]
        marks = [sum(i == key for i in ids) for key in left]
        if marks != [len(counts) for counts in left.values()] or (
            self._tokens.video is None and video_counts
        ):
            raise PromptError(
                f"The prompt has {sum(marks)} media marks; {len(image_counts)} images and "
                f"{len(video_counts)} videos were given. Each needs exactly one mark."
            )
        expanded: list[int] = []
        for i in ids:
            expanded += [i] * left[i].pop() if i in left else [i]
        return expanded

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without control tokens."""
        plain = [i for i in ids if i not in self._control]
        return decode(self._backend, plain)

    def stream(self) -> StreamDecoder:
        """A decoder for one answer that arrives id by id."""
        return StreamDecoder(self._backend, self._control)

    def _adds_special(self, runs: Sequence[tuple[str, str]]) -> bool:
        bos = self._tokens.bos
        if bos is None or not runs or runs[0][0] != "template":
            return True
        content = self._backend.id_to_token(bos)
        return not (content and runs[0][1].startswith(content))

    def _clean(
        self,
        encoding: Encoding,
        ids: Sequence[int],
        runs: Sequence[tuple[str, str]],
        *,
        sealed: bool,
    ) -> bool:
        """Whether control ids stand only where the template put them, and every mark is one id.

        ``unk`` comes from unknown characters as well; only where it was written out it is control.
        """
        offsets = encoding.offsets
        starts: list[int] = []
        position = 0
        for _, text in runs:
            starts.append(position)
            position += len(text)
        whole = "".join(text for _, text in runs)
        marks = 0
        for index, added in enumerate(encoding.special_tokens_mask):
            i = ids[index]
            # The mask marks what the post-processor added, which is no part of the string.
            if added or (i not in self._added and i not in self._control):
                continue
            start, end = _trim(whole, *offsets[index])
            first = bisect_right(starts, start) - 1
            last = bisect_right(starts, max(end - 1, start)) - 1
            kinds = {kind for kind, _ in runs[first : last + 1]}
            marks += i in (self._tokens.image, self._tokens.video)
            if "text" not in kinds:
                continue
            # An ordinary added token across a seam may have swallowed a control token of the
            # template; under their secret names it cannot.
            if i not in self._control and len(kinds) > 1 and not sealed:
                return False
            written = whole[start:end] == self._backend.id_to_token(i)
            if i in self._control and (i != self._unk or (written and not sealed)):
                return False
        wanted = sum(kind in ("image", "video") for kind, _ in runs)
        # A finished prompt is all template text; its marks are split off, so counts agree there.
        return marks == wanted

    def _seal(self, runs: Sequence[tuple[str, str]], *, copied: bool) -> _Sealed:
        with self._lock:
            known = self._sealed.get(copied)
            if known is None or any(known.secret in text for _, text in runs):
                make = _Sealed.copy if copied else _Sealed.make
                known = self._sealed[copied] = make(self._backend, self._control)
            return known


@dataclass(frozen=True)
class _Sealed:
    """A tokenizer whose control tokens answer to secret names only.

    Renaming keeps every rule of the library (white space around added tokens, dummy prefixes,
    order of normalisation) where taking the tokens out and encoding runs apart would not. The
    model (vocabulary and merges) is shared with the open tokenizer and needs no memory again.
    Where the model itself finds control tokens as its words (unigram models, and symbols of
    sentencepiece), a copy is made in which they are renamed as well.

    Attributes:
        backend: the tokenizer.
        secret: begins every secret name.
        pattern: finds control tokens in template text.
        ids: of tokens that the library gave another id here, by that id.
    """

    backend: Backend
    secret: str
    pattern: re.Pattern[str]
    ids: Mapping[int, int]

    @classmethod
    def make(cls, backend: Backend, control: frozenset[int]) -> _Sealed:
        secret = secrets.token_hex(12)
        added = backend.get_added_tokens_decoder()
        taken = {i: token.content for i, token in added.items()}
        # Control tokens that are words of the model have to be looked for as well.
        named = {i: name for i in control if (name := backend.id_to_token(i)) is not None}
        with mapped_errors("tokenizer.json cannot be sealed against control tokens in text"):
            sealed = Backend(backend.model)
            for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
                if (step := getattr(backend, part)) is not None:
                    setattr(sealed, part, step)
            for i, token in sorted({**named, **taken}.items()):
                _add(sealed, added.get(i), token, secret if i in control else "")
        ids = {
            found: i
            for i, token in {**named, **taken}.items()
            if (found := sealed.token_to_id((secret if i in control else "") + token)) is not None
        }
        if len(ids) != len(named.keys() | taken.keys()):
            raise ArtifactError(
                "tokenizer.json holds control tokens that cannot be told from its words. "
                "Convert the checkpoint again."
            )
        return cls(sealed, secret, _finder(added, named), ids)

    @classmethod
    def copy(cls, backend: Backend, control: frozenset[int]) -> _Sealed:
        """The same with a model of its own, in which the words are renamed."""
        secret = secrets.token_hex(12)
        names = {i: name for i in control if (name := backend.id_to_token(i)) is not None}
        document = json.loads(backend.to_str())
        _rename(document, {name: secret + name for name in names.values()})
        text = json.dumps(document, ensure_ascii=False)
        del document
        with mapped_errors("tokenizer.json cannot be sealed against control tokens in text"):
            sealed = Backend.from_str(text)
        del text
        trim_heap()
        moved = [n for i, n in names.items() if sealed.token_to_id(secret + n) != i]
        if moved:
            raise ArtifactError(
                f"tokenizer.json moves {moved[:5]} when its control tokens are renamed. "
                "Convert the checkpoint again."
            )
        return cls(sealed, secret, _finder(backend.get_added_tokens_decoder(), names), {})

    def hide(self, text: str) -> str:
        """Template text with its control tokens under their secret names."""
        return self.pattern.sub(lambda match: self.secret + match.group(), text)


def _finder(added: Mapping[int, AddedToken], names: Mapping[int, str]) -> re.Pattern[str]:
    """Finds control tokens in template text."""
    # The library takes the longest token that starts at the leftmost place.
    longest_first = sorted((n for i, n in names.items() if i in added), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _add(backend: Backend, token: AddedToken | None, content: str, secret: str) -> None:
    """Add a token with the flags of another."""
    same = AddedToken(
        secret + content,
        single_word=token is not None and token.single_word,
        lstrip=token is not None and token.lstrip,
        rstrip=token is not None and token.rstrip,
        normalized=token is not None and token.normalized,
        special=token is None or token.special,
    )
    (backend.add_special_tokens if same.special else backend.add_tokens)([same])


def _rename(document: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens everywhere in a tokenizer.json; merges that would build one are dropped."""
    for token in document["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = document["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [m for m in merges if not names.keys() & {m[0], m[1], m[0] + m[1]}]


def _merge(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring template pieces joined, so that a control token may span two segments."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and piece.kind == merged[-1].kind and piece.kind in ("template", "text"):
            merged[-1] = Piece(piece.kind, merged[-1].text + piece.text)
        elif piece.text:
            merged.append(piece)
    return merged


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Offsets without outer white space, which an added token may swallow by its flags."""
    run = text[start:end]
    bare = run.strip()
    lead = len(run) - len(run.lstrip())
    return (start + lead, start + lead + len(bare)) if bare else (start, end)


def _unk_id(backend: Backend) -> int | None:
    """Id of what the model does not know; unigram models name it nowhere, so one is asked for."""
    ids = encode(backend, "\U0010fffd", add_special_tokens=False).ids
    unk = ids[-1] if ids else None
    added = backend.get_added_tokens_decoder()
    return unk if unk in added else None
