"""SentencePieceTokenizer: the reference where a checkpoint has a model of sentencepiece alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from llava_edge.convert.checkpoint.config.tokenizer_settings import (
    read_added_tokens,
    read_special_tokens,
    read_tokenizer_config,
)
from llava_edge.convert.checkpoint.config.tokenizer_source import library_errors
from llava_edge.convert.text.chat_template import special_tokens_map
from llava_edge.convert.text.sentencepiece_model import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    read_sentencepiece,
)
from llava_edge.convert.verification.tokenizer.definition import FLAGS, AddedEntry
from llava_edge.runtime.processing.text.chat_prompt import MARKS

_BLANK = "▁"


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
        with library_errors("sentencepiece cannot open tokenizer.model"):
            # One blank comes off the start of a text, however many pieces begin with one.
            removes, spec.remove_extra_whitespaces = spec.remove_extra_whitespaces, False
            self._decoder: Any = sentencepiece.SentencePieceProcessor(
                model_proto=model.SerializeToString()
            )
            spec.remove_extra_whitespaces = removes
            spec.add_dummy_prefix = self._prefix and self._legacy
            self._model: Any = sentencepiece.SentencePieceProcessor(
                model_proto=model.SerializeToString()
            )
        self.normalises = bool(spec.precompiled_charsmap)
        """Whether the model file brings a table of characters."""
        self._bytes = {
            i: int(p.piece[3:5], 16) for i, p in enumerate(model.pieces) if p.type == BYTE
        }
        by_value = {value: i for i, value in self._bytes.items()}
        self._placeholder = [by_value[value] for value in b"\xef\xbf\xbd" if value in by_value]
        """The character that stands for what is no text, in byte pieces."""
        self.pieces: Mapping[str, int] = {
            str(piece.piece): index for index, piece in enumerate(model.pieces)
        }
        listed = _listed_tokens(folder, settings)
        known = {
            str(p.piece): i for i, p in enumerate(model.pieces) if p.type in (CONTROL, UNKNOWN)
        }
        known |= {content: index for content, (index, _) in listed.items()}
        named = special_tokens_map(folder, config)
        for content in named.values():
            if content in self.pieces:
                known.setdefault(content, self.pieces[content])
        for content, index in marks.items():
            known.setdefault(content, index)
        self.added: Mapping[str, int] = known
        self.symbols: Mapping[str, int] = {
            str(p.piece): i for i, p in enumerate(model.pieces) if p.type == USER_DEFINED
        }
        self._flags = {content: flags for content, (_, flags) in listed.items()}
        control = {*named.values(), *marks, *_further_special(folder, settings)}
        self.entries: Mapping[int, AddedEntry] = {
            index: AddedEntry(content, _entry_flags(content, listed, control))
            for content, index in known.items()
        }
        """Every added token with its flags, by id."""
        self.special = frozenset(i for i, e in self.entries.items() if "special" in e.flags)
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
        return self.added.get(token, self.pieces.get(token))

    def ids_of_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """See ``ReferenceTokenizer``."""
        return [self.ids(text, adds_bos=False) for text in texts]

    def texts_of_ids(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """See ``ReferenceTokenizer``; ids beyond the model file stand alone.

        In two places the fast tokenizers differ from the library, and they are followed: a run of
        byte pieces that is no UTF-8 becomes one placeholder a byte, where the library keeps what is
        whole in it; and the blank that comes off the start may be written as a byte.
        """
        size = len(self.pieces)
        inside = [[*self._placeheld(s)] if max(s, default=0) < size else [] for s in sequences]
        with library_errors("sentencepiece fails at ids"):
            found = [str(text) for text in self._decoder.decode(inside)] if inside else []
        contents = {i: entry.content for i, entry in self.entries.items()}
        return [
            text if ids or not sequence else "".join(contents.get(i, "") for i in sequence)
            for text, ids, sequence in zip(found, inside, sequences, strict=True)
        ]

    def _placeheld(self, ids: Sequence[int]) -> list[int]:
        found: list[int] = []
        for is_byte, group in groupby(ids, self._bytes.__contains__):
            run = list(group)
            data = bytes(self._bytes[i] for i in run) if is_byte else b""
            try:
                data.decode("utf-8")
            except UnicodeDecodeError:
                run = [*self._placeholder] * len(run)
            found += run
        if found and self._bytes.get(found[0]) == ord(" "):
            found[0] = self.pieces.get(_BLANK, found[0])
        return found

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


def _listed_tokens(
    folder: Path, settings: Mapping[str, Any]
) -> dict[str, tuple[int, Mapping[str, Any]]]:
    found: dict[str, tuple[int, Mapping[str, Any]]] = {
        content: (index, {}) for content, index in read_added_tokens(folder).items()
    }
    for place, token in (settings.get("added_tokens_decoder") or {}).items():
        found[token["content"]] = (int(place), token)
    return found


def _further_special(folder: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """Contents that the files call special without a name of their own; marks of media as well."""
    yield from MARKS.values()
    for source in (settings, read_special_tokens(folder)):
        for token in source.get("additional_special_tokens") or ():
            yield str(token["content"] if isinstance(token, Mapping) else token)


def _entry_flags(
    content: str, listed: Mapping[str, tuple[int, Mapping[str, Any]]], control: set[str]
) -> frozenset[str]:
    """Flags of an added token: as its file says; else special where it is control text.

    None is looked for in normalised text, whatever the file says: these tokens are cut out first.
    """
    _, flags = listed.get(content, (0, {}))
    if flags:
        return frozenset(flag for flag in FLAGS if flags.get(flag) and flag != "normalized")
    ordinary = content in listed and content not in control
    return frozenset() if ordinary else frozenset({"special"})
