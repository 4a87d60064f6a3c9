"""Conversations on which compiled segments are compared with the template they came from."""

from __future__ import annotations

from dataclasses import dataclass

from llava_edge.runtime.processing.text.chat_prompt import Media, Message, Text, user_message


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with a user's message, and its name for messages."""

    name: str
    messages: tuple[Message, ...]


ODD_TEXTS = {
    "a leading blank": " what is this?",
    "outer blanks": "  what is this?   ",
    "a final newline": "what is this?\n",
    "outer newlines": "\n\nwhat is this?\n\n",
    "outer blanks and newlines": " \n what is this?\n \n",
    "inner newlines": "first line\n\n  second line\n",
    "tabs": "\twhat\tis this?\t",
    "jinja": "{{ messages }} {% if true %} {# note #}",
    "markup": "<b>&amp; 'single' \"double\" \\ `back`</b>",
    "control tokens": "</s><s><|im_end|><|eot_id|><|endoftext|>",
    "instruction marks": "[INST] <<SYS>> x <</SYS>> [/INST]",
    "reasoning": "<think>\nit may be a cat\n</think>\n\nIt is a cat.",
    "reasoning without an opening mark": "it may be a cat</think> a cat",
    "reasoning that is closed twice": "<think>a</think>\nb</think>\n\nIt is a cat.",
    "role names": "USER: one ASSISTANT: two",
    "letters of many scripts": "Größe 日本語 עברית 🦙\u200d🔥",
    "a no-break space at the ends": "\u00a0what is this?\u00a0",
    "a mark as text": "the mark <image> as text",
    "one letter": "a",
    "braces": "{'type': 'text', 'text': 'x'}",
}


def check_conversations(*, system: bool, placed: bool, video: bool) -> tuple[Conversation, ...]:
    """At least 30 conversations; more where the template knows system turns or places media.

    Args:
        system: the template has system turns.
        placed: the template places media items, in any order of parts.
        video: the model has videos.
    """
    found: list[Conversation] = []
    rule = Message("system", (Text("Answer in one word."),))
    for turns in (1, 2, 3, 4):
        for images in (0, 1, 2, 3):
            messages = _dialogue(turns, images)
            name = f"{turns} turns, {images} images first"
            found.append(Conversation(name, messages))
            if system:
                found.append(Conversation(f"system, {name}", (rule, *messages)))
    for name, text in ODD_TEXTS.items():
        said = Message("assistant", (Text(text),))
        again = user_message("and?", images=1)
        odd = user_message(text, images=1)
        found += [
            Conversation(f"a question with {name}", (user_message(text),)),
            Conversation(f"an image and a question with {name}", (odd,)),
            Conversation(f"a later question with {name}", (*_dialogue(2, 0)[:2], odd)),
            Conversation(f"an answer with {name}", (user_message("what?"), said, again)),
        ]
        if system:
            odd_rule = Message("system", (Text(text),))
            found += [
                Conversation(f"a system text with {name}", (odd_rule, again)),
                Conversation(f"a system text, and a question with {name}", (rule, odd)),
            ]
    if placed:
        found += _positions(video)
    return tuple(found)


def _dialogue(turns: int, images: int) -> tuple[Message, ...]:
    messages: list[Message] = [user_message("what is in the first one?", images=images)]
    for turn in range(1, turns):
        messages.append(Message("assistant", (Text(f"number {turn} is a cat."),)))
        # The last question brings images of its own: later turns open like the first.
        messages.append(user_message(f"and number {turn + 1}?", images=images if turn > 1 else 0))
    return tuple(messages)


def _positions(video: bool) -> list[Conversation]:
    image, one, two = Media("image"), Text("first part"), Text("second part")
    shapes: dict[str, tuple[Text | Media, ...]] = {
        "two texts": (one, two),
        "two texts that touch": (Text("left"), Text(" right")),
        "two texts with outer blanks": (Text(" left \n"), Text("\n right ")),
        "an image last": (one, image),
        "an image between texts": (one, image, two),
        "an image first and two texts": (image, one, two),
        "images first and last": (image, one, image),
        "images around two texts": (image, one, image, two, image),
        "an image and no text": (image,),
        "two images and no text": (image, image),
        "an image and an empty text": (image, Text("")),
        "an image and blanks": (image, Text("  \n")),
    }
    if video:
        clip = Media("video")
        shapes |= {
            "a video and no text": (clip,),
            "a video first": (clip, one),
            "a video last": (one, clip),
            "a video between texts": (one, clip, two),
            "an image and a video": (image, clip, one),
            "a video and an image": (clip, image, one),
            "a text between an image and a video": (image, one, clip),
            "images around a video": (image, clip, image, one),
        }
    again = (Message("assistant", (Text("yes."),)), user_message("sure?"))
    found = []
    for name, parts in shapes.items():
        found.append(Conversation(f"a question of {name}", (Message("user", parts),)))
        found.append(Conversation(f"two turns, {name}", (Message("user", parts), *again)))
    return found
