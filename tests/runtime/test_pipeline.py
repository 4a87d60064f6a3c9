from __future__ import annotations

import gc
import io
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge.profiles.errors import (
    ArtifactError,
    EngineError,
    ImageError,
    PromptError,
    RequestError,
)
from llava_edge.runtime import LlavaEdge
from llava_edge.runtime.model import LlavaEdge as _Direct
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.processing.processor import RequestBuilder
from llava_edge.runtime.processing.request import Request


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


@pytest.fixture(scope="module")
def model(artifact: Path) -> Iterator[LlavaEdge]:
    with LlavaEdge.load(artifact, threads=1) as loaded:
        yield loaded


def test_the_lazy_name_is_the_class() -> None:
    assert LlavaEdge is _Direct


def test_an_answer_accounts_for_its_tokens_and_time(model: LlavaEdge, picture: Image.Image) -> None:
    answer = model.generate("What is this?", [picture], max_new_tokens=6)

    timings = answer.timings
    assert len(answer.token_ids) == 6
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens == model.count_tokens("What is this?", [picture])
    assert 0 < answer.image_tokens < answer.prompt_tokens
    assert timings.packing_seconds > 0
    apart = timings.vision_seconds + timings.packing_seconds + timings.prefill_seconds
    assert timings.ttft_seconds >= timings.preprocess_seconds + apart
    assert timings.decode_tokens_per_second is not None
    assert answer.peak_memory.host_bytes > 1 << 20
    assert (answer.device, answer.engine, answer.degraded) == ("cpu", "ort", ())


def test_preparing_a_request_counts_from_the_call(
    model: LlavaEdge, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = model._requests.capped

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(model._requests, "capped", slowly)
    timings = model.generate("What?", [picture], max_image_tokens=500, max_new_tokens=1).timings

    assert timings.preprocess_seconds >= 0.3
    assert timings.ttft_seconds >= 0.3


def test_one_token_has_no_decode_rate(model: LlavaEdge) -> None:
    answer = model.generate("Hello", max_new_tokens=1)

    assert answer.timings.decode_tokens_per_second is None


def test_streamed_pieces_are_the_text(model: LlavaEdge, picture: Image.Image) -> None:
    with model.stream("What is this?", [picture], max_new_tokens=12) as stream:
        pieces = list(stream)

    assert "".join(pieces) == stream.answer.text
    assert stream.answer.text == model.generate("What is this?", [picture], max_new_tokens=12).text


def test_the_stop_token_ends_the_answer_and_is_no_text(artifact: Path) -> None:
    with LlavaEdge.load(artifact, threads=1) as model:
        plain = model.generate("Hello there", max_new_tokens=8)
        # The fourth token of this answer becomes a stop token: same weights, shorter answer.
        wanted = plain.token_ids[3]
        first = plain.token_ids.index(wanted)
        object.__setattr__(model._tokens, "stop", (wanted,))

        stopped = model.generate("Hello there", max_new_tokens=8)

    assert stopped.token_ids == plain.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    assert plain.text.startswith(stopped.text)


def test_a_full_context_ends_the_answer(artifact: Path) -> None:
    with LlavaEdge.load(artifact, threads=1) as roomy:
        count = roomy.count_tokens("Hello there")
    with LlavaEdge.load(artifact, threads=1, context_tokens=count + 3) as model:
        answer = model.generate("Hello there", max_new_tokens=100)

    # Three positions are left; the last token needs none, since nothing follows it.
    assert answer.finish_reason == "context"
    assert len(answer.token_ids) == 4


def test_a_dropped_stream_lets_the_next_request_run(model: LlavaEdge) -> None:
    stream = model.stream("Tell me everything", max_new_tokens=200)
    next(stream)
    stream.close()

    assert len(model.generate("Hello", max_new_tokens=2).token_ids) == 2
    with pytest.raises(EngineError, match="closed before its end"):
        _ = stream.answer


def test_a_second_request_of_a_thread_with_an_open_stream_is_refused(model: LlavaEdge) -> None:
    with model.stream("Tell me everything", max_new_tokens=200) as stream:
        next(stream)
        with pytest.raises(EngineError, match="still has an open stream"):
            model.generate("Hello")
        with pytest.raises(EngineError, match="not complete"):
            _ = stream.answer

    assert len(model.generate("Hello", max_new_tokens=2).token_ids) == 2


def test_leaving_the_model_stops_a_stream_that_was_left_open(artifact: Path) -> None:
    with LlavaEdge.load(artifact, threads=1) as model:
        stream = model.stream("Tell me everything", max_new_tokens=200)
        next(stream)

    assert list(stream) == []
    with pytest.raises(EngineError, match="the model is closed"):
        model.generate("Hello")


def test_a_stream_closed_by_another_thread_ends_at_the_next_token(model: LlavaEdge) -> None:
    started, pieces = threading.Event(), []
    stream = model.stream("Tell me everything", max_new_tokens=1900)

    def consume() -> None:
        for piece in stream:
            pieces.append(piece)
            started.set()

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert started.wait(60)
    stream.close()
    consumer.join(60)

    assert not consumer.is_alive()
    with pytest.raises(EngineError, match="closed before its end"):
        _ = stream.answer
    assert len(model.generate("Hello", max_new_tokens=2).token_ids) == 2


def test_an_error_inside_a_stream_is_named_by_its_answer(
    model: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(row: object) -> np.ndarray:
        raise EngineError("the engine broke")

    monkeypatch.setattr(model._decoder, "step", broken)
    stream = model.stream("Hello", max_new_tokens=5)
    with pytest.raises(EngineError, match="the engine broke"):
        list(stream)
    with pytest.raises(EngineError, match=r"the stream failed \(the engine broke\)"):
        _ = stream.answer
    monkeypatch.undo()

    assert len(model.generate("Hello", max_new_tokens=2).token_ids) == 2


def test_a_stream_that_failed_keeps_nothing_of_its_request(
    model: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Request]] = []
    build = RequestBuilder.build

    def remembered(*args: Any, **options: Any) -> Request:
        request = build(*args, **options)
        made.append(weakref.ref(request))
        return request

    def stop(stage: str, done: int, total: int) -> None:
        raise EngineError("stopped by the application")

    monkeypatch.setattr(RequestBuilder, "build", remembered)
    gc.disable()
    try:
        stream = model.stream("Hello", [Image.new("RGB", (9, 9))], progress=stop)
        with pytest.raises(EngineError, match="stopped by"):
            next(stream)
        # The stream is held on to, and no collector has run.
        assert [request() for request in made] == [None]
    finally:
        gc.enable()
    with pytest.raises(EngineError, match="stopped by the application"):
        _ = stream.answer


@pytest.mark.parametrize("bound", [None, 1000])
def test_pixels_are_let_go_of_before_the_tokens_come(
    model: LlavaEdge, monkeypatch: pytest.MonkeyPatch, bound: int | None
) -> None:
    pixels: list[weakref.ref[np.ndarray]] = []
    opened: list[weakref.ref[Image.Image]] = []
    preprocess = ImageProcessor.preprocess

    def remembered(self: ImageProcessor, image: Image.Image) -> Any:
        tiles = preprocess(self, image)
        pixels.append(weakref.ref(tiles.pixel_values))
        opened.append(weakref.ref(image))
        return tiles

    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    monkeypatch.setattr(ImageProcessor, "preprocess", remembered)
    stream = model.stream("Hello", [file.getvalue()], max_new_tokens=9, max_image_tokens=bound)
    assert pixels[0]() is not None
    next(stream)
    gc.collect()
    assert (pixels[0](), opened[0]()) == (None, None)
    list(stream)
    assert stream.answer.image_tokens > 0


def test_threads_queue_and_get_the_answers_they_would_get_alone(model: LlavaEdge) -> None:
    prompts = [f"Question number {number}" for number in range(6)]
    alone = [model.generate(prompt, max_new_tokens=5).token_ids for prompt in prompts]
    found: dict[int, tuple[int, ...]] = {}

    def ask(index: int) -> None:
        found[index] = model.generate(prompts[index], max_new_tokens=5).token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [found[index] for index in range(len(prompts))] == alone


def test_sampling_with_one_seed_repeats_and_differs_from_another(model: LlavaEdge) -> None:
    def sample(seed: int) -> tuple[int, ...]:
        answer = model.generate("Hello", temperature=2.0, seed=seed, max_new_tokens=12)
        return answer.token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_lower_grid_takes_fewer_tokens_and_a_higher_one_is_refused(
    model: LlavaEdge, picture: Image.Image
) -> None:
    full = model.count_tokens("Hi", [picture])
    base = model.count_tokens("Hi", [picture], grid="base")
    side = model.artifact.manifest.model.vision.patches_per_side

    # base: every patch of the thumbnail and one newline
    text = full - model.generate("Hi", [picture], max_new_tokens=1).image_tokens
    assert base - text == side * side + 1
    with pytest.raises(RequestError, match="A grid can only be lowered here"):
        model.count_tokens("Hi", [picture], grid="3x3")


def test_images_may_be_arrays_bytes_and_paths(
    model: LlavaEdge, picture: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    sources = [path, str(path), path.read_bytes(), picture, np.asarray(picture)]

    answers = {model.generate("What?", [source], max_new_tokens=4).token_ids for source in sources}

    assert len(answers) == 1


@pytest.mark.parametrize("control", ["</s>", "<s>", "<pad>", "<unk>"])
def test_a_control_token_in_the_prompt_stays_text(model: LlavaEdge, control: str) -> None:
    request = model._requests.build(f"say {control} now", [], _options())
    plain = model._requests.build("say  now", [], _options())
    special = model._tokenizer.control_ids

    assert [i for i in request.ids if i in special] == [i for i in plain.ids if i in special]


def _options():  # type: ignore[no-untyped-def]
    from llava_edge.runtime.processing.request import PromptOptions

    return PromptOptions()


@pytest.mark.parametrize(
    ("prompt", "num_images", "options", "error", "message"),
    [
        pytest.param("", 0, {}, PromptError, "prompt is empty", id="empty"),
        pytest.param("  \n", 0, {"raw": True}, PromptError, "prompt is empty", id="blank raw"),
        pytest.param(
            "<image> and <image>",
            1,
            {},
            PromptError,
            "1 images were given and .* 2",
            id="marks",
        ),
        pytest.param("no mark", 1, {"raw": True}, PromptError, "1 images", id="raw no mark"),
        pytest.param(
            "word " * 3000, 0, {}, PromptError, r"takes \d+ tokens .* the context holds", id="long"
        ),
        # What is too long is not looked at character by character first.
        pytest.param("\ud800" * 2**21, 0, {}, PromptError, "2097152 characters; at", id="longest"),
        pytest.param(
            "word " * 200_000,
            0,
            {},
            PromptError,
            r"take \d+ tokens or more; the context",
            id="huge",
        ),
        pytest.param("Hi", 0, {"max_new_tokens": 0}, RequestError, "at least 1", id="no tokens"),
        pytest.param("Hi", 0, {"max_new_tokens": 1.5}, RequestError, "whole number", id="half"),
        pytest.param("Hi", 0, {"temperature": "hot"}, RequestError, "a number", id="word"),
        pytest.param("Hi", 0, {"top_k": True}, RequestError, "whole number", id="true"),
        pytest.param("a\ud800b", 0, {}, PromptError, "lone surrogates", id="surrogate"),
        pytest.param(None, 0, {}, PromptError, "must be a str", id="no text"),
        pytest.param("Hi", 0, {"top_p": 2.0}, RequestError, "top_p", id="sampling"),
        pytest.param("Hi", 0, {"grid": "9x9"}, RequestError, "grid", id="unknown grid"),
        pytest.param("Hi", 0, {"grid": ["1x2"]}, RequestError, "grid", id="grid in a list"),
        pytest.param("Hi", 0, {"raw": 1}, RequestError, "raw is 1; it must be True", id="raw"),
        pytest.param("Hi", 0, {"raw": np.zeros(2)}, RequestError, "raw is array", id="raw array"),
        pytest.param(
            "Hi", 0, {"image_marks": None}, RequestError, "image_marks is", id="marks None"
        ),
        pytest.param("Hi", 0, {"progress": 5}, RequestError, "must be a function", id="progress"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(
    model: LlavaEdge,
    picture: Image.Image,
    prompt: str,
    num_images: int,
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        model.stream(prompt, [picture] * num_images, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "image",
    ["picture.png", Path("picture.png"), b"bytes", np.zeros((50, 60, 3), np.uint8), {}, 5],
    ids=lambda image: type(image).__name__,
)
def test_a_single_image_that_is_no_list_is_named(model: LlavaEdge, image: object) -> None:
    # An array is a sequence of rows, and each row would pass for a picture.
    with pytest.raises(PromptError, match="must be a list of images"):
        model.generate("Hi", image)  # type: ignore[arg-type]


def test_a_text_file_is_no_image(model: LlavaEdge, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("these are words\n")

    with pytest.raises(ImageError, match=r"notes\.png"):
        model.generate("What?", [path])


def test_a_context_beyond_the_artifact_is_refused(artifact: Path) -> None:
    with pytest.raises(RequestError, match="made for 1 to"):
        LlavaEdge.load(artifact, context_tokens=10**6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": -1}, "threads is -1"),
        ({"threads": 10**9}, "at most 1024"),
        ({"context_tokens": 2.5}, "context_tokens is 2.5"),
        ({"context_tokens": True}, "context_tokens is True"),
        ({"device": "gpu"}, "devices are auto, cpu, cuda"),
        ({"device": None}, "devices are auto, cpu, cuda"),
        ({"device": np.zeros(2)}, "devices are auto, cpu, cuda"),
        ({"engine": np.zeros(2)}, "engines are auto"),
        ({"trust_engines": "no"}, "trust_engines is 'no'; it must be True or False"),
        ({"require_verified": 1}, "require_verified is 1"),
        ({"prefix_reuse": None}, "prefix_reuse is None"),
        ({"allow_slow": 0}, "allow_slow is 0"),
        ({"limits": 5}, "limits is 5; it must be a Limits object"),
        ({"progress": "loud"}, "progress is 'loud'; it must be a function"),
    ],
)
def test_a_wrong_argument_of_load_is_named(
    artifact: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        LlavaEdge.load(artifact, **options)  # type: ignore[arg-type]


def test_a_cpu_artifact_does_not_run_on_cuda(artifact: Path) -> None:
    with pytest.raises(EngineError, match="cpu target"):
        LlavaEdge.load(artifact, device="cuda")


def test_a_cuda_artifact_needs_cuda_or_insistence(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    cuda = make_artifact(make_checkpoint("odd", backbone="mistral"), profile="a100")

    with pytest.raises(EngineError, match="--allow-slow"):
        LlavaEdge.load(cuda)
    with pytest.raises(EngineError, match="onnxruntime-gpu"):
        LlavaEdge.load(cuda, device="cuda")


def test_an_unverified_artifact_is_refused_when_that_is_required(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"certificate\.json"):
        LlavaEdge.load(artifact, require_verified=True)


def test_memory_is_asked_before_it_is_taken(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_edge.profiles.errors import OutOfMemoryError
    from llava_edge.runtime.loading import placement

    monkeypatch.setattr(placement, "available_host_bytes", lambda: 1 << 20)

    with pytest.raises(OutOfMemoryError, match=r"0\.00 GiB are free"):
        LlavaEdge.load(artifact)


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": -1},
        {"threads": True},
        {"vision_cache_bytes": -1},
        {"trust_engines": "no"},
        {"strict_device": 1},
        {"cuda": {"graph": True}},
        {"limits": {"max_images": 1}},
    ],
)
def test_options_of_loading_have_their_types(artifact: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        LlavaEdge.load(artifact, **wrong)


def test_a_closed_model_says_so_wherever_it_is_used(artifact: Path, picture: Image.Image) -> None:
    model = LlavaEdge.load(artifact)
    chat = model.chat()
    context = model.context_tokens
    waiting = model.stream("Hi")
    model.close()
    model.close()

    uses: list[Callable[[], object]] = [
        lambda: model.generate("Hi"),
        lambda: model.stream("Hi", ["missing.png"]),
        lambda: model.chat(),
        lambda: model.count_tokens("Hi"),
        lambda: model.draw_tiles([picture]),
        lambda: model.teacher_forced_logits("Hi", (), [5]),
        lambda: model.replay("Hi", (), [5], lambda *_: None),
        lambda: model.decode_run_seconds,
        lambda: model.__enter__(),
        lambda: next(waiting),
        lambda: chat.send("Hi", ["missing.png"]),
        lambda: chat.count_tokens("Hi"),
        lambda: chat.prepare("missing.png"),
        lambda: chat.prepare_video("missing.mp4"),
    ]
    for use in uses:
        with pytest.raises(EngineError, match="the model is closed; load the artifact again"):
            use()
    # What was found at load is still there to be read.
    assert model.context_tokens == context
    assert model.device == "cpu"
    assert (model.engine, model.cache, model.degraded) == ("ort", "float32", ())
    chat.reset()
    assert chat.messages == []


@pytest.mark.parametrize(
    "name", ["artifact", "device", "engine", "cache", "degraded", "off_device", "context_tokens"]
)
def test_what_was_found_at_load_cannot_be_set(model: LlavaEdge, name: str) -> None:
    before = getattr(model, name)
    with pytest.raises(AttributeError, match=name):
        setattr(model, name, "another")
    assert getattr(model, name) is before or getattr(model, name) == before
