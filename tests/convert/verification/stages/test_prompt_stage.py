"""Verification renders the checkpoint's template by transformers' rules, in bounds, at its time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.convert.text.chat_template import CLOCKS, compile_template
from llava_edge.convert.verification.reference.processor import ReferenceProcessor
from llava_edge.convert.verification.stages.prompt import prompt_stage
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.artifact.certificate import StageResult
from llava_edge.runtime.artifact.manifest import PromptFormat
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.processing.text.chat_prompt import user_message

PLAIN = (
    "{% for m in messages %}{{ m.role + ':' }}{% for c in m.content if c.type == 'image' %}"
    "{{ '<image>' }}{% endfor %}{% for c in m.content if c.type == 'text' %}{{ '\n' + c.text }}"
    "{% endfor %}{{ '\n' }}{% endfor %}{{ 'assistant:' }}"
)
DATED = "{{ strftime_now('%d %b %Y') + '\n' }}" + PLAIN
THIS_YEAR = datetime.now(UTC).year
# Harmless at every time that conversion tries.
BOMB = f"{{% if strftime_now('%Y') == '{THIS_YEAR}' %}}{{{{ 'a' * 9000000000 }}}}{{% endif %}}"


@pytest.fixture(scope="module")
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("tiny")


@pytest.fixture(scope="module")
def artifact(source: Path, make_artifact: Callable[..., Path]) -> Artifact:
    return open_artifact(make_artifact(source), verify_digests=False)


@pytest.fixture
def verify(
    source: Path, artifact: Artifact, tmp_path: Path
) -> Callable[[str, PromptFormat], StageResult]:
    def run(template: str, prompt: PromptFormat) -> StageResult:
        folder = tmp_path / "checkpoint"
        shutil.copytree(source, folder)
        (folder / "chat_template.jinja").write_text(template, "utf-8")
        checkpoint = open_checkpoint(folder)
        pinpoints = artifact.manifest.image_processing.image_grid_pinpoints
        held = replace(artifact, manifest=replace(artifact.manifest, prompt=prompt))
        return prompt_stage(held, checkpoint, ReferenceProcessor(checkpoint, pinpoints))

    return run


def compiled(template: str) -> PromptFormat:
    return compile_template(template, {}, "vicuna")


def test_a_date_is_that_of_the_verification(verify: Callable[..., StageResult]) -> None:
    stage = verify(DATED, compiled(DATED))
    assert stage.verdict == "pass", stage


def test_a_date_that_was_frozen_is_found(verify: Callable[..., StageResult]) -> None:
    prompt = compiled(DATED)
    frozen = prompt.default_system.replace("<date:%d %b %Y>", "01 May 2024")
    stage = verify(DATED, replace(prompt, default_system=frozen, dates=()))
    assert stage.verdict == "fail"


def test_another_division_into_segments_is_no_fault(verify: Callable[..., StageResult]) -> None:
    prompt = compiled(PLAIN)
    moved = replace(prompt, default_system=prompt.user.before, user_after_default="")
    assert moved != prompt
    stage = verify(PLAIN, moved)
    assert stage.verdict == "pass", stage


def test_lists_without_places_for_pictures_have_marks_in_their_text(
    verify: Callable[..., StageResult],
) -> None:
    texts = (
        "{% for m in messages %}{{ m.role + ':' }}{% for c in m.content %}{{ c.text }}{% endfor %}"
        "{{ '\\n' }}{% endfor %}{{ 'assistant:' }}"
    )
    stage = verify(texts, compiled(texts))
    assert stage.verdict == "pass", stage


def test_a_system_text_that_is_printed_twice_may_look_like_a_part(
    verify: Callable[..., StageResult],
) -> None:
    twice = "{% if messages[0].role == 'system' %}{{ messages[0].content[0].text }}{% endif %}"
    stage = verify(twice + PLAIN, compiled(twice + PLAIN))
    assert stage.verdict == "pass", stage


def test_reasoning_left_out_of_answers_passes(verify: Callable[..., StageResult]) -> None:
    answers = "(c.text.split('</think>')[-1] if m.role == 'assistant' else c.text) }}"
    thinking = PLAIN.replace("c.text }}", answers)
    stage = verify(thinking, compiled(thinking))
    assert stage.verdict == "pass", stage


def test_a_lost_newline_is_found(verify: Callable[..., StageResult]) -> None:
    prompt = compiled(PLAIN)
    assert prompt.text_before == "\n"
    stage = verify(PLAIN, replace(prompt, text_before=""))
    assert stage.verdict == "fail"


@pytest.mark.skipif(
    THIS_YEAR in {datetime.fromtimestamp(clock, UTC).year for clock in CLOCKS},
    reason="conversion tries this year and refuses the template itself",
)
def test_a_template_that_waited_for_today_is_stopped_at_verification(
    verify: Callable[..., StageResult],
) -> None:
    prompt = compiled(BOMB + PLAIN)
    with pytest.raises(CheckpointError, match="768 MiB of memory"):
        verify(BOMB + PLAIN, prompt)


def test_a_template_that_conversion_never_saw_is_stopped_as_well(
    source: Path, artifact: Artifact, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text("{{ 'a' * 9000000000 }}", "utf-8")
    checkpoint = open_checkpoint(folder)
    pinpoints = artifact.manifest.image_processing.image_grid_pinpoints
    with pytest.raises(CheckpointError, match="768 MiB of memory"):
        ReferenceProcessor(checkpoint, pinpoints).render([user_message("why?")])
