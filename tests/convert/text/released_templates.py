"""Chat templates in the forms that checkpoints bring, written anew for these tests.

The order of parts, white space, trims and control tokens are those of the form; nothing else is
taken from anywhere. ``bos_token`` and ``eos_token`` are variables, as transformers hands them over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Released:
    """One template.

    Attributes:
        source: jinja2.
        strings: it reads a message's content as one string, so media are written as marks.
        system_string: it reads the system's content as one string.
        system: it has system turns.
        video: it places videos.
    """

    source: str
    strings: bool = False
    system_string: bool = False
    system: bool = True
    video: bool = False


_IMAGES = "{%- for c in m.content if c.type == 'image' %}{{ '<image>\n' }}{%- endfor %}"
_BARE_IMAGES = "{%- for c in m.content if c.type == 'image' %}{{ '<image>' }}{%- endfor %}"
_VIDEOS = "{%- for c in m.content if c.type == 'video' %}{{ '<video>\n' }}{%- endfor %}"
_TEXTS = "{%- for c in m.content if c.type == 'text' %}{{ c.text }}{%- endfor %}"
_SPACED = "{%- for c in m.content if c.type == 'text' %}{{ c.text + ' ' }}{%- endfor %}"
_ON_A_LINE = "{%- for c in m.content if c.type == 'text' %}{{ '\n' + c.text }}{%- endfor %}"
_MARKED = (
    "{%- for c in m.content if c.type == 'text' %}{%- if m.role == 'assistant' %}"
    "{% generation %}{{ c.text + ' ' }}{% endgeneration %}{%- else %}{{ c.text + ' ' }}"
    "{%- endif %}{%- endfor %}"
)
_OPEN_CHATML = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
_HEADER = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n' }}"
_OPEN_LLAMA = (
    "{%- if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def _messages(body: str) -> str:
    return "{%- for m in messages %}" + body + "{%- endfor %}"


def _alternating(start: str = "messages") -> str:
    return (
        f"{{%- for m in {start} %}}{{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}}"
        "{{ raise_exception('user and assistant have to take turns') }}{%- endif %}{%- endfor %}"
    )


_INSTRUCT = _messages(
    "{%- if m.role == 'system' %}{{ '<<SYS>>\n' + m.content[0].text + '\n<</SYS>>\n\n' }}"
    "{%- elif m.role == 'user' %}{{ '[INST] ' }}" + _IMAGES + _TEXTS + "{{ ' [/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{ ' ' + m.content[0].text + '</s>' }}"
    "{%- else %}{{ raise_exception('no such role') }}{%- endif %}"
)
_VICUNA = (
    _messages(
        "{%- if m.role != 'system' %}{{ m.role.upper() + ': ' }}{%- endif %}"
        + _IMAGES
        + _VIDEOS
        + _MARKED
    )
    + "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}"
)
_SYSTEM_TWICE = (
    _messages(
        "{%- if m.role == 'system' %}{{ m.content[0].text }}{%- else %}"
        "{{ m.role.upper() + ': ' }}{%- endif %}" + _IMAGES + _VIDEOS + _MARKED
    )
    + "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}"
)
_YI = (
    _messages(
        "{{ '<|im_start|>' + m.role + '\n' }}" + _IMAGES + _VIDEOS + _TEXTS + "{{ '<|im_end|>' }}"
    )
    + _OPEN_CHATML
)
_YI_LINES = _YI.replace("{{ '<|im_end|>' }}", "{{ '<|im_end|>\n' }}")
_LLAMA3_LINES = _messages(_HEADER + _BARE_IMAGES + _ON_A_LINE + "{{ '<|eot_id|>' }}") + _OPEN_LLAMA
_QWEN_LINES = (
    _messages(
        "{{ '<|im_start|>' + m.role }}" + _BARE_IMAGES + _ON_A_LINE + "{{ '<|im_end|>' + '\n' }}"
    )
    + _OPEN_CHATML
)

VARIANTS: Mapping[str, Released] = {
    "llava-v1.6-mistral-7b": Released(_INSTRUCT),
    "llava-v1.6-vicuna-7b": Released(_VICUNA.replace(_VIDEOS, "")),
    "llava-v1.6-vicuna-13b": Released(_VICUNA.replace(_VIDEOS, "").replace(_MARKED, _SPACED)),
    "llava-v1.6-34b": Released(_YI.replace(_VIDEOS, "")),
    "llama3-llava-next-8b": Released(_LLAMA3_LINES),
    "llava-next-72b": Released(_QWEN_LINES),
    "llava-next-110b": Released(
        "{%- if messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
        + _QWEN_LINES
    ),
    "LLaVA-NeXT-Video-7B": Released(_SYSTEM_TWICE, video=True),
    "LLaVA-NeXT-Video-34B": Released(_YI_LINES, video=True),
}
"""The nine variants as they were in 2024."""

REVISIONS: Mapping[str, Released] = {
    "mistral-7b, system inside the instruction": Released(
        "{%- set ns = namespace(rule='') %}"
        + _messages(
            "{%- if m.role == 'system' %}{%- set ns.rule = '<<SYS>>\n' + m.content[0].text + "
            "'\n<</SYS>>\n\n' %}{%- elif m.role == 'user' %}{{ '[INST] ' + ns.rule }}"
            "{%- set ns.rule = '' %}" + _IMAGES + _TEXTS + "{{ ' [/INST]' }}{%- else %}"
            "{{ ' ' + m.content[0].text + ' ' + eos_token }}{%- endif %}"
        )
    ),
    "llama3, texts trimmed on lines of their own": Released(
        "{{ bos_token }}" + _LLAMA3_LINES.replace("'\n' + c.text", "'\n' + c.text | trim"),
    ),
    "llama3, texts stripped by the method": Released(
        _LLAMA3_LINES.replace("c.text }}", "c.text.strip() }}"),
    ),
    "llama3, blank lines and a default system turn": Released(
        "{%- if messages[0].role != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>\n\n"
        "You see and answer.<|eot_id|>' }}{%- endif %}" + _LLAMA3_LINES
    ),
    "llama3, a body trimmed as a whole": Released(
        _messages(
            "{%- set ns = namespace(body='') %}{%- for c in m.content %}"
            "{%- if c.type == 'image' %}{%- set ns.body = ns.body + '<image>\n' %}{%- else %}"
            "{%- set ns.body = ns.body + c.text %}{%- endif %}{%- endfor %}"
            "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + ns.body | trim + "
            "'<|eot_id|>' }}"
        )
        + _OPEN_LLAMA
    ),
    "qwen, texts stripped on the right": Released(
        _QWEN_LINES.replace("c.text }}", "c.text.rstrip() }}")
    ),
    "vicuna 1.5 with a system text of its own": Released(
        "{%- if messages[0].role != 'system' %}{{ 'A chat of a person and a machine. ' }}"
        "{%- endif %}" + _VICUNA.replace(_VIDEOS, "")
    ),
    "1.5, the system text twice and answers closed": Released(
        _SYSTEM_TWICE.replace(_VIDEOS, "").replace(
            "{{ c.text + ' ' }}{% endgeneration %}", "{{ c.text + eos_token }}{% endgeneration %}"
        )
    ),
    "yi video, the system text twice": Released(
        _YI_LINES.replace(
            "+ m.role + '\n' }}",
            "+ m.role + '\n' }}{%- if m.role == 'system' %}{{ m.content[0].text + '\n' }}"
            "{%- endif %}",
        ),
        video=True,
    ),
    "parts in place": Released(
        _messages(
            "{{ '<|im_start|>' + m.role + '\n' }}{%- for c in m.content %}"
            "{%- if c.type == 'text' %}{{ c.text }}{%- else %}{{ '<' + c.type + '>' }}{%- endif %}"
            "{%- endfor %}{{ '<|im_end|>\n' }}"
        )
        + _OPEN_CHATML,
        video=True,
    ),
    "strings and lists": Released(
        _messages(
            "{{ '<|im_start|>' + m.role + '\n' }}{%- if m.content is string %}{{ m.content }}"
            "{%- else %}" + _IMAGES + _ON_A_LINE + "{%- endif %}{{ '<|im_end|>\n' }}"
        )
        + _OPEN_CHATML
    ),
}
"""Later revisions and common variations of the same."""

_QWEN_TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}"
    "{{ messages[0].content }}{%- endif %}{{ '\n# Tools\n' }}{%- for t in tools %}"
    "{{ t | tojson }}{%- endfor %}{{ '<|im_end|>\n' }}{%- else %}"
    "{%- if messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- else %}"
    "{{ '<|im_start|>system\nYou are a careful assistant.<|im_end|>\n' }}{%- endif %}{%- endif %}"
)
_LLAMA31 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- if messages[0].role == 'system' %}{%- set rule = messages[0].content | trim %}"
    "{%- set talk = messages[1:] %}{%- else %}{%- set rule = '' %}{%- set talk = messages %}"
    "{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{%- if tools is not none %}{{- 'Environment: ipython\n' }}{%- endif %}"
    "{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + rule + "
    "'<|eot_id|>' }}{%- for m in talk %}{{- '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}" + _OPEN_LLAMA
)
_MISTRAL_V3 = (
    "{%- if messages[0].role == 'system' %}{%- set rule = messages[0].content %}"
    "{%- set talk = messages[1:] %}{%- else %}{%- set talk = messages %}{%- endif %}"
    + _alternating("talk")
    + "{{ bos_token }}{%- for m in talk %}{%- if m.role == 'user' %}"
    "{%- if loop.last and rule is defined %}{{ '[INST] ' + rule + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{%- endif %}{%- else %}"
    "{{ ' ' + m.content | trim + eos_token }}{%- endif %}{%- endfor %}"
)
_MISTRAL_V2_RULE = (
    "{%- if messages[0].role == 'system' %}{%- set rule = messages[0].content | trim + '\n\n' %}"
    "{%- set talk = messages[1:] %}{%- else %}{%- set rule = '' %}{%- set talk = messages %}"
    "{%- endif %}{{ bos_token }}"
    + _alternating("talk")
    + "{%- for m in talk %}{%- if loop.first %}{%- set content = rule + m.content %}{%- else %}"
    "{%- set content = m.content %}{%- endif %}{%- if m.role == 'user' %}"
    "{{ '[INST] ' + content | trim + ' [/INST]' }}{%- else %}"
    "{{ ' ' + content | trim + eos_token }}{%- endif %}{%- endfor %}"
)

EXPORTS: Mapping[str, Released] = {
    "chatml by TRL": Released(
        _messages("{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}")
        + _OPEN_CHATML,
        strings=True,
    ),
    "chatml by TRL with generation blocks": Released(
        _messages(
            "{{ '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
            "{% generation %}{{ m.content }}{% endgeneration %}{%- else %}{{ m.content }}"
            "{%- endif %}{{ '<|im_end|>\n' }}"
        )
        + _OPEN_CHATML,
        strings=True,
    ),
    "vicuna by LLaMA-Factory": Released(
        "{{ bos_token }}{%- if messages[0].role == 'system' %}"
        "{%- set talk = messages[1:] %}{%- set rule = messages[0].content %}{%- else %}"
        "{%- set talk = messages %}{%- set rule = 'A talk of two.' %}{%- endif %}"
        "{{ rule + '\n' }}{%- for m in talk %}{%- if m.role == 'user' %}"
        "{{ 'USER: ' + m.content + ' ASSISTANT:' }}{%- else %}{{ m.content + eos_token }}"
        "{%- endif %}{%- endfor %}",
        strings=True,
    ),
    "qwen by LLaMA-Factory": Released(
        "{%- if messages[0].role == 'system' %}{%- set talk = messages[1:] %}"
        "{%- set rule = messages[0].content %}{%- else %}{%- set talk = messages %}"
        "{%- set rule = 'You help.' %}{%- endif %}"
        "{{ '<|im_start|>system\n' + rule + '<|im_end|>\n' }}{%- for m in talk %}"
        "{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + "
        "'<|im_end|>\n<|im_start|>assistant\n' }}{%- else %}{{ m.content + '<|im_end|>\n' }}"
        "{%- endif %}{%- endfor %}",
        strings=True,
    ),
    "mistral by LLaMA-Factory": Released(
        "{{ bos_token }}{%- if messages[0].role == 'system' %}{%- set talk = messages[1:] %}"
        "{%- set rule = messages[0].content %}{%- else %}{%- set talk = messages %}{%- endif %}"
        "{%- for m in talk %}{%- set content = m.content %}"
        "{%- if loop.index0 == 0 and rule is defined %}{%- set content = rule + '\n\n' + m.content "
        "%}{%- endif %}{%- if m.role == 'user' %}{{ '[INST] ' + content + '[/INST]' }}{%- else %}"
        "{{ content + eos_token }}{%- endif %}{%- endfor %}",
        strings=True,
    ),
    "llava by ms-swift": Released(
        _VICUNA.replace("m.role.upper()", "m['role'] | upper"), video=True
    ),
    "qwen with tools": Released(
        _QWEN_TOOLS
        + "{%- for m in messages %}{%- if m.role == 'user' or (m.role == 'system' and not "
        "loop.first) or (m.role == 'assistant' and not m.tool_calls) %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}"
        "{%- for call in m.tool_calls %}{{ '\n<tool_call>' + call.name }}{%- endfor %}"
        "{{ '<|im_end|>\n' }}{%- endif %}{%- endfor %}" + _OPEN_CHATML,
        strings=True,
    ),
    "qwen with tools and thinking": Released(
        _QWEN_TOOLS.replace(
            "{%- else %}{{ '<|im_start|>system\nYou are a careful assistant.<|im_end|>\n' }}", ""
        )
        + "{%- set ns = namespace(last=messages | length - 1, found=false) %}"
        "{%- for m in messages[::-1] %}{%- if m.role == 'user' and not ns.found %}"
        "{%- set ns.last = messages | length - 1 - loop.index0 %}{%- set ns.found = true %}"
        "{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set said = m.content %}"
        "{%- set why = '' %}{%- if m.reasoning_content is string %}"
        "{%- set why = m.reasoning_content %}{%- elif '</think>' in said %}"
        "{%- set why = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{%- if loop.index0 > ns.last and why %}"
        "{{ '<|im_start|>assistant\n<think>\n' + why + '\n</think>\n\n' + said }}{%- else %}"
        "{{ '<|im_start|>assistant\n' + said }}{%- endif %}{{ '<|im_end|>\n' }}"
        "{%- elif m.role == 'user' or not loop.first %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}",
        strings=True,
    ),
    "thinking dropped without a strip": Released(
        "{{ bos_token }}"
        + _messages(
            "{%- if m.role == 'assistant' %}{%- set said = m.content %}"
            "{%- if '</think>' in said %}{%- set said = said.split('</think>')[-1] %}{%- endif %}"
            "{{ '<A>' + said + '<E>' }}{%- elif m.role == 'user' %}{{ '<U>' + m.content }}"
            "{%- else %}{{ m.content }}{%- endif %}"
        )
        + "{%- if add_generation_prompt %}{{ '<A><think>\n' }}{%- endif %}",
        strings=True,
    ),
    "llama 3.1 with the date": Released(_LLAMA31, strings=True),
    "llama 3.1 with the date, parts": Released(
        "{{ bos_token }}{%- if messages[0].role != 'system' %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + "
        "strftime_now('%d %b %Y') + '\n\n<|eot_id|>' }}{%- endif %}"
        + _messages(
            "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
            "{%- if m.role == 'system' %}{{ 'Today Date: ' + strftime_now('%d %b %Y') + '\n\n' }}"
            "{%- endif %}"
            + _BARE_IMAGES
            + _TEXTS.replace("c.text", "c.text | trim")
            + "{{ '<|eot_id|>' }}"
        )
        + _OPEN_LLAMA
    ),
    "llama 3.1 with a fixed date": Released(
        _LLAMA31.replace("strftime_now is defined", "false"), strings=True
    ),
    "llama 2": Released(
        "{%- if messages[0].role == 'system' %}{%- set rule = messages[0].content %}"
        "{%- set talk = messages[1:] %}{%- else %}{%- set rule = false %}"
        "{%- set talk = messages %}{%- endif %}"
        + _alternating("talk")
        + "{%- for m in talk %}{%- if loop.first and rule %}"
        "{%- set content = '<<SYS>>\n' + rule + '\n<</SYS>>\n\n' + m.content %}{%- else %}"
        "{%- set content = m.content %}{%- endif %}{%- if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{%- else %}"
        "{{ ' ' + content | trim + ' ' + eos_token }}{%- endif %}{%- endfor %}",
        strings=True,
    ),
    "mistral v0.1, no system": Released(
        "{{ bos_token }}"
        + _alternating()
        + _messages(
            "{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{%- else %}"
            "{{ m.content + eos_token + ' ' }}{%- endif %}"
        ),
        strings=True,
        system=False,
    ),
    "mistral v0.2, system in the first instruction": Released(_MISTRAL_V2_RULE, strings=True),
    "mistral v0.3, system in the last instruction": Released(_MISTRAL_V3, strings=True),
    "vicuna 1.1": Released(
        "{%- if messages[0].role == 'system' %}{%- set talk = messages[1:] %}"
        "{%- set rule = messages[0].content %}{%- else %}{%- set talk = messages %}"
        "{%- set rule = 'A chat of two.' %}{%- endif %}{%- for m in talk %}"
        "{%- if loop.first %}{{ rule.strip() }}{%- endif %}{%- if m.role == 'user' %}"
        "{{ ' USER: ' + m.content.strip() }}{%- else %}"
        "{{ ' ASSISTANT: ' + m.content.strip() + eos_token }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{%- endif %}",
        strings=True,
    ),
    "yi chat": Released(
        "{%- if not add_generation_prompt is defined %}{%- set add_generation_prompt = false %}"
        "{%- endif %}{%- if messages[0].role == 'system' %}"
        "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
        "{%- set talk = messages[1:] %}{%- else %}{%- set talk = messages %}{%- endif %}"
        "{%- for m in talk %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{%- endfor %}" + _OPEN_CHATML,
        strings=True,
    ),
    "zephyr, system lists and strings": Released(
        _messages(
            "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
            "{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
        ),
        strings=True,
    ),
}
"""What training tools write, and templates of the language models themselves."""

NEIGHBOURS: Mapping[str, Released] = {
    "texts on lines of their own for users alone": Released(
        _messages(
            "{{ '<' + m.role + '>' }}"
            + _BARE_IMAGES
            + "{%- for c in m.content if c.type == 'text' "
            "%}{%- if m.role == 'user' %}{{ '\n' }}{%- endif %}{{ c.text }}{%- endfor %}"
            "{{ '<end>' }}"
        )
        + "{%- if add_generation_prompt %}{{ '<assistant>' }}{%- endif %}"
    ),
    "images after texts": Released(
        _messages(
            "{{ m.role + ': ' }}"
            + _TEXTS
            + _IMAGES.replace("'<image>\n'", "'\n<image>'")
            + "{{ ';' }}"
        )
        + "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
    ),
    "one newline after the last image": Released(
        _messages(
            "{{ m.role + ': ' }}"
            + _BARE_IMAGES
            + "{%- if m.content | selectattr('type', 'equalto', "
            "'image') | list %}{{ '\n' }}{%- endif %}" + _TEXTS + "{{ ';' }}"
        )
        + "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
    ),
    "a separator between images": Released(
        _messages(
            "{{ m.role + ': ' }}{%- for c in m.content if c.type == 'image' %}{{ '<image>' }}"
            "{%- if not loop.last %}{{ ', ' }}{%- endif %}{%- endfor %}" + _TEXTS + "{{ ';' }}"
        )
        + "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
    ),
    "texts joined by newlines, parts in place": Released(
        _messages(
            "{{ m.role + ':\n' }}{%- for c in m.content %}{%- if c.type == 'text' %}{{ c.text }}"
            "{%- else %}{{ '[<' + c.type + '>]' }}{%- endif %}{%- if not loop.last %}{{ '\n' }}"
            "{%- endif %}{%- endfor %}{{ '\n---\n' }}"
        )
        + "{%- if add_generation_prompt %}{{ 'assistant:\n' }}{%- endif %}",
        video=True,
    ),
    "media in order, then texts": Released(
        _messages(
            "{{ m.role + ': ' }}{%- for c in m.content if c.type != 'text' %}"
            "{{ '<' + c.type + '>' }}{%- endfor %}" + _SPACED
        )
        + "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}",
        video=True,
    ),
    "videos before images": Released(
        _messages("{{ m.role + ': ' }}" + _VIDEOS + _IMAGES + _SPACED)
        + "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}",
        video=True,
    ),
    "trims that differ by role": Released(
        _messages(
            "{{ m.role + ': ' }}" + _IMAGES + "{%- for c in m.content if c.type == 'text' %}"
            "{%- if m.role == 'user' %}{{ c.text.lstrip() }}{%- elif m.role == 'assistant' %}"
            "{{ c.text.rstrip('\n') }}{%- else %}{{ c.text.strip(' ') }}{%- endif %}{%- endfor %}"
            "{{ ';' }}"
        )
        + "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
    ),
    "three copies of the system text": Released(
        _messages(
            "{%- if m.role == 'system' %}{{ m.content[0].text + '|' + m.content[0].text | trim + "
            "'|' + m.content[0].text + '\n' }}{%- else %}{{ m.role + ': ' }}"
            + _IMAGES
            + _TEXTS
            + "{{ ';' }}{%- endif %}"
        )
        + "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
    ),
    "a default instruction in the first question": Released(
        "{%- for m in messages %}{%- if m.role == 'user' %}{{ '[INST] ' }}"
        "{%- if loop.first %}{{ 'Be brief.\n\n' }}{%- endif %}"
        + _IMAGES
        + _TEXTS
        + "{{ ' [/INST]' }}"
        "{%- elif m.role == 'assistant' %}{{ ' ' + m.content[0].text + eos_token }}{%- else %}"
        "{{ raise_exception('no system turn') }}{%- endif %}{%- endfor %}",
        system=False,
    ),
    "a whole body trimmed after a default instruction": Released(
        "{{ bos_token }}{%- for m in messages %}{%- set content = m.content %}"
        "{%- if loop.first %}{%- set content = 'Be brief.\n' + content %}{%- endif %}"
        "{%- if m.role == 'user' %}{{ '<U>' + content | trim + '<E>' }}"
        "{%- elif m.role == 'system' %}{{ raise_exception('no system turn') }}{%- else %}"
        "{{ '<A>' + m.content + '<E>' }}{%- endif %}{%- endfor %}<A>",
        strings=True,
        system=False,
    ),
    "a system string before lists, merged into the first turn": Released(
        "{{ bos_token }}{%- if messages[0].role == 'system' %}"
        "{%- set rule = messages[0].content + '\n\n' %}{%- set talk = messages[1:] %}{%- else %}"
        "{%- set rule = '' %}{%- set talk = messages %}{%- endif %}{%- for m in talk %}"
        "{%- set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<turn>' + role + '\n' + (rule if loop.first else '') }}{%- for c in m.content %}"
        "{%- if c.type == 'image' %}{{ '<image>' }}{%- else %}{{ c.text | trim }}{%- endif %}"
        "{%- endfor %}{{ '<end>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<turn>model\n' }}{%- endif %}",
        system_string=True,
    ),
    "a system string that is trimmed, and lists": Released(
        "{%- if messages[0].role == 'system' %}{%- set rule = messages[0].content | trim %}"
        "{%- set talk = messages[1:] %}{%- else %}{%- set rule = '' %}{%- set talk = messages %}"
        "{%- endif %}{{ '<S>Today Date: ' + strftime_now('%d %b %Y') + '\n\n' + rule + '<E>' }}"
        "{%- for m in talk %}{{ '<' + m.role + '>' }}{%- for c in m.content %}"
        "{%- if c.type == 'image' %}{{ '<image>' }}{%- else %}{{ c.text }}{%- endif %}"
        "{%- endfor %}{{ '<E>' }}{%- endfor %}{{ '<assistant>' }}",
        system_string=True,
    ),
    "thinking dropped up to its first end": Released(
        _messages(
            "{{ '<' + m.role + '>' }}"
            + _IMAGES
            + "{%- for c in m.content if c.type == 'text' %}{%- if m.role == 'assistant' and "
            "'</think>' in c.text %}{{ c.text.split('</think>', 1)[1] }}{%- else %}{{ c.text }}"
            "{%- endif %}{%- endfor %}{{ '<E>' }}"
        )
        + "{{ '<assistant>' }}"
    ),
    "the weekday and the hour": Released(
        "{{ 'It is ' + strftime_now('%A, %-d %B %Y, %H:%M') + '.\n' }}"
        + _VICUNA.replace(_VIDEOS, "")
    ),
    "the date in every question": Released(
        _messages(
            "{{ m.role + ' (' + strftime_now('%Y-%m-%d') + '): ' }}"
            + _IMAGES
            + _TEXTS
            + "{{ ';' }}"
        )
        + "{%- if add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
    ),
}
"""Neighbours of those forms."""

ALL: Mapping[str, Released] = {**VARIANTS, **REVISIONS, **EXPORTS, **NEIGHBOURS}
