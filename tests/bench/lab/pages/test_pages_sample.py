import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from llava_edge.bench.lab.pages.drawing.draw import FILE, write_questions
from llava_edge.bench.lab.pages.drawing.geometry import ANYRES, PAGE_SIZES, PATCH_SIZE, cell_sizes
from llava_edge.bench.lab.pages.drawing.page import BAR, SHAPES, Page
from llava_edge.bench.lab.pages.drawing.sample import Sample, held_out_sample, training_sample
from llava_edge.bench.lab.pages.drawing.text_page import READING_KINDS
from llava_edge.profiles.errors import OutputExistsError

SAMPLES = [training_sample(index, 99) for index in range(150)]


def rows_of_text(page: Page) -> list[list[str]]:
    """Words and numbers line by line, found from the cells alone."""
    lines: list[list[str]] = []
    for row in range(page.rows):
        text = "".join(
            page.marks[row, column].sign if (row, column) in page.marks else " "
            for column in range(page.columns)
        )
        if text.strip():
            lines.append(text.split())
    return lines


def is_text(sample: Sample) -> bool:
    return any(question.kind == "count lines" for question in sample.page.questions)


def test_the_same_number_gives_the_same_picture_and_questions() -> None:
    first, second = training_sample(7, 8), training_sample(7, 8)
    assert first.image.tobytes() == second.image.tobytes()
    assert first.questions == second.questions
    assert first.image.tobytes() != training_sample(8, 8).image.tobytes()


def test_held_out_pages_are_not_those_of_training() -> None:
    def contents(samples: Iterable[Sample]) -> set[tuple[object, ...]]:
        # Not the pixels: the grain of the paper alone makes them differ.
        return {
            (
                *(sample.page.rows, sample.page.columns),
                *((at, mark.sign, mark.colour) for at, mark in sample.page.marks.items()),
            )
            for sample in samples
        }

    held_out = contents(held_out_sample(seed, i) for seed in (0, 7) for i in range(40))
    assert len(held_out) == 80
    assert not contents(SAMPLES) & held_out


def test_every_grid_occurs_and_every_cell_is_one_patch() -> None:
    grids: Counter[tuple[int, int]] = Counter()
    for sample in SAMPLES:
        layout = ANYRES.layout(sample.image.height, sample.image.width)
        grids[layout.rows, layout.columns] += 1
        assert (layout.kept_rows, layout.kept_columns) == (sample.page.rows, sample.page.columns)
        assert layout.pad_top % PATCH_SIZE == 0 == layout.pad_left % PATCH_SIZE
    assert set(grids) == {(2, 2), (1, 2), (2, 1), (3, 1), (1, 3)}


def test_every_page_size_can_be_drawn_and_most_need_unpadding() -> None:
    sizes = [size for grid in PAGE_SIZES for size in grid]
    assert all(cell_sizes(*size) for size in sizes)
    padded = [
        size
        for size in sizes
        if (layout := ANYRES.layout(size[0] * 14, size[1] * 14)).pad_top or layout.pad_left
    ]
    assert len(padded) > len(sizes) / 2


def test_answers_about_text_are_what_the_cells_say() -> None:
    checked: Counter[str] = Counter()
    for sample in filter(is_text, SAMPLES):
        lines = rows_of_text(sample.page)
        colours = {}
        for mark in sample.page.marks.values():
            if mark.places[2] == 1:
                line, item, _ = mark.places
                colours[lines[line - 1][item - 1]] = mark.colour
        for question in sample.page.questions:
            words = question.text.rstrip("?").split()
            place = {item: (i, j) for i, line in enumerate(lines) for j, item in enumerate(line)}
            if question.kind == "number on a line":
                (expected,) = (item for item in lines[int(words[-1]) - 1] if item.isdigit())
            elif question.kind == "first word":
                expected = lines[int(words[-1]) - 1][0]
            elif question.kind == "last word":
                expected = lines[int(words[-1]) - 1][-1]
            elif question.kind == "beside":
                expected = lines[place[words[-1]][0]][1]
            elif question.kind == "below":
                expected = lines[place[words[-1]][0] + 1][0]
            elif question.kind == "colour":
                expected = colours[words[-1]]
            elif question.kind == "line of a word":
                expected = str(place[words[3]][0] + 1)
            elif question.kind == "count lines":
                expected = str(len(lines))
            else:
                line = lines[0 if "top" in words else -1]
                expected = line[0 if "left" in words else -1]
            assert question.answer == expected, question
            checked[question.kind] += 1
    assert set(READING_KINDS) < set(checked)


def test_answers_about_bars_are_what_the_cells_say() -> None:
    checked = 0
    for sample in SAMPLES:
        marks = sample.page.marks
        tops: dict[int, int] = {}
        for (row, column), mark in marks.items():
            if mark.sign == BAR:
                tops[column] = min(row, tops.get(column, row))
        for question in sample.page.questions:
            if question.kind == "count bars":
                assert question.answer == str(len(tops))
                continue
            if question.kind in ("bar colour", "bar of a colour"):
                letters = {
                    marks[sample.page.rows - 1, at].sign: marks[row, at].colour
                    for at, row in tops.items()
                }
                said, asked = question.answer, question.text.rstrip("?").split()[-1]
                letter, colour = (asked, said) if question.kind == "bar colour" else (said, asked)
                assert letters[letter] == colour
            if question.kind != "tallest bar":
                continue
            pick = max if "shortest" in question.text else min
            column = pick(tops, key=lambda at: tops[at])
            below, top = marks[sample.page.rows - 1, column], marks[tops[column], column]
            assert question.answer == (top.colour if "colour" in question.text else below.sign)
            checked += 1
    assert checked > 30


def test_answers_about_shapes_are_what_the_cells_say() -> None:
    checked = 0
    for sample in SAMPLES:
        for question in sample.page.questions:
            marks = list(sample.page.marks.values())
            if question.kind in ("name a shape", "shape colour"):
                asked = question.text.rstrip("?").split()[-1]
                pair = {question.answer, asked}
                assert sum({mark.sign, mark.colour} == pair for mark in marks) == 1
                assert sum(asked in (mark.sign, mark.colour) for mark in marks) == 1
            if question.kind != "count shapes":
                continue
            forms = [shape for shape in SHAPES if f" {shape}s " in question.text]
            colour = question.text.rstrip("?").split()[-1]
            counted = sum(
                mark.sign == forms[0] if forms else mark.colour == colour for mark in marks
            )
            assert question.answer == str(counted)
            assert 1 <= counted <= 6
            checked += 1
    assert checked > 30


def test_lines_to_copy_have_20_to_40_characters_none_twice() -> None:
    copies = [q for s in SAMPLES for q in s.questions if q.kind == "copy"]
    assert copies
    for question in copies:
        assert question.text == f"Repeat {question.answer}"
        assert 20 <= len(question.answer) == len(set(question.answer)) <= 40


def test_capitals_are_drawn_whole() -> None:
    from llava_edge.bench.lab.pages.drawing.render import _mask

    for side in (12, 14, 16, 18, 21, 24, 28):
        heights = set()
        for sign in "EFHT":
            inked = np.asarray(_mask(sign, side)).max(axis=1) > 60
            heights.add(int(inked.sum()))
        assert max(heights) - min(heights) <= 1, side


def test_a_folder_of_questions_serves_calibration_and_quality(tmp_path: Path) -> None:
    folder = tmp_path / "held-out"
    write_questions(folder, 3, seed=4)
    lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    assert len(lines) == 3
    for index, line in enumerate(lines):
        sample = held_out_sample(4, index)
        assert line["answers"] == [line["answer"]] == [sample.questions[0].answer]
        assert line["question"] == sample.questions[0].text
        assert (folder / line["image"]).is_file()
    with pytest.raises(OutputExistsError):
        write_questions(folder, 1)
