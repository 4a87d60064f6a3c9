"""Conversations: question and answer, with or without an image, read from a calibration folder.

The folder holds one or more ``*.jsonl`` files, one JSON object a line::

    {"image": "receipts/17.jpg", "question": "What is the total?", "answer": "12.80 EUR"}

``image`` is a path inside the folder, left out or null for text only. Further keys are ignored, so
that a data set's own ids may stay. A file that is not like this is refused with every fault; an
image that cannot be read is left out and named.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.profiles.anyres import AnyRes
from llava_edge.profiles.errors import RequestError, shorten
from llava_edge.runtime.images import ImageSource, read_image_size
from llava_edge.runtime.json_lines import path_inside, read_objects
from llava_edge.runtime.limits import Limits

_LOG = logging.getLogger(__name__)

TEXT_SHARE = 0.25
"""Share of samples without an image, where there are enough of both."""


@dataclass(frozen=True)
class Conversation:
    """One question and its answer.

    ``image`` opens anew at every call, None for text only; ``limits`` are what it is opened within.
    """

    name: str
    question: str
    answer: str
    image: Callable[[], ImageSource] | None = None
    limits: Limits = field(default_factory=Limits)


def read_conversations(
    folder: Path, anyres: AnyRes, limit: int, seed: int, limits: Limits | None = None
) -> tuple[tuple[Conversation, ...], dict[str, Any]]:
    """Read a calibration folder.

    Where it holds more than ``limit`` conversations, as many are chosen: a quarter of them text
    only, the others going round the grids that their images take, in an order drawn by seed.

    Args:
        folder: see above.
        anyres: of the artifact, which decides the grid of an image.
        limit: most conversations.
        seed: of the choice.
        limits: bounds on its images.

    Returns:
        Conversations in the folder's order, and what is to be said of the source.

    Raises:
        RequestError: there is no such folder or no line in it, or lines are malformed; every fault
            is listed.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not files:
        raise RequestError(
            f"--calibration {folder}: there is no *.jsonl file in it. Give a folder with one, of "
            'lines like {"image": "a.jpg", "question": "…", "answer": "…"}.'
        )
    faults: list[str] = []
    found = [
        conversation
        for file in files
        for name, entry in _entries(file, faults)
        if (conversation := _read(folder, name, entry, faults)) is not None
    ]
    if not found and not faults:
        faults.append("no line holds a conversation")
    if faults:
        raise RequestError(f"--calibration {folder} cannot be read: {shorten(faults, 10)}")
    found = [replace(conversation, limits=limits or Limits()) for conversation in found]
    left_out: list[dict[str, str]] = []
    if len(found) > limit:
        found = _choose(found, anyres, limit, seed, left_out)
    source = {"source": "folder", "folder": folder.name, "left_out": left_out}
    return tuple(found), source


def _entries(file: Path, faults: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = file.read_text("utf-8")
    except (OSError, ValueError) as error:
        faults.append(f"{file.name}: {error}")
        return iter(())
    return read_objects(text, lambda number: f"{file.name}:{number}", faults)


def _read(folder: Path, name: str, entry: dict[str, Any], faults: list[str]) -> Conversation | None:
    texts: dict[str, str] = {}
    for key in ("question", "answer"):
        value = entry.get(key)
        if not isinstance(value, str) or not value.strip():
            faults.append(f"{name}: {key} is {value!r:.40}, not a text")
            continue
        texts[key] = value
    image = entry.get("image")
    opener: Callable[[], ImageSource] | None = None
    if image is not None:
        path = path_inside(folder, image)
        if path is None:
            faults.append(f"{name}: image is {image!r:.80}, no path inside the folder")
            return None
        opener = partial(Path, path)
    if len(texts) < 2:
        return None
    return Conversation(name, texts["question"], texts["answer"], opener)


def _choose(
    found: Sequence[Conversation],
    anyres: AnyRes,
    limit: int,
    seed: int,
    left_out: list[dict[str, str]],
) -> list[Conversation]:
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(found)).tolist()
    text_only = [place for place in order if found[place].image is None]
    by_grid: dict[tuple[int, int], list[int]] = {}
    for place in order:
        grid = _grid(found[place], anyres, left_out)
        if grid is not None:
            by_grid.setdefault(grid, []).append(place)
    rounds = max((len(places) for places in by_grid.values()), default=0)
    with_image = [
        places[turn] for turn in range(rounds) for places in by_grid.values() if turn < len(places)
    ]
    num_text = min(len(text_only), max(round(limit * TEXT_SHARE), limit - len(with_image)))
    chosen = [*text_only[:num_text], *with_image[: limit - num_text]]
    return [found[place] for place in sorted(chosen)]


def _grid(
    conversation: Conversation, anyres: AnyRes, left_out: list[dict[str, str]]
) -> tuple[int, int] | None:
    """Rows and columns that an image takes, from its header; None without an image."""
    if conversation.image is None:
        return None
    path = conversation.image()
    assert isinstance(path, Path)
    try:
        layout = anyres.layout(*read_image_size(path, conversation.limits))
    except RequestError as error:
        _LOG.warning("calibration sample %s is left out: %s", conversation.name, error)
        left_out.append({"sample": conversation.name, "reason": str(error)})
        return None
    return layout.rows, layout.columns
