"""Tokenizer and chat template of a random checkpoint, trained on the sentences below.

Small, complete and made here: byte-level BPE, so every string can be encoded, with the control
tokens and the turn format of the backbone's family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

Backbone = Literal["llama", "mistral", "qwen2"]

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"
MIN_VOCAB_SIZE = 288
"""256 bytes, the control tokens, and room for a few merges."""

_MAX_TRAINED = 2048
_SENTENCES = (
    "What is shown in this image? Describe the image in detail, please.",
    "The picture shows a small boat on a quiet lake with mountains in the background.",
    "How many people are in the photo, and what are they doing?",
    "There are three people at a wooden table; one of them is reading a newspaper.",
    "What is the total on this receipt? The total is 12.50, paid in cash on 2024-03-17.",
    "Read the text on the sign. It says: no parking between 8:00 and 18:00.",
    "Which colour is the car on the left? The car on the left is red, the other one is white.",
    "A curious person asks questions and the assistant gives helpful, detailed and polite answers.",
    "Answer the questions. Compare the first image with the second image and list differences.",
    "Is it day or night in the video? What happens at the end of the video?",
    "Yes, it is raining. No, the window is closed and the light is on.",
    "Ein Bild sagt mehr als tausend Worte. Où est le chat ? El perro está en la cocina.",
)


@dataclass(frozen=True)
class Family:
    """Control tokens and turn format that go with a backbone."""

    first_tokens: tuple[str, ...]
    last_tokens: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    unk: str | None
    adds_bos: bool
    chat_template: str


_TURN_PARTS = (
    "{%- macro media(message) -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'video' -%}{{ '<video>\\n' }}{%- endif -%}"
    "{%- endfor -%}{%- endmacro -%}"
    "{%- macro words(message) -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endmacro -%}"
)
_VICUNA = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ words(message) + ' ' }}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ 'USER: ' + media(message) + words(message) + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + words(message) + ' ' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
_INSTRUCT = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{ '<<SYS>>\\n' + words(message) + '\\n<</SYS>>\\n\\n' }}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ '[INST] ' + media(message) + words(message) + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + words(message) + ' </s>' }}{%- endif -%}"
    "{%- endfor -%}"
)
_CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + media(message) + words(message)"
    " + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

_LLAMA_TOKENS = ("<unk>", "<s>", "</s>")
FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        _LLAMA_TOKENS, ("<pad>",), "<s>", "</s>", "<pad>", "<unk>", True, _TURN_PARTS + _VICUNA
    ),
    "mistral": Family(
        _LLAMA_TOKENS, ("<pad>",), "<s>", "</s>", "<pad>", "<unk>", True, _TURN_PARTS + _INSTRUCT
    ),
    "qwen2": Family(
        (),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        "<|endoftext|>",
        None,
        False,
        _TURN_PARTS + _CHATML,
    ),
}
"""By backbone; where the control tokens stand in the vocabulary follows each family's habit."""


def train_tokenizer(backbone: Backbone, vocab_size: int, video: bool = False) -> Tokenizer:
    """Train the tokenizer; the same arguments always give the same file.

    Args:
        backbone: decides control tokens and whether a bos token is put first.
        vocab_size: rows of the embedding table; all ids are below it.
        video: whether there is a ``<video>`` token, too.

    Raises:
        ValueError: the table is too small for a byte-level vocabulary.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size {vocab_size} is below {MIN_VOCAB_SIZE}")
    family = FAMILIES[backbone]
    marks = (VIDEO_TOKEN, IMAGE_TOKEN) if video else (IMAGE_TOKEN,)
    # Qwen brings its control tokens along; a llama gets the image mark first, then padding.
    groups = (marks, family.last_tokens) if family.first_tokens else (family.last_tokens, marks)
    added = [token for group in groups for token in group]
    tokenizer = Tokenizer(BPE(unk_token=family.unk))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=min(vocab_size - len(added), _MAX_TRAINED),
        min_frequency=2,
        special_tokens=list(family.first_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in added]
    )
    if family.adds_bos and family.bos is not None:
        bos_id = tokenizer.token_to_id(family.bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos}:1 $B:1",
            special_tokens=[(family.bos, bos_id)],
        )
    return tokenizer
