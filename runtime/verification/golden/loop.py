"""GoldenLoop: what the reference makes of sampling options and of token ids, kept in the artifact.

It travels in the golden file as one JSON value. With it a board without torch compares how tokens
are drawn and how text is streamed. Logits do not travel: both sides draw the same ones from whole
numbers (``drawn_logits``), so that every machine has the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from llava_edge.profiles.errors import ArtifactError, RequestError
from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.generation.loop import FinishReason
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.json_codec import from_json, to_json
from llava_edge.runtime.util.validation import require_count

LogitKind = Literal["spread", "peaked", "tied", "equal", "holes", "steep"]
"""``spread`` evenly from -8 to 8; ``peaked`` few high ones; ``tied`` four values; ``equal`` one
value; ``holes`` spread, a quarter at minus infinity; ``steep`` spread eight times as wide."""

_MOST_CASES = 64
_MOST_IDS = 256
_MOST_LOGITS = 4096
_AGAIN = "Copy or convert the artifact again."


@dataclass(frozen=True)
class DrawCase:
    """One choice of sampling options, and what is drawn with it.

    Attributes:
        name: for reports.
        temperature: of ``GenerationConfig``, as the next three and ``seed``.
        top_k: see there.
        top_p: see there.
        repetition_penalty: see there.
        seed: see there.
        logits: of which kind.
        logits_seed: of the first row; each further row has the next number.
        vocab_size: length of a row.
        num_text_tokens: ids from here on are never sampled.
        places: ids that are never sampled.
        prompt: ids that the penalty counts from the start.
        quantiles: numbers in [0, 1) in place of the random one.
        quantile_ids: what each of them draws from the first row.
        ids: what ``seed`` draws, a row each.
    """

    name: str
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int
    logits: LogitKind
    logits_seed: int
    vocab_size: int
    num_text_tokens: int
    places: tuple[int, ...]
    prompt: tuple[int, ...]
    quantiles: tuple[float, ...] = ()
    quantile_ids: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()

    @property
    def options(self) -> GenerationConfig:
        """As the runtime takes them.

        Raises:
            RequestError: one is out of range.
        """
        return GenerationConfig(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )

    def row(self, number: int) -> Array:
        """Logits float32 (vocab_size,) of the ``number``-th token."""
        return drawn_logits(self.logits, self.logits_seed + number, self.vocab_size)


@dataclass(frozen=True)
class TextCase:
    """Token ids that the model is made to say, and what a user must get.

    Attributes:
        name: for reports.
        ids: what the model says.
        count: so many of them are the answer.
        finish_reason: of the answer.
        max_new_tokens: that the request allows.
        text: of the answer.
        least: characters that must have been handed out once each id of the answer is there.
    """

    name: str
    ids: tuple[int, ...]
    count: int
    finish_reason: FinishReason
    max_new_tokens: int
    text: str
    least: tuple[int, ...]


@dataclass(frozen=True)
class GoldenLoop:
    """All cases of one artifact."""

    draws: tuple[DrawCase, ...]
    texts: tuple[TextCase, ...]

    def to_json(self) -> Any:
        """The JSON value that ``parse_loop`` reads."""
        return to_json(self)


def parse_loop(value: Any, manifest: Manifest, where: str) -> GoldenLoop:
    """Read and check what the golden file holds about the loop.

    Args:
        value: parsed JSON.
        manifest: of the artifact.
        where: name of the file, for messages.

    Raises:
        ArtifactError: it is malformed, or not of this model.
    """
    try:
        loop = from_json(GoldenLoop, value, "loop")
        for fault in _faults(loop, manifest):
            raise ArtifactError(fault)
    except ArtifactError as error:
        raise ArtifactError(f"{where} holds no golden loop cases: {error}. {_AGAIN}") from error
    return loop


def _faults(loop: GoldenLoop, manifest: Manifest) -> list[str]:
    vocab = manifest.model.text.vocab_size
    faults: list[str] = []
    if not (0 < len(loop.draws) <= _MOST_CASES and 0 < len(loop.texts) <= _MOST_CASES):
        faults.append(f"it must list 1 to {_MOST_CASES} cases of each kind")
    for name in (*(draw.name for draw in loop.draws), *(text.name for text in loop.texts)):
        if not (name.isprintable() and 0 < len(name) <= 80):
            faults.append(f"a case has the name {name!r:.90}")
    for draw in loop.draws:
        try:
            _check_draw(draw)
        except RequestError as error:
            faults.append(f"case {draw.name}: {error}")
    for text in loop.texts:
        if not 0 < text.count <= len(text.ids) <= _MOST_IDS or len(text.least) != text.count:
            faults.append(f"case {text.name}: {text.count} ids of {len(text.ids)} are no answer")
        elif not all(0 <= each < vocab for each in text.ids):
            faults.append(f"case {text.name}: an id lies outside 0 to {vocab - 1}")
        elif not 1 <= text.max_new_tokens <= _MOST_IDS:
            faults.append(
                f"case {text.name}: max_new_tokens is {text.max_new_tokens}, not 1 to {_MOST_IDS}"
            )
    return faults


def _check_draw(case: DrawCase) -> None:
    assert case.options
    size = require_count("vocab_size", case.vocab_size, 1, _MOST_LOGITS)
    require_count("logits_seed", case.logits_seed, 0, 1 << 32)
    require_count("num_text_tokens", case.num_text_tokens, 1, size)
    for name, ids, most in (
        ("places", case.places, size),
        ("prompt", case.prompt, 1 << 40),
        ("quantile_ids", case.quantile_ids, size),
        ("ids", case.ids, size),
    ):
        if len(ids) > _MOST_IDS:
            raise RequestError(f"{name} has {len(ids)} entries; at most {_MOST_IDS} are read")
        for each in ids:
            require_count(name, each, 0, most - 1)
    if len(case.quantiles) != len(case.quantile_ids):
        raise RequestError("quantiles and quantile_ids have different lengths")
    if not all(0 <= each < 1 for each in case.quantiles):
        raise RequestError("a quantile lies outside [0, 1)")


@lru_cache(maxsize=1024)
def drawn_logits(kind: LogitKind, seed: int, size: int) -> Array:
    """Logits float32 (size,) that are the same on every machine; not to be written to.

    Whole numbers are mixed (splitmix64); what follows are sums and products of float64, which IEEE
    754 rounds the same everywhere.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    first, second = (_uniform(2 * seed + part, size) for part in range(2))
    spread = 16.0 * first - 8.0
    if kind == "peaked":
        values = 12.0 * first * second * second - 3.0
    elif kind == "tied":
        values = np.floor(4.0 * first) - 1.0
    elif kind == "equal":
        values = np.full(size, 1.5)
    elif kind == "holes":
        values = np.where(second < 0.25, -np.inf, spread)
    else:
        values = spread * (8.0 if kind == "steep" else 1.0)
    found: Array = values.astype(np.float32)
    found.flags.writeable = False
    return found


def _uniform(stream: int, size: int) -> Array:
    """float64 (size,) in [0, 1), of 20 bits each."""
    mask = (1 << 64) - 1
    start = np.uint64(stream * 0xD1342543DE82EF95 & mask)
    with np.errstate(over="ignore"):
        mixed = start + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    found: Array = (mixed >> np.uint64(44)).astype(np.float64) / (1 << 20)
    return found
