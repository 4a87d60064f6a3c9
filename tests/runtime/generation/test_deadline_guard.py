from __future__ import annotations

from collections.abc import Callable

import pytest

from llava_edge.profiles.errors import DeadlineError, RequestError
from llava_edge.runtime.generation.deadline import ThroughputEstimate, TimeBudget
from llava_edge.runtime.generation.deadline_guard import CancelledError, DeadlineGuard, TooSlowError
from llava_edge.runtime.util.progress import no_progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def never() -> bool:
    return False


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> Callable[..., DeadlineGuard]:
    """``watch(seconds, tiles, tokens)`` at a pace of 1 s a tile and 0.01 s a token."""
    pace = ThroughputEstimate()
    pace.report(1, 1.0, 100, 1.0)

    def make(
        seconds: float | None, tiles: int = 5, tokens: int = 100, may_lower: bool = True
    ) -> DeadlineGuard:
        budget = TimeBudget(seconds, clock)
        return DeadlineGuard(budget, pace, tiles, tokens, no_progress, never, may_lower=may_lower)

    return make


@pytest.mark.parametrize(
    "seconds", [0, -1, float("nan"), "2", True, pytest.param(10**9999, id="large")]
)
def test_a_deadline_is_a_positive_number(seconds: object) -> None:
    with pytest.raises(RequestError, match="deadline_seconds"):
        TimeBudget(seconds)  # type: ignore[arg-type]


def test_without_a_deadline_there_is_all_the_time(clock: Clock) -> None:
    budget = TimeBudget(None, clock)
    clock.now += 1e9

    assert budget.remaining is None
    assert not budget.is_over
    budget.require("the end")


def test_the_pace_follows_what_was_seen_lately() -> None:
    pace = ThroughputEstimate()
    assert pace.foresee(10, 1000) == 0

    pace.report(2, 1.0, 100, 1.0)
    assert pace.foresee(10, 1000) == pytest.approx(5 + 10)
    pace.report(2, 3.0, 0, 0.0)
    assert pace.foresee(10, 1000) == pytest.approx(10 + 10)


def test_the_first_token_may_take_half_of_the_time(watch: Callable[..., DeadlineGuard]) -> None:
    watch(12.0).require_time("all")

    with pytest.raises(TooSlowError, match=r"all takes about 6.00 s .* 11.90 s are left"):
        watch(11.9).require_time("all")


def test_nothing_is_too_slow_where_nothing_can_be_lowered(
    watch: Callable[..., DeadlineGuard], clock: Clock
) -> None:
    lowest = watch(0.5, may_lower=False)
    lowest.require_time("all")
    lowest("tiles", 0, 5)
    clock.now += 0.4
    lowest("tiles", 1, 5)


def test_a_pace_that_will_not_do_is_noticed_on_the_way(clock: Clock) -> None:
    budget = TimeBudget(4.0, clock)
    watch = DeadlineGuard(budget, ThroughputEstimate(), 5, 100, no_progress, never, may_lower=True)
    watch.require_time("all")
    watch("tiles", 0, 5)
    clock.now += 0.7
    watch("tiles", 1, 5)
    clock.now += 0.9
    with pytest.raises(TooSlowError, match=r"after 2 of 5 tiles the rest takes about 2\.40 s"):
        watch("tiles", 2, 5)


def test_the_prompt_behind_the_tiles_counts(
    watch: Callable[..., DeadlineGuard], clock: Clock
) -> None:
    hurried = watch(10.5, tiles=3, tokens=200)
    hurried("tiles", 0, 3)
    clock.now += 3.0
    # 6 s for two more tiles, and 2 s for 200 tokens at the pace of before.
    with pytest.raises(TooSlowError, match="about 8"):
        hurried("tiles", 1, 3)


def test_when_the_time_is_up_the_work_ends(
    watch: Callable[..., DeadlineGuard], clock: Clock
) -> None:
    late = watch(1.0, may_lower=False)
    clock.now += 1.0

    with pytest.raises(DeadlineError, match=r"1 s were given .* over at prompt 3 of 9"):
        late("prompt", 3, 9)
    with pytest.raises(DeadlineError):
        late.require_time("all")


def test_a_request_that_nobody_wants_ends(clock: Clock) -> None:
    watch = DeadlineGuard(
        TimeBudget(), ThroughputEstimate(), 1, 1, no_progress, lambda: True, may_lower=True
    )

    with pytest.raises(CancelledError):
        watch("tiles", 0, 1)


def test_what_is_watched_is_reported(watch: Callable[..., DeadlineGuard]) -> None:
    seen: list[tuple[str, int, int]] = []
    told = DeadlineGuard(
        TimeBudget(),
        ThroughputEstimate(),
        1,
        1,
        lambda *what: seen.append(what),
        never,
        may_lower=True,
    )
    told("tiles", 0, 2)
    told("tiles", 2, 2)

    assert seen == [("tiles", 0, 2), ("tiles", 2, 2)]
