"""Tokenizers of the reference: transformers' own, or sentencepiece where there is nothing else.

A checkpoint with ``tokenizer.model`` alone was trained with the sentencepiece library below
transformers' slow Llama tokenizer. transformers 5 has no slow one any more and reads the file by
rules of its own, which give other ids. So there the library itself is the reference, with the rules
that stood around it: added tokens are cut out first, each run between them is encoded by itself,
and bos comes first. Source: ``LlamaTokenizer`` and ``PreTrainedTokenizer.tokenize`` of transformers
4.47 (``legacy``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers
import transformers

from llava_edge.convert.checkpoint.config.tokenizer_settings import (
    read_tokenizer_config,
)
from llava_edge.convert.checkpoint.config.tokenizer_source import library_errors
from llava_edge.convert.checkpoint.transformers_loader import load_tokenizer
from llava_edge.convert.util.text_files import read_object, read_text
from llava_edge.convert.verification.tokenizer.definition import FLAGS, Definition
from llava_edge.convert.verification.tokenizer.sentencepiece_reference import (
    SentencePieceTokenizer,
    _listed_tokens,
)


class ReferenceTokenizer(Protocol):
    """What the verifier asks of a tokenizer.

    Attributes:
        name: library and version, for the certificate.
        added: ids of added tokens by content.
        special: ids of those that are control text.
        symbols: pieces of the vocabulary that text is cut at before anything else, by content.
        bos: the token that opens a sequence, where there is one.
        eos: the token that ends it.
    """

    name: str
    added: Mapping[str, int]
    special: frozenset[int]
    symbols: Mapping[str, int]
    bos: str | None
    eos: str | None

    def ids(self, text: str, *, adds_bos: bool = True) -> list[int]:
        """Ids of a text, with what the tokenizer puts around it unless ``adds_bos`` is false."""

    def id_of(self, token: str) -> int | None:
        """Id of a token by its content."""

    def ids_of_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, with nothing put around them."""

    def texts_of_ids(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Texts of many id sequences, special tokens among them; spaces are not cleaned up."""


class TransformersTokenizer:
    """A tokenizer that transformers made; see ``ReferenceTokenizer``."""

    name = f"transformers {transformers.__version__}"

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        self.added: Mapping[str, int] = {
            str(t): int(i) for i, t in loaded.added_tokens_decoder.items()
        }
        self.special = frozenset(
            int(i) for i, t in loaded.added_tokens_decoder.items() if t.special
        )
        self.symbols: Mapping[str, int] = {}
        self.bos: str | None = loaded.bos_token
        self.eos: str | None = loaded.eos_token

    def definition(self) -> str:
        """The ``tokenizer.json`` that it computes with."""
        return str(self._loaded.backend_tokenizer.to_str())

    def ids(self, text: str, *, adds_bos: bool = True) -> list[int]:
        """See ``ReferenceTokenizer``."""
        return [int(i) for i in self._loaded(text, add_special_tokens=adds_bos)["input_ids"]]

    def id_of(self, token: str) -> int | None:
        """See ``ReferenceTokenizer``."""
        found = self._loaded.convert_tokens_to_ids(token)
        return None if found is None else int(found)

    def ids_of_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """See ``ReferenceTokenizer``."""
        return list(self._loaded(list(texts), add_special_tokens=False)["input_ids"])

    def texts_of_ids(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """See ``ReferenceTokenizer``.

        It is what ``decode`` returns with ``clean_up_tokenization_spaces=False``: the clean-up was
        made for WordPiece, and takes blanks away that the model wrote.
        """
        backend = self._loaded.backend_tokenizer
        return list(backend.decode_batch([*map(list, sequences)], skip_special_tokens=False))


class FileTokenizer:
    """A ``tokenizer.json`` as it stands, with the tokens that other files list beside it.

    See ``ReferenceTokenizer``. Where a checkpoint is no model of transformers, its classes may read
    the file by rules of their own, which are not those that the model was trained with.

    Args:
        folder: the checkpoint; its files have been judged.
        other: of the same checkpoint, for the names of tokens.
    """

    symbols: Mapping[str, int] = {}

    def __init__(self, folder: Path, other: ReferenceTokenizer) -> None:
        self.name = f"tokenizers {tokenizers.__version__}"
        self.bos, self.eos = other.bos, other.eos
        self.added, self.special = other.added, other.special
        path = folder / "tokenizer.json"
        with library_errors(f"{path} is no tokenizer"):
            self._backend = tokenizers.Tokenizer.from_str(read_text(path))
            listed = _listed_tokens(folder, read_tokenizer_config(folder))
            for content, (index, flags) in sorted(listed.items(), key=lambda item: item[1][0]):
                if self._backend.token_to_id(content) == index or index == self._size():
                    special = index in other.special
                    given = {k: v for k, v in flags.items() if k in FLAGS}
                    given = {"special": special, "normalized": not special, **given}
                    token = tokenizers.AddedToken(content, **given)
                    add = self._backend.add_special_tokens if special else self._backend.add_tokens
                    add([token])
        self._backend.no_truncation()
        self._backend.no_padding()

    def definition(self) -> str:
        """The ``tokenizer.json`` that it computes with."""
        return str(self._backend.to_str())

    def ids(self, text: str, *, adds_bos: bool = True) -> list[int]:
        """See ``ReferenceTokenizer``."""
        return list(self._backend.encode(text, add_special_tokens=adds_bos).ids)

    def id_of(self, token: str) -> int | None:
        """See ``ReferenceTokenizer``."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def ids_of_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """See ``ReferenceTokenizer``."""
        found = self._backend.encode_batch([*texts], add_special_tokens=False)
        return [list(encoding.ids) for encoding in found]

    def texts_of_ids(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """See ``ReferenceTokenizer``."""
        return list(self._backend.decode_batch([*map(list, sequences)], skip_special_tokens=False))

    def _size(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))


def reference_tokenizer(
    folder: Path,
    config: Mapping[str, Any],
    marks: Mapping[str, int],
    *,
    is_original: bool = False,
) -> ReferenceTokenizer:
    """The reference for a checkpoint's files.

    Args:
        folder: see ``SentencePieceTokenizer``.
        config: see there.
        marks: see there.
        is_original: the checkpoint is no model of transformers: a ``tokenizer.json`` that its
            class reads otherwise than it stands decides itself.

    Raises:
        CheckpointError: there is none.
    """
    if reads_sentencepiece(folder, marks):
        return SentencePieceTokenizer(folder, config, marks)
    found = TransformersTokenizer(load_tokenizer(folder))
    if is_original and (folder / "tokenizer.json").is_file():
        own = FileTokenizer(folder, found)
        stands, read = (Definition.parse(each.definition()) for each in (own, found))
        if (stands.settings, stands.steps) != (read.settings, read.steps):
            return own
    return found


def reads_sentencepiece(folder: Path, marks: Mapping[str, int]) -> bool:
    """Whether ``tokenizer.model`` is what a checkpoint says about its vocabulary.

    It is where there is no ``tokenizer.json``, and where that one gives a mark another id than the
    configuration does, so that no prompt with an image would fit the model.
    """
    if not (folder / "tokenizer.model").is_file():
        return False
    listed = read_object(folder / "tokenizer.json").get("added_tokens") or ()
    ids = {token.get("content"): token.get("id") for token in listed if isinstance(token, Mapping)}
    contradicted = any(ids.get(content, index) != index for content, index in marks.items())
    return contradicted or not (folder / "tokenizer.json").is_file()
