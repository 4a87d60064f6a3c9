"""The compiled segments say what the templates say; hostile templates end quickly."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llava_edge.convert.text.builtin_templates import FAMILIES, builtin_format, detect_family
from llava_edge.convert.text.chat_template import (
    compile_chat_template,
    compile_template,
    find_template,
)
from llava_edge.convert.text.template_checks import check_conversations
from llava_edge.convert.text.template_sandbox import ChatRequest, TemplateLimits, render_all
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.artifact.manifest import Trim
from llava_edge.runtime.processing.text.chat_prompt import (
    MARKS,
    Media,
    Message,
    Text,
    compose,
    raw_pieces,
    rendered,
    user_message,
)

IMAGES = "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
VIDEOS = "{% for c in m['content'] if c['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
TEXTS = "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"

TEMPLATES: dict[str, str] = {
    "mistral, system before the instruction": (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ '<<SYS>>\n' + m['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
        "{% elif m['role'] == 'user' %}{{ '[INST] ' }}" + IMAGES + TEXTS + "{{ ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'][0]['text'] + '</s>' }}"
        "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
    ),
    "mistral, system inside the instruction": (
        "{% set ns = namespace(rule='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% set ns.rule = '<<SYS>>\n' + m['content'][0]['text'] + '\n<</SYS>>\n\n' %}"
        "{% elif m['role'] == 'user' %}{{ '[INST] ' + ns.rule }}{% set ns.rule = '' %}"
        + IMAGES
        + TEXTS
        + "{{ ' [/INST]' }}{% else %}{{ ' ' + m['content'][0]['text'] + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "vicuna, a blank after each text": (
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}"
        "{% endif %}" + IMAGES + VIDEOS + "{% for c in m['content'] if c['type'] == 'text' %}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ c['text'] + ' ' }}"
        "{% endgeneration %}{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "llama3, bos written by the template": (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        + IMAGES
        + "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] | trim }}{% endfor %}"
        "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "chatml without newlines, default system": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nAnswer the questions.<|im_end|>' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        + IMAGES
        + TEXTS
        + "{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "chatml with newlines, parts in place": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}{{ '<image>' }}{% elif c['type'] == 'video' %}"
        "{{ '<video>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "chatml of a text model, strings only": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
        "+ '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "texts joined by newlines, no system": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system') }}{% endif %}{{ m['role'] | title }}{{ ' says:\n' }}"
        + IMAGES
        + "{{ m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') "
        "| join('\n') }}{{ '\n---\n' }}{% endfor %}Assistant says:\n"
    ),
}
VARIABLES = {"bos_token": "<|begin|>", "eos_token": "</s>", "pad_token": "<pad>"}


def chat(messages: Sequence[Message], strings: bool) -> list[dict[str, Any]]:
    """What a user of the reference hands to the template."""
    found: list[dict[str, Any]] = []
    for m in messages:
        content: Any = [
            {"type": "text", "text": p.text} if isinstance(p, Text) else {"type": p.kind}
            for p in m.parts
        ]
        if strings:
            media = "".join(MARKS[p.kind] + "\n" for p in m.parts if isinstance(p, Media))
            content = media + "".join(p.text for p in m.parts if isinstance(p, Text))
        found.append({"role": m.role, "content": content})
    return found


def reference(template: str, messages: Sequence[Message], strings: bool = False) -> str:
    texts, _ = render_jinja_template(
        conversations=[chat(messages, strings)],
        chat_template=template,
        add_generation_prompt=True,
        **VARIABLES,
    )
    return str(texts[0])


@pytest.mark.parametrize("name", TEMPLATES)
def test_compiled_segments_equal_the_rendering_of_the_reference(name: str) -> None:
    template = TEMPLATES[name]
    compiled = compile_template(template, VARIABLES, "vicuna")
    strings = "strings only" in name
    conversations = check_conversations(
        system=compiled.system is not None, placed=not strings, video=VIDEOS in template
    )
    assert len(conversations) >= 30
    for conversation in conversations:
        if strings and not all(isinstance(p, Text) for m in conversation.messages for p in m.parts):
            continue
        ours = rendered(compose(compiled, conversation.messages, image_marks=False))
        assert ours == reference(template, conversation.messages, strings), conversation.name


def test_segments_of_the_vicuna_template_are_the_published_ones() -> None:
    compiled = compile_template(TEMPLATES["vicuna, a blank after each text"], VARIABLES, "vicuna")
    pieces = compose(compiled, (user_message("What?", images=1),))
    assert rendered(pieces) == "USER: <image>\nWhat? ASSISTANT:"
    assert [p.kind for p in pieces] == [
        "template",
        "image",
        *["template", "text"],
        *["template"] * 2,
    ]
    assert compiled.system is not None
    assert compiled.special_tokens == ()


def test_segments_know_their_control_tokens() -> None:
    llama = compile_template(
        TEMPLATES["llama3, bos written by the template"],
        VARIABLES,
        "llama3",
        added_tokens=("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|other|>", "\n"),
    )
    assert llama.prefix == "<|begin|>"
    stripped = Trim("any", "any")
    assert llama.user.trim == llama.assistant.trim == stripped
    assert llama.system is not None
    assert llama.system.trim == stripped
    assert llama.special_tokens == (
        "<|begin|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|start_header_id|>",
    )
    inside = compile_template(TEMPLATES["mistral, system inside the instruction"], VARIABLES, "m")
    assert inside.user_after_system == ""
    assert inside.special_tokens == ("</s>",)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        pytest.param(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "did not end",
            id="a loop without end",
        ),
        pytest.param("{{ 'x' * 10**9 }}", "768 MiB of memory", id="a billion characters at once"),
        pytest.param(
            "{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", "longer", id="slow swelling"
        ),
        pytest.param("{{ 9 ** (9 ** 9) }}", "did not end", id="a number without end"),
        pytest.param(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError", id="an escape"
        ),
        pytest.param(
            "{{ messages.__init__.__globals__ }}", "SecurityError", id="an escape by globals"
        ),
        pytest.param("{% import 'os' as os %}{{ os }}", "loader", id="an import"),
        pytest.param("{% include '/etc/passwd' %}", "loader", id="an include"),
        pytest.param(
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "Recursion", id="recursion"
        ),
        pytest.param("{{ namespace(__x=1) }}", "SecurityError", id="a private name"),
        pytest.param("{% if %}", "TemplateSyntaxError", id="no template at all"),
        pytest.param("{" * 100_000, "chat template", id="a flood of braces"),
        pytest.param("x" * 1_000_000, "characters", id="a template of a million characters"),
        pytest.param("{{ messages.append(1) }}", "SecurityError", id="changing the conversation"),
    ],
)
def test_hostile_templates_end_quickly_with_a_checkpoint_error(template: str, words: str) -> None:
    limits = TemplateLimits(seconds=1)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=words):
        compile_template(template, {}, "vicuna", limits=limits)
    # The bound is processor time; a busy machine takes longer.
    assert time.monotonic() - started < 60


def test_a_template_is_not_given_files_or_other_processes() -> None:
    (answer,) = render_all(
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}", {}, [ChatRequest(())]
    )
    assert answer.text is None
    assert "SecurityError" in str(answer.error)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        pytest.param(
            TEMPLATES["chatml with newlines, parts in place"].replace(
                "{{ c['text'] }}", "{{ c['text'] | upper }}"
            ),
            "missing or repeated",
            id="changes the letters",
        ),
        pytest.param(
            TEMPLATES["chatml with newlines, parts in place"].replace(
                "{{ c['text'] }}", "{{ c['text'] | replace('  ', ' ') }}"
            ),
            r"outer blanks|inner newlines",
            id="joins blanks",
        ),
        pytest.param(
            TEMPLATES["vicuna, a blank after each text"].replace(
                "'ASSISTANT:'", "'ASSISTANT:' if messages | length < 6 else 'A:'"
            ),
            "3 turns",
            id="depends on the number of turns",
        ),
        pytest.param(
            TEMPLATES["vicuna, a blank after each text"] + "{{ strftime_now('%H') | int + 1 }}",
            "in the generation prompt .*depends on the date",
            id="reckons with the time",
        ),
        pytest.param(
            TEMPLATES["vicuna, a blank after each text"] + "{{ strftime_now('%c') }}",
            "dates in the forms .*%c",
            id="writes the date as the system's language has it",
        ),
        pytest.param(
            TEMPLATES["vicuna, a blank after each text"].replace(
                "{{ '<image>\n' }}", "{{ 'Image ' ~ loop.index ~ ': <image>\n' }}"
            ),
            "after the image and before the image of the user's turn .*Image 3.*Image 2",
            id="numbers its images",
        ),
        pytest.param(
            TEMPLATES["vicuna, a blank after each text"].replace(
                "{{ c['text'] + ' ' }}{% endif %}",
                "{{ c['text'] + (' ' if m['content'] | length < 3 else '_') }}{% endif %}",
            ),
            "of the user's turn the template writes '.*_",
            id="counts the parts of a message",
        ),
        pytest.param(
            TEMPLATES["chatml without newlines, default system"].replace(
                "{% for m in messages %}",
                "{% for m in messages[1:] + messages[:1] if m['role'] == 'user' or true %}",
            ),
            "out of order|is alone|one question alone",
            id="another order of turns",
        ),
        pytest.param(
            TEMPLATES["vicuna, a blank after each text"]
            + "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'][0]['text'] }}"
            "{% endif %}",
            "the system text stands after the question",
            id="repeats the system text at the end",
        ),
        pytest.param(
            TEMPLATES["vicuna, a blank after each text"] + "{{ ['a', 'b', 'c', 'd'] | random }}",
            "cannot be compiled",
            id="throws dice",
        ),
        pytest.param("nothing but this", "missing or repeated", id="shows no text"),
        pytest.param("{{ messages }}", "cannot be compiled", id="prints the list"),
        pytest.param(
            "{{ raise_exception('never') }}", "TemplateError: never", id="refuses everything"
        ),
    ],
)
def test_a_template_of_another_form_is_refused_with_what_differs(template: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        compile_template(template, VARIABLES, "vicuna")
    assert "raw prompts" in str(caught.value)


def write(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({"chat_template.jinja": "j"}, "j", id="jinja"),
        pytest.param({"chat_template.json": {"chat_template": "c"}}, "c", id="json"),
        pytest.param(
            {"chat_template.json": {"chat_template": "c"}, "chat_template.jinja": "j"},
            "c",
            id="json before jinja",
        ),
        pytest.param(
            {"processor_config.json": {"chat_template": "p"}, "chat_template.jinja": "j"},
            "p",
            id="processor config first",
        ),
        pytest.param(
            {"tokenizer_config.json": {"chat_template": "t"}, "chat_template.jinja": "j"},
            "j",
            id="tokenizer last",
        ),
        pytest.param(
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tools", "template": "x"},
                        {"name": "default", "template": "d"},
                    ]
                }
            },
            "d",
            id="a list of named ones",
        ),
        pytest.param({}, None, id="none"),
    ],
)
def test_the_template_is_found_where_the_reference_looks(
    tmp_path: Path, files: Mapping[str, Any], expected: str | None
) -> None:
    write(tmp_path, files)
    assert find_template(tmp_path) == expected


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"tokenizer_config.json": "{"}, id="broken"),
        pytest.param({"tokenizer_config.json": "[1]"}, id="no object"),
        pytest.param(
            {"tokenizer_config.json": {"chat_template": [{"name": "a", "template": "x"}]}},
            id="no default",
        ),
        pytest.param({"tokenizer_config.json": {"chat_template": 7}}, id="a number"),
    ],
)
def test_unreadable_template_files_are_checkpoint_errors(
    tmp_path: Path, files: Mapping[str, Any]
) -> None:
    write(tmp_path, files)
    with pytest.raises(CheckpointError):
        find_template(tmp_path)


def test_special_tokens_come_from_the_checkpoint(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "chat_template.jinja": TEMPLATES["llama3, bos written by the template"],
            "tokenizer_config.json": {
                "bos_token": {"content": "<|start|>", "lstrip": False},
                "eos_token": "<|eot_id|>",
                "added_tokens_decoder": {"5": {"content": "<|start_header_id|>"}},
            },
        },
    )
    compiled = compile_chat_template(tmp_path, {"text_config": {"vocab_size": 128256}})
    assert (compiled.source, compiled.family) == ("template", "llama3")
    assert compiled.prefix == "<|start|>"
    assert set(compiled.special_tokens) == {"<|start|>", "<|eot_id|>", "<|start_header_id|>"}


# Prompts that the original code builds, word by word from its conversation table.
CANONICAL = {
    "mistral_instruct": "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]",
    "vicuna": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions. "
        "USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"
    ),
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|>"
        "<|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language "
        "and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|><|start_header_id|>"
        "assistant<|end_header_id|>\n\nA1<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ2"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "chatml_newline": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nQ1"
        "<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_builtin_formats_write_the_prompts_of_the_original_code(family: str) -> None:
    conversation = (
        user_message("Q1", images=1),
        Message("assistant", (Text("A1"),)),
        user_message("Q2"),
    )
    assert rendered(compose(builtin_format(family), conversation)) == CANONICAL[family]


def test_the_video_models_name_a_user() -> None:
    asked = rendered(compose(builtin_format("vicuna", video=True), (user_message("Q", videos=1),)))
    assert asked.startswith("A chat between a curious user and")
    assert asked.endswith("the user's questions. USER: <video>\nQ ASSISTANT:")


@pytest.mark.parametrize(
    ("config", "source_id", "family"),
    [
        ({"text_config": {"model_type": "mistral"}}, "", "mistral_instruct"),
        ({"text_config": {"model_type": "llama", "vocab_size": 32064}}, "llama3-x", "vicuna"),
        ({"text_config": {"model_type": "llama", "vocab_size": 64064}}, "", "chatml_direct"),
        ({"text_config": {"vocab_size": 128320}}, "", "llama3"),
        ({"text_config": {"model_type": "qwen2"}}, "", "chatml_newline"),
        ({"text_config": {"vocab_size": 512}}, "me/tiny-llama3-next", "llama3"),
        ({"text_config": {"vocab_size": 512}}, "me/tiny-34b", "chatml_direct"),
        ({}, "", "vicuna"),
    ],
)
def test_the_family_follows_the_language_model(
    config: Mapping[str, Any], source_id: str, family: str
) -> None:
    assert detect_family(config, source_id) == family


def test_an_unknown_language_model_has_no_family() -> None:
    with pytest.raises(CheckpointError, match="gemma"):
        detect_family({"text_config": {"model_type": "gemma"}})
    with pytest.raises(CheckpointError, match="unknown"):
        builtin_format("gemma")


def test_a_checkpoint_without_template_gets_the_format_of_its_family(tmp_path: Path) -> None:
    config = {"model_type": "llava_next_video", "text_config": {"vocab_size": 32064}}
    assert compile_chat_template(tmp_path, config) == builtin_format("vicuna", video=True)
    named = compile_chat_template(tmp_path, config, family="llama3")
    assert named == builtin_format("llama3")


def test_raw_prompts_need_no_format() -> None:
    pieces = raw_pieces("[INST] <image>\nDescribe. [/INST]", images=1)
    assert rendered(pieces) == "[INST] <image>\nDescribe. [/INST]"
