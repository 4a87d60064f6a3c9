"""Conversations: question and answer, with or without an image, read from a calibration folder.

The folder holds one or more ``*.jsonl`` files, one JSON object a line::

    {"image": "receipts/17.jpg", "question": "What is the total?", "answer": "12.80 EUR"}

``image`` is a path inside the folder, left out or null for text only. Further keys are ignored, so
that a data set's own ids may stay. A file that is not like this is refused with every fault; an
image that cannot be read is left out and named.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.profiles.anyres import AnyRes
from llava_edge.profiles.errors import ImageError, RequestError, shorten
from llava_edge.runtime.image_header import read_image_header
from llava_edge.runtime.images import ImageSource
from llava_edge.runtime.limits import Limits

_LOG = logging.getLogger(__name__)

TEXT_SHARE = 0.25
"""Share of samples without an image, where there are enough of both."""

_MAX_LINE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Conversation:
    """One question and its answer; ``image`` opens anew at every call, None for text only."""

    name: str
    question: str
    answer: str
    image: Callable[[], ImageSource] | None = None


def read_conversations(
    folder: Path, anyres: AnyRes, limit: int, seed: int
) -> tuple[tuple[Conversation, ...], dict[str, Any]]:
    """Read a calibration folder.

    Where it holds more than ``limit`` conversations, as many are chosen: a quarter of them text
    only, the others going round the grids that their images take, in an order drawn by seed.

    Args:
        folder: see above.
        anyres: of the artifact, which decides the grid of an image.
        limit: most conversations.
        seed: of the choice.

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
        for number, line in _lines(file, faults)
        if (conversation := _read(folder, f"{file.name}:{number}", line, faults)) is not None
    ]
    if not found and not faults:
        faults.append("no line holds a conversation")
    if faults:
        raise RequestError(f"--calibration {folder} cannot be read: {shorten(faults, 10)}")
    left_out: list[dict[str, str]] = []
    if len(found) > limit:
        found = _choose(found, anyres, limit, seed, left_out)
    source = {"source": "folder", "folder": folder.name, "left_out": left_out}
    return tuple(found), source


def _lines(file: Path, faults: list[str]) -> list[tuple[int, str]]:
    try:
        text = file.read_text("utf-8")
    except (OSError, ValueError) as error:
        faults.append(f"{file.name}: {error}")
        return []
    return [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _read(folder: Path, name: str, line: str, faults: list[str]) -> Conversation | None:
    try:
        if len(line) > _MAX_LINE_CHARACTERS:
            raise ValueError(f"a line of {len(line)} characters; at most {_MAX_LINE_CHARACTERS}")
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        faults.append(f"{name}: no JSON ({error})")
        return None
    if not isinstance(entry, dict):
        faults.append(f"{name}: no JSON object")
        return None
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
        path = _inside(folder, image)
        if path is None:
            faults.append(f"{name}: image is {image!r:.80}, no path inside the folder")
            return None
        opener = partial(Path, path)
    if len(texts) < 2:
        return None
    return Conversation(name, texts["question"], texts["answer"], opener)


def _inside(folder: Path, image: object) -> Path | None:
    if not isinstance(image, str) or not image or "\0" in image:
        return None
    path = folder / image
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        return None
    return path if is_inside else None


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
    limits = Limits()
    try:
        if path.stat().st_size > limits.max_image_bytes:
            raise ImageError(f"{path.name} has more than {limits.max_image_bytes} bytes")
        header = read_image_header(path.read_bytes(), limits.max_image_frames)
        layout = anyres.layout(header.height, header.width)
    except (OSError, RequestError) as error:
        _LOG.warning("calibration sample %s is left out: %s", conversation.name, error)
        left_out.append({"sample": conversation.name, "reason": str(error)})
        return None
    return layout.rows, layout.columns
