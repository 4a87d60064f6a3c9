"""Conversations: what a turn's prompt is, what it reuses, and what enters the history."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge.profiles.errors import EngineError, ImageError, PromptError, RequestError
from llava_edge.runtime import Chat, ChatMessage, LlavaEdge
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.util.arrays import Array

PAGES = Path(__file__).parents[2] / "bench" / "lab" / "pages" / "llava-next-pages"
FIRST, SECOND = "Which line is SKY on?", "Which line is MOON on?"


@pytest.fixture(scope="module")
def artifact(make_artifact: Callable[..., Path]) -> Path:
    """Of trained weights, whose answers are words that encode to the ids they came from."""
    return make_artifact(PAGES)


@pytest.fixture(scope="module")
def model(artifact: Path) -> Iterator[LlavaEdge]:
    with LlavaEdge.load(artifact, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def plain(artifact: Path) -> Iterator[LlavaEdge]:
    with LlavaEdge.load(artifact, threads=1, prefix_reuse=False) as loaded:
        yield loaded


@pytest.fixture
def chat(model: LlavaEdge) -> Chat:
    # Nothing of the test before may be found in the cache.
    model.teacher_forced_logits("x")
    return model.chat()


def count_calls(patch: pytest.MonkeyPatch, owner: object, name: str) -> list[int]:
    """Grows with every call."""
    real, calls = getattr(owner, name), []

    def counted(*args: object) -> object:
        calls.append(1)
        return real(*args)

    patch.setattr(owner, name, counted)
    return calls


def test_a_second_turn_computes_only_what_is_new(
    model: LlavaEdge, chat: Chat, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = count_calls(monkeypatch, model._tower.encoder, "encode")
    cut = count_calls(monkeypatch, ImageProcessor, "preprocess")
    first = chat.send("Describe the picture.", [picture])
    assert (first.reused_tokens, len(cut)) == (0, 1)
    assert len(first.token_ids) > 3
    assert len(tiles) > 0
    tiles.clear()

    second = chat.send(SECOND)

    # All of the first prompt and its answer; the stop token was chosen but never run.
    assert second.reused_tokens == first.prompt_tokens + len(first.token_ids) - 1
    assert second.image_tokens == first.image_tokens
    assert (tiles, len(cut)) == ([], 1)


def test_a_conversation_gives_the_answers_it_would_give_without_reuse(
    chat: Chat, plain: LlavaEdge, picture: Image.Image
) -> None:
    other = plain.chat()
    turned = picture.rotate(90, expand=True)
    for text, images in [(FIRST, [picture]), (SECOND, []), (FIRST, [turned]), ("And SKY?", [])]:
        ours, theirs = chat.send(text, images), other.send(text, images)
        assert ours.token_ids == theirs.token_ids
        assert ours.prompt_tokens == theirs.prompt_tokens
        assert theirs.reused_tokens == 0

    assert [m.text for m in chat.messages] == [m.text for m in other.messages]


def test_the_prompt_is_what_the_reference_makes_of_the_texts(
    model: LlavaEdge,
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    picture: Image.Image,
) -> None:
    from transformers import LlavaNextProcessor

    odd = make_checkpoint("odd", backbone="mistral")
    with LlavaEdge.load(make_artifact(odd), threads=1) as random:
        for checkpoint, loaded in ((PAGES, model), (odd, random)):
            chat = loaded.chat()
            chat.send(FIRST, [picture], max_new_tokens=5)
            chat.send(SECOND, [picture.rotate(90, expand=True)], max_new_tokens=5)
            ours = chat._request([*chat.messages, ChatMessage("user", "And now?")]).ids

            processor = LlavaNextProcessor.from_pretrained(checkpoint)
            conversation = [
                {
                    "role": message.role,
                    "content": [{"type": "image"}] * len(message.images)
                    + [{"type": "text", "text": message.text}],
                }
                for message in (*chat.messages, ChatMessage("user", "And now?"))
            ]
            text = processor.apply_chat_template(conversation, add_generation_prompt=True)
            images = [picture, picture.rotate(90, expand=True)]
            theirs = processor(images=images, text=text)["input_ids"][0]
            assert ours.tolist() == list(theirs)


def test_the_history_holds_texts_ids_and_pictures(chat: Chat, picture: Image.Image) -> None:
    answer = chat.send(FIRST, [picture])

    asked, said = chat.messages
    assert (asked.role, asked.text, len(asked.images)) == ("user", FIRST, 1)
    assert (said.role, said.text, said.token_ids) == ("assistant", answer.text, answer.token_ids)


def test_taking_a_turn_back_goes_on_behind_what_is_left(chat: Chat, picture: Image.Image) -> None:
    first = chat.send(FIRST, [picture])
    chat.send(SECOND)

    chat.undo()
    again = chat.send("Which line is SUN on?")

    assert again.reused_tokens >= first.prompt_tokens + len(first.token_ids) - 1
    assert [m.text for m in chat.messages if m.role == "user"] == [FIRST, "Which line is SUN on?"]
    chat.undo(2)
    assert chat.messages == []


def test_an_edited_history_is_reused_as_far_as_it_is_the_same(
    chat: Chat, plain: LlavaEdge, picture: Image.Image
) -> None:
    first = chat.send(FIRST, [picture])
    chat.messages[1] = ChatMessage("assistant", "no line at all")

    second = chat.send(SECOND)

    assert first.image_tokens <= second.reused_tokens <= first.prompt_tokens
    other = plain.chat()
    other.messages += chat.messages[:2]
    assert other.send(SECOND).token_ids == second.token_ids


def test_another_request_between_two_turns_costs_time_and_changes_nothing(
    model: LlavaEdge, chat: Chat, plain: LlavaEdge, picture: Image.Image
) -> None:
    chat.send(FIRST, [picture])
    model.generate("something else", max_new_tokens=2)

    second = chat.send(SECOND)

    assert second.reused_tokens < 5
    other = plain.chat()
    other.send(FIRST, [picture])
    assert other.send(SECOND).token_ids == second.token_ids


def test_what_is_cancelled_or_fails_does_not_enter(
    model: LlavaEdge, chat: Chat, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = chat.send(FIRST, [picture])
    before = list(chat.messages)

    stream = chat.stream(SECOND)
    next(stream)
    stream.close()
    assert chat.messages == before
    stream = chat.stream(SECOND)
    next(stream)
    stream._handle.cancel()  # as another thread does
    assert list(stream) == []
    assert chat.messages == before

    def broken(row: Array) -> Array:
        raise EngineError("the engine broke")

    with monkeypatch.context() as patch:
        patch.setattr(model._decoder, "step", broken)
        with pytest.raises(EngineError, match="the engine broke"):
            chat.send(SECOND)
    with pytest.raises(ImageError):
        chat.send(SECOND, [b"no picture"])
    with pytest.raises(RequestError, match="temperature"):
        chat.send(SECOND, temperature=-1.0)
    assert chat.messages == before

    assert chat.send(SECOND).reused_tokens >= first.prompt_tokens
    assert len(chat.messages) == 4


def test_a_message_sent_before_another_answer_came_is_refused(chat: Chat) -> None:
    early = chat.stream(SECOND)
    chat.send(FIRST)

    with pytest.raises(RequestError, match="went on after this message"):
        next(early)
    assert len(chat.messages) == 2


def test_an_answer_to_a_history_that_was_edited_meanwhile_does_not_enter(chat: Chat) -> None:
    chat.send(FIRST)
    stream = chat.stream(SECOND)
    next(stream)
    chat.reset()
    list(stream)

    assert stream.answer.text
    assert chat.messages == []


def test_of_messages_that_threads_send_at_once_one_enters(chat: Chat) -> None:
    barrier, refused = threading.Barrier(3), []

    def say(text: str) -> None:
        stream = chat.stream(text)
        barrier.wait()
        try:
            list(stream)
        except RequestError as error:
            refused.append(error)

    threads = [threading.Thread(target=say, args=(f"Say {i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (len(chat.messages), len(refused)) == (2, 2)


def test_a_conversation_that_does_not_fit_is_refused_with_the_sum(
    artifact: Path, picture: Image.Image
) -> None:
    with LlavaEdge.load(artifact, threads=1) as roomy:
        count = roomy.chat().count_tokens(FIRST, [picture])
    with LlavaEdge.load(artifact, threads=1, context_tokens=count + 20) as model:
        chat = model.chat()
        chat.send(FIRST, [picture])
        wanted = chat.count_tokens(SECOND, [picture])
        worked: list[str] = []

        with pytest.raises(PromptError) as refused:
            chat.send(SECOND, [picture], progress=lambda stage, done, total: worked.append(stage))

        earlier = chat._request(chat.messages, generation_prompt=False).num_tokens
        text = str(refused.value)
        assert f"takes {wanted} tokens: {earlier} for 1 earlier turns" in text
        assert f"{wanted - earlier} for this one" in text
        assert f"the context holds {count + 20}" in text
        assert (worked, len(chat.messages)) == ([], 2)


def test_a_prompt_of_the_chat_counts_as_it_is_run(chat: Chat, picture: Image.Image) -> None:
    for text, images in [(FIRST, [picture]), (SECOND, [])]:
        count = chat.count_tokens(text, images)
        assert chat.send(text, images).prompt_tokens == count


def test_text_that_is_no_text_is_refused_wherever_it_stands(model: LlavaEdge) -> None:
    # Found by fuzzing: a system text went to the tokenizer unlooked at.
    with pytest.raises(PromptError, match="lone surrogates"):
        model.chat("be \ud800 brief")
    with pytest.raises(PromptError, match="must be a str"):
        model.chat(5)  # type: ignore[arg-type]
    chat = model.chat()
    chat.messages += [ChatMessage("user", "Hi"), ChatMessage("assistant", "\udfff")]
    with pytest.raises(PromptError, match="lone surrogates"):
        chat.send("And?")
    with pytest.raises(RequestError, match="image_marks is 1"):
        model.chat(image_marks=1)  # type: ignore[arg-type]


def test_a_system_text_stands_where_the_template_has_it(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    with LlavaEdge.load(make_artifact(make_checkpoint("odd", backbone="qwen2"))) as qwen:
        with_system, without = qwen.chat("Be brief and kind."), qwen.chat()
        assert with_system.count_tokens("Hi") != without.count_tokens("Hi")
        answer = with_system.send("Hi", max_new_tokens=2)
        ids = with_system._request([ChatMessage("user", "Hi")]).ids
        assert "Be brief and kind." in qwen._tokenizer.decode(ids.tolist())
        assert answer.prompt_tokens == len(ids)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m: m.chat(grid="9x9"), RequestError, "grid"),
        (lambda m: m.chat().undo(), RequestError, "conversation has 0"),
        (lambda m: m.chat().undo(0), RequestError, "turns is 0"),
        (lambda m: m.chat().send(""), PromptError, "prompt is empty"),
        (lambda m: m.chat().send(None), PromptError, "must be a str"),
        (lambda m: m.chat().send("Hi", "picture.png"), PromptError, "list of images"),
        (lambda m: m.chat().send("Hi", raw=True), TypeError, "raw"),
    ],
    ids=range(7),
)
def test_what_cannot_be_done_is_named(
    model: LlavaEdge, act: Callable[[LlavaEdge], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        act(model)


def test_what_the_template_has_no_place_for_is_refused_at_the_beginning(
    model: LlavaEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = model.artifact.manifest
    assert manifest.prompt is not None
    no_system = replace(manifest, prompt=replace(manifest.prompt, system=None))
    monkeypatch.setattr(model._requests, "_manifest", no_system)
    with pytest.raises(PromptError, match="no system turn"):
        model.chat("Be brief.")

    monkeypatch.setattr(model._requests, "_manifest", replace(manifest, prompt=None))
    with pytest.raises(PromptError, match="no chat template"):
        model.chat()


def test_the_most_images_are_those_of_the_whole_conversation(
    model: LlavaEdge, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model._requests, "_limits", replace(model._requests._limits, max_images=2))
    small = Image.fromarray(np.zeros((30, 30, 3), np.uint8))
    chat.send(FIRST, [small, small])

    with pytest.raises(PromptError, match=r"behind 2 earlier ones; at most 2"):
        chat.send(SECOND, [small])


@pytest.mark.parametrize("messages", [5, None, "Hi", {"role": "user"}])
def test_a_history_that_is_none_is_refused_and_the_old_one_stays(
    chat: Chat, messages: object
) -> None:
    chat.send("What is this?", max_new_tokens=2)
    before = list(chat.messages)
    with pytest.raises(RequestError, match=r"messages is a .*; it must be a list"):
        chat.messages = messages  # type: ignore[assignment]
    assert chat.messages == before
    chat.send("And this?", max_new_tokens=2)
    assert len(chat.messages) == 4


def test_a_history_is_set_and_edited_with_messages_alone(chat: Chat) -> None:
    chat.messages = (ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello"))  # type: ignore[assignment]
    assert chat.send("Well?", max_new_tokens=2).prompt_tokens
    chat.messages.append("garbage")  # type: ignore[arg-type]
    for use in (chat.send, chat.count_tokens):
        with pytest.raises(RequestError, match=r"messages\[4\] is a str; it must be a ChatMessage"):
            use("Hi")
    del chat.messages[4:]
    assert chat.send("Well?", max_new_tokens=2).reused_tokens


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"role": "robot", "text": "Hi"}, "role is 'robot'; roles are system, user, assistant"),
        ({"role": "user", "text": 5}, "the text of a message is a int"),
        ({"role": "user", "text": "Hi", "images": ["a.jpg"]}, r"images is \['a.jpg'\]"),
        ({"role": "user", "text": "Hi", "images": "a.jpg"}, "images is 'a.jpg'"),
        ({"role": "user", "text": "Hi", "video": "a.mp4"}, "video is 'a.mp4'"),
    ],
)
def test_a_message_of_other_types_is_refused_when_it_is_made(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        ChatMessage(**fields)


def test_a_system_text_that_is_none_is_refused_and_the_old_one_stays(chat: Chat) -> None:
    with pytest.raises(PromptError, match="must be a str"):
        chat.system = 5  # type: ignore[assignment]
    assert chat.system is None
    assert chat.send("Hi", max_new_tokens=2).token_ids
