"""Tokenizers of the reference: transformers' own, or sentencepiece where there is nothing else.

A checkpoint with ``tokenizer.model`` alone was trained with the sentencepiece library below
transformers' slow Llama tokenizer. transformers 5 has no slow one any more and reads the file by
rules of its own, which give other ids. So there the library itself is the reference, with the rules
that stood around it: added tokens are cut out first, each run between them is encoded by itself,
and bos comes first. Source: ``LlamaTokenizer`` and ``PreTrainedTokenizer.tokenize`` of transformers
4.47 (``legacy``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import transformers

from llava_edge.convert.chat_template import special_tokens_map
from llava_edge.convert.sentencepiece_model import CONTROL, UNKNOWN, read_sentencepiece
from llava_edge.convert.text_files import read_object
from llava_edge.convert.tokenizer_settings import read_added_tokens, read_tokenizer_config
from llava_edge.convert.tokenizer_source import library_errors
from llava_edge.convert.transformers_loader import load_tokenizer

_BLANK = "▁"


class ReferenceTokenizer(Protocol):
    """What the verifier asks of a tokenizer.

    Attributes:
        name: library and version, for the certificate.
        added: ids of added tokens by content.
        bos: the token that opens a sequence, where there is one.
        eos: the token that ends it.
    """

    name: str
    added: Mapping[str, int]
    bos: str | None
    eos: str | None

    def ids(self, text: str, *, adds_bos: bool = True) -> list[int]:
        """Ids of a text, with what the tokenizer puts around it unless ``adds_bos`` is false."""

    def id_of(self, token: str) -> int | None:
        """Id of a token by its content."""


class TransformersTokenizer:
    """A tokenizer that transformers made; see ``ReferenceTokenizer``."""

    name = f"transformers {transformers.__version__}"

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        self.added: Mapping[str, int] = {
            str(t): int(i) for i, t in loaded.added_tokens_decoder.items()
        }
        self.bos: str | None = loaded.bos_token
        self.eos: str | None = loaded.eos_token

    def ids(self, text: str, *, adds_bos: bool = True) -> list[int]:
        """See ``ReferenceTokenizer``."""
        return [int(i) for i in self._loaded(text, add_special_tokens=adds_bos)["input_ids"]]

    def id_of(self, token: str) -> int | None:
        """See ``ReferenceTokenizer``."""
        found = self._loaded.convert_tokens_to_ids(token)
        return None if found is None else int(found)


class SentencePieceTokenizer:
    """The sentencepiece library and a checkpoint's settings; see ``ReferenceTokenizer``.

    Args:
        folder: the checkpoint, with ``tokenizer.model``.
        config: ``config.json`` in the words of Hugging Face.
        marks: ids of media marks by content, where no file of the tokenizer lists them.

    Raises:
        CheckpointError: a file is malformed, or the library refuses the model.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], marks: Mapping[str, int]) -> None:
        import sentencepiece

        self.name = f"sentencepiece {sentencepiece.__version__}"
        settings = read_tokenizer_config(folder)
        self._legacy = settings.get("legacy") is not False
        self._adds_bos = settings.get("add_bos_token") is not False
        model = read_sentencepiece(folder / "tokenizer.model")
        spec = model.normalizer_spec
        prefix = settings.get("add_prefix_space")
        if prefix is not None:
            spec.add_dummy_prefix = prefix
        self._prefix = bool(spec.add_dummy_prefix)
        if not self._legacy:
            spec.add_dummy_prefix = False
        with library_errors("sentencepiece cannot open tokenizer.model"):
            self._model: Any = sentencepiece.SentencePieceProcessor(
                model_proto=model.SerializeToString()
            )
        self._pieces = {piece.piece: index for index, piece in enumerate(model.pieces)}
        listed = _listed_tokens(folder, settings)
        known = {
            str(p.piece): i for i, p in enumerate(model.pieces) if p.type in (CONTROL, UNKNOWN)
        }
        known |= {content: index for content, (index, _) in listed.items()}
        named = special_tokens_map(folder, config)
        for content in named.values():
            if content in self._pieces:
                known.setdefault(content, self._pieces[content])
        for content, index in marks.items():
            known.setdefault(content, index)
        self.added: Mapping[str, int] = known
        self._flags = {content: flags for content, (_, flags) in listed.items()}
        longest_first = sorted(known, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.bos = self._named(named, "bos_token", "<s>")
        self.eos = self._named(named, "eos_token", "</s>")
        self._unk = str(model.pieces[model.trainer_spec.unk_id].piece)

    def ids(self, text: str, *, adds_bos: bool = True) -> list[int]:
        """See ``ReferenceTokenizer``."""
        found: list[int] = []
        first = None if self.bos is None else self.id_of(self.bos)
        if adds_bos and self._adds_bos and first is not None:
            found.append(first)
        if not self._legacy and text:
            text = text.replace(_BLANK, " ")
            # As its fast form: a blank that is there already is the one in front.
            text = _BLANK + text if self._prefix and not text.startswith(" ") else text
        runs = self._runs(text)
        for place, run in enumerate(runs):
            if run in self.added:
                found.append(self.added[run])
            elif not self._legacy and place == 0 and run == _BLANK and len(runs) > 1:
                # The blank of a prompt that begins with a token of its own.
                continue
            elif run:
                found += self._encode(run)
        return found

    def id_of(self, token: str) -> int | None:
        """See ``ReferenceTokenizer``."""
        return self.added.get(token, self._pieces.get(token))

    def _encode(self, run: str) -> list[int]:
        with library_errors("sentencepiece fails at a text"):
            if self._legacy or not run.startswith((_BLANK, " ")):
                return [int(i) for i in self._model.encode(run)]
            # As transformers: behind the unknown token a leading blank is kept as it is.
            before = len(self._model.encode(self._unk))
            return [int(i) for i in self._model.encode(self._unk + run)[before:]]

    def _runs(self, text: str) -> list[str]:
        """Added tokens and what stands between them, white space off where their flags say so."""
        runs = self._cut.split(text)
        for place in range(1, len(runs), 2):
            flags = self._flags.get(runs[place], {})
            if flags.get("lstrip"):
                runs[place - 1] = runs[place - 1].rstrip()
            if flags.get("rstrip"):
                runs[place + 1] = runs[place + 1].lstrip()
        return [run for run in runs if run]

    def _named(self, named: Mapping[str, str], key: str, default: str) -> str | None:
        content = named.get(key, default)
        return content if self.id_of(content) is not None else None


def reference_tokenizer(
    folder: Path, config: Mapping[str, Any], marks: Mapping[str, int]
) -> ReferenceTokenizer:
    """The reference for a checkpoint's files; arguments are those of ``SentencePieceTokenizer``.

    Raises:
        CheckpointError: there is none.
    """
    if reads_sentencepiece(folder, marks):
        return SentencePieceTokenizer(folder, config, marks)
    return TransformersTokenizer(load_tokenizer(folder))


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


def _listed_tokens(
    folder: Path, settings: Mapping[str, Any]
) -> dict[str, tuple[int, Mapping[str, Any]]]:
    found: dict[str, tuple[int, Mapping[str, Any]]] = {
        content: (index, {}) for content, index in read_added_tokens(folder).items()
    }
    for place, token in (settings.get("added_tokens_decoder") or {}).items():
        found[token["content"]] = (int(place), token)
    return found
