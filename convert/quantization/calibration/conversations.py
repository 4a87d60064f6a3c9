"""Conversations to calibrate with, read from a folder or a file.

A folder holds ``*.jsonl`` files, one object a line, or ``*.json`` files, one list of objects each.
Either may be named itself in place of its folder. ``conversation_entry`` has the forms of an
object. Images are paths inside that folder. Further keys are ignored, so that a data set's own ids
may stay. Malformed entries are refused, all of them together. What is of a kind that is not used,
and an image that cannot be read, are left out and named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_edge.convert.quantization.calibration.conversation_entry import (
    Conversation,
    EntryFaultError,
    LeftOutError,
    Turn,
    read_entry,
    reason_of,
)
from llava_edge.convert.quantization.calibration.files import FORMS, find_files
from llava_edge.profiles.errors import RequestError, shorten
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.runtime.processing.images.loading import read_image_size
from llava_edge.runtime.util.jsonl import NoEntriesError, read_entries
from llava_edge.runtime.util.limits import Limits

__all__ = ["TEXT_SHARE", "Conversation", "Turn", "find_files", "read_conversations"]

TEXT_SHARE = 0.25
"""Share of samples without an image, where there are enough of both."""

_LOOKED_AT = 20
"""Images whose size is read before some are chosen, for each that is: all of them would be a
hundred gigabytes in the largest public data sets."""

_MOST_NAMED = 100


def read_conversations(
    source: Path, anyres: AnyRes, limit: int, seed: int, limits: Limits | None = None
) -> tuple[tuple[Conversation, ...], dict[str, Any]]:
    """Read a calibration folder, or one file of it.

    Where it holds more than ``limit`` conversations, as many are chosen: a quarter of them text
    only, the others going round the grids that their first images have, in an order drawn by seed.

    Args:
        source: folder or file; see above.
        anyres: of the artifact, which decides the grid of an image.
        limit: most conversations.
        seed: of the choice.
        limits: bounds on its images.

    Returns:
        Conversations in the source's order, and what is to be reported of the source.

    Raises:
        RequestError: there is no such folder or file or no entry in it, or entries are malformed;
            every fault is listed.
    """
    source = Path(source)
    folder, files = find_files(source)
    faults: list[str] = []
    left_out = _LeftOut()
    found: list[Conversation] = []
    for file in files:
        for name, entry in _entries(file, source, faults, left_out):
            try:
                found.append(read_entry(folder, name, entry))
            except EntryFaultError as error:
                faults.append(f"{name}: {error}")
            except LeftOutError as error:
                left_out.add(name, str(error))
    if not found and not faults:
        faults.append("no line holds a conversation")
        faults += [f"{each['sample']}: {each['reason']}" for each in left_out.listed]
    if faults:
        raise RequestError(f"--calibration {source} cannot be read: {shorten(faults, 10)}. {FORMS}")
    found = [replace(conversation, limits=limits or Limits()) for conversation in found]
    if len(found) > limit:
        found = _choose(found, anyres, limit, seed, left_out)
    report = {"source": "folder", "folder": folder.name, "left_out": left_out.listed}
    if source != folder:
        report = {**report, "source": "file", "file": source.name}
    return tuple(found), report


def _entries(
    file: Path, source: Path, faults: list[str], left_out: _LeftOut
) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        yield from read_entries(file, faults, file.name)
    except NoEntriesError as error:
        if file != source and file.suffix.lower() == ".json" and "one object" in str(error):
            # A folder of data often has a description beside it.
            left_out.add(file.name, str(error))
        else:
            faults.append(f"{file.name}: {error}")


class _LeftOut:
    """What is left out and why: the first ones by name, since the artifact lists them."""

    def __init__(self) -> None:
        self._named: list[dict[str, str]] = []
        self._more = 0

    def add(self, name: str, reason: str) -> None:
        """Note one."""
        if len(self._named) >= _MOST_NAMED:
            self._more += 1
            return
        self._named.append({"sample": name, "reason": reason})

    @property
    def listed(self) -> list[dict[str, str]]:
        """Samples and reasons, as plain JSON."""
        rest = {"sample": f"{self._more} more", "reason": "not listed one by one"}
        return [*self._named, *([rest] if self._more else [])]


def _choose(
    found: Sequence[Conversation],
    anyres: AnyRes,
    limit: int,
    seed: int,
    left_out: _LeftOut,
) -> list[Conversation]:
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(found)).tolist()
    text_only = [place for place in order if not found[place].images]
    shown = [place for place in order if found[place].images]
    by_grid: dict[tuple[int, int], list[int]] = {}
    for place in shown[: _LOOKED_AT * limit]:
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


def _grid(conversation: Conversation, anyres: AnyRes, left_out: _LeftOut) -> tuple[int, int] | None:
    """Rows and columns that the first image has, from its header; None where it cannot be read."""
    path = conversation.images[0]()
    assert isinstance(path, Path)
    try:
        layout = anyres.layout(*read_image_size(path, conversation.limits))
    except RequestError as error:
        left_out.add(conversation.name, reason_of(error, conversation))
        return None
    return layout.rows, layout.columns
