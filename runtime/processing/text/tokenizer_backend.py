"""Calls of the tokenizers library, whose panics and bare exceptions become errors of ours.

The library is written in Rust. Where it cannot go on it panics, and that arrives as an exception
below ``BaseException`` which cannot be imported by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from llava_edge.profiles.errors import ArtifactError, LlavaEdgeError
from llava_edge.runtime.processing.text.tokenizer_validation import tokenizer_faults
from llava_edge.runtime.util.checksummed_json import parse_strict
from llava_edge.runtime.util.opened_file import OpenedFile

MAX_BYTES = 64 << 20
"""Largest ``tokenizer.json``; those of vocabularies of 262,144 have 33 MB."""


def open_backend(opened: OpenedFile) -> Backend:
    """Read, judge and open a ``tokenizer.json``.

    Raises:
        ArtifactError: it is too large, or holds what is not let through.
    """
    path, data = opened.path, opened.read(MAX_BYTES)
    if faults := tokenizer_faults(parse_strict(data, str(path), judges_numbers=False)):
        listed = "; ".join(faults[:8])
        raise ArtifactError(
            f"{path} is no tokenizer that is opened: {listed}. Copy or convert the artifact again."
        )
    with mapped_errors(f"{path} is no tokenizer"):
        return Backend.from_str(data.decode("utf-8"))


def encode(backend: Backend, text: str, *, add_special_tokens: bool) -> Encoding:
    """Encode a text.

    Raises:
        ArtifactError: the tokenizer fails at it.
    """
    with mapped_errors("the artifact's tokenizer fails at this prompt"):
        return backend.encode(text, add_special_tokens=add_special_tokens)


def decode(backend: Backend, ids: Sequence[int]) -> str:
    """Text of ids, without special tokens.

    Raises:
        ArtifactError: the tokenizer fails at them.
    """
    with mapped_errors("the artifact's tokenizer fails at this answer"):
        return str(backend.decode(list(ids), skip_special_tokens=True))


@contextmanager
def mapped_errors(
    what: str,
    kind: type[LlavaEdgeError] = ArtifactError,
    step: str = "Copy or convert the artifact again.",
) -> Iterator[None]:
    """Errors and panics of a library as an error of ours.

    Args:
        what: begins the message.
        kind: of the error.
        step: next step, which ends the message.

    Raises:
        LlavaEdgeError: of the given kind.
    """
    try:
        yield
    except LlavaEdgeError:
        raise
    except BaseException as error:
        # A panic of Rust code arrives as a class that cannot be imported by name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {str(error)[:300]}. {step}") from error
