"""atomic_write: a text file that is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from llava_edge.profiles.errors import OutputError, OutputExistsError, RequestError, plain_reason
from llava_edge.runtime.util.atomic_write import atomic_file


def atomic_write(path: Path, text: str) -> None:
    """Write, replacing what is there.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name that is no UTF-8 stands in it as Python shows it.
        with atomic_file(path) as partial:
            partial.write_text(text, "utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"{path} could not be written: {plain_reason(error)}.") from error


def check_writable(path: Path | None, option: str, *, force: bool | None) -> None:
    """Find out before hours of work whether its result can be written.

    Args:
        path: of the file; None is none.
        option: that named it.
        force: whether ``--force`` was given; None where the option knows none.

    Raises:
        OutputExistsError: the file exists and ``force`` is off.
        RequestError: it is a folder, its folder is not there or cannot be written.
    """
    if path is None:
        return
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise RequestError(f"{option} {path} cannot be written: {error.strerror}.") from error
    if path.is_dir():
        raise RequestError(f"{option} {path} is a folder. Name a file.")
    if path.exists() and not force:
        otherwise = "" if force is None else ", or --force"
        raise OutputExistsError(f"{path} exists. Choose another name for {option}{otherwise}.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise RequestError(
            f"{option} {path} cannot be written: there is no folder {folder}. Create it."
        )
    if not os.access(folder, os.W_OK):
        raise RequestError(f"{option} {path} cannot be written: {folder} does not allow it.")
