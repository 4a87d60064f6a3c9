"""PngFile: a picture that a command writes, whole or not at all, and never over another file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from llava_edge.profiles.errors import OutputExistsError, RequestError, plain_reason
from llava_edge.runtime.util.atomic_write import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image


class PngFile:
    """Where a picture will go; everything that can be wrong with that is said at once.

    Args:
        path: ends in ``.png``, in a folder that exists.
        force: whether a file that is there may be replaced.

    Raises:
        RequestError: the path is none for a PNG file.
        OutputExistsError: a file is there.
    """

    def __init__(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".png":
            raise RequestError(f"{self.path} was asked for; pictures are written as .png files")
        if not self.path.parent.is_dir():
            raise RequestError(
                f"{self.path} cannot be written: there is no folder {self.path.parent}. Create it."
            )
        if self.path.is_dir():
            raise RequestError(f"{self.path} is a folder; name a file")
        if self.path.exists() and not force:
            raise OutputExistsError(
                f"{self.path} exists and is not overwritten; name another file or give --force"
            )

    def write(self, picture: Image) -> None:
        """Save the picture.

        Raises:
            RequestError: the folder cannot be written to.
        """
        try:
            with atomic_file(self.path) as partial, open(partial, "wb") as file:
                picture.save(file, "PNG")
        except OSError as error:
            raise RequestError(f"{self.path} cannot be written: {plain_reason(error)}") from error
