"""Which files of ``--calibration`` are read; nothing of them is."""

from __future__ import annotations

from pathlib import Path

from llava_edge.profiles.errors import RequestError, plain_reason

FORMS = (
    'Entries are like {"image": "a.jpg", "question": "…", "answer": "…"}, or like {"image": '
    '"a.jpg", "conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}.'
)


def find_files(source: Path) -> tuple[Path, list[Path]]:
    """The folder that images lie in, and the files to be read.

    Raises:
        RequestError: there is no such folder or file, or the folder has none that is read.
    """
    try:
        if source.is_dir():
            listed = sorted(source.iterdir())
            files = [file for file in listed if file.suffix.lower() in (".jsonl", ".json")]
            if not files:
                raise RequestError(
                    f"--calibration {source}: no *.jsonl and no *.json file is in it. {FORMS}"
                )
            return source, files
        source.stat()
    except (OSError, ValueError) as error:
        raise RequestError(
            f"--calibration {source} cannot be read: {plain_reason(error)}. Give a folder with a "
            f"*.jsonl or *.json file, or the file itself. {FORMS}"
        ) from error
    return source.parent, [source]
