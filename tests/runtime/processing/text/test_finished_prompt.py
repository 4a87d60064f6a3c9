"""A finished prompt given as a question is noticed, and a question is left alone."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.artifact.manifest import PromptFormat, Turn
from llava_edge.runtime.processing.text.finished_prompt import finished_marks

PLAIN = PromptFormat(
    source="template",
    family="vicuna",
    prefix="",
    default_system="",
    system=None,
    user=Turn("[[person]] ", " [[stop]]\n"),
    user_after_system="",
    assistant=Turn("[[machine]] ", " [[stop]]\n"),
    generation_prompt="[[machine]]",
    image="<image>",
    video="<video>",
    special_tokens=(),
)


@pytest.mark.parametrize(
    "text",
    [
        "[[person]] <image>What? [[stop]]\n[[machine]]",
        "Be brief. [[person]] What? [[stop]]\n[[machine]] ",
        "[INST] <image>\nWhat is shown in this image? [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat? [/INST]\n",
        "USER: <image>\nWhat is shown in this image? ASSISTANT:",
        "A chat between a curious human and an assistant. USER: <image>\nWhat? ASSISTANT:",
        "<|im_start|>system\nAnswer.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
        "<|im_start|>assistant\n",
        "<|im_start|>user\nWhat?<|im_end|>",
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "### Human: <image>\nWhat?### Assistant:",
        "<|user|>\nWhat?<|end|>\n<|assistant|>\n",
        "You are a SUPERUSER: be brief. USER: What? ASSISTANT:",
        "[INST] What? [/INST] A cat.</s>[INST] Whose? [/INST]",
    ],
)
def test_a_prompt_as_a_card_has_it_is_noticed(text: str) -> None:
    assert finished_marks(PLAIN, text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "What is shown in this image?",
        "What does [INST] mean, and what does [/INST] mean?",
        "Which of these is right: USER: or ASSISTANT: ?",
        "The log says USER: root, is that bad?",
        "Does SUPERUSER: come before ASSISTANT:",
        "Translate </s> and <s>old price</s> into plain words",
        "ASSISTANT:",
        "[/INST]",
        "User: hello\nAssistant: hi\nWho greeted first?",
        "Question: what is 2 + 2? Answer:",
        "<image>",
        "Explain <|im_start|>user and <|im_end|> to me",
        "print('[INST]')",
        "Explain [INST] and [/INST]",
        "Is this prompt right? [INST] hi [/INST]",
        "In this log, who is USER: and who is ASSISTANT:",
        "prompt = f'USER: {question} ASSISTANT:",
    ],
)
def test_a_question_is_left_alone(text: str) -> None:
    assert finished_marks(PLAIN, text) is None


@pytest.mark.parametrize("before", ["", "U:", "  "])
def test_a_template_of_short_marks_claims_nothing(before: str) -> None:
    short = PromptFormat(**{**vars(PLAIN), "user": Turn(before, ""), "generation_prompt": "A:"})
    assert finished_marks(short, "U: what? A:") is None


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("tiny"))


@pytest.fixture(scope="module")
def model(artifact: Path) -> Iterator[LlavaEdge]:
    with LlavaEdge.load(artifact, threads=1) as loaded:
        yield loaded


def finished(model: LlavaEdge) -> str:
    """A question as the artifact's own template finishes it."""
    prompt = model.artifact.manifest.prompt
    assert prompt is not None
    return (
        prompt.prefix + prompt.user.before + "Why?" + prompt.user.after + prompt.generation_prompt
    )


def test_each_call_warns_once_and_names_the_way_out(
    model: LlavaEdge, caplog: pytest.LogCaptureFixture
) -> None:
    text = finished(model)
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: model.generate(text, max_new_tokens=1),
        "stream": lambda: list(model.stream(text, max_new_tokens=1)),
        "count_tokens": lambda: model.count_tokens(text),
        "a turn": lambda: model.chat().send(text, max_new_tokens=1),
        "a turn's tokens": lambda: model.chat().count_tokens(text),
    }
    for name, call in calls.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            call()
        warnings = [r.getMessage() for r in caplog.records if "looks finished" in r.getMessage()]
        assert len(warnings) == 1, name
        assert "raw=True (--raw)" in warnings[0]


def test_a_raw_prompt_and_a_question_are_not_warned_of(
    model: LlavaEdge, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model.generate(finished(model), raw=True, max_new_tokens=1)
        model.generate("Why?", max_new_tokens=1)
        chat = model.chat()
        chat.send("Why?", max_new_tokens=1)
        chat.send("And why that?", max_new_tokens=1)
    assert "looks finished" not in caplog.text


def test_the_command_shows_the_warning(artifact: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "llava_edge.runtime.cli.main", "run", str(artifact)),
            *("--prompt", "USER: Why? ASSISTANT:", "--max-new-tokens", "1", "--json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("looks finished") == 1
    assert "--raw" in done.stderr
