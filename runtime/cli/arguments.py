"""Flags that several commands share: the artifact, what runs it, what its cache holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from llava_edge.profiles.boards.device_name import DEVICE_METAVAR, device_argument
from llava_edge.profiles.command_line import bar, one_of, whole_number
from llava_edge.profiles.errors import (
    ArtifactError,
    RequestError,
    did_you_mean,
    plain_reason,
    printable,
)
from llava_edge.profiles.memory.buffers import CACHE_FLAGS
from llava_edge.profiles.models.anyres import GRID_NAMES
from llava_edge.runtime.util.choices import AskedCache, AskedEngine

_MANIFEST = "manifest.json"


def add_artifact_argument(parser: argparse._ActionsContainer, nargs: str | None = None) -> None:
    """Add ``ARTIFACT``."""
    parser.add_argument(
        "artifact", nargs=nargs, metavar="ARTIFACT", help="folder that llava-edge convert wrote"
    )


def add_json_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--json``."""
    parser.add_argument(
        "--json", action="store_true", help="one JSON object as the last line of stdout"
    )


def add_device_arguments(parser: argparse._ActionsContainer) -> None:
    """Add ``--device``, ``--threads`` and ``--allow-slow``; see ``LlavaEdge.load``."""
    parser.add_argument(
        "--device",
        type=device_argument,
        metavar=DEVICE_METAVAR,
        default="auto",
        help="what runs the language model",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(0, 4096),
        default=0,
        metavar="N",
        help="threads on the CPU; 0: as many as are allowed",
    )
    parser.add_argument("--allow-slow", action="store_true", help="run a cuda artifact on the CPU")


def add_engine_arguments(parser: argparse._ActionsContainer) -> None:
    """Add ``--engine``, ``--trust-engines`` and ``--strict-device``; see ``LlavaEdge.load``."""
    parser.add_argument(
        "--engine",
        type=one_of(get_args(AskedEngine)),
        metavar=bar(get_args(AskedEngine)),
        default="auto",
        help="what runs the vision tower; auto: the first that works",
    )
    parser.add_argument(
        "--trust-engines",
        action="store_true",
        help="open TensorRT engines that came with the artifact",
    )
    parser.add_argument(
        "--strict-device",
        action="store_true",
        help="on cuda: refuse where a part of the model would be computed on the CPU",
    )


def add_cache_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--cache``; ``asked_cache`` reads it."""
    names = ("auto", *CACHE_FLAGS)
    parser.add_argument(
        "--cache",
        type=one_of(names),
        metavar=bar(names),
        default="auto",
        help="type of the key and value cache; int8 where the artifact was converted with it",
    )


def asked_cache(flag: str) -> AskedCache:
    """A value of ``--cache`` as ``LlavaEdge.load`` accepts it."""
    return "auto" if flag == "auto" else CACHE_FLAGS[flag]


def add_grid_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--grid`` of commands that may only lower it."""
    parser.add_argument(
        "--grid",
        metavar="NAME",
        help="lower the AnyRes grid, for instance base or 1x2 (default: the artifact's)",
    )


def require_grid(name: str | None) -> None:
    """Refuse a grid that no artifact has.

    Raises:
        RequestError: its name is unknown.
    """
    if name is not None and name not in GRID_NAMES:
        raise RequestError(
            f"grid {name!r:.60} is unknown; named grids are {', '.join(GRID_NAMES)}"
            f"{did_you_mean(name, GRID_NAMES)}"
        )


def require_artifact(folder: str) -> None:
    """Refuse what is no artifact at a glance; ``open_artifact`` checks all of it.

    Raises:
        ArtifactError: there is no such folder, or nothing of an artifact in it.
    """
    try:
        is_there = Path(folder, _MANIFEST).exists()
        if not is_there and Path(folder).resolve(strict=True).is_dir():
            raise ArtifactError(
                f"{folder!s:.300} is no artifact: it holds no {_MANIFEST}. Give a folder that "
                "llava-edge convert wrote."
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"there is no artifact at {folder!s:.300}: {plain_reason(error)}. Convert a checkpoint "
            "into it first."
        ) from error


def require_questions(path: Path | None) -> None:
    """Refuse a file of ``--quality`` that is not there; reading it needs more than its name.

    Raises:
        RequestError: there is no such file.
    """
    if path is None:
        return
    try:
        path.stat()
    except (OSError, ValueError) as error:
        raise RequestError(
            f"--quality {printable(str(path))} cannot be read: {plain_reason(error)}. Give a file "
            "of questions, one JSON object a line."
        ) from error
