"""Requests for which memory or time does not suffice: they give way, and the model stays sound."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge.profiles.errors import DeadlineError, OutOfMemoryError, PromptError, RequestError
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.backends.onnxruntime import Binding, Session, _map_error
from llava_edge.runtime.generation.decoder.sampling import Sampler
from llava_edge.runtime.loading.memory_fit import least_context
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from llava_edge.runtime.util import allocation
from llava_edge.runtime.util.allocation import RESERVE_BYTES
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.encoder import VisionEncoder

QUESTION = "What is this?"
TOKENS = 6


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


@pytest.fixture
def model(artifact: Path) -> Iterator[LlavaEdge]:
    with LlavaEdge.load(artifact, threads=1) as loaded:
        yield loaded


@pytest.fixture
def wide() -> Image.Image:
    random = np.random.default_rng(3)
    return Image.fromarray(random.integers(0, 256, (120, 200, 3), np.uint8))


def expected(model: LlavaEdge, image: Image.Image, grid: str | None = None) -> tuple[int, ...]:
    return model.generate(QUESTION, [image], grid=grid, max_new_tokens=TOKENS).token_ids


class Failing:
    """Free memory that is gone at some questions, counted from 0.

    Attributes:
        asked: what asked, in order.
    """

    def __init__(self, patch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
        self.asked: list[str] = []
        real = allocation.require_free

        def require(nbytes: int, what: str) -> None:
            self.asked.append(what)
            gone = fails(len(self.asked) - 1)
            free = 0 if gone else None
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(allocation, "available_host_bytes", lambda: free)
                inner.setattr(allocation, "_ASKED_FROM", 0)
                real(nbytes, what)

        for module in _modules_that_ask():
            patch.setattr(module, "require_free", require)


def _modules_that_ask() -> list[Any]:
    from llava_edge.runtime.generation import engine
    from llava_edge.runtime.processing.images import loading as images
    from llava_edge.runtime.processing.video import video_reader

    return [allocation, engine, images, video_reader]


def never(_: int) -> bool:
    return False


def test_tiles_are_given_up_until_the_request_fits(
    model: LlavaEdge, wide: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {grid: expected(model, wide, grid) for grid in (None, "1x2", "base")}
    assert len(set(answers.values())) == 3
    memory = model._engine._memory
    tokens = {g: model.count_tokens(QUESTION, [wide], grid=g) for g in ("1x2", "base")}
    monkeypatch.setattr(allocation, "_ASKED_FROM", 0)

    for grid, tiles in (("1x2", 3), ("base", 1)):
        model.teacher_forced_logits("x", raw=True)
        room = memory.host_bytes(tiles, 0, tokens[grid]) + RESERVE_BYTES
        monkeypatch.setattr(allocation, "available_host_bytes", lambda room=room: room)
        answer = model.generate(QUESTION, [wide], max_new_tokens=TOKENS)
        assert answer.token_ids == answers[grid]
        assert len(answer.degraded) == 1
        assert answer.degraded[0].startswith(f"grid lowered to {grid}: a request of ")

    monkeypatch.setattr(allocation, "available_host_bytes", lambda: None)
    after = model.generate(QUESTION, [wide], max_new_tokens=TOKENS)
    assert (after.token_ids, after.degraded) == (answers[None], ())


def test_an_arena_that_refuses_in_the_middle_of_a_run_is_given_way_to(
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    wide: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_artifact(make_checkpoint("odd", backbone="mistral"), profile="a100")
    with LlavaEdge.load(made, "cpu", allow_slow=True, threads=1) as model:
        base = expected(model, wide, "base")
        most = 1 + model.count_tokens(QUESTION, [wide], grid="base")
        real = Binding.run

        def run(self: Binding, **how: bool) -> None:
            # As the provider of a GPU says it where its limit is reached.
            held = self._bound.get("in inputs_embeds")
            if held is not None and held.shape[1] > most:
                text = "Available memory of 1048576 is smaller than requested bytes of 4194304"
                raise _map_error(RuntimeError(f"[ONNXRuntimeError] : 6 : {text}"), "running")
            real(self, **how)

        monkeypatch.setattr(Binding, "run", run)
        answer = model.generate(QUESTION, [wide], max_new_tokens=TOKENS)
        assert answer.token_ids == base
        (said,) = answer.degraded
        assert said.startswith("grid lowered to base: memory ran out while running: ")
        monkeypatch.undo()
        assert model.generate(QUESTION, [wide], max_new_tokens=TOKENS).degraded == ()


def test_then_the_context_is_cut_to_the_request(
    model: LlavaEdge, wide: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = expected(model, wide, "base")
    loaded = model.context_tokens
    failing = Failing(monkeypatch, lambda place: "a request of" in failing.asked[place] and full())

    def full() -> bool:
        return model.context_tokens > 100

    model.teacher_forced_logits("x", raw=True)
    answer = model.generate(QUESTION, [wide], max_new_tokens=TOKENS)

    needed = answer.prompt_tokens + TOKENS
    assert answer.token_ids == base
    assert [given_up.partition(":")[0] for given_up in answer.degraded] == [
        "grid lowered to base",
        f"context lowered from {loaded} to {needed} tokens",
    ]
    assert model.context_tokens == needed
    # What it holds now is told before any work, as ever.
    with pytest.raises(RequestError, match=f"the context holds {needed}"):
        model.generate("many words " * needed)
    again = model.generate(QUESTION, [wide], grid="base", max_new_tokens=TOKENS)
    assert again.token_ids == base
    # It is so for good, and so it is told with every answer.
    assert again.degraded == answer.degraded[1:]


def test_a_context_that_is_cut_keeps_room_for_an_image_while_that_suffices(
    model: LlavaEdge, wide: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, least = model.context_tokens, least_context(model.artifact.manifest)
    plain = model.generate("Hello", max_new_tokens=TOKENS)
    needed = plain.prompt_tokens + TOKENS
    assert needed < least < loaded
    normal = expected(model, wide)

    def cut_of(held: int) -> Any:
        with monkeypatch.context() as patch:
            failing = Failing(patch, lambda place: "a request" in failing.asked[place] and full())

            def full() -> bool:
                return model.context_tokens == held

            return model.generate("Hello", max_new_tokens=TOKENS)

    for held, left in ((loaded, least), (least, needed)):
        answer = cut_of(held)
        assert answer.token_ids == plain.token_ids
        assert model.context_tokens == left
        (given_up,) = answer.degraded
        assert given_up.startswith(f"context lowered from {loaded} to {left} tokens: ")
        if left == least:
            assert expected(model, wide) == normal


def test_what_cannot_give_way_is_out_of_memory_and_the_next_request_is_answered(
    model: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = model.generate("Hello", max_new_tokens=TOKENS).token_ids
    model.teacher_forced_logits("x", raw=True)
    with monkeypatch.context() as patch:
        Failing(patch, lambda _: True)
        with pytest.raises(OutOfMemoryError, match="MiB are free"):
            model.generate("Hello", max_new_tokens=model.context_tokens)

    assert model.generate("Hello", max_new_tokens=TOKENS).token_ids == plain


def test_a_cache_that_found_no_room_is_taken_by_the_next_request(
    model: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = model.generate("Hello", max_new_tokens=TOKENS)
    with monkeypatch.context() as patch:
        failing = Failing(patch, lambda _: True)
        for _ in range(2):
            with pytest.raises(OutOfMemoryError, match="MiB are free"):
                model.generate("Hello", max_new_tokens=TOKENS)
        assert any("a buffer" in what for what in failing.asked)

    assert model.context_tokens == plain.prompt_tokens + TOKENS
    assert model.generate("Hello", max_new_tokens=TOKENS).token_ids == plain.token_ids


@pytest.mark.parametrize("lasting", [False, True])
def test_memory_that_fails_anywhere_is_an_answer_and_the_next_request_is_normal(
    artifact: Path, wide: Image.Image, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "prompt_lookup_num_tokens": 2}
    with contextlib.ExitStack() as stack:
        load = partial(LlavaEdge.load, artifact, threads=1, vision_cache_bytes=1 << 20)
        model = stack.enter_context(load())
        loaded = model.context_tokens

        def ask() -> Any:
            # As a file, so that decoding asks as well; from an empty cache.
            model.teacher_forced_logits("x", raw=True)
            model._engine._embedder._encoder._cache.__init__(1 << 20)
            return model.generate(QUESTION, [png(wide)], **options)

        with monkeypatch.context() as patch:
            normal = ask()
            counted = Failing(patch, never)
            assert ask().token_ids == normal.token_ids
        sites = len(counted.asked)
        assert len(set(counted.asked)) >= 10

        outcomes = {"refused": 0, "gave way": 0, "went on": 0}
        for place in range(sites):
            with monkeypatch.context() as patch:
                fails = (lambda n, k=place: n >= k) if lasting else (lambda n, k=place: n == k)
                Failing(patch, fails)
                try:
                    answer = ask()
                    given = bool(answer.degraded) or answer.token_ids == normal.token_ids
                    assert given, counted.asked[place]
                    outcomes["gave way" if answer.degraded else "went on"] += 1
                except OutOfMemoryError:
                    outcomes["refused"] += 1
            again = ask()
            assert again.token_ids == normal.token_ids, counted.asked[place]
            if model.context_tokens == loaded:
                assert again.degraded == ()
            else:
                (given_up,) = again.degraded
                assert given_up.startswith(f"context lowered from {loaded} to ")
                model = stack.enter_context(load())
    assert outcomes["refused"] if lasting else outcomes["gave way"] and outcomes["went on"]


def test_memory_that_fails_while_loading_is_refused_and_loading_again_works(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        counted = Failing(patch, never)
        LlavaEdge.load(artifact, threads=1).close()
    assert len(counted.asked) > 4
    for place in range(len(counted.asked)):
        with monkeypatch.context() as patch:
            Failing(patch, lambda n, k=place: n == k)
            with pytest.raises(OutOfMemoryError):
                LlavaEdge.load(artifact, threads=1)
    LlavaEdge.load(artifact, threads=1).close()


def test_a_failure_inside_the_engine_gives_way_too(
    model: LlavaEdge, wide: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = expected(model, wide, "base")
    model.teacher_forced_logits("x", raw=True)
    encode = VisionEncoder._encode_batch
    runs: list[int] = []

    def fail_behind_the_first(self: VisionEncoder, tiles: Array, out: Array) -> None:
        runs.append(len(tiles))
        if len(runs) in (2, 5):
            raise MemoryError
        encode(self, tiles, out)

    monkeypatch.setattr(VisionEncoder, "_encode_batch", fail_behind_the_first)
    answer = model.generate(QUESTION, [wide], max_new_tokens=TOKENS)

    # Two tiles of five, three of three with the last one failing, and the thumbnail.
    assert len(runs) == 6
    assert answer.token_ids == base
    assert answer.degraded == ("grid lowered to base: memory ran out",)


def test_a_failure_between_tokens_ends_the_answer_and_not_the_model(
    model: LlavaEdge, wide: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    normal = expected(model, wide)
    run = Session.run_bound
    with monkeypatch.context() as patch:
        stream = model.stream(QUESTION, [wide], max_new_tokens=TOKENS)
        next(stream)

        def out_of_memory(self: Session, binding: Any, **how: bool) -> None:
            raise OutOfMemoryError("memory ran out while running the graph")

        patch.setattr(Session, "run_bound", out_of_memory)
        with pytest.raises(OutOfMemoryError):
            list(stream)
    assert Session.run_bound is run
    assert expected(model, wide) == normal


def test_memory_that_python_is_refused_anywhere_is_our_error(
    model: LlavaEdge, wide: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> Any:
        raise MemoryError

    normal = expected(model, wide)
    for owner, name in ((Sampler, "choose"), (Tokenizer, "expand_media")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refused)
            with pytest.raises(OutOfMemoryError, match="memory ran out"):
                expected(model, wide)
        assert expected(model, wide) == normal


def test_a_conversation_falls_back_to_thumbnails(
    model: LlavaEdge, wide: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_thumbnail = model.chat(grid="base")
    first = by_thumbnail.send(QUESTION, [wide], max_new_tokens=TOKENS)
    chat = model.chat()
    tiles = chat.count_tokens(QUESTION, [wide])
    model.teacher_forced_logits("x", raw=True)

    failing = Failing(monkeypatch, lambda place: f"and {tiles} tokens" in failing.asked[place])
    answer = chat.send(QUESTION, [wide], max_new_tokens=TOKENS)
    assert answer.token_ids == first.token_ids
    assert answer.degraded[0].startswith("images lowered to their thumbnails: a request of 5 tiles")
    # The conversation keeps its pictures as they were sent.
    assert chat.messages[0].images[0].layout.num_tiles == 5


def test_a_bound_on_image_tokens_lowers_the_grid(model: LlavaEdge, wide: Image.Image) -> None:
    small = Image.new("RGB", (20, 20))
    sizes = {
        grid: model.generate("?", [wide, small], grid=grid, max_new_tokens=1).image_tokens
        for grid in ("2x2", "1x2", "base")
    }
    assert sizes["2x2"] > sizes["1x2"] > sizes["base"]
    for grid, size in sizes.items():
        answer = model.generate("?", [wide, small], max_image_tokens=size, max_new_tokens=1)
        assert answer.image_tokens == size
        why = f"grid lowered to {grid}: max_image_tokens is {size}"
        assert answer.degraded == (() if grid == "2x2" else (why,))
        assert answer.token_ids == expected_pair(model, wide, small, grid)

    least = sizes["base"] - 1
    with pytest.raises(RequestError, match=rf"at most {least} tokens .* take {least + 1}"):
        model.generate("?", [wide, small], max_image_tokens=least)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(RequestError, match="max_image_tokens"):
            model.generate("?", [wide], max_image_tokens=wrong)


def expected_pair(model: LlavaEdge, *rest: Any) -> tuple[int, ...]:
    *images, grid = rest
    return model.generate("?", images, grid=grid, max_new_tokens=1).token_ids


def test_a_bound_on_image_tokens_in_a_conversation(model: LlavaEdge, wide: Image.Image) -> None:
    size = model.generate("?", [wide], grid="1x2", max_new_tokens=1).image_tokens
    chat = model.chat()
    answer = chat.send("?", [wide, chat.prepare(Image.new("RGB", (1, 1)))], max_new_tokens=1)
    cut = answer.image_tokens - model.generate("?", [wide], max_new_tokens=1).image_tokens
    chat.reset()

    bound = size + cut
    images = [chat.prepare(Image.new("RGB", (1, 1))), wide]
    answer = chat.send("?", images, max_image_tokens=bound, max_new_tokens=1)
    assert answer.image_tokens == bound
    assert answer.degraded == (f"grid lowered to 1x2: max_image_tokens is {bound}",)


def test_images_that_are_cut_already_become_thumbnails(model: LlavaEdge, wide: Image.Image) -> None:
    base = model.generate("?", [wide, wide], grid="base", max_new_tokens=TOKENS)
    chat = model.chat()
    images = [chat.prepare(wide), wide]
    for bound in (base.image_tokens, base.image_tokens + 1):
        answer = chat.send("?", images, max_image_tokens=bound, max_new_tokens=TOKENS)
        assert answer.token_ids == base.token_ids
        why = f"images lowered to their thumbnails: max_image_tokens is {bound}"
        assert answer.degraded == (why,)
        chat.undo()

    least = base.image_tokens
    with pytest.raises(RequestError, match=rf"at most {least - 1} tokens .* 2 images take {least}"):
        chat.send("?", images, max_image_tokens=least - 1)
    assert chat.messages == []
    for wrong in (0, "5", True):
        with pytest.raises(RequestError, match=f"max_image_tokens is {wrong!r}"):
            chat.send("?", images, max_image_tokens=wrong)
    for no_list in (wide, 5, b"x"):
        with pytest.raises(PromptError, match="must be a list of images"):
            chat.send("?", no_list, max_image_tokens=least)  # type: ignore[arg-type]


class Slow:
    """A tower that takes 100 ms a tile."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        encode = VisionEncoder._encode_batch

        def slowly(encoder: VisionEncoder, tiles: Array, out: Array) -> None:
            time.sleep(0.1)
            encode(encoder, tiles, out)

        patch.setattr(VisionEncoder, "_encode_batch", slowly)


def test_a_deadline_lowers_the_grid_by_how_long_it_took_before(
    model: LlavaEdge, wide: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = expected(model, wide, "base")
    Slow(monkeypatch)
    for _ in range(4):
        model.teacher_forced_logits("x", raw=True)
        expected(model, wide)
    model.teacher_forced_logits("x", raw=True)
    # Five tiles take 0.5 s and three 0.3 s; half of the time is for the first token.
    answer = model.generate(QUESTION, [wide], max_new_tokens=TOKENS, deadline_seconds=0.5)

    assert answer.token_ids == base[: len(answer.token_ids)]
    assert answer.degraded[0].startswith("grid lowered to base: a request of 3 tiles")


def test_tiles_that_are_kept_take_no_time(
    artifact: Path, wide: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    Slow(monkeypatch)
    with LlavaEdge.load(artifact, threads=1, vision_cache_bytes=1 << 20) as model:
        normal = expected(model, wide)
        pace = model._engine._pace.tile_seconds
        assert pace is not None
        assert pace >= 0.1
        for _ in range(3):
            model.teacher_forced_logits("x", raw=True)
            # Five tiles would take 0.5 s.
            answer = model.generate(QUESTION, [wide], max_new_tokens=TOKENS, deadline_seconds=0.9)
            assert (answer.reused_tokens, answer.degraded) == (0, ())
            assert answer.token_ids == normal
        # What took no time says nothing of how long the next picture takes.
        assert model._engine._pace.tile_seconds == pace
        other = wide.rotate(180)
        answer = model.generate(QUESTION, [other], max_new_tokens=TOKENS, deadline_seconds=0.9)
        assert answer.degraded[0].startswith("grid lowered to ")


def test_what_the_kv_cache_holds_is_not_lowered(model: LlavaEdge, wide: Image.Image) -> None:
    chat = model.chat()
    chat.send(QUESTION, [wide], max_new_tokens=TOKENS)
    # By this pace the new words alone take too long; thumbnails would add all words before them.
    model._engine._pace.token_seconds = 10.0
    answer = chat.send("And now?", max_new_tokens=TOKENS, deadline_seconds=60.0)

    assert answer.reused_tokens > answer.image_tokens > 37
    assert answer.degraded == ()


def test_a_deadline_ends_an_answer_with_what_there_is(
    model: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.generate("Hello", max_new_tokens=30)
    run = Session.run_bound

    def slowly(self: Session, binding: Any, **how: bool) -> None:
        time.sleep(0.02)
        run(self, binding, **how)

    monkeypatch.setattr(Session, "run_bound", slowly)
    answer = model.generate("Hello", max_new_tokens=30, deadline_seconds=0.3)

    assert answer.finish_reason == "deadline"
    assert 1 <= len(answer.token_ids) < 30
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert whole.text.startswith(answer.text)


def test_a_deadline_before_the_first_token_is_an_error_and_frees_the_model(
    model: LlavaEdge, wide: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    normal = expected(model, wide, "base")
    model.teacher_forced_logits("x", raw=True)
    with monkeypatch.context() as patch:
        Slow(patch)
        with pytest.raises(DeadlineError, match=r"0\.02 s were given"):
            model.generate(QUESTION, [wide], grid="base", deadline_seconds=0.02)

    assert expected(model, wide, "base") == normal


@pytest.fixture(scope="module")
def video_model(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> Iterator[LlavaEdge]:
    checkpoint = make_checkpoint("odd", model_type="llava_next_video", image_size=56)
    with LlavaEdge.load(make_artifact(checkpoint, num_frames=8), threads=1) as loaded:
        yield loaded


def test_frames_are_given_up_behind_tiles(
    video_model: LlavaEdge, wide: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(5)
    frames = [Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8)) for _ in range(8)]

    def ask(**options: Any) -> Any:
        video_model.teacher_forced_logits("x", raw=True)
        return video_model.generate(
            QUESTION, [wide], video=frames, max_new_tokens=TOKENS, **options
        )

    wanted = ask(grid="base", num_frames=2)
    limit = f"a request of 3 tiles and {wanted.prompt_tokens} tokens"
    with monkeypatch.context() as patch:
        failing = Failing(
            patch,
            lambda place: "a request of" in failing.asked[place] and failing.asked[place] != limit,
        )
        answer = ask()
    assert answer.token_ids == wanted.token_ids
    what = "grid lowered to base and frames to 2: a request of 5 tiles"
    assert answer.degraded[0].startswith(what)

    alone = Failing(monkeypatch, lambda place: "a request of 8 tiles" in alone.asked[place])
    video_model.teacher_forced_logits("x", raw=True)
    answer = video_model.generate(QUESTION, video=frames, max_new_tokens=TOKENS)
    assert answer.degraded[0].startswith("frames lowered to 4: a request of 8 tiles")


_UNDER_A_LIMIT = """
import json, resource, sys
from pathlib import Path
from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.runtime import LlavaEdge

def held():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmSize:")[1].split()[0]) * 1024

artifact, large = sys.argv[1], Path(sys.argv[2]).read_bytes()
with LlavaEdge.load(artifact, threads=1) as model:
    ask = lambda *images: list(model.generate("What?", images, max_new_tokens=4).token_ids)
    normal = ask()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    seen = []
    for room in (4, 8, 16, 32, 64):
        resource.setrlimit(resource.RLIMIT_AS, (held() + (room << 20), hard))
        try:
            ask(large)
            seen.append("answered")
        except OutOfMemoryError as error:
            seen.append("refused")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        assert ask() == normal
    print(json.dumps([seen, ask(large) == ask(large)]))
"""


def test_memory_that_the_system_really_refuses(artifact: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (3000, 3000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg")

    # In a process of its own: a limit on the address space is the process's.
    done = subprocess.run(
        [sys.executable, "-c", _UNDER_A_LIMIT, str(artifact), str(tmp_path / "large.jpg")],
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    seen, same = json.loads(done.stdout)
    assert seen[0] == "refused"
    assert same


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
