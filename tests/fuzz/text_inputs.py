"""Prompts, options of a request and lines of quality questions to fuzz with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.mutate import mutated

_ALPHABETS = (
    "abcdefghij klmnop\n",
    "".join(map(chr, range(32))),
    "".join(map(chr, range(0x7F, 0x250))),
    "".join(map(chr, range(0x300, 0x370))),
    "".join(map(chr, range(0x4E00, 0x4E80))),
    "\u200b\u200d\u202e\u2066\ufeff\ufffe\uffff\u2028\u0085\u00ad\u1160",
    "🏳️‍🌈👩‍👩‍👧‍👦🇩🇪\U000e0041\U0010ffff",
    "".join(map(chr, range(0xD800, 0xD810))),
    "<>/|[]{}imagevdoINST#_▁ \t",
)


def prompt(random: Random, special: Sequence[str]) -> str:
    """Any text.

    Args:
        random: decides.
        special: what the tokenizer takes for control tokens.
    """
    act = random.randrange(10)
    if act == 0:
        return random.choice(("", " ", "\n", "\0", "\ufeff", "\ud800", "<image>", "<video>"))
    if act == 1:
        unit = random.choice(("a", "a ", "\U0001f600", "<image>", "\n", "█", "e\u0301", *special))
        return unit * random.choice((3_000, 30_000, 200_000, 1 << 20, 1_200_000))
    parts: list[str] = []
    for _ in range(random.randrange(1, 30)):
        kind = random.randrange(5)
        if kind == 0:
            parts.append(random.choice(special))
        elif kind == 1:
            token = random.choice(special)
            cut = random.randrange(len(token) + 1)
            parts.append(random.choice((token[:cut], token[cut:], token.upper(), token[::-1])))
        elif kind == 2:
            parts.append(random.choice(("<image>", "<video>", "<image", "image>", "<<image>>")))
        else:
            alphabet = random.choice(_ALPHABETS)
            parts.append("".join(random.choices(alphabet, k=random.randrange(1, 40))))
    return "".join(parts)


class _Strange:
    """Refuses to be anything."""

    def __repr__(self) -> str:
        return "a" * 10_000

    def __bool__(self) -> bool:
        raise ZeroDivisionError


def strange_value(random: Random) -> Any:
    """Something that few options can be."""
    return random.choice(
        (
            *(-1, 0, 1, 2, 3.5, -0.0, 1e308, 1e-308, 10**9, 10**30, -(10**30), 2**31, 2**63),
            *(
                float("nan"),
                float("inf"),
                float("-inf"),
                True,
                False,
                None,
                "",
                "1",
                "nan",
                "\ud800",
            ),
            *(b"1", [], [1], (), {}, {"a": 1}, set(), object(), _Strange(), 1j, print, int),
            *(np.int64(3), np.float32(0.5), np.float64("nan"), np.array(1), np.array([1, 2])),
        )
    )


OPTIONS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed"),
    *("prompt_lookup_num_tokens", "grid", "raw", "image_marks", "num_frames", "frame_choice"),
    "progress",
)


def options(random: Random) -> dict[str, Any]:
    """Keyword arguments of ``stream``, sound ones among strange ones."""
    sound = {
        "max_new_tokens": random.choice((1, 2, 3)),
        "temperature": random.choice((0, 0.2, 1.0, 1e-300, 1e300)),
        "top_k": random.choice((0, 1, 5, 10**12)),
        "top_p": random.choice((1.0, 0.5, 1e-300)),
        "repetition_penalty": random.choice((1.0, 1.3, 0.001, 1000.0)),
        "seed": random.choice((None, 0, 2**64, 10**40)),
        "prompt_lookup_num_tokens": random.choice((0, 1, 8)),
        "grid": random.choice((None, "base", "1x2", "2x2", "9x9", "", "1X2", "-1x2", "0x0")),
        "raw": random.choice((True, False)),
        "image_marks": random.choice((True, False)),
    }
    given = {name: sound[name] for name in random.sample(sorted(sound), random.randrange(4))}
    for name in random.sample(OPTIONS, random.choice((0, 1, 1, 1, 2, 3))):
        given[name] = strange_value(random)
    return given


_LINES = (
    {"image": "a.png", "question": "What is it?", "answers": ["one", "two"]},
    {"question": "Which?", "choices": ["x", "y"], "answer": "A", "kind": "letters"},
    {"image": ["a.png", "b.png"], "question": "Both?", "answer": "yes", "more": {"a": [1, None]}},
)


def quality_lines(random: Random) -> bytes:
    """Contents of a file of questions, damaged as text, as objects or as bytes."""
    lines: list[bytes] = []
    for _ in range(random.randrange(1, 6)):
        entry: dict[str, Any] = dict(random.choice(_LINES))
        act = random.randrange(8)
        if act == 0:
            entry[random.choice(sorted(entry))] = _json_value(random, 3)
        elif act == 1:
            entry.pop(random.choice(sorted(entry)))
        elif act == 2:
            entry["image"] = random.choice(
                ("/etc/passwd", "../../a", "\0", "", "a" * 5000, "\ud800", "~/x", ".", [[]], [None])
            )
        text = json.dumps(entry, ensure_ascii=random.random() < 0.5)
        if act == 3:
            depth = random.choice((10, 1000, 100_000))
            text = random.choice(("[" * depth, '{"a":' * depth, "[" * depth + "]" * depth))
        elif act == 4:
            number = random.choice(("NaN", "Infinity", "-1e999", "1" * 5000, "0x1", "1e5"))
            text = f'{{"question": "a", "answers": {number}, "image": {number}}}'
        raw = text.encode("utf-8", "surrogatepass")
        lines.append(mutated(random, raw, [raw]) if act == 5 else raw)
    joined = random.choice((b"\n", b"\n", b"\r\n", b"\n\n", b"\xe2\x80\xa8", b"\0")).join(lines)
    joined = random.choice((b"", b"", b"\xef\xbb\xbf", b"\xff\xfe")) + joined
    return mutated(random, joined, [joined]) if random.random() < 0.2 else joined


def _json_value(random: Random, depth: int) -> Any:
    leaves = (None, True, 0, -1, 1e300, 10**40, "", "text", "\ud800", "\0", "a" * 1000)
    if depth == 0 or random.random() < 0.5:
        return random.choice(leaves)
    inner = [_json_value(random, depth - 1) for _ in range(random.randrange(4))]
    return inner if random.random() < 0.5 else {str(i): item for i, item in enumerate(inner)}


def write_questions(random: Random, folder: Path) -> Path:
    """A file of ``quality_lines``."""
    path = folder / "questions.jsonl"
    path.write_bytes(quality_lines(random))
    return path
