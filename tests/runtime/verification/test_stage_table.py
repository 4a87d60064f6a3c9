"""What people and programs are told of the stages."""

from __future__ import annotations

import json

from llava_edge.runtime.artifact.certificate import Deviation, StageResult
from llava_edge.runtime.verification.report import (
    deviation_line,
    stage_table,
    verdict_line,
    verification_json,
)

GOOD = StageResult("prompt", "differing", 0.0, 0.0, "pass", detail="40 prompts")
BAD = StageResult("packing", "max_gap_of_range", 0.123456, 1e-4, "fail", detail="row 3\x1b[2J")
OPEN = StageResult("greedy", "differing_tokens", None, None, "inconclusive", detail="too few")
LOSS = StageResult("quantization_loss", "kl", 0.02, 0.5, "pass", "loss")


def test_the_two_questions_have_a_table_each() -> None:
    lines = stage_table([GOOD, LOSS, BAD]).splitlines()

    titles = [index for index, line in enumerate(lines) if not line.startswith(" ")]
    assert [lines[index].split(":")[0] for index in titles] == [
        "export fidelity",
        "quantisation loss",
    ]
    assert any("packing" in line for line in lines[: titles[1]])
    assert [line.split()[0] for line in lines[titles[1] + 1 :]] == ["stage", "quantization_loss"]
    assert len(stage_table([LOSS]).splitlines()) == 3


def test_columns_stand_under_their_heads() -> None:
    head, good, bad = stage_table([GOOD, BAD]).splitlines()[1:4]

    assert head.split() == ["stage", "metric", "value", "bound", "verdict"]
    assert good.split() == ["prompt", "differing", "0", "0", "pass"]
    assert bad.split() == ["packing", "max_gap_of_range", "0.123", "0.0001", "FAIL"]
    for column in ("value", "bound"):
        end = head.index(column) + len(column)
        assert good[end - 1] == "0"
        assert good[end : end + 1] in ("", " ")


def test_details_stand_where_something_is_wrong_and_without_control_characters() -> None:
    text = stage_table([GOOD, BAD, OPEN])

    assert "40 prompts" not in text
    assert "    row 3?[2J" in text
    assert "    too few" in text
    assert "greedy" in text
    assert " -  " in text


def test_programs_get_the_verdict_and_every_row() -> None:
    found = json.loads(json.dumps(verification_json([GOOD, OPEN, LOSS]), allow_nan=False))

    assert (found["passed"], found["verdict"]) == (False, "inconclusive")
    assert [row["name"] for row in found["stages"]] == ["prompt", "greedy", "quantization_loss"]
    assert set(found["stages"][0]) >= {"name", "metric", "value", "bound", "verdict", "question"}
    assert verification_json([GOOD, LOSS])["passed"] is True


def test_one_line_says_which_stages_decide() -> None:
    assert verdict_line([GOOD, LOSS]) == "passed"
    assert verdict_line([GOOD, OPEN, OPEN]) == "inconclusive: greedy"
    assert verdict_line([OPEN, BAD]) == "failed: packing"


def test_a_long_detail_is_wrapped_to_80_columns() -> None:
    detail = "too few tokens " * 20
    long = StageResult("greedy", "tokens", None, None, "inconclusive", detail=detail)
    tensor = "language_model.layers.0.input_layernorm"
    deviation = Deviation(tensor, 0.5, 0.1, {"mean": 1.0}, {"mean": 2.0})
    text = f"{stage_table([GOOD, long])}\n{deviation_line(deviation)}"
    assert max(map(len, text.splitlines())) <= 80
    assert " ".join(text.split()).count("too few tokens") == 20
