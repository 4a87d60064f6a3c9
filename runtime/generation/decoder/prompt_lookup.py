"""PromptLookup: guesses the next tokens by finding the last ones earlier in prompt or answer.

Answers that quote, copy or edit what stands in the prompt repeat it token by token. What followed
the same few tokens before is a draft of what follows now; the model then checks it in one run.

Source: Saxena, "Prompt Lookup Decoding", 2023; transformers
``PromptLookupCandidateGenerator`` 5.23.0, from which this differs: an index in place of a search,
the latest match in place of the first, and drafts that may run into themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_NGRAM = 3
"""Most tokens that are compared; three rarely agree by chance."""

_LONGEST_PAUSE = 32
"""Matches: where nothing ever holds, one draft of one token in as many is what it costs."""


class PromptLookup:
    """The tokens so far, and where each run of one to three of them ended last.

    A step costs as many look-ups as ``MAX_NGRAM``, however long the prompt is. Memory is about half
    a kilobyte a text token; places cost eight bytes.

    Args:
        ids: of the prompt.
        places: ids that stand for images and videos. They are no text: runs of tokens neither hold
            nor span them, and drafts end in front of them.
    """

    def __init__(self, ids: Iterable[int], places: Sequence[int] = ()) -> None:
        self._places = frozenset(places)
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._since_place = 0
        self._match: int | None = None
        self._matched = 0
        for token in ids:
            self.append(int(token))

    @property
    def matched(self) -> int:
        """How many of the last tokens were found earlier: 0 to ``MAX_NGRAM``."""
        return self._matched

    def append(self, token: int) -> None:
        """Take the next token of the answer, and find where it and those before it stood last."""
        self._ids.append(token)
        self._match, self._matched = None, 0
        if token in self._places:
            self._since_place = 0
            return
        self._since_place += 1
        end = len(self._ids)
        for size in range(min(MAX_NGRAM, self._since_place), 0, -1):
            run = tuple(self._ids[-size:])
            if self._match is None and run in self._ends:
                self._match, self._matched = self._ends[run], size
            self._ends[run] = end

    def draft(self, most: int) -> list[int]:
        """At most so many tokens that followed the longest match; empty where there is none.

        A draft that reaches the end of what is known goes on with its own beginning, as it would
        in text that repeats itself.
        """
        if self._match is None:
            return []
        found: list[int] = []
        for at in range(self._match, self._match + most):
            token = self._ids[at] if at < len(self._ids) else found[at - len(self._ids)]
            if token in self._places:
                break
            found.append(token)
        return found


class DraftPace:
    """How long a draft to ask for, from how the drafts before it went; deterministic.

    A wrong draft costs a part of a step for each of its tokens, so trust is earned, by each size of
    match on its own: drafts begin short, double while all of one holds, and shrink to what held. A
    size whose draft failed at its first token sits out a number of matches: twice as many each time
    for three tokens, three times for two, four times for one.

    Args:
        most: longest draft.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._sizes = {size: _Trust(length=2 ** (size - 1)) for size in range(1, MAX_NGRAM + 1)}

    def length(self, matched: int) -> int:
        """Tokens to draft behind a match of that size, 0 for none. Asking counts as a match."""
        if not matched:
            return 0
        trust = self._sizes[matched]
        if trust.sits_out:
            trust.sits_out -= 1
            return 0
        return min(trust.length, self._most)

    def report(self, matched: int, drafted: int, accepted: int) -> None:
        """Tell how a draft behind a match of that size went."""
        trust = self._sizes[matched]
        if accepted == drafted:
            trust.length = min(max(trust.length, 2 * drafted), self._most)
        else:
            trust.length = max(1, accepted)
        trust.failures = 0 if accepted else trust.failures + 1
        # What is copied is found by a longer match one token later, so short ones can wait.
        growth = MAX_NGRAM + 2 - matched
        trust.sits_out = 0 if accepted else min(growth**trust.failures, _LONGEST_PAUSE)


@dataclass
class _Trust:
    length: int
    failures: int = 0
    sits_out: int = 0
