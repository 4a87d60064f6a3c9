"""Numbers of numpy, pandas and torch are numbers; what only looks like one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge.profiles.errors import PromptError, RequestError
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.chat import ChatMessage
from llava_edge.runtime.generation.deadline import TimeBudget
from llava_edge.runtime.generation.generation_config import GenerationConfig
from llava_edge.runtime.loading.options import LoadOptions
from llava_edge.runtime.model import LlavaEdge
from llava_edge.runtime.processing.request import PromptOptions, VideoInput
from llava_edge.runtime.util.json_codec import to_json
from llava_edge.runtime.util.limits import Limits
from llava_edge.runtime.util.validation import require_count, require_flag, require_number


class Tensor:
    """What torch's scalars offer, without torch."""

    def __init__(self, value: Any, dtype: str, ndim: int = 0) -> None:
        self.value, self.dtype, self.ndim = value, f"torch.{dtype}", ndim

    def __repr__(self) -> str:
        return f"tensor({self.value!r}, dtype={self.dtype}, ndim={self.ndim})"

    def __index__(self) -> int:
        if "int" not in self.dtype:
            raise TypeError("only integer tensors of a single element can be an index")
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)


WHOLE = [4, np.int8(4), np.uint64(4), np.int64(4), np.array(4), Tensor(4, "int64")]
REAL = [*WHOLE, 4.0, np.float16(4), np.float32(4), np.array(4.0), Fraction(8, 2), Decimal(4)]
REAL += [Tensor(4.0, "float32"), Tensor(4.0, "bfloat16")]
NO_NUMBER: list[Any] = [True, np.bool_(True), Tensor(1, "bool"), "4", np.str_("4"), b"4", None]
NO_NUMBER += [4j, np.complex64(4), [4], np.array([4]), Tensor(4, "int64", 1), np.datetime64(4, "s")]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_every_whole_number_becomes_an_int(value: Any) -> None:
    found = require_count("top_k", value, 1, 9)
    assert (type(found), found) == (int, 4)


@pytest.mark.parametrize("value", REAL, ids=repr)
def test_every_real_number_becomes_a_float(value: Any) -> None:
    found = require_number("temperature", value)
    assert (type(found), found) == (float, 4.0)


@pytest.mark.parametrize("value", [*NO_NUMBER, 4.0, np.float64(4), Fraction(4)], ids=repr)
def test_what_is_no_whole_number_is_named_with_its_rule(value: Any) -> None:
    with pytest.raises(RequestError, match=r"^top_k is .*; it must be a whole number, at least 1"):
        require_count("top_k", value, 1)


@pytest.mark.parametrize("value", [*NO_NUMBER, 10**400], ids=repr)
def test_what_is_no_real_number_is_named_with_its_rule(value: Any) -> None:
    with pytest.raises(RequestError, match=r"^temperature is .*; it must be a number"):
        require_number("temperature", value)


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), np.array(True), Tensor(1, "bool")], ids=repr
)
def test_truth_values_of_other_libraries_are_flags(value: Any) -> None:
    assert require_flag("raw", value) is True


@pytest.mark.parametrize("value", [1, 0, "yes", None, np.int64(1), np.zeros(2), np.array([True])])
def test_numbers_and_words_are_no_flags(value: Any) -> None:
    with pytest.raises(RequestError, match=r"^raw is .*; it must be True or False"):
        require_flag("raw", value)


def test_a_value_that_cannot_be_shown_hides_no_message() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ZeroDivisionError

    with pytest.raises(RequestError, match="seed is a Broken; it must be"):
        require_count("seed", Broken(), 0)


def test_options_hold_plain_values_whatever_they_were_given_as() -> None:
    options: dict[str, Any] = {"seed": np.int64(3), "top_p": np.float32(0.5), "top_k": np.int8(4)}
    assert json.dumps(GenerationConfig(**options).__dict__)
    loading = LoadOptions(threads=np.int32(2), context_tokens=np.uint16(9), allow_slow=np.bool_(1))  # type: ignore[arg-type]
    assert [type(each) for each in (loading.threads, loading.context_tokens)] == [int, int]
    assert loading.allow_slow is True
    assert type(Limits(max_images=np.int64(3)).max_images) is int  # type: ignore[arg-type]
    assert Limits(image_formats=["PNG"]).image_formats == ("PNG",)  # type: ignore[arg-type]
    assert PromptOptions(raw=np.bool_(1)).raw is True  # type: ignore[arg-type]
    assert type(VideoInput(b"", np.int64(3)).num_frames) is int  # type: ignore[arg-type]
    assert type(TimeBudget(np.float32(3)).seconds) is float  # type: ignore[arg-type]
    assert type(CudaOptions(memory_limit_bytes=np.int64(5)).memory_limit_bytes) is int  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["graph", "best_on_device", "exact_arena", "warm_up"])
def test_choices_of_a_gpu_are_flags(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is 'no'; it must be True or False"):
        CudaOptions(**{name: "no"})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]) -> Path:
    return make_artifact(make_checkpoint("odd", backbone="mistral"))


@pytest.fixture(scope="module")
def model(artifact: Path) -> LlavaEdge:
    return LlavaEdge.load(artifact)


def test_a_request_of_numpy_values_is_the_one_of_plain_values(
    model: LlavaEdge, picture: Image.Image
) -> None:
    plain = {"max_new_tokens": 3, "temperature": 0.5, "seed": 7, "prompt_lookup_num_tokens": 2}
    plain |= {"top_k": 5, "top_p": 0.5, "deadline_seconds": 60, "max_image_tokens": 999}
    scalars = {name: np.asarray(value)[()] for name, value in plain.items()}

    answers = [model.generate("Hi", [picture], **given) for given in (plain, scalars)]

    assert answers[0].token_ids == answers[1].token_ids
    assert json.dumps(to_json(answers[1]))


def test_images_may_be_none_an_array_of_them_in_a_list_or_an_iterator(
    model: LlavaEdge, picture: Image.Image
) -> None:
    without = model.count_tokens("Hi")
    assert model.count_tokens("Hi", None) == without
    assert model.generate("Hi", images=None, max_new_tokens=2).image_tokens == 0
    assert model.chat().send("Hi", None, max_new_tokens=2).image_tokens == 0
    pictures = (each for each in [picture, picture])
    # Read once, although lower grids ask for them again.
    answer = model.generate("Hi", pictures, max_new_tokens=2, max_image_tokens=60)
    assert answer.degraded
    assert 0 < answer.image_tokens <= 60


def test_an_endless_iterator_of_images_is_refused(model: LlavaEdge, picture: Image.Image) -> None:
    with pytest.raises(PromptError, match="65 images were given; at most 64"):
        model.stream("Hi", iter(lambda: picture, None))


def test_an_array_of_images_is_told_to_become_a_list(model: LlavaEdge) -> None:
    with pytest.raises(PromptError, match=r"images is a ndarray; .* Give list\(images\)"):
        model.stream("Hi", np.zeros((2, 8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    "one",
    [memoryview(b"abc"), bytearray(b"abc"), Image.new("RGB", (9, 9))],
    ids=["view", "bytes", "image"],
)
def test_one_image_in_place_of_a_list_is_told_to_be_wrapped(model: LlavaEdge, one: Any) -> None:
    with pytest.raises(PromptError, match=r"must be a list of images. Wrap the one you have"):
        model.stream("Hi", one)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: model.generate("Hi", stop=["\n"]), r"stream\(\) has no option 'stop'"),
        (lambda model: model.stream("Hi", top_K=3), r"'top_K' \(did you mean top_k\?\)"),
        (lambda model: model.stream("Hi", max_tokens=3), "did you mean max_new_tokens"),
        (lambda model: model.chat(sytem="x"), r"chat\(\) has no option 'sytem' \(did you mean sys"),
        (lambda model: model.chat().send("Hi", temprature=1), "did you mean temperature"),
        (lambda model: model.chat().stream("Hi", raw=True), "has no option 'raw'"),
        (lambda model: model.chat().count_tokens("Hi", grid="base"), "has no option 'grid'"),
        (lambda model: model.count_tokens("Hi", seed=1), r"count_tokens\(\) has no option 'seed'"),
        (
            lambda model: model.draw_tiles([], gird="base"),
            r"draw_tiles\(\) has no option 'gird' \(",
        ),
        (lambda _: Limits(max_image_pixel=9), r"Limits\(\) has no option .* mean max_image_pixels"),  # type: ignore[call-arg]
        (lambda _: CudaOptions(graphs=True), r"CudaOptions\(\) has no option .* mean graph\?"),  # type: ignore[call-arg]
    ],
)
def test_an_unknown_option_is_named_with_the_known_ones(
    model: LlavaEdge, ask: Callable[[LlavaEdge], Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        ask(model)


@pytest.mark.parametrize("system", [3, b"x", "a\ud800", "x" * (1 << 21)])
def test_a_system_text_that_is_refused_is_called_so(model: LlavaEdge, system: Any) -> None:
    with pytest.raises(PromptError, match=r"^the system text (is a|has|holds)"):
        model.chat(system=system)


@pytest.mark.parametrize("ids", ["ab", b"ab", None, 5, [1.5], [True], ["1"], [-1]])
def test_token_ids_are_whole_numbers(model: LlavaEdge, ids: Any) -> None:
    with pytest.raises(RequestError, match="token_ids"):
        model.teacher_forced_logits("Hi", token_ids=ids)
    with pytest.raises(RequestError, match="token_ids"):
        model.replay("Hi", (), ids, lambda *_: None)
    with pytest.raises(RequestError, match="token_ids"):
        ChatMessage("assistant", "Ho", token_ids=ids)


def test_token_ids_of_an_array_are_those_of_a_list(model: LlavaEdge) -> None:
    of_list = model.teacher_forced_logits("Hi", token_ids=[5, 6])
    assert np.array_equal(model.teacher_forced_logits("Hi", token_ids=np.array([5, 6])), of_list)
    assert ChatMessage("assistant", "Ho", token_ids=np.array([5, 6])).token_ids == (5, 6)  # type: ignore[arg-type]


def test_an_unknown_option_of_load_is_named_before_anything_is_opened() -> None:
    with pytest.raises(RequestError, match=r"'trust_engine' \(did you mean trust_engines\?\)"):
        LlavaEdge.load("nowhere", trust_engine=True)  # type: ignore[arg-type]
    for falsy in (False, 0, {}):
        with pytest.raises(RequestError, match="must be a Limits object"):
            LlavaEdge.load("nowhere", limits=falsy)  # type: ignore[arg-type]


WRONG: list[dict[str, Any]] = [
    {"temperature": -1},
    {"top_k": -1},
    {"seed": -1},
    {"max_new_tokens": 0},
    {"prompt_lookup_num_tokens": -1},
    {"progress": 5},
    {"deadline_seconds": 0},
    {"num_frames": 0},
    {"frame_choice": "best"},
    {"max_image_tokens": 0},
    {"temprature": 1},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: next(iter(wrong)))
def test_options_are_checked_before_any_picture_is_opened(
    model: LlavaEdge, wrong: dict[str, Any], tmp_path: Path
) -> None:
    for ask in (model.stream, model.chat().stream):
        with pytest.raises(RequestError) as caught:
            ask("Hi", [tmp_path / "missing.png"], **wrong)
        assert "missing" not in str(caught.value)
        assert next(iter(wrong)).replace("frame_choice", "frame choice") in str(caught.value)


def test_text_and_marks_are_checked_before_any_picture_is_opened(
    model: LlavaEdge, tmp_path: Path
) -> None:
    for options in ({}, {"max_image_tokens": 99}):
        for prompt in ("<image> and <image>", None, b"bytes", "a\ud800"):
            with pytest.raises(PromptError) as caught:
                model.stream(prompt, [tmp_path / "missing.png"], **options)  # type: ignore[arg-type]
            assert "missing" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "onnx"}, "engine 'onnx' is unknown; engines are auto, tensorrt"),
        ({"cache": 8}, "cache 8 is unknown; types are auto, float32"),
        ({"context_tokens": 0}, "context_tokens is 0"),
        ({"progress": 1}, "progress is 1; it must be a function"),
        ({"cuda": 1}, "cuda is 1; it must be a CudaOptions object"),
        ({"device": "gpu"}, "device 'gpu' is unknown; devices are auto, cpu, cuda and cuda:N"),
    ],
)
def test_options_of_load_are_checked_before_anything_is_opened(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        LlavaEdge.load("nowhere", **options)


@pytest.mark.parametrize("artifact", [None, 5, b"folder", ["folder"]])
def test_an_artifact_that_is_no_path_is_named(artifact: Any) -> None:
    with pytest.raises(RequestError, match=r"artifact is .*; it must be the path of a folder"):
        LlavaEdge.load(artifact)
