"""Where an artifact goes, and whether it may go there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llava_edge.convert.output.journal import read_document
from llava_edge.convert.output.partial_folder import JOURNAL
from llava_edge.convert.output.volume_output import is_empty_folder, settle_move, works_inside
from llava_edge.convert.util.files import refusal
from llava_edge.profiles.errors import ArtifactError, ExportError, OutputExistsError, RequestError
from llava_edge.runtime.artifact.manifest_validation import MANIFEST


def output_path(out: str | os.PathLike[str]) -> Path:
    """An output as an absolute path; a link to a folder stands for that folder."""
    # The name is needed, and "." has none.
    path = Path(os.path.abspath(out))
    return path.resolve() if os.path.islink(path) and os.path.isdir(path) else path


def refuse_existing(out: Path, *, force: bool) -> None:
    """Refuse an output that must not be replaced; callers do so before work starts.

    Raises:
        OutputExistsError: ``out`` exists and ``force`` is not set.
        RequestError: ``out`` is something else than an artifact, which ``force`` does not replace.
        ExportError: the system refuses the output.
    """
    out = output_path(out)
    try:
        settle_move(out)
    except OSError as error:
        raise ExportError(f"the output {out!s:.300} cannot be used: {refusal(error)}.") from error
    if not os.path.lexists(out) or is_empty_folder(out):
        return
    if not out.is_dir():
        raise OutputExistsError(f"{out} is no folder, and an artifact is one. Name another output.")
    if not force:
        raise OutputExistsError(
            f"{out} exists. Nothing is overwritten unasked: add --force to replace it, or "
            "name another output."
        )
    if not (out / MANIFEST).is_file():
        raise RequestError(
            f"{out} is no artifact (it holds no {MANIFEST}), so --force does not replace "
            "it. Name another output, or remove it yourself."
        )


def unfinished_request(out: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``request_key`` of an unfinished conversion into ``out``; empty where there is none."""
    path = partial_of(output_path(out)) / JOURNAL
    try:
        document = read_document(path)
    except ArtifactError:
        return {}
    request = document.get("request") if isinstance(document, dict) else None
    return request if isinstance(request, dict) else {}


def partial_of(out: Path) -> Path:
    """The folder of unfinished work for an absolute output: beside it, or in it on a volume."""
    inside = out.is_dir() and works_inside(out)
    return (out if inside else out.parent) / f"{out.name}.partial"
