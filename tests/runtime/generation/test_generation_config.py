"""One source of generation options: every call and every flag has the fields of the config."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

import llava_edge.runtime
from llava_edge.profiles import errors
from llava_edge.profiles.errors import LlavaEdgeError, RequestError, UnknownOptionError
from llava_edge.runtime import Chat, GenerationConfig, LlavaEdge
from llava_edge.runtime.cli.generation_arguments import add_generation_arguments, asked_generation

NAMES = [each.name for each in fields(GenerationConfig)]
CALLS = (LlavaEdge.generate, LlavaEdge.stream, Chat.send, Chat.stream)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__qualname__)
def test_every_call_has_the_config_and_each_of_its_fields(call: Callable[..., Any]) -> None:
    parameters = inspect.signature(call).parameters

    assert parameters["generation_config"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    for each in fields(GenerationConfig):
        keyword = parameters[each.name]
        assert keyword.kind is inspect.Parameter.KEYWORD_ONLY
        # None is "not given": the value of the config counts.
        assert keyword.default is None
        plain = str(each.type).removesuffix(" | None")
        assert keyword.annotation == f"{plain} | None"


@pytest.mark.parametrize(
    ("whole", "streamed"), [(LlavaEdge.generate, LlavaEdge.stream), (Chat.send, Chat.stream)]
)
def test_the_whole_answer_takes_what_the_stream_takes(
    whole: Callable[..., Any], streamed: Callable[..., Any]
) -> None:
    assert inspect.signature(whole).parameters == inspect.signature(streamed).parameters


def test_flags_are_the_fields() -> None:
    parser = argparse.ArgumentParser()
    add_generation_arguments(parser)

    given = [f"--{name.replace('_', '-')}={3}" for name in NAMES if name != "top_p"]
    config = asked_generation(parser.parse_args([*given, "--top-p=0.5"]))

    assert config == GenerationConfig(
        max_new_tokens=3,
        temperature=3.0,
        top_k=3,
        top_p=0.5,
        repetition_penalty=3.0,
        seed=3,
        prompt_lookup_num_tokens=3,
    )
    assert asked_generation(parser.parse_args([])) == GenerationConfig()
    for each in fields(GenerationConfig):
        assert each.default is None or f"(default: {each.default})" in " ".join(
            parser.format_help().split()
        )


def test_a_keyword_wins_over_the_config() -> None:
    config = GenerationConfig(max_new_tokens=7, temperature=0.5, seed=1)

    merged = GenerationConfig.merged(config, temperature=0.0, seed=None, top_k=None)

    assert merged == GenerationConfig(max_new_tokens=7, temperature=0.0, seed=1)


def test_a_misspelt_option_is_a_type_error_that_names_the_nearest() -> None:
    with pytest.raises(TypeError, match="did you mean max_new_tokens") as raised:
        GenerationConfig(max_new_token=3)  # type: ignore[call-arg]

    assert isinstance(raised.value, UnknownOptionError)


def test_a_config_of_another_type_is_refused() -> None:
    with pytest.raises(RequestError, match="generation_config is a dict"):
        GenerationConfig.merged({"temperature": 1.0})  # type: ignore[arg-type]


def test_the_whole_error_tree_is_importable_from_the_runtime() -> None:
    tree = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, LlavaEdgeError)
    ]

    assert len(tree) > 15
    for each in tree:
        assert getattr(llava_edge.runtime, each.__name__) is each
        assert each.__name__ in llava_edge.runtime.__all__


def test_every_public_name_is_there() -> None:
    for name in llava_edge.runtime.__all__:
        assert getattr(llava_edge.runtime, name) is not None
        assert name in dir(llava_edge.runtime)
