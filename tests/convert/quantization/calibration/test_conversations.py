from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_edge.convert.quantization.calibration.conversations import read_conversations
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.runtime.util.limits import Limits

FolderMaker = Callable[..., Path]

# Candidates 1x2 and 2x1, as (height, width).
_ANYRES = AnyRes(28, 14, ((28, 56), (56, 28)), "hf")


@pytest.fixture
def make_folder(tmp_path: Path) -> FolderMaker:
    """``make_folder(*lines, **images)``: a calibration folder; images are name=(width, height)."""

    def make(*lines: Any, **images: tuple[int, int]) -> Path:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "samples.jsonl").write_text("\n".join(texts) + "\n", "utf-8")
        for name, size in images.items():
            Image.new("RGB", size, "teal").save(tmp_path / f"{name}.png")
        return tmp_path

    return make


def _entry(image: str | None = None, **changes: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"question": "What?", "answer": "This."}
    if image is not None:
        entry["image"] = image
    return {**entry, **changes}


def test_lines_become_conversations_with_and_without_image(make_folder: FolderMaker) -> None:
    folder = make_folder(_entry("a.png", id=7), "", _entry(question="Why?"), a=(5, 4))
    found, source = read_conversations(folder, _ANYRES, limit=9, seed=0)
    assert [(c.name, c.question, c.image is None) for c in found] == [
        ("samples.jsonl:1", "What?", False),
        ("samples.jsonl:3", "Why?", True),
    ]
    assert found[0].image is not None
    assert found[0].image() == folder / "a.png"
    assert source == {"source": "folder", "folder": folder.name, "left_out": []}


def test_malformed_lines_are_reported_together(make_folder: FolderMaker) -> None:
    folder = make_folder(
        "{",
        "[1]",
        _entry(answer=" "),
        {"question": 3, "answer": "x"},
        _entry("../outside.png"),
        _entry("/etc/hostname"),
        _entry(5),  # type: ignore[arg-type]
    )
    with pytest.raises(RequestError) as caught:
        read_conversations(folder, _ANYRES, limit=9, seed=0)
    for number, reason in enumerate(
        ["no JSON", "no JSON object", "answer is ' '", "question is 3", "'../outside.png'"], 1
    ):
        assert f"samples.jsonl:{number}: {reason}" in str(caught.value).replace("image is ", "")
    assert "image is '/etc/hostname', no path inside" in str(caught.value)
    assert "image is 5" in str(caught.value)


@pytest.mark.parametrize("lines", [None, [""]], ids=["no file", "an empty file"])
def test_a_folder_without_conversations_says_what_it_must_hold(
    lines: list[str] | None, make_folder: FolderMaker, tmp_path: Path
) -> None:
    folder = tmp_path / "absent" if lines is None else make_folder(*lines)
    with pytest.raises(RequestError, match=r"jsonl|no line holds a conversation"):
        read_conversations(folder, _ANYRES, limit=9, seed=0)


def test_a_link_out_of_the_folder_is_refused(make_folder: FolderMaker, tmp_path: Path) -> None:
    folder = make_folder(_entry("link.png"))
    (folder / "link.png").symlink_to("/etc/hostname")
    with pytest.raises(RequestError, match=r"link\.png', no path inside"):
        read_conversations(folder, _ANYRES, limit=9, seed=0)


def test_too_many_are_chosen_from_every_grid_and_a_quarter_of_text(
    make_folder: FolderMaker,
) -> None:
    # Twenty wide images, two tall ones, nine texts: both tall ones are taken.
    images = [*["wide.png"] * 20, *["tall.png"] * 2]
    lines = [_entry(image) for image in images] + [_entry()] * 9
    folder = make_folder(*lines, wide=(56, 28), tall=(28, 56))
    for seed in range(5):
        found, _ = read_conversations(folder, _ANYRES, limit=8, seed=seed)
        counts = Counter(Path(str(c.image())).name if c.image else "text" for c in found)
        assert counts == {"tall.png": 2, "wide.png": 4, "text": 2}
    found, _ = read_conversations(folder, _ANYRES, limit=8, seed=3)
    again, _ = read_conversations(folder, _ANYRES, limit=8, seed=3)
    other, _ = read_conversations(folder, _ANYRES, limit=8, seed=4)
    assert [c.name for c in again] == [c.name for c in found]
    assert [c.name for c in other] != [c.name for c in found]


def test_unreadable_images_are_named_when_choosing(make_folder: FolderMaker) -> None:
    folder = make_folder(*[_entry("gone.png"), _entry("text.png")], *[_entry()] * 3)
    (folder / "text.png").write_text("no image")
    found, source = read_conversations(folder, _ANYRES, limit=3, seed=0)
    assert all(c.image is None for c in found)
    assert [each["sample"] for each in source["left_out"]] == ["samples.jsonl:1", "samples.jsonl:2"]
    assert "No such file" in source["left_out"][0]["reason"]


def test_images_of_calibration_are_opened_within_the_limits_asked(
    make_folder: FolderMaker,
) -> None:
    folder = make_folder(*[_entry("wide.png")] * 3, wide=(56, 28), tall=(28, 56))
    limits = Limits(max_image_pixels=56 * 28 - 1)
    found, source = read_conversations(folder, _ANYRES, limit=2, seed=0, limits=limits)
    assert found == ()
    assert "max_image_pixels" in source["left_out"][0]["reason"]
    found, _ = read_conversations(folder, _ANYRES, limit=9, seed=0, limits=limits)
    assert {conversation.limits for conversation in found} == {limits}


def test_a_photo_on_its_side_counts_for_the_grid_that_it_is_cut_on(
    make_folder: FolderMaker,
) -> None:
    folder = make_folder(*[_entry("wide.png")] * 8, *[_entry("tall.png")] * 8, wide=(56, 28))
    exif = Image.Exif()
    exif[0x0112] = 6
    # Stored wide, looked at tall.
    Image.new("RGB", (56, 28)).save(folder / "tall.png", exif=exif)
    found, _ = read_conversations(folder, _ANYRES, limit=4, seed=0)
    assert Counter(Path(str(c.image())).name for c in found if c.image) == {
        "wide.png": 2,
        "tall.png": 2,
    }


def test_separators_inside_strings_and_a_byte_order_mark_do_not_cut_lines(tmp_path: Path) -> None:
    entry = json.dumps({"question": "one\u2028two\x85", "answer": "x"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text("\ufeff" + entry + "\r\n\r\n" + entry, "utf-8")
    found, _ = read_conversations(tmp_path, _ANYRES, limit=8, seed=0)
    assert [conversation.question for conversation in found] == ["one\u2028two\x85"] * 2


def test_an_image_named_by_a_lone_surrogate_is_a_fault_of_its_line(tmp_path: Path) -> None:
    entry = {"question": "q", "answer": "x", "image": "\ud800.png"}
    (tmp_path / "a.jsonl").write_text(json.dumps(entry))
    with pytest.raises(RequestError, match=r"a\.jsonl:1: image is"):
        read_conversations(tmp_path, _ANYRES, limit=8, seed=0)
