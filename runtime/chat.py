"""Chat: a conversation with a loaded artifact, turn by turn.

    chat = model.chat()
    chat.send("What is this?", images=["receipt.jpg"])
    chat.send("And the second line?")

There is no cache here: every turn is a request of the whole conversation, and what the KV cache
holds of it is found by content (``prefix_cache.py``). Editing the history therefore needs no more
than editing the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NoReturn, get_args

from llava_edge.profiles.errors import PromptError, RequestError
from llava_edge.runtime.generation.deadline import TimeBudget
from llava_edge.runtime.generation.generation_config import OPTION_NAMES, GenerationConfig
from llava_edge.runtime.generation.output import Answer
from llava_edge.runtime.generation.stream import AnswerStream, Pieces
from llava_edge.runtime.processing.degradation import Degradation, Fallback
from llava_edge.runtime.processing.images.loading import ImageSource
from llava_edge.runtime.processing.media import PreparedImage
from llava_edge.runtime.processing.prepared_video import PreparedVideo
from llava_edge.runtime.processing.processor import RequestBuilder
from llava_edge.runtime.processing.request import Request, VideoInput
from llava_edge.runtime.processing.text.chat_prompt import (
    Message,
    Piece,
    Role,
    Text,
    compose,
    user_message,
)
from llava_edge.runtime.processing.text.finished_prompt import warn_if_finished
from llava_edge.runtime.processing.video.frame_sampling import FrameChoice
from llava_edge.runtime.processing.video.video_reader import VideoSource
from llava_edge.runtime.util.progress import Progress, no_progress
from llava_edge.runtime.util.validation import (
    refuse_unknown,
    require_callable,
    require_count,
    require_counts,
    require_flag,
    settle,
)

WithinTurn = Callable[[Pieces], Pieces]
"""Wraps the work on an answer; runs where no other request can come between."""


ChatImage = ImageSource | PreparedImage
"""An image, or one that ``Chat.prepare`` of this very conversation has cut."""

ChatVideo = VideoSource | PreparedVideo
"""A video, or one that ``Chat.prepare_video`` of this very conversation has cut."""

StartAnswer = Callable[
    [Degradation, GenerationConfig, TimeBudget, WithinTurn, Progress], AnswerStream
]
"""``LlavaEdge``'s way to begin an answer."""

_STREAM_OPTIONS = (
    *("video", "generation_config", "num_frames", "frame_choice"),
    *("max_image_tokens", "deadline_seconds", "progress"),
)


@dataclass(frozen=True)
class ChatMessage:
    """What one role said.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        text: as it was given, or as it was answered.
        images: of a user's message, cut already.
        token_ids: of an assistant's message, as they were generated.
        video: of a user's message, cut already.

    Raises:
        RequestError: a role is unknown, images or video are not cut already, or token ids are no
            whole numbers.
        PromptError: the text is none.
    """

    role: Role
    text: str
    images: tuple[PreparedImage, ...] = ()
    token_ids: tuple[int, ...] = ()
    video: PreparedVideo | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.role, str) or self.role not in get_args(Role):
            raise RequestError(f"role is {self.role!r:.60}; roles are {', '.join(get_args(Role))}")
        if not isinstance(self.text, str):
            raise PromptError(f"the text of a message is a {type(self.text).__name__}, not a str")
        images = self.images
        if not isinstance(images, (list, tuple)) or not all(
            isinstance(image, PreparedImage) for image in images
        ):
            raise RequestError(
                f"images is {images!r:.60}; a message holds a list of what Chat.prepare gives"
            )
        ids = require_counts("token_ids", self.token_ids)
        settle(self, images=tuple(images), token_ids=ids)
        if self.video is not None and not isinstance(self.video, PreparedVideo):
            raise RequestError(
                f"video is {self.video!r:.60}; a message holds what Chat.prepare_video gives"
            )


class Chat:
    """A conversation. Make one with ``LlavaEdge.chat``.

    A turn's prompt is exactly what transformers' ``apply_chat_template`` makes of the texts so far.
    So an answer is encoded anew from its text, and where that gives other ids than were generated
    (a model may spell a word otherwise than its tokenizer does; a stop token may not be what the
    template writes), the cache is reused up to the first such id and the rest is computed.
    Pictures and videos before it are not encoded again while the cache holds them.

    Tiles and frames of the whole history stay in host memory (1.6 MiB for a picture of five
    336-pixel tiles, 0.3 MiB for a frame), as many as fit the context. A message shows one video at
    most; of a conversation's videos each may have as many frames as the artifact was planned for.
    """

    def __init__(
        self,
        requests: RequestBuilder,
        start: StartAnswer,
        require_open: Callable[[], None],
        context_tokens: Callable[[], int],
        *,
        system: str | None = None,
        image_marks: bool = True,
        grid: str | None = None,
        now: datetime | None = None,
    ) -> None:
        self._messages: list[ChatMessage] = []
        self._now = now
        self._system: str | None = None
        self._requests = requests
        self._start = start
        self._require_open = require_open
        self._context_tokens = context_tokens
        self._image_marks = require_flag("image_marks", image_marks)
        self._grid = grid
        # What the template or the artifact has no place for is refused now, not at the first turn.
        self.system = system
        self._processor = requests.processor(grid)

    @property
    def messages(self) -> list[ChatMessage]:
        """The conversation so far, oldest first: user and assistant in turn.

        The list may be edited, and another one may be set in its place; what was left as it was is
        found in the cache again.

        Raises:
            RequestError: what is set is no list of ``ChatMessage``.
        """
        return self._messages

    @messages.setter
    def messages(self, messages: Sequence[ChatMessage]) -> None:
        self._messages = _checked(messages)

    @property
    def system(self) -> str | None:
        """Text of the system turn; None leaves what the template puts in its place.

        Raises:
            PromptError: what is set is no text, or the template has no system turn.
        """
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        before, self._system = self._system, text
        try:
            self._pieces([ChatMessage("user", "?")])
        except BaseException:
            self._system = before
            raise

    def send(
        self,
        text: str,
        images: Iterable[ChatImage] | None = (),
        video: ChatVideo | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        num_frames: int | None = None,
        frame_choice: FrameChoice = "reference",
        max_image_tokens: int | None = None,
        deadline_seconds: float | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        prompt_lookup_num_tokens: int | None = None,
        progress: Progress = no_progress,
        **unknown: NoReturn,
    ) -> Answer:
        """Say something and wait for the whole answer. Arguments and errors: see ``stream``."""
        with self.stream(
            text,
            images,
            video,
            generation_config,
            num_frames=num_frames,
            frame_choice=frame_choice,
            max_image_tokens=max_image_tokens,
            deadline_seconds=deadline_seconds,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            progress=progress,
            **unknown,
        ) as stream:
            for _ in stream:
                pass
            return stream.answer

    def prepare(self, image: ImageSource) -> PreparedImage:
        """Open an image and cut its tiles now; a message takes it in place of the image.

        Raises:
            ImageError: it is refused.
            EngineError: the model is closed.
        """
        self._require_open()
        return self._requests.prepare(image, self._processor)

    def prepare_video(
        self,
        video: VideoSource,
        num_frames: int | None = None,
        frame_choice: FrameChoice = "reference",
    ) -> PreparedVideo:
        """Open a video and cut its frames now; a message takes it in place of the video.

        Raises:
            VideoError: it is refused, or the model takes none.
            DependencyError: it is to be decoded and PyAV is not installed.
            RequestError: the number of frames or their choice is out of range.
            EngineError: the model is closed.
        """
        self._require_open()
        return self._requests.prepare_video(VideoInput(video, num_frames, frame_choice))

    def stream(
        self,
        text: str,
        images: Iterable[ChatImage] | None = (),
        video: ChatVideo | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        num_frames: int | None = None,
        frame_choice: FrameChoice = "reference",
        max_image_tokens: int | None = None,
        deadline_seconds: float | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        prompt_lookup_num_tokens: int | None = None,
        progress: Progress = no_progress,
        **unknown: NoReturn,
    ) -> AnswerStream:
        """Say something and have the answer piece by piece.

        Message and answer enter ``messages`` together, once the answer is complete. One that was
        cancelled or failed leaves the history as it was, and so does one whose history was edited
        in the meantime.

        Args:
            text: as the prompt of ``LlavaEdge.stream``.
            images: shown with this message.
            video: shown with this message.
            generation_config: as in ``LlavaEdge.stream``.
            num_frames: as in ``LlavaEdge.stream``; of a video that is cut already, not asked.
            frame_choice: as ``num_frames``.
            max_image_tokens: as in ``LlavaEdge.stream``, for the images of this message; of those
                that ``prepare`` has cut, thumbnails are all that is left below.
            deadline_seconds: as in ``LlavaEdge.stream``. Where time or memory does not suffice,
                all images of the conversation are seen as thumbnails for this answer.
            max_new_tokens: see ``GenerationConfig``, as the six below. One that is given wins over
                ``generation_config``.
            temperature: 0 is greedy.
            top_k: tokens to choose from.
            top_p: probability to choose from.
            repetition_penalty: of tokens that occurred.
            seed: of sampling.
            prompt_lookup_num_tokens: drafts from the prompt.
            progress: told about tiles and prompt chunks.
            unknown: none; a misspelt option is named.

        Raises:
            ImageError: an image is refused.
            VideoError: the video is refused.
            DependencyError: a video is to be decoded and PyAV is not installed.
            PromptError: the message is empty, or the conversation does not fit the context; says
                what it takes.
            RequestError: an option is unknown or out of range; while iterating, the conversation
                went on since this stream was made.
            EngineError: the model is closed.
        """
        self._require_open()
        budget = TimeBudget(deadline_seconds)
        refuse_unknown("Chat.stream()", unknown, (*_STREAM_OPTIONS, *OPTION_NAMES))
        config = GenerationConfig.merged(
            generation_config,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        )
        require_callable("progress", progress)
        before = _checked(self.messages)
        images, capped = self._check_message(text, images, before), ""
        VideoInput.given(None, num_frames, frame_choice)
        if max_image_tokens is not None:
            images, capped = self._capped(images, max_image_tokens)
        message = self._message(text, images, video, num_frames, frame_choice)
        request = self._request([*before, message])
        self._check_length(request, before)
        degradation = Degradation(lambda: request, lambda: self._steps([*before, message]), capped)

        def within_turn(pieces: Pieces) -> Pieces:
            if self.messages != before:
                raise RequestError(
                    "the conversation went on after this message was sent: another answer came "
                    "first, or the history was edited. Send the message again."
                )
            answer = yield from pieces
            if answer is not None and self.messages == before:
                said = ChatMessage("assistant", answer.text, token_ids=answer.token_ids)
                self.messages += [message, said]
            return answer

        return self._start(degradation, config, budget, within_turn, progress)

    def count_tokens(
        self,
        text: str,
        images: Iterable[ChatImage] | None = (),
        video: ChatVideo | None = None,
        *,
        num_frames: int | None = None,
        **unknown: NoReturn,
    ) -> int:
        """Exactly how many tokens the conversation would take with this message, before it is sent.

        Raises:
            ImageError: an image is refused.
            VideoError: the video is refused.
            PromptError: the message is empty, or the history's roles do not alternate.
            EngineError: the model is closed.
        """
        self._require_open()
        refuse_unknown("Chat.count_tokens()", unknown, ("video", "num_frames"))
        before = _checked(self.messages)
        images = self._check_message(text, images, before)
        message = self._message(text, images, video, num_frames)
        return self._request([*before, message]).num_tokens

    def undo(self, turns: int = 1) -> None:
        """Take back the last questions and what was answered to them.

        Raises:
            RequestError: there are not so many.
        """
        asked = [i for i, message in enumerate(self.messages) if message.role == "user"]
        turns = require_count("turns", turns, 1)
        if turns > len(asked):
            raise RequestError(
                f"{turns} turns were to be taken back; the conversation has {len(asked)}"
            )
        del self.messages[asked[-turns] :]

    def reset(self) -> None:
        """Start anew; the system text stays."""
        self.messages.clear()

    def _check_message(
        self, text: str, images: Iterable[ChatImage] | None, before: Sequence[ChatMessage]
    ) -> Sequence[ChatImage]:
        """The images as a list, once all holds that needs none of them to be opened."""
        self._requests.check_text(text)
        return self._requests.check_images(images, sum(len(message.images) for message in before))

    def _message(
        self,
        text: str,
        images: Sequence[ChatImage],
        video: ChatVideo | None,
        num_frames: int | None,
        frame_choice: FrameChoice = "reference",
    ) -> ChatMessage:
        warn_if_finished(self._requests.prompt_format(), text)
        cut = tuple(
            image if isinstance(image, PreparedImage) else self.prepare(image) for image in images
        )
        if video is not None and not isinstance(video, PreparedVideo):
            video = self.prepare_video(video, num_frames, frame_choice)
        return ChatMessage("user", text, cut, video=video)

    def _pieces(
        self, messages: Sequence[ChatMessage], *, generation_prompt: bool = True
    ) -> tuple[Piece, ...]:
        # Both may have been set since by the application.
        if self.system is not None:
            self._requests.check_text(self.system, "the system text")
        for message in messages:
            self._requests.check_text(message.text)
        said = [
            user_message(
                message.text,
                images=len(message.images),
                videos=int(message.video is not None),
            )
            if message.role == "user"
            else Message(message.role, (Text(message.text),))
            for message in messages
        ]
        if self.system is not None:
            said.insert(0, Message("system", (Text(self.system),)))
        return compose(
            self._requests.prompt_format(),
            said,
            image_marks=self._image_marks,
            generation_prompt=generation_prompt,
            now=self._now,
        )

    def _request(
        self, messages: Sequence[ChatMessage], *, generation_prompt: bool = True
    ) -> Request:
        pieces = self._pieces(messages, generation_prompt=generation_prompt)
        images = [image for message in messages for image in message.images]
        videos = [message.video for message in messages if message.video is not None]
        return self._requests.assemble(pieces, images, videos)

    def _capped(
        self, images: Sequence[ChatImage], max_image_tokens: int
    ) -> tuple[list[PreparedImage], str]:
        """A message's images, cut, within a bound on tokens; and what was lowered."""
        opened, grid, lowered = self._requests.capped(images, self._grid, max_image_tokens)
        processor = self._requests.processor(grid)
        cut = [
            image if isinstance(image, PreparedImage) else self._requests.prepare(image, processor)
            for image in opened
        ]
        return cut, lowered

    def _steps(self, messages: Sequence[ChatMessage]) -> list[Fallback]:
        """The same with thumbnails of all images; of images that are cut, no other grid is left."""
        base = self._requests.processor("base").anyres

        def make() -> Request:
            seen = [replace(m, images=tuple(i.thumbnail(base) for i in m.images)) for m in messages]
            return self._request(seen)

        frames = max((len(m.video.frame_digests) for m in messages if m.video), default=0)
        return [Fallback("images lowered to their thumbnails", 1, frames, make)]

    def _check_length(self, request: Request, before: Sequence[ChatMessage]) -> None:
        total, room = request.num_tokens, self._context_tokens()
        if total < room:
            return
        earlier = self._request(before, generation_prompt=False).num_tokens if before else 0
        turns = sum(message.role == "user" for message in before)
        raise PromptError(
            f"with this message the conversation takes {total} tokens: {earlier} for {turns} "
            f"earlier turns and {total - earlier} for this one ({request.image_tokens} of all "
            f"stand for {len(request.layouts)} images, {request.video_tokens} for "
            f"{len(request.videos)} videos); the context holds {room} and the answer needs "
            "at least one. Take turns back (undo), start anew (reset), show fewer images or "
            "frames, lower the grid, or load or convert with a larger context."
        )


def _checked(messages: object) -> list[ChatMessage]:
    """A list of messages, copied.

    Raises:
        RequestError: it is none.
    """
    if not isinstance(messages, (list, tuple)):
        raise RequestError(
            f"messages is a {type(messages).__name__}; it must be a list of ChatMessage"
        )
    for place, message in enumerate(messages):
        if not isinstance(message, ChatMessage):
            raise RequestError(
                f"messages[{place}] is a {type(message).__name__}; it must be a ChatMessage"
            )
    return list(messages)
