"""Every expected number below was worked out by hand from the published rules."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from llava_edge.bench import cli
from llava_edge.profiles.errors import (
    LlavaEdgeError,
    OutputExistsError,
    PromptError,
    RequestError,
    VideoError,
)
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.quality.metrics import (
    anls,
    choice_letter,
    choice_prompt,
    exact_match,
    relaxed_accuracy,
)
from llava_edge.runtime.quality.questions import read_quality_questions, require_media
from llava_edge.runtime.quality.run import Given, measure_quality


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Paris", ["Lyon", "Paris"], 1.0),
        (" paris.\n", ["Paris"], 1.0),
        ("New  York", ["new york"], 1.0),
        ("Paris, France", ["Paris"], 0.0),
        ("12.0", ["12"], 0.0),
        ("", ["Paris"], 0.0),
    ],
)
def test_exact_match(prediction: str, answers: list[str], expected: float) -> None:
    assert exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        pytest.param("Hello", ["hello"], 1.0, id="case does not count"),
        pytest.param("helo", ["hello"], 0.8, id="one of five is missing"),
        pytest.param("kitten", ["sitting"], 1 - 3 / 7, id="three of seven"),
        pytest.param("ab", ["cb"], 0.0, id="one half is too far"),
        pytest.param("abc", ["xyz", "abd"], 2 / 3, id="the nearest answer counts"),
        pytest.param("", ["abc"], 0.0, id="nothing said"),
        pytest.param("total 12", ["total  12"], 1.0, id="runs of blanks are one"),
    ],
)
def test_anls(prediction: str, answers: list[str], expected: float) -> None:
    assert anls(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        pytest.param("105", ["100"], 1.0, id="five percent off"),
        pytest.param("105.1", ["100"], 0.0, id="more than five percent off"),
        pytest.param("-95", ["-100"], 1.0, id="below zero"),
        pytest.param("0.43", ["42%"], 1.0, id="0.43 is within 5 percent of 0.42"),
        pytest.param("42", ["42%"], 0.0, id="42 is not 0.42"),
        pytest.param("0", ["0"], 1.0, id="zero"),
        pytest.param("0.001", ["0"], 0.0, id="zero allows nothing"),
        pytest.param("Yes", ["yes"], 1.0, id="text"),
        pytest.param("yes", ["no"], 0.0, id="another text"),
        pytest.param("7", ["seven", "7.2"], 1.0, id="any of the answers"),
    ],
)
def test_relaxed_accuracy(prediction: str, answers: list[str], expected: float) -> None:
    assert relaxed_accuracy(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("B", "B"),
        ("b.", "B"),
        (" (C) ", "C"),
        ("The answer is (B).", "B"),
        ("Not (A) but (D)", "D"),
        ("C. a dog", "C"),
        ("Answer: D", "D"),
        ("A cat is shown, so B", "B"),
        ("I see a green bird", "C"),
        ("It is a dog", None),
        ("(A) because B is wrong", "A"),
        ("Option A is correct", "A"),
        ("The answer is A because it is red", "A"),
        ("I think so", None),
        ("red fish", "A"),
        ("scow", None),
        ("E", None),
        ("", None),
    ],
)
def test_the_letter_that_an_answer_names(prediction: str, expected: str | None) -> None:
    choices = ["red fish", "blue fish", "green bird", "cow"]
    assert choice_letter(prediction, choices) == expected


@pytest.mark.parametrize(
    ("prediction", "choices", "expected"),
    [
        ("100", ["10", "100", "0"], "B"),
        ("It is 12.", ["12", "1"], "A"),
        ("not blue", ["blue", "not blue"], "B"),
        ("it is not blue", ["blue", "not blue"], "B"),
        ("eyes", ["yes", "eyes"], "B"),
        ("Vitamin C", ["Vitamin C", "Vitamin A", "Vitamin B"], "A"),
        ("I think it is a dog", ["x"] * 9, None),
    ],
)
def test_texts_of_choices_are_whole_words(
    prediction: str, choices: list[str], expected: str | None
) -> None:
    assert choice_letter(prediction, choices) == expected


def test_numbers_that_are_none() -> None:
    assert relaxed_accuracy("5", ["Infinity"]) == 0.0
    assert relaxed_accuracy("Infinity", ["infinity"]) == 1.0


def test_choices_are_shown_as_llava_was_trained() -> None:
    assert choice_prompt("What is it?", ["a cat", "a dog"]) == (
        "What is it?\nA. a cat\nB. a dog\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_every_fault_of_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    lines = [
        "{",
        "3",
        json.dumps({"question": " ", "answers": ["x"]}),
        json.dumps({"question": "q", "answers": []}),
        json.dumps({"question": "q", "answer": 7}),
        json.dumps({"question": "q", "answer": "x", "image": "../outside.png"}),
        json.dumps({"question": "q", "answer": "C", "choices": ["one", "two"]}),
    ]
    file.write_text("\n".join(lines))
    with pytest.raises(RequestError) as caught:
        read_quality_questions(file)
    for number in range(1, len(lines) + 1):
        assert f"line {number}" in str(caught.value)
    with pytest.raises(RequestError, match="cannot be read"):
        read_quality_questions(tmp_path / "none.jsonl")
    file.write_text("\n")
    with pytest.raises(RequestError, match="no question"):
        read_quality_questions(file)


def test_separators_inside_texts_a_mark_of_order_and_odd_names(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    entry = {"question": "one\u2028two\x85", "answer": "x", "answers": None, "choices": None}
    file.write_text("\ufeff" + json.dumps(entry, ensure_ascii=False), "utf-8")
    (found,) = read_quality_questions(file)
    assert found.question == "one\u2028two\x85"
    assert found.answers == ("x",)
    for wrong in ({"image": "\ud800.png"}, {"images": ["a.png"]}):
        file.write_text(json.dumps({"question": "q", "answer": "x", **wrong}))
        with pytest.raises(RequestError, match="line 1: "):
            read_quality_questions(file)


def test_memory_held_on_a_gpu_is_noted(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"question": "q", "answer": "x"}\n' * 3)
    questions = read_quality_questions(file)
    with LlavaEdge.load(make_artifact(make_checkpoint("odd", backbone="mistral"))) as model:
        assert measure_quality(model, questions, max_new_tokens=2).device_bytes is None
        sizes = iter((3 << 30, 5 << 30, 4 << 30))
        generate = model.generate

        def on_gpu(*arguments: Any, **options: Any) -> Any:
            answer = generate(*arguments, **options)
            held = replace(answer.peak_memory, device_bytes=next(sizes))
            return replace(answer, peak_memory=held)

        monkeypatch.setattr(model, "generate", on_gpu)
        assert measure_quality(model, questions, max_new_tokens=2).device_bytes == 5 << 30


def test_the_command_asks_everything_and_a_refused_image_is_a_wrong_answer(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    picture: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact = make_artifact(make_checkpoint("odd", backbone="mistral"))
    picture.save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with LlavaEdge.load(artifact) as model:
        said = model.generate("What?", images=[tmp_path / "a.png"], max_new_tokens=3).text
        lower = model.generate(
            "What?", images=[tmp_path / "a.png"], max_new_tokens=3, grid="base"
        ).text
    file = tmp_path / "data.jsonl"
    entries = [
        {"image": "a.png", "question": "What?", "answers": [said], "kind": "right"},
        {"image": "a.png", "question": "What?", "answers": ["¬"], "kind": "wrong"},
        {"image": "bad.png", "question": "What?", "answers": [said], "kind": "refused"},
        {"question": "Which?", "choices": ["one", "two"], "answer": "B"},
    ]
    file.write_text("\n".join(map(json.dumps, entries)))
    kept = tmp_path / "answers.jsonl"
    command = [str(artifact), "--quality", str(file), "--max-new-tokens", "3", "--json"]
    command += ["--only", "quality"]
    assert cli.main([*command, "--answers", str(kept)]) == 0
    output = capsys.readouterr()
    (row,) = json.loads(output.out.splitlines()[-1])["rows"]
    assert row["precision"] == "fp16 (computes fp32)"
    assert row["weights"] == "random"
    assert "cases" not in row, "nothing but quality was asked for"
    assert row["quality"]["questions"] == 4
    assert row["quality"]["exact_match"] == pytest.approx(33.333)
    assert row["quality"]["kinds"] == {"refused": 0.0, "right": 100.0, "wrong": 0.0}
    assert "question 3" in row["quality"]["refused"][0]
    assert row["quality"]["multiple_choice"] in (0.0, 100.0)
    assert row["quality"]["anls"] == pytest.approx(33.333)
    assert row["quality"]["relaxed_accuracy"] == pytest.approx(33.333)
    assert "exact match" in output.err
    assert len(kept.read_text().splitlines()) == 4
    with pytest.raises(OutputExistsError, match="--answers"):
        cli.main([*command, "--answers", str(kept)])
    with pytest.raises(RequestError, match="--answers"):
        cli.main([*command, "--answers", str(tmp_path / "none" / "answers.jsonl")])
    with pytest.raises(LlavaEdgeError, match="nowhere"):
        cli.main([str(artifact), str(tmp_path / "nowhere"), *command[1:]])
    two = [f"{artifact}/.", *command, "--limit", "1", "--grid", "base"]
    capsys.readouterr()
    assert cli.main(two) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["quality"]["questions"] for row in rows] == [1, 1]
    refused = tmp_path / "refused.jsonl"
    refused.write_text(json.dumps(entries[2]))
    assert cli.main([str(artifact), "--quality", str(refused), "--only", "quality"]) == 1
    with LlavaEdge.load(artifact) as model:
        questions = read_quality_questions(file, limit=1)
        result = measure_quality(model, questions, grid="base", max_new_tokens=3)
        assert result.predictions == (lower,)
        with pytest.raises(RequestError, match="grid"):
            measure_quality(model, questions, grid="no such grid")
    assert result.exact_match == (100.0 if lower == said else 0.0)


def test_a_question_may_show_a_video(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"frames")
    file = tmp_path / "data.jsonl"
    file.write_text('{"question": "q", "answer": "rain", "video": "clip.mp4"}\n')
    questions = read_quality_questions(file)
    require_media(file, questions, takes_video=True)
    with pytest.raises(RequestError, match="line 1: it shows a video"):
        require_media(file, questions, takes_video=False)
    shown: list[Any] = []

    class Model:
        def generate(self, prompt: str, **options: Any) -> Any:
            shown.append(options["video"])
            raise VideoError("PyAV cannot open it")

    found = measure_quality(cast(Any, Model()), questions)

    assert shown == [tmp_path / "clip.mp4"]
    assert found.right == (False,)
    assert found.refused == ("question 1: PyAV cannot open it",)


def test_answers_that_are_known_are_scored_and_not_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"question": "q", "answer": "x"}\n' * 3)
    kept: list[Given] = []

    class Model:
        def generate(self, prompt: str, **options: Any) -> Any:
            raise PromptError("too long")

    known = (Given("X."), Given(None, "no picture"))
    found = measure_quality(
        cast(Any, Model()), read_quality_questions(file), known=known, keep=kept.append
    )

    assert found.right == (True, False, False)
    assert kept == [Given(None, "too long")]
    assert found.refused == ("question 2: no picture", "question 3: too long")
