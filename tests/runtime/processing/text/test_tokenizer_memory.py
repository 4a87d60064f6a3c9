"""What a large tokenizer needs in a fresh process, against what a plan counts for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from llava_edge.profiles.memory.estimate import memory_constants

WORDS = 152_000
CHILD = """
import json, sys, time
from pathlib import Path
from llava_edge.runtime.artifact.manifest import TokenIds
from llava_edge.runtime.util.opened_file import OpenedFile
from llava_edge.runtime.processing.text.chat_prompt import Piece
from llava_edge.runtime.processing.text.tokenizer import Tokenizer

def mem(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return int(line.split()[1]) * 1024

size = int(sys.argv[2])
ids = TokenIds(image=size + 2, video=None, bos=size, stop=(size + 1,), num_text_tokens=size + 2)
before = mem("VmRSS")
tokenizer = Tokenizer.open(OpenedFile(Path(sys.argv[1])), ids)
opened = mem("VmRSS") - before
found = tokenizer.encode_pieces((Piece("text", "a <|end|> b"),))
print(json.dumps({
    "opened": opened, "sealed": mem("VmRSS") - before, "peak": mem("VmHWM") - before,
    "control": [i for i in found[1:] if i >= size],
}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 152,000 words, as Qwen2 has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = list(alphabet)
    merges: list[tuple[str, str]] = []
    known = set(words)
    place = 0
    while len(words) < WORDS:
        # Each word so far with each letter, so that every merge leads to a new word.
        left, right = words[place // len(alphabet)], alphabet[place % len(alphabet)]
        place += 1
        if left + right not in known:
            known.add(left + right)
            words.append(left + right)
            merges.append((left, right))
    backend = Backend(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    split: Any = pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|start|>", "<|end|>", "<image>")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", pair=None, special_tokens=[("<|start|>", WORDS)]
    )
    path = tmp_path_factory.mktemp("large") / "tokenizer.json"
    backend.save(str(path))
    return path


def test_the_plan_counts_what_a_large_tokenizer_needs(large: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(large), str(WORDS)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(done.stdout)
    constants = memory_constants()

    assert found["control"] == []
    for target in ("cpu", "cuda"):
        kept = WORDS * constants[target].bytes("tokenizer_per_token")
        peak = WORDS * constants[target].bytes("tokenizer_load_per_token")
        assert found["sealed"] <= kept, found
        assert found["peak"] <= peak, found
    # Control tokens in text need no second copy of the words.
    assert found["sealed"] - found["opened"] < 8 << 20, found
