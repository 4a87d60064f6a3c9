"""Prompt formats of earlier schema versions write the prompts that they wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.artifact.manifest import Manifest, PromptFormat
from llava_edge.runtime.artifact.old_manifest import with_prompt_of_2
from llava_edge.runtime.processing.text.chat_prompt import (
    Media,
    Message,
    Text,
    compose,
    rendered,
    user_message,
)
from llava_edge.runtime.util.json_codec import from_json

DATA = Path(__file__).parents[2] / "data"

OLD: dict[str, Any] = {
    "source": "template",
    "family": "vicuna",
    "prefix": "^",
    "default_system": "(default)",
    "system": {"before": "(", "after": ")"},
    "user": {"before": "U:", "after": "."},
    "user_after_system": "u:",
    "assistant": {"before": "A:", "after": ";"},
    "generation_prompt": "A:",
    "text_separator": "+",
    "text_after": "~",
    "image": "<image>\n",
    "video": "[<video>]",
    "media_first": True,
    "stripped_roles": ["system"],
    "special_tokens": [],
}
PARTS = Message("user", (Text("a"), Media("video"), Text("b"), Text("c"), Media("image")))
SYSTEM = Message("system", (Text(" r "),))
ANSWER = Message("assistant", (Text(" s "),))


@pytest.mark.parametrize(
    ("changes", "messages", "expected"),
    [
        ({}, (PARTS,), "^(default)U:<image>\n[<video>]a+b+c~.A:"),
        ({"media_first": False}, (PARTS,), "^(default)U:a~[<video>]b+c~<image>\n.A:"),
        ({"text_separator": "~"}, (PARTS,), "^(default)U:<image>\n[<video>]a~b~c~.A:"),
        ({}, (SYSTEM, user_message(" q ")), "^(r)u: q ~.A:"),
        (
            {"stripped_roles": ["user", "assistant"]},
            (SYSTEM, user_message(" q "), ANSWER, user_message("p")),
            "^( r )u:q~.A:s;U:p~.A:",
        ),
        ({"system": None}, (user_message("q", images=1),), "^(default)U:<image>\nq~.A:"),
    ],
)
def test_the_prompt_is_what_it_was(
    changes: dict[str, Any], messages: tuple[Message, ...], expected: str
) -> None:
    document = with_prompt_of_2({"prompt": {**OLD, **changes}})
    read = from_json(PromptFormat, document["prompt"])
    assert rendered(compose(read, messages)) == expected


def test_an_artifact_without_a_prompt_format_stays_without_one() -> None:
    assert with_prompt_of_2({"prompt": None, "x": 1}) == {"prompt": None, "x": 1}


@pytest.mark.parametrize("version", [1, 2])
def test_kept_artifacts_have_a_format_of_their_time(version: int) -> None:
    document = json.loads((DATA / f"schema_{version}" / "manifest.json").read_text("utf-8"))
    assert "text_separator" in document["prompt"]
    assert from_json(Manifest, with_prompt_of_2(document)).prompt is not None


@pytest.mark.parametrize(
    "changes",
    [{"joints": []}, {"dates": ["%Y"]}, {"system": {"before": "", "after": "", "cut": 1}}],
)
def test_fields_of_a_later_version_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="unknown keys"):
        with_prompt_of_2({"prompt": {**OLD, **changes}})
