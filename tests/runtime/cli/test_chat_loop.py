"""``run --chat`` and ``--show-tiles``, through the command."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.cli import main as cli
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.util.arrays import Array

PAGES = Path(__file__).parents[3] / "bench" / "lab" / "pages" / "llava-next-pages"
QUESTION = "Which line is SKY on?"


@pytest.fixture(scope="module")
def artifact(make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(PAGES)


@pytest.fixture
def image(picture: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    picture.save(path)
    return path


@pytest.fixture
def chat(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str], str]]:
    """``chat(lines, *arguments)``: exit code, lines of stdout, stderr."""

    def run(lines: str, *arguments: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = cli.main(["run", str(artifact), "--chat", "--threads", "1", *arguments])
        output = capsys.readouterr()
        return code, output.out.splitlines(), output.err

    return run


Run = Callable[..., tuple[int, list[str], str]]


def test_lines_are_answered_and_stdout_holds_answers_alone(
    chat: Run, artifact: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"\n/image {image}\n{QUESTION}\nWhich line is MOON on?\n/quit\n{QUESTION}\n"
    code, answers, said = chat(lines)

    with LlavaEdge.load(artifact, threads=1) as model:
        own = model.chat()
        expected = [own.send(QUESTION, [image]).text, own.send("Which line is MOON on?").text]
    assert (code, answers) == (0, expected)
    assert "tokens, with the next message)" in said
    assert said.count(" reused)") == 1


def test_a_bound_on_image_tokens_cuts_the_pictures_of_a_question_together(
    chat: Run, artifact: Path, image: Path
) -> None:
    with LlavaEdge.load(artifact, threads=1) as model:
        sizes = {
            grid: model.generate("?", [image, image], grid=grid, max_new_tokens=1).image_tokens
            for grid in ("2x2", "1x2", "base")
        }
    assert sizes["2x2"] > sizes["1x2"] > sizes["base"]
    for grid in ("1x2", "base"):
        code, lines, said = chat(
            f"/image {image}\n/image {image}\n{QUESTION}\nAnd MOON?\n",
            *("--json", "--max-image-tokens", str(sizes[grid])),
        )
        answers = [turn["answer"] for turn in json.loads(lines[-1])["turns"]]
        assert code == 0
        assert [answer["image_tokens"] for answer in answers] == [sizes[grid]] * 2
        why = f"grid lowered to {grid}: max_image_tokens is {sizes[grid]}"
        assert [answer["degraded"] for answer in answers] == [[why], []]
        assert f"(at most {sizes['2x2'] // 2} tokens" in said.replace(f"{image}: ", "")


def test_pictures_and_prompt_of_the_command_come_first(chat: Run, image: Path) -> None:
    code, lines, said = chat(
        "/undo\nWhich line is MOON on?\n", "--image", str(image), "--prompt", QUESTION, "--json"
    )

    result: dict[str, Any] = json.loads(lines[-1])
    assert (code, len(lines)) == (0, 1)
    assert [turn["prompt"] for turn in result["turns"]] == [QUESTION, "Which line is MOON on?"]
    assert result["turns"][0]["answer"]["image_tokens"] > 0
    # Its picture went with the turn that was taken back.
    assert result["turns"][1]["answer"]["image_tokens"] == 0
    assert [m["role"] for m in result["messages"]] == ["user", "assistant"]
    assert "(0 turns are left)" in said


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/show me", "'/show me' is no command"),
        ("/image", "'/image' is no command"),
        ("/image no/such.png", "no/such.png"),
        ("/video no/such.mp4", "is no video model"),
        ("/undo", "conversation has 0"),
        ("<image> what", "marks"),
    ],
)
def test_an_error_is_reported_and_ends_nothing_but_a_pipe_in_its_exit_code(
    chat: Run, line: str, named: str
) -> None:
    code, answers, said = chat(f"{line}\n{QUESTION}\n")

    assert code == 2
    assert len(answers) == 1
    assert "error: " in said
    assert named in said


def test_a_message_may_begin_with_a_slash_and_a_new_conversation_forgets(chat: Run) -> None:
    code, lines, _ = chat(f"{QUESTION}\n/reset\n//etc\n/help\n", "--json")

    result = json.loads(lines[-1])
    assert code == 0
    assert [turn["prompt"] for turn in result["turns"]] == [QUESTION, "/etc"]
    assert result["messages"][0]["text"] == "/etc"
    assert len(result["messages"]) == 2


def test_an_interrupted_answer_is_not_kept_and_the_next_is_answered(
    chat: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Decoder.step, iter(range(1000))

    def step(self: Decoder, row: Array) -> Array:
        if next(calls) == 0:
            raise KeyboardInterrupt
        return real(self, row)

    monkeypatch.setattr(Decoder, "step", step)
    code, lines, said = chat(f"{QUESTION}\nWhich line is MOON on?\n", "--json")

    result = json.loads(lines[-1])
    assert code == 0
    assert "(stopped;" in said
    assert [turn["prompt"] for turn in result["turns"]] == ["Which line is MOON on?"]


def test_a_pipe_of_bytes_works_and_bytes_that_are_no_text_are_named(artifact: Path) -> None:
    program = Path(sys.executable).with_name("llava-edge")
    command = [str(program), "run", str(artifact), "--chat", "--threads", "1"]
    done = subprocess.run(
        command,
        input=f"{QUESTION}\r\n\xff\n".encode("latin-1"),
        capture_output=True,
        check=False,
    )

    assert done.returncode == 2
    assert len(done.stdout.decode().splitlines()) == 1
    assert "lone surrogates" in done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat", "--raw"], "--raw takes none"),
        ([], "--prompt"),
        (["--prompt", "Hi", "--system", "Be brief."], "belongs to --chat"),
        (["--prompt", "Hi", "--show-tiles", "a.png"], "give at least one"),
        (["--prompt", "Hi", "--frames", "4"], "belong to --video"),
        (["--prompt", "Hi", "--frame-choice", "original"], "belong to --video"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_before_loading(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "no-such-artifact", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_tiles_are_drawn_into_a_file(
    artifact: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiles.png"
    asked = ["--prompt", QUESTION, "--image", str(image), "--show-tiles", str(out)]

    assert cli.main(["run", str(artifact), *asked]) == 0

    with Image.open(out) as drawn, LlavaEdge.load(artifact, threads=1) as model:
        assert drawn.size == model.draw_tiles([image]).size
        both = model.draw_tiles([image, image])
        assert both.height == 2 * drawn.height
        smaller = model.draw_tiles([image], grid="base")
        assert smaller.width < drawn.width
    # Said before anything is loaded.
    assert cli.main(["run", "no-such-artifact", *asked]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main(["run", str(artifact), *asked, "--force"]) == 0
