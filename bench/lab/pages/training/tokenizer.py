"""Tokenizer and chat template of the small model: byte-level, words of the questions merged.

What stands on pages is in capitals and digits, and merges are learnt from small letters, so each
character that is read or copied stays a token of its own; everything else can be encoded, too.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from llava_edge.bench.lab.pages.drawing.page import COLOURS, SHAPES

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
IMAGE = "<image>"
ASK, REPLY = "[INST]", "[/INST]"

MAX_VOCABULARY = 512
_CORNERS = ("top left", "top right", "bottom left", "bottom right")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '[INST]' }}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{{ '[/INST]' }}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{{ '</s>' }}"
    "{%- endif -%}"
    "{%- endfor -%}\n"
)
"""Mistral's turns without blanks; the tokenizer puts ``<s>`` first. There is no system turn."""


def train_tokenizer() -> Tokenizer:
    """Train the tokenizer on the wording of the questions; always the same."""
    tokenizer = Tokenizer(BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=[UNK, BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_wording(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (IMAGE, ASK, REPLY)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def _wording() -> list[str]:
    sentences = [
        "How many lines are there?",
        "What is the number on line",
        "What is the first word on line",
        "What is the last word on line",
        "What number is next to",
        "What word is below",
        "Which line is",
        "How many bars are there?",
        "Which bar is the tallest?",
        "What colour is the tallest bar?",
        "Which bar is the shortest?",
        "What colour is bar",
        "Repeat",
    ]
    sentences += [f"What is at the {corner}?" for corner in _CORNERS]
    for colour in COLOURS:
        sentences += [f"Which bar is {colour}?", f"How many shapes are {colour}?", colour]
        sentences.append(f"What shape is {colour}?")
    for shape in SHAPES:
        sentences += [f"How many {shape}s are there?", f"What colour is the {shape}?", shape]
    # Twice, as a pair that is seen once is not merged.
    return sentences * 2
