from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_edge.runtime.generation.decoder.prompt_lookup import MAX_NGRAM, DraftPace, PromptLookup

PLACE = 9
_tokens = st.lists(st.sampled_from([0, 1, 2, PLACE]), max_size=40)


def naive(ids: list[int], most: int) -> tuple[int, list[int]]:
    """Size of the longest match and its draft, by looking at every position."""
    for size in range(MAX_NGRAM, 0, -1):
        run = ids[len(ids) - size :]
        if len(run) < size or PLACE in run:
            continue
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == run:
                known = list(ids)
                while len(known) < len(ids) + most:
                    if known[end] == PLACE:
                        break
                    known.append(known[end])
                    end += 1
                return size, known[len(ids) :]
    return 0, []


@given(_tokens, _tokens, st.integers(0, 12))
def test_drafts_are_those_of_a_search_through_everything(
    prompt: list[int], answer: list[int], most: int
) -> None:
    lookup = PromptLookup(prompt, [PLACE])
    for token in answer:
        lookup.append(token)

    matched, draft = naive(prompt + answer, most)

    assert (lookup.matched, lookup.draft(most)) == (matched, draft)


def test_the_longest_match_wins_over_a_later_one() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 7, 3, 5, 1, 2, 3])

    assert (lookup.matched, lookup.draft(2)) == (3, [4, 7])


def test_of_equal_matches_the_last_wins() -> None:
    lookup = PromptLookup([1, 2, 5, 1, 2, 6, 1, 2])

    assert (lookup.matched, lookup.draft(1)) == (2, [6])


def test_runs_neither_hold_nor_span_an_image_and_drafts_end_before_one() -> None:
    spanning = PromptLookup([1, PLACE, 2, 7, 1, PLACE, 2], [PLACE])
    reaching = PromptLookup([1, 2, 3, PLACE, 1], [PLACE])
    standing = PromptLookup([PLACE, PLACE, PLACE], [PLACE])

    assert (spanning.matched, spanning.draft(3)) == (1, [7, 1])
    assert reaching.draft(9) == [2, 3]
    assert (standing.matched, standing.draft(9)) == (0, [])


def test_a_draft_may_go_on_with_its_own_beginning() -> None:
    assert PromptLookup([4, 5, 6, 4]).draft(7) == [5, 6, 4, 5, 6, 4, 5]


def test_drafts_double_while_they_hold_and_shrink_to_what_held() -> None:
    pace = DraftPace(10)
    lengths = []
    for accepted in (4, 8, 10, 3, 3):
        lengths.append(pace.length(3))
        pace.report(3, lengths[-1], min(accepted, lengths[-1]))

    assert lengths == [4, 8, 10, 10, 3]
    # Sizes earn their trust apart.
    assert (pace.length(2), pace.length(1), pace.length(0)) == (2, 1, 0)


@pytest.mark.parametrize(
    ("size", "tries"),
    [
        # 2, 4, 8, 16 and 32 matches sit out between the tries.
        (3, [0, 3, 8, 17, 34, 67]),
        (2, [0, 4, 14, 42]),
        (1, [0, 5, 22, 55]),
    ],
)
def test_a_size_that_fails_sits_out_longer_each_time_and_returns_when_it_holds(
    size: int, tries: list[int]
) -> None:
    pace = DraftPace(8)
    asked = []
    for _ in range(tries[-1] + 1):
        asked.append(pace.length(size))
        if asked[-1]:
            pace.report(size, asked[-1], 0)

    assert [index for index, length in enumerate(asked) if length] == tries
    while not pace.length(size):
        pass
    pace.report(size, 1, 1)
    assert pace.length(size) == 2


def test_where_nothing_holds_a_draft_in_33_is_all_it_costs() -> None:
    pace = DraftPace(8)
    drafted = 0
    for _ in range(1000):
        if length := pace.length(1):
            drafted += length
            pace.report(1, length, 0)

    assert drafted <= 5 + 1000 // 33


def test_a_short_draft_that_held_does_not_lower_the_next() -> None:
    pace = DraftPace(8)
    pace.report(3, 4, 4)
    # The end of the answer cut this one.
    pace.report(3, 1, 1)

    assert pace.length(3) == 8
