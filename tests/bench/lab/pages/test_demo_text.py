"""What ``make demo`` prints."""

from pathlib import Path

import pytest

from llava_edge.bench.lab.pages.demo_text import one_question, places, step, table

ROW = {
    "artifact_bytes": 15 << 20,
    "peak_memory": {"host_bytes": 140 << 20},
    "ttft_seconds": 0.0314,
    "decode_tokens_per_second": 1234.5,
}


def test_a_step_is_one_line_with_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    with step("convert to fp16"):
        assert capsys.readouterr().out.strip() == "convert to fp16"
    assert capsys.readouterr().out.endswith(" s\n")
    with pytest.raises(KeyboardInterrupt), step("ask fp16"):
        raise KeyboardInterrupt
    assert capsys.readouterr().out.endswith("failed\n")


def test_each_precision_has_one_row_and_who_was_not_measured_the_right_answers_alone() -> None:
    lines = table({"fp16": ROW}, {"fp16": 148, "transformers": 150}, 150).splitlines()
    assert lines[1].split() == [
        "fp16",
        "15.0",
        "MiB",
        "140.0",
        "MiB",
        "31",
        "ms",
        "1234",
        "148",
        "(98.7",
        "%)",
    ]
    assert " ".join(lines[2].split()) == "transformers 150 (100.0 %)"
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 80


def test_each_answer_stands_once_with_all_who_gave_it() -> None:
    answers = {"fp16": "8", "int4": "3", "transformers": "8"}
    text = one_question(Path("questions/images/00009.png"), "What number?", "8", answers)
    assert text.splitlines() == [
        "  What number?  (questions/images/00009.png)",
        "    fp16, transformers: 8 - right",
        "    int4: 3 - wrong, it is 8",
    ]


def test_a_folder_is_named_once_and_long_lines_are_wrapped() -> None:
    text = places(Path("artifacts/demo"), {"fp16": "an artifact " * 9, "log.txt": "messages"})
    assert text.count("artifacts/demo") == 1
    assert max(map(len, text.splitlines())) <= 80
