"""Tokenizer files: from whatever a checkpoint holds to one ``tokenizer.json`` and its ids.

The reference's processor decides what the ids are, so its own tokenizer is asked wherever
transformers can load one; the file is written as that one is when the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from llava_edge.convert.checkpoint.config import original as original_config
from llava_edge.convert.checkpoint.config.tokenizer_settings import (
    read_added_tokens,
    read_special_tokens,
    read_tokenizer_config,
    refuse_foreign_class,
)
from llava_edge.convert.checkpoint.config.tokenizer_source import (
    judge_tokenizer_json,
    library_errors,
    open_tokenizer_json,
    read_tokenizer_json,
)
from llava_edge.convert.checkpoint.transformers_loader import load_merges, load_tokenizer
from llava_edge.convert.text.builtin_templates import builtin_format, detect_family, stop_tokens
from llava_edge.convert.text.chat_template import special_tokens_map
from llava_edge.convert.text.sentencepiece import (
    SentencePieceModel,
    SentencePieceSettings,
    probe_texts,
)
from llava_edge.convert.util.text_files import read_object
from llava_edge.profiles.errors import CheckpointError, shorten
from llava_edge.runtime.artifact.manifest import TokenIds
from llava_edge.runtime.processing.text.chat_prompt import MARKS, Kind
from llava_edge.runtime.util.progress import Notify

_MAX_FILLERS = 1024
_HUB_TYPES = ("llava", "llava_next", "llava_next_video")


def prepare_tokenizer(
    checkpoint_folder: Path,
    config: Mapping[str, Any],
    out_file: Path,
    vocab_size: int,
    *,
    family: str | None = None,
    source_id: str = "",
    report: Notify | None = None,
) -> TokenIds:
    """Write the artifact's ``tokenizer.json`` and read the special ids from it.

    Args:
        checkpoint_folder: the checkpoint.
        config: ``config.json`` in the words of Hugging Face.
        out_file: where to write.
        vocab_size: rows of the embedding table.
        family: prompt family, detected where left out; adds its stop tokens.
        source_id: hub id or folder name, see ``detect_family``.
        report: is told what a person should know, such as files that contradict each other.

    Raises:
        CheckpointError: there is no usable tokenizer, or configuration and tokenizer do not agree
            about an id.
    """
    family = family or detect_family(config, source_id)
    with library_errors(f"the tokenizer of {checkpoint_folder} cannot be read"):
        files = _Files.read(checkpoint_folder, config, family)
        return _prepare(files, out_file, vocab_size, report)


def build_tokenizer_json(checkpoint_folder: Path, config: Mapping[str, Any]) -> str:
    """A ``tokenizer.json`` made from ``tokenizer.model``, with the marks of media.

    Raises:
        CheckpointError: as ``prepare_tokenizer``.
    """
    with library_errors(f"the tokenizer of {checkpoint_folder} cannot be read"):
        files = _Files.read(checkpoint_folder, config)
        backend = _from_sentencepiece(files)
        _place_marks(backend, files)
        return backend.to_str()


def _prepare(files: _Files, out_file: Path, vocab_size: int, report: Notify | None) -> TokenIds:
    say = report or (lambda sentence: None)
    backend = _choose(files, say)
    tokens = _token_ids(backend, files, vocab_size, files.family or "")
    backend.no_truncation()
    backend.no_padding()
    text = backend.to_str()
    judge_tokenizer_json(text, "the tokenizer.json to be written")
    again = open_tokenizer_json(text, "the tokenizer.json to be written")
    if (fault := _first_difference(backend, again, files)) is not None:
        raise CheckpointError(
            f"The tokenizer changes when it is written and read again: {fault}. "
            "Give a checkpoint with another tokenizer.json."
        )
    out_file.write_text(text, encoding="utf-8")
    return tokens


@dataclass(frozen=True)
class _Files:
    """What the checkpoint says about its tokenizer."""

    folder: Path
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    names: Mapping[str, str]
    added: Mapping[int, AddedToken]
    original: bool
    family: str | None = None

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any], family: str | None = None) -> _Files:
        refuse_foreign_class(folder)
        settings = read_tokenizer_config(folder)
        names = special_tokens_map(folder, config)
        raw = read_object(folder / "config.json")
        return cls(
            folder=folder,
            config=config,
            settings=settings,
            names=names,
            added=_listed_tokens(folder, settings, set(names.values())),
            original=original_config.is_original(raw),
            family=family,
        )

    def mark(self, kind: Kind) -> str:
        """How the tokenizer writes the place of a medium."""
        named = self.settings.get(f"{kind}_token")
        content = named.get("content") if isinstance(named, Mapping) else named
        return content if isinstance(content, str) and content else MARKS[kind]

    def wanted(self, kind: Kind) -> int | None:
        """Id that the configuration gives to the place of a medium."""
        # An original configuration has none; the one of its translation is only a placeholder.
        if self.original:
            return None
        for key in (f"{kind}_token_index", f"{kind}_token_id"):
            value = self.config.get(key)
            if type(value) is int:
                return value
        return None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Media that the model knows."""
        video = self.config.get("model_type") == "llava_next_video"
        return ("image", "video") if video else ("image",)


def _choose(files: _Files, say: Notify) -> Backend:
    """The checkpoint's own tokenizer.json, or one built from its other files."""
    own = files.folder / "tokenizer.json"
    model = files.folder / "tokenizer.model"
    candidates: list[tuple[str, Callable[[], Backend]]] = []
    if own.is_file():
        candidates.append(("tokenizer.json", lambda: _own(files, say)))
    if model.is_file():
        candidates.append(("tokenizer.model", lambda: _from_sentencepiece(files)))
    elif not own.is_file() and (files.folder / "merges.txt").is_file():
        candidates.append(("vocab.json and merges.txt", lambda: _from_merges(files)))
    if not candidates:
        raise CheckpointError(
            f"{files.folder} has no tokenizer: neither tokenizer.json, tokenizer.model nor "
            "vocab.json with merges.txt. Give a folder that holds one next to the weights."
        )
    faults: list[str] = []
    built: list[tuple[str, Backend]] = []
    for name, make in candidates:
        # A second file is asked only where the first one is wrong, or to say that they differ.
        try:
            backend = make()
            _place_marks(backend, files)
        except CheckpointError as error:
            if len(candidates) == 1:
                raise
            faults.append(f"{name}: {error}")
            continue
        built.append((name, backend))
    if not built:
        raise CheckpointError(
            "No tokenizer of the checkpoint agrees with its config.json:\n  - "
            + "\n  - ".join(faults)
        )
    name, backend = built[0]
    if len(built) == 2 and (fault := _first_difference(backend, built[1][1], files)) is not None:
        say(
            f"tokenizer.json and tokenizer.model disagree: {fault}. {name} is taken, whose image "
            "id is the one of config.json."
        )
    for fault in faults:
        say(f"{name} is taken; left aside was {fault}")
    return backend


def _own(files: _Files, say: Notify) -> Backend:
    path = files.folder / "tokenizer.json"
    backend = open_tokenizer_json(read_tokenizer_json(path), str(path))
    if files.original or files.config.get("model_type") not in _HUB_TYPES:
        _add_listed(backend, files)
        return backend
    try:
        reference = _backend(load_tokenizer(files.folder))
    except CheckpointError as error:
        say(f"{error!s:.300} tokenizer.json is taken as it is.")
        _add_listed(backend, files)
        return backend
    if (fault := _first_difference(backend, reference, files)) is not None:
        say(
            "transformers reads this checkpoint's tokenizer otherwise than tokenizer.json alone "
            f"says: {fault}. The artifact follows transformers."
        )
    return reference


def _backend(loaded: Any) -> Backend:
    """A copy of what a tokenizer of transformers computes with."""
    return open_tokenizer_json(loaded.backend_tokenizer.to_str(), "what transformers reads")


def _from_sentencepiece(files: _Files) -> Backend:
    model = SentencePieceModel.open(files.folder / "tokenizer.model")
    prefix = files.settings.get("add_prefix_space")
    settings = SentencePieceSettings(
        legacy=files.settings.get("legacy") is not False,
        add_prefix_space=prefix if isinstance(prefix, bool) else None,
        add_bos=files.settings.get("add_bos_token") is not False,
    )
    backend = model.build(settings)
    model.compare(backend, settings)
    # They are looked for in the text as it was written: a blank put in front is no part of them.
    _add_listed(backend, replace(files, added={i: _raw(t) for i, t in files.added.items()}))
    # What the settings name, or turns of the family are written with, is control text as well
    # where the model file has it as an ordinary symbol.
    written = builtin_format(files.family).special_tokens if files.family else ()
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for content in dict.fromkeys((*files.names.values(), *written)):
        if content not in added and backend.token_to_id(content) is not None:
            backend.add_special_tokens([AddedToken(content, normalized=False)])
    return backend


def _from_merges(files: _Files) -> Backend:
    backend = _backend(load_merges(files.folder))
    _add_listed(backend, files)
    return backend


def _listed_tokens(
    folder: Path, settings: Mapping[str, Any], special: Iterable[str]
) -> dict[int, AddedToken]:
    """Added tokens that stand beside the vocabulary, by id."""
    found: dict[int, AddedToken] = {}
    named = set(special)
    for source in (settings, read_special_tokens(folder)):
        named |= {*_contents(source.get("additional_special_tokens"))}
    for content, index in read_added_tokens(folder).items():
        is_special = content in named or content in MARKS.values()
        found[index] = AddedToken(content, special=is_special, normalized=not is_special)
    for place, token in (settings.get("added_tokens_decoder") or {}).items():
        flags = {key: value for key, value in token.items() if key not in ("__type", "id")}
        found[int(place)] = AddedToken(**flags)
    return found


def _contents(tokens: Any) -> Iterator[str]:
    for token in tokens or ():
        yield str(token["content"] if isinstance(token, Mapping) else token)


def _add_listed(backend: Backend, files: _Files) -> None:
    """Add the listed tokens at their ids; unnamed ids between them become reserved tokens."""
    faults = []
    for index, token in sorted(files.added.items()):
        known = backend.id_to_token(index)
        if known is None and backend.token_to_id(token.content) is None:
            _fill(backend, index, token.content)
        elif known != token.content:
            faults.append(
                f"{token.content!r} should be {index}; the vocabulary has {known!r} there and "
                f"{token.content!r} at {backend.token_to_id(token.content)}"
            )
            continue
        _add(backend, token)
        if backend.token_to_id(token.content) != index:
            faults.append(f"{token.content!r} cannot be placed at id {index}")
    if faults:
        raise CheckpointError(
            f"The added tokens contradict the vocabulary: {shorten(faults)}. Take all tokenizer "
            "files from one revision of the checkpoint."
        )


def _raw(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=token.special,
    )


def _add(backend: Backend, token: AddedToken) -> None:
    (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _fill(backend: Backend, index: int, content: str) -> None:
    gap = range(_next_id(backend), index)
    if len(gap) > _MAX_FILLERS:
        raise CheckpointError(
            f"{content!r} should have id {index}; the vocabulary ends at {gap.start - 1}, which "
            f"leaves {len(gap)} ids without a token (at most {_MAX_FILLERS}). Take the tokenizer "
            "that belongs to this config.json."
        )
    for filler in gap:
        backend.add_special_tokens([AddedToken(f"<|reserved_{filler}|>", normalized=False)])


def _next_id(backend: Backend) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _place_marks(backend: Backend, files: _Files) -> None:
    """See that each medium has a token, at the id that the configuration gives it."""
    faults = []
    missing: list[tuple[int, str]] = []
    for kind in files.kinds:
        content, wanted = files.mark(kind), files.wanted(kind)
        found = backend.token_to_id(content)
        if found is None:
            free = _next_id(backend) + sum(i >= _next_id(backend) for i, _ in missing)
            missing.append((free if wanted is None else wanted, content))
            if wanted is not None and (taken := backend.id_to_token(wanted)) is not None:
                faults.append(
                    f"config.json gives {content} the id {wanted}, which is {taken!r} in the "
                    f"tokenizer, and the tokenizer has no {content}"
                )
            elif wanted is not None and not _next_id(backend) <= wanted < _next_id(backend) + 2:
                faults.append(
                    f"config.json gives {content} the id {wanted}; the tokenizer has no {content} "
                    f"and its next free id is {_next_id(backend)}"
                )
        elif wanted is not None and wanted != found:
            other = backend.id_to_token(wanted)
            faults.append(
                f"config.json gives {content} the id {wanted}, the tokenizer {found} "
                f"(its {wanted} is {other!r})"
            )
        elif found not in backend.get_added_tokens_decoder():
            missing.append((found, content))
    if faults:
        raise CheckpointError(
            f"{'; '.join(faults)}. Both must agree, because the weights were trained with one of "
            "them and nothing here says which: take config.json and tokenizer from one revision."
        )
    for index, content in sorted(missing):
        backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])
        if backend.token_to_id(content) != index:
            raise CheckpointError(
                f"{content} cannot be placed at id {index}; it came to lie at "
                f"{backend.token_to_id(content)}. Take the tokenizer that belongs to config.json."
            )


def _token_ids(backend: Backend, files: _Files, vocab_size: int, family: str) -> TokenIds:
    def index(content: str | None) -> int | None:
        found = None if content is None else backend.token_to_id(content)
        return found if found is None else int(found)

    image = index(files.mark("image"))
    assert image is not None
    video = index(files.mark("video")) if "video" in files.kinds else None
    stop = _stop_ids(backend, files, family)
    bos = index(files.names.get("bos_token"))
    if bos is None:
        # Without a named one: what the tokenizer itself puts first.
        first = backend.encode("", add_special_tokens=True).ids[:1]
        bos = first[0] if first else None
    # The marks and a padding token of its own are no text, wherever they stand.
    no_text = {image, video, index(files.names.get("pad_token"))} - {*stop, bos}
    vocab = backend.get_vocab(with_added_tokens=True)
    text = [i for i in vocab.values() if i not in no_text]
    beyond = sorted(i for i in text if i >= vocab_size)
    if beyond:
        named = [f"{i} {backend.id_to_token(i)!r}" for i in beyond]
        raise CheckpointError(
            f"The tokenizer has ids that the embedding table of {vocab_size} rows lacks: "
            f"{shorten(named)}. Take tokenizer and weights from one checkpoint."
        )
    return TokenIds(image=image, video=video, bos=bos, stop=stop, num_text_tokens=max(text) + 1)


def _stop_ids(backend: Backend, files: _Files, family: str) -> tuple[int, ...]:
    """Ids that end an answer, the most trusted source first, without repetition.

    ``generation_config.json`` is what the reference obeys. An id of ``config.json`` counts only
    where it is a control token, because exported configurations carry defaults of other models.
    """
    control = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    listed = _ids(read_object(files.folder / "generation_config.json").get("eos_token_id"))
    found = [i for i in listed if backend.id_to_token(i) is not None]
    text = files.config.get("text_config")
    for source in (files.config, text if isinstance(text, Mapping) else {}):
        found += [i for i in _ids(source.get("eos_token_id")) if i in control]
    eos = files.names.get("eos_token")
    for content in (*([eos] if eos else []), *stop_tokens(family)):
        index = backend.token_to_id(content)
        found += [] if index is None else [int(index)]
    if not found:
        raise CheckpointError(
            f"No token ends an answer: neither generation_config.json, config.json nor the "
            f"tokenizer names one, and none of {', '.join(stop_tokens(family))} is in the "
            "vocabulary. Add eos_token_id to generation_config.json."
        )
    added = backend.get_added_tokens_decoder()
    if text_ids := [i for i in dict.fromkeys(found) if i not in added]:
        named = ", ".join(f"{i} {backend.id_to_token(i)!r:.40}" for i in text_ids)
        raise CheckpointError(
            f"An answer would end at {named}, which is ordinary text, so that no question could "
            "hold it. Name a control token as eos_token_id in generation_config.json, or list this "
            "one among the tokenizer's added tokens."
        )
    return tuple(dict.fromkeys(found))


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if type(v) is int]


def _first_difference(one: Backend, other: Backend, files: _Files) -> str | None:
    """The first of 200 strings, or the first added token, for which two tokenizers differ."""
    marks = [files.mark(kind) for kind in files.kinds]
    texts = [
        *probe_texts(),
        *(f"[INST] {m}\nWhat is this? [/INST] a</s>" for m in marks),
        *(f"<|im_start|>user\n{m}\nWhat?<|im_end|>" for m in marks),
    ]
    for text in texts:
        a, b = one.encode(text).ids, other.encode(text).ids
        if a != b:
            return f"{text!r} gives {a} and {b}"
    added = one.get_added_tokens_decoder(), other.get_added_tokens_decoder()
    contents = [{i: t.content for i, t in tokens.items() if t.special} for tokens in added]
    for i in sorted({*contents[0], *contents[1]}):
        if contents[0].get(i) != contents[1].get(i):
            return f"special id {i} is {contents[0].get(i)!r} and {contents[1].get(i)!r}"
    return None
