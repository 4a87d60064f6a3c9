"""Who waits gets in, in order; whatever ends a request lets the next one in."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from llava_edge.profiles.errors import DeadlineError, EngineError
from llava_edge.runtime.generation import request_queue
from llava_edge.runtime.generation.request_queue import RequestQueue
from llava_edge.runtime.generation.stream import AnswerStream, Pieces, StreamHandle


def started(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def ended(*threads: threading.Thread) -> bool:
    for thread in threads:
        thread.join(30)
    return not any(thread.is_alive() for thread in threads)


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def endless(queue: RequestQueue) -> AnswerStream:
    """A stream that holds the queue for as long as somebody iterates it."""

    def pieces(handle: StreamHandle) -> Pieces:
        with queue.turn(handle.close, handle.thread):
            while not handle.is_cancelled():
                yield "piece"
        return None

    return AnswerStream(pieces)


def test_who_came_first_gets_in_first() -> None:
    queue, order = RequestQueue(), []

    def take(number: int) -> None:
        with queue.turn():
            order.append(number)

    threads = []
    with queue.turn():
        for number in range(40):
            threads.append(started(lambda number=number: take(number)))
            wait_until(lambda: len(queue._waiting) == len(threads))

    assert ended(*threads)
    assert order == list(range(40))


def test_who_comes_again_and_again_does_not_keep_others_out() -> None:
    queue, taken = RequestQueue(), {"greedy": 0, "modest": 0}
    stop = threading.Event()

    def take(name: str) -> None:
        while not stop.is_set():
            with queue.turn():
                taken[name] += 1
                time.sleep(0.001)

    threads = [started(lambda name=name: take(name)) for name in taken]
    wait_until(lambda: taken["greedy"] + taken["modest"] >= 200)
    stop.set()

    assert ended(*threads)
    assert abs(taken["greedy"] - taken["modest"]) <= 40


def test_who_waits_too_long_is_told_and_leaves_the_queue() -> None:
    queue, release = RequestQueue(), threading.Event()

    def hold() -> None:
        with queue.turn():
            release.wait(30)

    holder = started(hold)
    wait_until(lambda: queue._holder is not None)
    began = time.monotonic()
    for seconds in (0.2, -1.0):
        with (
            pytest.raises(DeadlineError, match="while other requests"),
            queue.turn(seconds=seconds),
        ):
            raise AssertionError("got in")
    assert 0.2 <= time.monotonic() - began < 5
    release.set()
    assert ended(holder)
    with queue.turn(seconds=0.001):
        pass


def test_an_error_inside_lets_the_next_one_in() -> None:
    queue = RequestQueue()
    with pytest.raises(ZeroDivisionError), queue.turn():
        raise ZeroDivisionError

    with queue.turn():
        pass


def test_closing_stops_the_holder_and_sends_away_who_waits() -> None:
    queue, said = RequestQueue(), []
    stream = endless(queue)
    began = threading.Event()

    def consume() -> None:
        for _ in stream:
            began.set()
            time.sleep(0.001)

    def ask() -> None:
        try:
            with queue.turn():
                said.append("got in")
        except EngineError as error:
            said.append(str(error))

    consumer = started(consume)
    assert began.wait(30)
    waiting = [started(ask) for _ in range(5)]
    wait_until(lambda: len(queue._waiting) == 5)
    with queue.closing():
        inside = queue._holder

    assert ended(consumer, *waiting)
    assert inside is not None
    assert said == ["the model is closed; load the artifact again"] * 5
    with pytest.raises(EngineError, match="the model is closed"), queue.turn():
        pass


def test_who_waits_is_sent_away_before_the_holder_ends() -> None:
    queue, refused = RequestQueue(), threading.Event()

    def ask() -> None:
        with pytest.raises(EngineError, match="closed"), queue.turn():
            pass
        refused.set()

    def close() -> None:
        with queue.closing():
            pass

    with queue.turn():
        asking = started(ask)
        wait_until(lambda: len(queue._waiting) == 1)
        closing = started(close)
        assert refused.wait(30)

    assert ended(asking, closing)


def test_two_that_close_at_once_do_so_one_after_the_other() -> None:
    queue, inside, most = RequestQueue(), [], []

    def close() -> None:
        with queue.closing():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    with queue.turn():
        threads = [started(close) for _ in range(4)]
        wait_until(lambda: len(queue._waiting) == 4)
        assert not most

    assert ended(*threads)
    assert most == [1, 1, 1, 1]


def test_who_closes_while_another_does_waits_for_it() -> None:
    queue, inside, leave, said = RequestQueue(), threading.Event(), threading.Event(), []

    def close() -> None:
        with queue.closing():
            inside.set()
            leave.wait(30)
            said.append("first")

    def close_again() -> None:
        with queue.closing():
            said.append("second")

    first = started(close)
    assert inside.wait(30)
    second = started(close_again)
    wait_until(lambda: len(queue._waiting) == 1)
    with pytest.raises(EngineError, match="the model is closed"), queue.turn():
        pass
    leave.set()

    assert ended(first, second)
    assert said == ["first", "second"]


def test_closing_from_inside_a_request_is_refused_and_possible_afterwards() -> None:
    queue = RequestQueue()
    with (
        queue.turn(),
        pytest.raises(EngineError, match="from inside a request"),
        queue.closing(),
    ):
        pass

    with queue.closing():
        pass


def test_a_stream_dropped_in_a_cycle_does_not_lock_out_its_own_thread() -> None:
    queue = RequestQueue()
    gc.disable()
    try:
        stream = endless(queue)
        next(stream)
        # An exception that a consumer keeps makes such a cycle of its frames.
        cycle = [stream]
        cycle.append(cycle)  # type: ignore[arg-type]
        del stream, cycle

        with queue.turn():
            pass
    finally:
        gc.enable()


def leave_in_a_cycle(queue: RequestQueue) -> None:
    """A stream of a thread that has gone, held by nothing but itself."""

    def leave() -> None:
        stream = endless(queue)
        next(stream)
        cycle = [stream]
        cycle.append(cycle)  # type: ignore[arg-type]

    assert ended(started(leave))


def test_who_waits_behind_a_stream_in_a_cycle_gets_in_although_nothing_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = RequestQueue()
    monkeypatch.setattr(request_queue, "_COLLECT_SECONDS", 0.02)
    gc.disable()
    try:
        leave_in_a_cycle(queue)

        def ask() -> None:
            with queue.turn():
                pass

        assert ended(*(started(ask) for _ in range(3)))
    finally:
        gc.enable()


def test_of_all_who_wait_the_first_alone_collects_and_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue, collecting = RequestQueue(), []
    monkeypatch.setattr(request_queue, "_COLLECT_SECONDS", 0.02)
    monkeypatch.setattr(gc, "collect", lambda *_: collecting.append(threading.get_ident()))
    holder = endless(queue)
    assert ended(started(lambda: next(holder)))

    def ask(seconds: float) -> None:
        with pytest.raises(DeadlineError), queue.turn(seconds=seconds):
            pass

    first = started(lambda: ask(1.5))
    wait_until(lambda: len(queue._waiting) == 1)
    others = [started(lambda: ask(0.2)) for _ in range(5)]
    assert ended(*others)
    assert ended(first)

    # Pauses of 0.02, 0.04, 0.08 … seconds. All others have left by then.
    assert 1 <= len(collecting) <= 7
    assert len(set(collecting)) == 1
    holder.close()


def test_a_thread_is_not_taken_for_one_that_has_gone() -> None:
    queue, said = RequestQueue(), []
    streams = [endless(queue)]
    numbers: list[int] = []

    def leave_it() -> None:
        numbers.append(threading.get_ident())
        next(streams[0])

    def ask() -> None:
        numbers.append(threading.get_ident())
        with pytest.raises(DeadlineError), queue.turn(seconds=0.01):
            said.append("got in")

    assert ended(started(leave_it))
    while len(numbers) < 2 or (numbers[0] not in numbers[1:] and len(numbers) < 20):
        assert ended(started(ask))

    assert numbers[0] in numbers[1:], "the system gave the number to no other thread"
    assert not said
    streams.pop().close()


def test_a_stream_that_is_dropped_lets_the_next_one_in_without_a_collection() -> None:
    queue = RequestQueue()
    gc.disable()
    try:
        dropped = started(lambda: next(endless(queue)) and None)
        assert ended(dropped)
        with queue.turn(seconds=5):
            pass
    finally:
        gc.enable()


def test_a_wait_may_be_longer_than_the_system_counts() -> None:
    queue = RequestQueue()
    with queue.turn(seconds=1e300):
        pass


def test_the_thread_that_goes_on_with_a_stream_owns_it() -> None:
    queue = RequestQueue()
    stream = endless(queue)
    assert ended(started(lambda: [next(stream) for _ in range(2)] and None))

    # That thread has gone; here the stream is ours.
    next(stream)
    with pytest.raises(EngineError, match="still has an open stream"), queue.turn():
        pass

    handed_on = threading.Event()

    def consume() -> None:
        next(stream)
        handed_on.set()
        wait_until(lambda: len(queue._waiting) == 1)
        stream.close()

    consumer = started(consume)
    assert handed_on.wait(30)
    with queue.turn():
        pass
    assert ended(consumer)


def test_a_stream_is_iterated_by_one_thread_at_a_time() -> None:
    inside, go = threading.Event(), threading.Event()

    def pieces(handle: StreamHandle) -> Pieces:
        inside.set()
        go.wait(30)
        yield "piece"
        return None

    stream = AnswerStream(pieces)
    found: list[str] = []
    consumer = started(lambda: found.append(next(stream)))
    assert inside.wait(30)
    with pytest.raises(EngineError, match="one thread at a time"):
        next(stream)
    go.set()

    assert ended(consumer)
    assert found == ["piece"]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    wait_until(lambda: threading.active_count() <= before)
