"""The error tree. Its root sits in the lowest layer so that every package can raise it.

    LlavaEdgeError            exit 1   something failed; the message says what
    ├── RequestError          exit 2   the request is malformed or cannot be met
    │   ├── ProfileError               a hardware profile is unknown or impossible
    │   ├── BudgetError                no candidate fits the memory budget
    │   ├── PromptError                prompt, image marks or context do not go together
    │   ├── ImageError                 an image is refused
    │   ├── VideoError                 a video is refused
    │   ├── UnknownOptionError         a call has no such option; a TypeError as well
    │   ├── UsageError                 a command line is malformed
    │   ├── CheckpointError            a checkpoint cannot be converted faithfully
    │   └── OutputExistsError          nothing is overwritten unasked
    ├── HubError              exit 1   the model hub could not be reached or answered
    ├── ExportError           exit 1   writing the artifact failed
    ├── VerificationError     exit 1   an artifact does not do what its checkpoint does
    ├── ArtifactError         exit 1   an artifact is damaged, unsafe or of another kind
    ├── EngineError           exit 1   the inference engine failed
    ├── OutOfMemoryError      exit 1   memory ran out where the plan said it would not
    ├── DeadlineError         exit 1   the time that was given is over
    ├── OutputError           exit 1   what a command prints could not be written
    └── DependencyError       exit 1   an optional package is missing

A message holds four things: what was asked, what was found, the rule, the next step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class LlavaEdgeError(Exception):
    """Root of all errors that this project raises on purpose."""

    exit_code = 1


class RequestError(LlavaEdgeError):
    """The request is malformed or cannot be met; the caller must change it."""

    exit_code = 2


class ProfileError(RequestError):
    """A hardware profile is unknown, malformed or holds an impossible value."""


class BudgetError(RequestError):
    """Nothing that was asked for fits the memory budget."""


class PromptError(RequestError):
    """Prompt, image marks, context length or sampling options do not go together."""


class UnknownOptionError(RequestError, TypeError):
    """A call has no option of that name; Python's own error for it is a ``TypeError``."""


class UsageError(RequestError):
    """A command line is malformed: an option or a value of one that does not exist."""


class ImageError(RequestError):
    """An image is refused before or while it is decoded."""


class VideoError(RequestError):
    """A video is refused before or while it is decoded."""


class CheckpointError(RequestError):
    """A checkpoint is unsafe, incomplete, or of a kind that cannot be kept faithfully."""


class OutputExistsError(RequestError):
    """The output already exists and ``--force`` was not given."""


class HubError(LlavaEdgeError):
    """The model hub could not be reached, or does not have what was asked."""


class ExportError(LlavaEdgeError):
    """Building or writing an artifact failed; nothing half-written is left in its place."""


class VerificationError(LlavaEdgeError):
    """An artifact was compared with its checkpoint and failed."""


class ArtifactError(LlavaEdgeError):
    """An artifact is damaged, unsafe, or made for something else."""


class EngineError(LlavaEdgeError):
    """The inference engine refused or failed a call."""


class OutOfMemoryError(LlavaEdgeError):
    """Memory ran out; the message says how much was asked and how much there was."""


class DeadlineError(LlavaEdgeError):
    """The time that a request was given is over, and there is no token yet."""


class OutputError(LlavaEdgeError):
    """Stdout could not be written; what it was to hold is lost."""


class DependencyError(LlavaEdgeError):
    """An optional package is missing; the message holds the install command."""


_MAX_SHOWN = 400
"""Characters of one foreign name in a message."""


def printable(text: str) -> str:
    """A foreign text for a message: short, and without characters that a terminal obeys."""
    shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
    if shown.isprintable():
        return shown
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return "".join(escaped)


def shorten(items: Sequence[str], limit: int = 5) -> str:
    """Join items for a message, each printable, cut at ``limit`` with a count of the rest."""
    shown = ", ".join(printable(item) for item in items[:limit])
    rest = len(items) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


def did_you_mean(text: str, names: Iterable[str]) -> str:
    """`` (did you mean NAME?)`` for the nearest of the names, empty where none is near."""
    # Longer texts are no slips of a finger, and comparing them takes long.
    by_lower = {name.lower(): name for name in names}
    near = get_close_matches(text.lower(), by_lower, 1) if len(text) <= 100 else []
    return f" (did you mean {by_lower[near[0]]}?)" if near else ""


def plain_reason(error: Exception) -> str:
    """Why a file cannot be read or written, without the system's numbers."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start})"
    # Errors of FFmpeg have it as well, and are no OSError.
    message = getattr(error, "strerror", None)
    if isinstance(message, str) and message:
        return message
    return str(error) or type(error).__name__
