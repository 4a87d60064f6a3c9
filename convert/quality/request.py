"""QualityRequest: the user's questions to an artifact, read before any work begins."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_edge.profiles.errors import RequestError
from llava_edge.runtime.quality.questions import (
    QualityQuestion,
    read_quality_questions,
    require_media,
)
from llava_edge.runtime.util.limits import Limits

_BLOCK = 1 << 20


@dataclass(frozen=True)
class QualityRequest:
    """Questions with their answers, and how much may be lost.

    Args:
        file: see ``runtime/quality/questions.py``.
        max_loss: largest share of right answers that may be gone, see ``certificate.Quality``.
        limits: that images are opened within.
        max_new_tokens: of an answer.

    Raises:
        RequestError: the file is malformed, names a picture that is missing or cannot be opened,
            or the share is none.

    Attributes:
        questions: of the file.
        digest: SHA-256 of the file.
        key: SHA-256 of that and of the sizes and times of what the file shows.
    """

    file: Path
    max_loss: float | None = None
    limits: Limits = field(default_factory=Limits)
    max_new_tokens: int = 64
    questions: tuple[QualityQuestion, ...] = field(init=False, repr=False)
    digest: str = field(init=False, repr=False)
    key: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Written so that NaN is refused.
        if self.max_loss is not None and not 0 <= self.max_loss <= 1:
            raise RequestError(
                f"--max-loss {self.max_loss} is no share of right answers; it lies between 0 and "
                "1, and 0.02 allows 2 of 100 to be lost."
            )
        questions = read_quality_questions(self.file)
        require_media(self.file, questions, limits=self.limits)
        object.__setattr__(self, "questions", questions)
        object.__setattr__(self, "digest", _digest(self.file))
        object.__setattr__(self, "key", _key(self.digest, questions))

    def require_model(self, *, takes_video: bool, has_template: bool) -> None:
        """Make sure that a model can be asked.

        Raises:
            RequestError: it takes no videos and a question shows one, or it has no template.
        """
        if not has_template:
            raise RequestError(
                f"--quality {self.file} and --no-template were both given; questions are asked "
                "through the template. Leave one of them out."
            )
        if not takes_video:
            require_media(self.file, self.questions, takes_video=False, limits=self.limits)


def _digest(file: Path) -> str:
    whole = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            whole.update(block)
    return whole.hexdigest()


def _key(digest: str, questions: Sequence[QualityQuestion]) -> str:
    whole = hashlib.sha256(digest.encode())
    for question in questions:
        for path in (*question.images, *([question.video] if question.video else [])):
            status = path.stat()
            whole.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return whole.hexdigest()
