"""Commands whose standard streams are closed, full, not read, or not UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_edge.runtime.artifact.open import open_artifact

PROGRAM = Path(sys.executable).with_name("llava-edge")
PLAN = "plan --profile jetson-orin-nano-8gb"


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


@pytest.fixture(scope="module")
def ask(artifact: Path) -> str:
    return f"run '{artifact}' --prompt Hi --max-new-tokens 3"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command line with PROGRAM in place of its first word."""
    return subprocess.run(
        ["bash", "-c", f"'{PROGRAM}' {line}"],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        env={**os.environ, **environment},
        check=False,
    )


def assert_one_clear_error(done: subprocess.CompletedProcess[str]) -> None:
    assert done.stderr.count("error:") == 1, done.stderr
    for word in ("Traceback", "Errno", "fault of llava-edge", "Exception ignored"):
        assert word not in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_a_question_is_answered_whatever_is_closed(ask: str, closed: str) -> None:
    done = shell(f"{ask} {closed}")
    assert done.returncode == 0, done.stderr
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", ""))
    assert "error" not in done.stderr


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (PLAN, 0),
        (f"{PLAN} --json", 0),
        ("doctor", 0),
        ("--help", 0),
        ("cook", 2),
        ("run nowhere --prompt Hi --json", 1),
        ("run --json", 2),
        ("verify nowhere --against nowhere --json", 1),
        ("build-engine nowhere --json", 1),
        ("bench nowhere --json", 1),
        ("bench --compare nowhere nowhere --json", 2),
    ],
)
def test_every_command_ends_as_it_would_with_stderr_closed(line: str, code: int) -> None:
    done = shell(f"{line} 2>&-")
    assert (done.returncode, done.stderr) == (code, "")
    if "--json" in line:
        assert "InternalError" not in done.stdout
        assert json.loads(done.stdout.splitlines()[-1])


def test_a_conversion_and_a_chat_need_no_stream(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = make_checkpoint("odd", backbone="mistral"), tmp_path / "out"
    closed = "<&- >&- 2>&-"
    quick = "--profile cpu-16gb --precision fp16 --verify none"
    assert shell(f"convert '{folder}' '{out}' {quick} {closed}").returncode == 0
    # What was printed went nowhere, and into no file of the artifact: all digests hold.
    open_artifact(out)
    assert shell(f"run '{out}' --chat {closed}").returncode == 0


def test_a_closed_descriptor_is_taken_by_no_file(tmp_path: Path) -> None:
    code = (
        "import os; from llava_edge.runtime.cli.standard_streams import standard_streams\n"
        f"with standard_streams(), open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "    for number in (1, 2): os.write(number, b'noise')\n"
        "    file.write(str(file.fileno() > 2 and os.get_inheritable(2)))\n"
    )
    subprocess.run(["bash", "-c", f"'{sys.executable}' -c \"$0\" <&- >&- 2>&-", code], check=True)
    assert (tmp_path / "file").read_text() == "True"


@pytest.mark.parametrize("line", [PLAN, f"{PLAN} --json", "doctor", "--help", "--version"])
def test_what_a_full_disk_takes_of_stdout_is_one_error(line: str) -> None:
    done = shell(f"{line} >/dev/full")
    assert done.returncode == 1
    assert_one_clear_error(done)
    assert "could not be written: No space left on device" in done.stderr


@pytest.mark.parametrize(("line", "code"), [("run --json", 2), ("run no --prompt Hi --json", 1)])
@pytest.mark.parametrize("output", [">/dev/full", "> >(exec true)"])
def test_an_error_that_stdout_cannot_carry_is_told_on_stderr_alone(
    line: str, code: int, output: str
) -> None:
    # The second one's reader is gone before the command has started.
    done = shell(f"{line} {output}")
    assert done.returncode == code
    assert_one_clear_error(done)


def test_an_answer_that_a_full_disk_took_is_an_error(ask: str, artifact: Path) -> None:
    for line in (ask, f"{ask} --json"):
        done = shell(f"{line} >/dev/full")
        assert done.returncode == 1
        assert_one_clear_error(done)
    # A conversation ends with it: no later answer could be read.
    done = shell(f"run '{artifact}' --chat --max-new-tokens 2 >/dev/full <<< $'one\\ntwo\\nthree'")
    assert done.returncode == 1
    assert_one_clear_error(done)


def test_a_full_stderr_changes_nothing(ask: str) -> None:
    done = shell(f"{ask} 2>/dev/full")
    assert done.returncode == 0
    assert done.stdout


def test_a_reader_that_has_gone_ends_the_command_quietly(ask: str) -> None:
    for line in (ask, PLAN, "--help"):
        done = shell(f"{line} | true; echo ${{PIPESTATUS[0]}}")
        assert done.stdout.split() in (["0"], ["1"])
        assert "error" not in done.stderr
        assert "Exception" not in done.stderr


def test_a_full_pipe_that_must_not_block_loses_nothing() -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "read, write = os.pipe(); os.set_blocking(write, False)\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=write)\n"
        "os.close(write); time.sleep(0.5)\n"
        "print(len(open(read, 'rb').read()), child.wait())\n"
    )
    print_much = (
        "from llava_edge.runtime.cli.standard_streams import standard_streams\n"
        "with standard_streams(): print('x' * 300_000, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, print_much], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["300001", "0"], done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "1"},
    ],
    ids=str,
)
def test_names_and_places_that_are_no_text_are_shown_with_a_stand_in(
    environment: dict[str, str],
) -> None:
    for line in ("run $'no\\xff\\u20acwhere' --prompt Hi", "plan --profile $'\\xff\\u20ac'"):
        done = shell(line, **environment)
        assert done.returncode in (1, 2)
        assert_one_clear_error(done)
    assert shell("run --help", **environment).returncode == 0


def test_a_system_error_is_told_without_its_number(
    artifact: Path, tmp_path: Path, picture: object
) -> None:
    picture.save(tmp_path / "a.png")  # type: ignore[attr-defined]
    locked = tmp_path / "locked"
    locked.mkdir()
    out = locked / "tiles.png"
    ask = f"run '{artifact}' --prompt Hi --image '{tmp_path}/a.png' --show-tiles '{out}'"
    # No file may have more than 64 blocks of 1024 bytes, nor may any picture.
    done = shell(f"--version >/dev/null; ulimit -f 1; trap '' XFSZ; '{PROGRAM}' {ask}")
    assert done.returncode == 2
    assert_one_clear_error(done)
    assert "tiles.png cannot be written: File too large" in done.stderr
    assert list(locked.iterdir()) == []


def test_a_line_of_stderr_is_in_the_log_at_once_and_not_when_the_command_ends() -> None:
    code = (
        "import os, sys\n"
        "from llava_edge.runtime.cli.standard_streams import standard_streams\n"
        "with standard_streams():\n"
        "    print('about 14 min', file=sys.stderr)\n"
        "    os._exit(0)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stderr == "about 14 min\n"
