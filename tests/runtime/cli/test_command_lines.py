"""Command lines, right and wrong: help, what is refused, how soon, and what a person reads."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from llava_edge.profiles.command_line import CommandParser
from llava_edge.profiles.errors import UsageError
from llava_edge.runtime.cli import main as cli

COMMANDS = sorted(entry.name for entry in entry_points(group=cli.GROUP))
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "numpy", "PIL", "tokenizers")
CONVERT = ("convert", "MISSING")
RUN = ("run", "FOLDER", "--prompt", "Hi")
ASKED = ("bench", "DAMAGED", "--quality")
WRONG = {
    "a checkpoint that is not there": CONVERT,
    "a folder that is no checkpoint": ("convert", "FOLDER"),
    "an unknown profile": (*CONVERT, "--profile", "a10000"),
    "an unknown precision": (*CONVERT, "--precision", "int3"),
    "an unknown grid": (*CONVERT, "--profile", "a100", "--grid", "7x7"),
    "no number": (*CONVERT, "--context", "many"),
    "a negative number": (*CONVERT, "--samples", "-5"),
    "an option that is misspelt": (*CONVERT, "--calbration", "x"),
    "calibration that is not there": (*CONVERT, "--calibration", "MISSING"),
    "questions that are not there": ("convert", "--profile", "a100", "--quality", "MISSING"),
    "an output that exists": (*CONVERT, "TAKEN", "--profile", "a100"),
    "an output below a file": (*CONVERT, "TAKEN/file/x", "--profile", "a100"),
    "an unknown variant": ("convert", "--model", "llava-v1.6-mistal-7b", "--profile", "a100"),
    "memory without a unit": (*CONVERT, "--vram", "8"),
    "run: no artifact": ("run", "MISSING", "--prompt", "Hi"),
    "run: a folder that is none": RUN,
    "run: an option that is misspelt": (*RUN, "--devcie", "cpu"),
    "run: an unknown grid": (*RUN, "--grid", "7x7"),
    "run: no deadline": (*RUN, "--deadline", "nan"),
    "verify: no artifact": ("verify", "MISSING", "--on-device"),
    "verify: an option that is misspelt": ("verify", "FOLDER", "--agianst", "x"),
    "plan: an unknown profile": ("plan", "--profile", "jetson-orin-nano"),
    "doctor: an argument": ("doctor", "x"),
    "bench: no artifact": ("bench", "MISSING"),
    "bench: a folder that is none": ("bench", "FOLDER"),
    "bench: an artifact that is damaged": ("bench", "DAMAGED"),
    "bench: an option that is misspelt": ("bench", "DAMAGED", "--rouns", "3"),
    "bench: a report in no folder": ("bench", "DAMAGED", "--out", "MISSING/x.json"),
    "bench: answers in no folder": (*ASKED, "FILE", "--answers", "MISSING/x"),
    "bench: answers that exist": (*ASKED, "FILE", "--answers", "FILE"),
    "bench: questions that are not there": (*ASKED, "MISSING"),
    "bench: results that are not there": ("bench", "--compare", "MISSING", "MISSING"),
    "bench: results that are none": ("bench", "--compare", "FILE", "FILE"),
    "build-engine: no artifact": ("build-engine", "MISSING"),
    "build-engine: a folder that is none": ("build-engine", "FOLDER"),
    "build-engine: an artifact that is damaged": ("build-engine", "DAMAGED"),
    "build-engine: no GPU": ("build-engine", "DAMAGED", "--device", "cpu"),
    "build-engine: an unknown library": ("build-engine", "DAMAGED", "--engine", "tensort"),
}
PROGRAM = """
import json, sys
from llava_edge.runtime.cli.main import main
heavy = sys.argv[1].split()
for words in json.loads(sys.argv[2]):
    code = main(words)
    print(json.dumps({"code": code, "heavy": [name for name in heavy if name in sys.modules]}))
    print("-- end", file=sys.stderr)
"""


def run_fresh(
    lines: list[list[str]], **environment: str
) -> tuple[list[dict[str, object]], list[str]]:
    """Command lines one after another in one fresh process: outcomes, and stderr of each."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, " ".join(HEAVY), json.dumps(lines)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"code"')]
    return outcomes, done.stderr.split("-- end\n")


def test_a_wrong_command_line_is_refused_before_anything_large_is_imported(tmp_path: Path) -> None:
    taken, folder = tmp_path / "taken", tmp_path / "folder"
    damaged = tmp_path / "damaged"
    for made in (taken, folder, damaged):
        made.mkdir()
    (taken / "file").write_text("kept")
    (damaged / "manifest.json").write_text("{}")
    places = {
        "MISSING": str(tmp_path / "missing"),
        "FOLDER": str(folder),
        "TAKEN": str(taken),
        "DAMAGED": str(damaged),
        "FILE": str(taken / "file"),
    }

    def placed(word: str) -> str:
        name, _, rest = word.partition("/")
        return places.get(name, name) + (f"/{rest}" if rest else "")

    lines = [[placed(word) for word in words] for words in WRONG.values()]
    outcomes, messages = run_fresh(lines)

    for name, outcome, message in zip(WRONG, outcomes, messages, strict=False):
        assert outcome["code"] in (1, 2), name
        assert outcome["heavy"] == [], name
        assert message.startswith("error: "), name
        assert len(message.splitlines()) == 1, name
    assert len(outcomes) == len(WRONG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "folder", "taken"]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["cnvert"], "convert"),
        (["--verison"], "--version"),
        (["plan", "--profil", "t4"], "--profile"),
        (["plan", "--profile", "rtx4090"], "rtx-4090"),
        (["plan", "llava-v1.6-mistal-7b"], "llava-v1.6-mistral-7b"),
        (["plan", "--precision", "int3"], "int8"),
        (["run", "x", "--prompt", "Hi", "--grid", "2x22"], "2x2"),
    ],
)
def test_a_slip_of_the_finger_names_what_was_meant(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert f"(did you mean {meant}?)" in capsys.readouterr().err


def test_every_command_has_one_sentence_and_every_option_a_text_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    flat = " ".join(overview.split())
    for name in COMMANDS:
        assert cli.main([name, "--help"]) == 0
        text = capsys.readouterr().out
        sentence = " ".join(text.split("\n\n")[1].split())
        assert sentence.endswith(".")
        assert f" {name} {sentence}" in flat
        entries = re.findall(r"^  -\S.*(?:\n(?!  -|\n|\S).*)*", text, re.MULTILINE)
        assert entries
        assert [entry for entry in entries if not re.search(r"\S(  +|\n +)\S", entry)] == []
        assert max(map(len, text.splitlines())) <= 80
        assert text.isascii()
    assert max(map(len, overview.splitlines())) <= 80


@pytest.mark.parametrize("size", ["8", "-8GiB", "0", "nan", "inf", "", "8Gigs", "900TiB"])
def test_a_size_that_is_none_is_refused_with_what_to_write(
    size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", f"--vram={size}"]) == 2
    assert re.search(r"\d+GiB", capsys.readouterr().err)


def test_plans_and_lists_fit_80_columns_and_count_no_bytes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (["--profile", "t4", "--all"], ["--list"], ["--vram", "1GiB"]):
        cli.main(["plan", *words])
        captured = capsys.readouterr()
        assert max(map(len, captured.out.splitlines())) <= 80
        assert not re.search(r"\d{6,}|\d bytes", captured.out + captured.err)
        if "--all" in words:
            assert "first token" in captured.out
        if "--list" in words:
            assert "jetson-orin-nano-8gb" in captured.out
            assert "llava-v1.6-mistral-7b" in captured.out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_locale_is_printed_without_an_error_and_can_be_read(encoding: str) -> None:
    program = (
        "from llava_edge.runtime.cli.standard_streams import standard_streams\n"
        "with standard_streams():\n"
        "    print('1 \u2026 2 \u2192 3 \u2264 4 \u4f60 \u2588', flush=True)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    wanted = {
        "ascii": b"1 ... 2 -> 3 <= 4 \\u4f60 #\n",
        "cp1252": b"1 \x85 2 -> 3 <= 4 \\u4f60 #\n",
        "utf-8": "1 \u2026 2 \u2192 3 \u2264 4 \u4f60 \u2588\n".encode(),
    }
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == wanted[encoding]


def test_make_lists_what_users_need_first_and_within_80_columns() -> None:
    root = Path(__file__).parents[3]
    text = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True)
    users, developers = text.stdout.split("for developers:")
    assert "convert" in users
    assert "fuzz" in developers
    assert max(map(len, text.stdout.splitlines())) <= 80


@pytest.mark.parametrize("words", [["verify"], ["build-engine"], ["bench"]])
def test_a_path_that_is_wrong_is_named_before_what_is_missing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, str(tmp_path / "nothing")]) in (1, 2)
    assert str(tmp_path / "nothing") in capsys.readouterr().err


def test_an_artifact_to_verify_is_told_what_it_can_be_compared_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert cli.main(["verify", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "--against CHECKPOINT" in message
    assert "--on-device" in message


@pytest.mark.parametrize("frames", ["llava-next-video-7b", "0", "many"])
def test_frames_that_are_no_number_are_told_what_video_wants(
    frames: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--profile", "a100", "--video", frames]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{frames!r} is no whole number of at least 1" in message
    assert "Write a number or nothing after --video, and a model before it" in message


def test_every_option_with_a_default_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[CommandParser] = []

    def kept(parser: CommandParser, *_: object) -> None:
        parsers.append(parser)
        raise UsageError("parsed")

    monkeypatch.setattr(CommandParser, "parse_args", kept)
    for name in COMMANDS:
        cli.main([name])
    assert len(parsers) == len(COMMANDS)
    shown = 0
    for parser in parsers:
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            default = action.default
            if not action.option_strings or default is argparse.SUPPRESS:
                continue
            # A switch that is off and a list that is empty need no words.
            if default is None or default is False or default == []:
                continue
            entry = " ".join(parser._get_formatter()._expand_help(action).split())
            value = ",".join(default) if isinstance(default, list) else str(default)
            where = f"{parser.prog} {action.option_strings[0]}"
            assert re.search(rf"default: {re.escape(value)}\b", entry), where
            assert entry in text, where
            shown += 1
    assert shown > 20
