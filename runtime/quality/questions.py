"""Quality questions: a file of image, question and accepted answers, for ``convert`` and ``bench``.

One JSON object a line, or one list of them, as DocVQA, ChartQA, TextVQA and the like are easily
brought to::

    {"image": "page-1.png", "question": "What is the total?", "answers": ["12.80", "12.80 EUR"]}

``answer`` does for one answer. With ``choices``, a list of texts, the question is one of multiple
choice and the answer a letter. ``kind`` counts results apart. ``image`` is a path inside the
folder of the file, or a list of such paths, or left out; ``video`` is such a path. Further keys are
ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_edge.profiles.errors import RequestError, shorten
from llava_edge.runtime.processing.images.loading import read_image_size
from llava_edge.runtime.util.jsonl import NoEntriesError, path_inside, read_entries
from llava_edge.runtime.util.limits import Limits

_MAX_CHOICES = 26


@dataclass(frozen=True)
class QualityQuestion:
    """One question; ``choices`` is empty unless it is one of multiple choice.

    ``where`` is what messages call it.
    """

    question: str
    answers: tuple[str, ...]
    images: tuple[Path, ...]
    choices: tuple[str, ...] = ()
    kind: str = ""
    video: Path | None = None
    where: str = ""


def read_quality_questions(file: Path, limit: int | None = None) -> tuple[QualityQuestion, ...]:
    """Read the first ``limit`` questions of a file, or all.

    Raises:
        RequestError: there is no such file or no question in it, or lines are malformed; every
            fault is listed.
    """
    file = Path(file)
    faults: list[str] = []
    found: list[QualityQuestion] = []
    try:
        for name, entry in read_entries(file, faults):
            question = _read(file.parent, name, entry, faults)
            if question is not None:
                found.append(question)
            if len(found) == limit:
                break
    except NoEntriesError as error:
        raise RequestError(f"--quality {file} cannot be read: {error}.") from error
    if not found and not faults:
        faults.append("it holds no question")
    if faults:
        raise RequestError(
            f"--quality {file} cannot be used: {shorten(faults, 10)}. Lines are like "
            '{"image": "a.png", "question": "…", "answers": ["…"]}.'
        )
    return tuple(found)


def require_media(
    file: Path,
    questions: Sequence[QualityQuestion],
    *,
    takes_video: bool | None = None,
    limits: Limits | None = None,
) -> None:
    """Make sure that what questions show is there and can be opened, by the headers of images.

    Args:
        file: that the questions come from, for the message.
        questions: all of them.
        takes_video: whether the model does; None where that is not known yet.
        limits: that images are opened within.

    Raises:
        RequestError: something is missing or of the wrong kind; every fault is listed.
    """
    faults: list[str] = []
    for question in questions:
        for image in question.images:
            try:
                read_image_size(image, limits)
            except RequestError as error:
                faults.append(f"{question.where}: {error}")
        if question.video is None:
            continue
        if takes_video is False:
            faults.append(f"{question.where}: it shows a video, and the model takes images only")
        elif not question.video.is_file():
            faults.append(f"{question.where}: there is no video {question.video}")
    if faults:
        raise RequestError(f"--quality {file} cannot be used: {shorten(faults, 10)}.")


def _read(
    folder: Path, name: str, entry: dict[str, Any], faults: list[str]
) -> QualityQuestion | None:
    before = len(faults)
    question = entry.get("question")
    if not isinstance(question, str) or not question.strip():
        faults.append(f"{name}: question is {question!r:.40}, not a text")
    choices = _texts(entry.get("choices") or [], f"{name}: choices", faults)
    if len(choices) > _MAX_CHOICES:
        faults.append(f"{name}: {len(choices)} choices; at most {_MAX_CHOICES}")
    given = entry.get("answers")
    given = entry.get("answer") if given is None else given
    answers = _texts([given] if isinstance(given, str) else given, f"{name}: answers", faults)
    if not answers and len(faults) == before:
        faults.append(f"{name}: there are no answers")
    letters = {chr(ord("A") + place) for place in range(len(choices))}
    if choices and len(faults) == before and not letters.issuperset(answers):
        faults.append(f"{name}: answers are {answers!r:.40}; with choices they are letters")
    if "images" in entry:
        faults.append(f"{name}: the key is image, also for a list of them, not images")
    images = _paths(folder, name, "image", entry.get("image"), faults)
    shown = entry.get("video")
    videos = _paths(folder, name, "video", None if isinstance(shown, list) else shown, faults)
    if isinstance(shown, list):
        faults.append(f"{name}: video is {shown!r:.80}, not one path")
    if len(faults) > before:
        return None
    assert isinstance(question, str)
    kind = str(entry.get("kind") or "")
    return QualityQuestion(question, answers, images, choices, kind, (*videos, None)[0], name)


def _texts(value: Any, what: str, faults: list[str]) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    faults.append(f"{what} are {value!r:.40}, not a list of texts")
    return ()


def _paths(folder: Path, name: str, key: str, value: Any, faults: list[str]) -> tuple[Path, ...]:
    paths: Sequence[Any] = [] if value is None else value if isinstance(value, list) else [value]
    found: list[Path] = []
    for given in paths:
        path = path_inside(folder, given)
        if path is None:
            faults.append(f"{name}: {key} is {given!r:.80}, no path inside the folder")
        else:
            found.append(path)
    return tuple(found)
