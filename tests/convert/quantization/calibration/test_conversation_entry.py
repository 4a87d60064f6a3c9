"""Entries of public data sets, in the forms that are in use, become conversations."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_edge.convert.quantization.calibration import conversations as conversations_module
from llava_edge.convert.quantization.calibration.calibration_set import CalibrationModel
from llava_edge.convert.quantization.calibration.conversation_entry import Conversation
from llava_edge.convert.quantization.calibration.conversations import read_conversations
from llava_edge.convert.quantization.plan import QuantizationRequest
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.runtime.artifact.open import open_artifact
from llava_edge.runtime.util import jsonl as json_lines

_ANYRES = AnyRes(28, 14, ((28, 56), (56, 28)), "hf")


def llava(*said: str, **others: Any) -> dict[str, Any]:
    """LLaVA's form; human and gpt in turn."""
    turns = [
        {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)
    ]
    return {"id": "1", "conversations": turns, **others}


def openai(*said: Any, **others: Any) -> dict[str, Any]:
    """OpenAI's form; user and assistant in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]
    return {"messages": turns, **others}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("a.png", (56, 28)), ("b.png", (28, 56))):
        Image.new("RGB", size, "teal").save(tmp_path / name)
    return tmp_path


def read(source: Path, limit: int = 99) -> tuple[tuple[Conversation, ...], dict[str, Any]]:
    return read_conversations(source, _ANYRES, limit=limit, seed=0)


def shown(conversation: Conversation) -> list[tuple[str, str, list[str]]]:
    """Turns with the names of their images."""
    return [
        (turn.question, turn.answer, [Path(str(image())).name for image in turn.images])
        for turn in conversation.turns
    ]


A, B = ["a.png"], ["b.png"]


@pytest.mark.parametrize(
    ("entry", "turns"),
    [
        (llava("<image>\nWhat?", "This.", image="a.png"), [("What?", "This.", A)]),
        (llava("What?\n<image>", "This.", image="a.png"), [("What?", "This.", A)]),
        (llava("What?", "This.", image="a.png"), [("What?", "This.", A)]),
        (llava("See <image> here?", "Yes.", image="a.png"), [("See <image> here?", "Yes.", A)]),
        (llava("What?", "This."), [("What?", "This.", [])]),
        (llava("The tag <image>?", "HTML."), [("The tag <image>?", "HTML.", [])]),
        (llava("<image>", "A square.", image=["a.png"]), [("", "A square.", A)]),
        (
            llava("<image>\n<image>\nWhich?", "One.", image=["a.png", "b.png"]),
            [("Which?", "One.", A + B)],
        ),
        (
            llava("<image>\nOne?", "Yes.", "And\n<image>", "No.", image=["a.png", "b.png"]),
            [("One?", "Yes.", A), ("And", "No.", B)],
        ),
        (
            llava("<image>\nOne?", "Yes.", "Two?", "No.", "Three?", image="a.png"),
            [("One?", "Yes.", A), ("Two?", "No.", [])],
        ),
        (openai("<image>What?", "This.", images=["a.png"]), [("What?", "This.", A)]),
        (
            openai("<image>What?", "This.", images=[{"bytes": None, "path": "a.png"}]),
            [("What?", "This.", A)],
        ),
        (
            openai(
                [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}], "This."
            ),
            [("What?", "This.", A)],
        ),
        (
            openai(
                [{"type": "text", "text": "What?"}, {"type": "image"}],
                [{"type": "text", "text": "This."}],
                images=["b.png"],
            ),
            [("What?", "This.", B)],
        ),
        (
            openai([{"type": "image_url", "image_url": {"url": "a.png"}}], "A square."),
            [("", "A square.", A)],
        ),
        (
            {
                "conversations": [
                    {"from": "gpt", "value": "Hello."},
                    *llava("Hi", "Ho")["conversations"],
                ]
            },
            [("Hi", "Ho", [])],
        ),
        (
            {"image": "a.png", "question": "<image>\nWhat?", "answer": "This."},
            [("What?", "This.", A)],
        ),
        (
            {"image": ["a.png", "b.png"], "question": "Which?", "answer": "One."},
            [("Which?", "One.", A + B)],
        ),
        (
            {"image": None, "video": None, "question": "Why?", "answer": "So."},
            [("Why?", "So.", [])],
        ),
    ],
)
def test_an_entry_has_its_turns_and_pictures(
    folder: Path, entry: dict[str, Any], turns: list[tuple[str, str, list[str]]]
) -> None:
    file = folder / "data.json"
    file.write_text(json.dumps([entry]))
    (found,), source = read(file)
    assert shown(found) == turns
    assert found.name == "data.json entry 1"
    assert source == {"source": "file", "file": "data.json", "folder": folder.name, "left_out": []}


def test_a_system_text_is_the_conversations_own(folder: Path) -> None:
    turns = [{"from": "system", "value": "Be brief."}, *llava("Hi", "Ho")["conversations"]]
    entries = [{"conversations": turns}, llava("Hi", "Ho", system="Be brief."), llava("Hi", "Ho")]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert [each.system for each in read(folder)[0]] == ["Be brief.", "Be brief.", None]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "train.JSON", "data.txt"])
@pytest.mark.parametrize("form", ["list", "lines"])
def test_the_content_decides_how_a_file_is_read(
    folder: Path, name: str, mark: str, end: str, form: str
) -> None:
    entries = [llava("<image>\nWhat?", "Ça\u2028va.", image="a.png"), llava("Why?", "So.")]
    if form == "list":
        text = json.dumps(entries, indent=2, ensure_ascii=False).replace("\n", end)
    else:
        text = end.join(json.dumps(entry, ensure_ascii=False) for entry in entries) + end
    (folder / name).write_bytes((mark + text).encode())
    by_file = [shown(each) for each in read(folder / name)[0]]
    assert by_file == [[("What?", "Ça\u2028va.", A)], [("Why?", "So.", [])]]
    if not name.endswith("txt"):
        assert [shown(each) for each in read(folder)[0]] == by_file


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (llava("Hi", "Ho", image="../a.png"), "'../a.png', no path inside the folder"),
        (llava("Hi", "Ho", image="/etc/hostname"), "no path inside the folder"),
        (llava("Hi", "Ho", image=["a.png", 5]), "image is 5, no path inside"),
        (llava("<image> <image>", "Ho", image="a.png"), "1 images and 2 <image> marks"),
        (llava("Hi"), "its roles are none; user and assistant follow each other"),
        (llava("Hi", " "), "answer is ' ', not a text"),
        (llava(" ", "Ho"), "question is ' ', not a text"),
        ({"conversations": []}, "conversations is [], not a list of messages"),
        ({"conversations": "Hi"}, "conversations is 'Hi', not a list"),
        ({"conversations": ["Hi"]}, "conversations[0] is 'Hi', not an object"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "conversations[0] is from 'robot'"),
        ({"conversations": [{"from": [1], "value": "x"}]}, "is from [1]; known are assistant, gpt"),
        ({"conversations": [{"from": "human"}]}, "holds None, not a text or a list of parts"),
        (openai("Hi", "Ho", conversations=[]), "both conversations and messages"),
        (openai("Hi", "Ho", images=["a.png"], image="a.png"), "both image and images"),
        (openai([{"type": "smell"}], "Ho"), "has a part {'type': 'smell'}"),
        (openai("Hi", [{"type": "image", "image": "a.png"}]), "only a user does"),
        (openai([{"type": "image", "image": "a.png"}], "Ho", images=B), "beside and inside"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "its roles are user"),
        ({"id": 1}, "question is None, not a text; an entry has question and answer, or conver"),
        (llava("Hi \ud83d", "Ho"), "a text holds half a character (a lone surrogate)"),
        (openai("Hi", [{"type": "text", "text": "\ude00"}]), "half a character"),
        (llava("Hi", "Ho", system="\udcff"), "half a character"),
        ({"question": "Hi", "answer": "\ud83d"}, "half a character"),
    ],
)
def test_a_malformed_entry_is_named_with_the_rule(
    folder: Path, entry: dict[str, Any], reason: str
) -> None:
    (folder / "data.jsonl").write_text(json.dumps(llava("Hi", "Ho")) + "\n" + json.dumps(entry))
    with pytest.raises(RequestError) as caught:
        read(folder)
    assert "data.jsonl:2: " in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (llava("<video>\nWhat?", "This.", video="a.mp4"), "it has video;"),
        (openai("<video>What?", "This.", videos=["a.mp4"]), "it has videos;"),
        (openai([{"type": "video", "video": "a.mp4"}], "This."), "a part of type video"),
        (openai("Hi", "Ho", audios=["a.wav"]), "it has audios;"),
        (llava("Hi", "Ho", image="https://example.org/a.png"), "nothing is fetched"),
        (llava("Hi", "Ho", image="data:image/png;base64,AAAA"), "nothing is fetched"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "it calls tools"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "it calls tools",
        ),
    ],
)
def test_an_entry_of_a_kind_that_is_not_used_is_left_out_with_the_reason(
    folder: Path, entry: dict[str, Any], reason: str
) -> None:
    (folder / "data.json").write_text(json.dumps([entry, llava("Hi", "Ho")]))
    found, source = read(folder)
    assert [each.name for each in found] == ["data.json entry 2"]
    assert source["left_out"][0]["sample"] == "data.json entry 1"
    assert reason in source["left_out"][0]["reason"]
    (folder / "data.json").write_text(json.dumps([entry]))
    with pytest.raises(RequestError, match=r"no line holds a conversation, data\.json entry 1: "):
        read(folder)


def test_of_a_whole_set_of_videos_the_first_are_listed(folder: Path) -> None:
    entries = [llava("<video>", "x", video="a.mp4")] * 150 + [llava("Hi", "Ho")]
    (folder / "data.json").write_text(json.dumps(entries))
    listed = read(folder)[1]["left_out"]
    assert len(listed) == 101
    assert listed[-1]["sample"] == "50 more"


def test_of_a_large_set_only_some_pictures_are_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [llava("<image>", "x", image="a.png")] * 90 + [llava("<image>", "x", image="b.png")]
    (folder / "data.json").write_text(json.dumps(entries))
    looked: list[object] = []
    real = conversations_module.read_image_size
    monkeypatch.setattr(
        conversations_module, "read_image_size", lambda *args: looked.append(1) or real(*args)
    )
    assert len(read(folder, limit=3)[0]) == 3
    assert len(looked) == 60


def make(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(json_lines.MAX_FILE_BYTES + 1)
    else:
        path.write_bytes(
            {
                "utf-16": "[]".encode("utf-16"),
                "latin-1": b'[{"question": "\xe9", "answer": "x"}]',
                "one object": b'{\n "data": []\n}\n',
                "empty": b"",
                "empty list": b" [ ] ",
                "cut off": b'[{"question": "a", "answer": "b"}, {"quest',
                "no comma": b'[{"question": "a", "answer": "b"} {}]',
                "more": b'[{"question": "a", "answer": "b"}] []',
                "deep": b"[" * 100_000,
                "number": b"[5]",
                "long line": b'{"question": "' + b"a" * json_lines.MAX_LINE_BYTES + b'"}\n',
            }[kind]
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pipe", "no regular file"),
        ("device", "no regular file"),
        ("folder", "no .*jsonl"),
        ("huge", "at most 2.0 GiB are read"),
        ("missing", "No such file or directory. Give a folder"),
        ("utf-16", "UTF-16 text; save it as UTF-8"),
        ("latin-1", r"not UTF-8 text \(byte 15\)"),
        ("one object", "holds one object; a list of entries"),
        ("empty", "no line holds a conversation"),
        ("empty list", "no line holds a conversation"),
        ("cut off", r"data.json entry 2: no JSON \("),
        ("no comma", "data.json entry 1: no JSON .*a comma or ] is missing"),
        ("more", "there is more after its list"),
        ("deep", "data.json entry 1: no JSON"),
        ("number", "data.json entry 1: no JSON object"),
        ("long line", "data.json:1: a line of more than 4.0 MiB"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, kind: str, message: str
) -> None:
    file = tmp_path / "data.json"
    if kind != "missing":
        make(kind, file)
    with pytest.raises(RequestError, match=message) as caught:
        read(file)
    assert "Errno" not in str(caught.value)


def test_a_pipe_in_place_of_a_picture_is_left_out(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    entries = [llava("<image>", "x", image="pipe.png")] * 2 + [llava("Hi", "Ho")]
    (folder / "data.json").write_text(json.dumps(entries))
    found, source = read(folder, limit=1)
    assert [each.images for each in found] == [()]
    assert "no regular file" in source["left_out"][0]["reason"]


def test_a_description_beside_the_data_is_left_out(folder: Path) -> None:
    (folder / "data.jsonl").write_text(json.dumps(llava("Hi", "Ho")))
    (folder / "dataset_info.json").write_text(json.dumps({"data": {"file_name": "x"}}, indent=1))
    found, source = read(folder)
    assert len(found) == 1
    assert source["left_out"][0]["sample"] == "dataset_info.json"


def test_a_sample_holds_all_turns_and_all_pictures(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path], folder: Path
) -> None:
    artifact = open_artifact(make_artifact(make_checkpoint("odd", backbone="mistral")))
    manifest = artifact.manifest
    entry = llava("<image>\nOne?", "Yes.", "And\n<image>", "No.", image=["a.png", "b.png"])
    (folder / "data.json").write_text(json.dumps([entry, llava("One?", "Yes.")]))
    with CalibrationModel.open(
        artifact.folder,
        manifest.model,
        manifest.tokens,
        manifest.prompt,
        manifest.image_processing,
        manifest.target,
        manifest.context_tokens,
        threads=1,
    ) as model:
        prepared = model.prepare(*read(folder))
        sample, plain = prepared.samples
        assert sample.embed().shape == (len(sample.kinds), manifest.model.text.hidden_size)
    assert len(sample.kinds) > len(plain.kinds) + 2 * 25
    assert prepared.report["num_text_only"] == 1
    assert sum(prepared.report["grids"].values()) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"calibration": Path("/nowhere")}, "--calibration /nowhere cannot be read: No such file"),
        ({"num_samples": 0}, r"\(--samples\) is 0; it must be a whole number, at least 1"),
    ],
)
def test_what_cannot_be_calibrated_with_is_refused_before_any_work(
    asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        QuantizationRequest(**asked)
