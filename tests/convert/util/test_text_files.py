"""Files of a checkpoint are regular, bounded and parsed with a bound."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_edge.convert.util.text_files import (
    open_file,
    parse_json,
    read_bytes,
    read_object,
    read_text,
)
from llava_edge.profiles.errors import CheckpointError


def make_socket(path: Path) -> None:
    here = Path.cwd()
    # The path of a socket is short; that of a test's folder may not be.
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "pipe": (os.mkfifo, "is a named pipe"),
    "link to a device": (lambda p: p.symlink_to("/dev/zero"), "is a link to a device"),
    "link to a folder": (lambda p: p.symlink_to(p.parent), "is a link to a folder"),
    "socket": (make_socket, "is a socket"),
    "link to nothing": (
        lambda p: p.symlink_to("nothing"),
        "link to nothing, where there is nothing",
    ),
    "link to itself": (lambda p: p.symlink_to(p.name), "leads in a circle"),
    "nothing": (lambda p: None, "No such file"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    make, named = STRANGE[kind]
    path = tmp_path / "config.json"
    make(path)

    with pytest.raises(CheckpointError, match=named), open_file(path):
        pass


def test_a_link_to_a_regular_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to("blob")

    assert read_object(tmp_path / "config.json") == {"a": 1}


def test_a_file_above_its_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 1 << 40)

    with pytest.raises(CheckpointError, match=r"such a file may have 16\.0 MiB"):
        read_text(path)
    with pytest.raises(CheckpointError, match="such a file may have 5 B"):
        read_bytes(path, 5)


def test_line_ends_come_back_as_newlines(tmp_path: Path) -> None:
    (tmp_path / "x.jinja").write_bytes(b"a\r\nb\rc\n")

    assert read_text(tmp_path / "x.jinja") == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[" * 101 + "]" * 101, "nested more than 100 levels"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 5_000 + "1" + "}" * 5_000, "nested"),
        (f'{{"layers": {"9" * 10_000}}}', "a number of 10000 digits"),
        (f"[-{'9' * 10_000}]", "digits"),
        (r'{"\ud800": 1}', "half a character"),
        (r'["ok", {"a": "\udfff"}]', "half a character"),
        ("{", "Expecting"),
    ],
)
def test_json_that_nothing_can_handle_is_no_valid_json(text: str, named: str) -> None:
    with pytest.raises(CheckpointError, match="x is no valid JSON") as caught:
        parse_json(text, "x")
    assert named in str(caught.value)


def test_json_of_ordinary_depth_and_any_character_is_read() -> None:
    assert parse_json("[" * 90 + '"\\ud83d\\ude00é"' + "]" * 90, "x")
