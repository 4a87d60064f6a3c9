"""Prompts of an exact number of tokens, as text for us and as ids for the peer.

Both must see the very same ids. So the model gets a tokenizer that knows one word for each id, and
a prompt is so many words, joined the way ``convert --no-template`` joins question and answer.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


@dataclass(frozen=True)
class PeerPrompt:
    """A prompt without an image.

    Attributes:
        question: its first part.
        answer: its second.
        ids: of both, bos first.
    """

    question: str
    answer: str
    ids: tuple[int, ...]


def write_word_tokenizer(path: Path, num_tokens: int) -> None:
    """Let a ``tokenizer.json`` know one word for each id, beside its control tokens."""
    document = json.loads(path.read_text("utf-8"))
    control = {token["id"]: token["content"] for token in document["added_tokens"]}
    vocab = {control.get(number, f"w{number}"): number for number in range(num_tokens)}
    unknown = document["model"].get("unk_token") or "w0"
    document |= {
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [],
            "unk_token": unknown,
            "ignore_merges": True,
        },
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "\\s+"},
            "behavior": "Removed",
            "invert": False,
        },
        "decoder": None,
    }
    path.write_text(json.dumps(document), "utf-8")


def draw_prompts(tokenizer: Path, count: int, num_tokens: int, seed: int) -> tuple[PeerPrompt, ...]:
    """Prompts of exactly ``num_tokens`` ids; words are as unequally frequent as in a language.

    Args:
        tokenizer: that ``write_word_tokenizer`` wrote.
        count: prompts.
        num_tokens: ids of each.
        seed: of the words.
    """
    backend = Tokenizer.from_file(str(tokenizer))
    words = sorted(word for word in backend.get_vocab() if word.startswith("w"))
    # The same frequencies for every seed: held-out prompts are of the same language.
    random.Random(0).shuffle(words)
    frequencies = [1.0 / rank for rank in range(1, len(words) + 1)]
    draw = random.Random(seed)
    added = len(backend.encode("").ids)
    prompts = []
    for _ in range(count):
        question, *answer = draw.choices(words, frequencies, k=num_tokens - added)
        text = " ".join(answer)
        ids = backend.encode(f"\n{question}\n{text}").ids
        if len(ids) != num_tokens:
            raise ValueError(f"{tokenizer} knows words of more than one id")
        prompts.append(PeerPrompt(question, text, tuple(ids)))
    return tuple(prompts)


def write_conversations(folder: Path, prompts: Sequence[PeerPrompt]) -> None:
    """A calibration folder of these prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in prompts)
    (folder / "prompts.jsonl").write_text("".join(lines), "utf-8")


def calibration_digest(prompts: Sequence[PeerPrompt]) -> str:
    """What the journal of a conversion says of these ids, all of them text (kind 0).

    See ``digest`` of a CalibrationSet.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        ids = np.asarray(prompt.ids, np.int64)
        seal = hashlib.sha256(ids.tobytes())
        seal.update(np.zeros(len(ids), np.uint8).tobytes())
        digest.update(seal.digest())
    return digest.hexdigest()
