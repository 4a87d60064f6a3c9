"""ChatLoop: a conversation by lines, in a terminal or through a pipe.

Answers go to one stream and everything else to stderr, so that a pipe gets answers alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from llava_edge.profiles.errors import LlavaEdgeError, OutputError, RequestError
from llava_edge.runtime.chat import Chat, ChatImage
from llava_edge.runtime.generation.output import Answer
from llava_edge.runtime.processing.prepared_video import PreparedVideo
from llava_edge.runtime.util.progress import ProgressLine

HELP = """\
/image PATH   show a picture with the next message (again for more than one)
/video PATH   show a video with the next message, in place of one that waits
/undo         take the last question, what it showed and its answer back
/reset        start anew
/quit         leave; so does Ctrl-D
//text        a message that begins with a slash
Ctrl-C stops an answer; what is stopped is not kept."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    prompt: str
    answer: Answer


class ChatLoop:
    """Reads lines, says answers.

    Args:
        chat: the conversation.
        live: where answers go.
        describe: a line about an answer, for stderr.
        options: of ``Chat.stream``.
        frames: how many frames of videos, and which; arguments of ``Chat.prepare_video``.
        progress: cleared before anything is printed.

    Attributes:
        turns: all that were answered, also those taken back later.
        failure: the first error that was reported.
    """

    def __init__(
        self,
        chat: Chat,
        live: TextIO,
        describe: Callable[[Answer], str],
        options: dict[str, Any],
        progress: ProgressLine,
        frames: dict[str, Any] | None = None,
    ) -> None:
        self.turns: list[Turn] = []
        self.failure: LlavaEdgeError | None = None
        self._chat = chat
        self._live = live
        self._describe = describe
        self._options = options
        self._progress = progress
        self._frames = frames or {}
        self._waiting: list[ChatImage] = []
        self._waiting_video: PreparedVideo | None = None

    def run(self, lines: Iterator[str]) -> None:
        """Answer until the lines end or one says ``/quit``."""
        for line in lines:
            if line.strip() == "/quit":
                return
            if line.strip():
                self.take(line)

    def take(self, line: str) -> None:
        """One line: a command, or a message. Errors of it are reported and end nothing."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._command(*line.strip().partition(" ")[::2])
            else:
                self.say(line.removeprefix("/") if line.startswith("//") else line)
        except OutputError:
            # No further answer could be read either.
            raise
        except LlavaEdgeError as error:
            self._progress.clear()
            self._note(f"error: {error}")
            self.failure = self.failure or error

    def say(self, text: str) -> None:
        """Send a message and print its answer as it comes.

        Raises:
            LlavaEdgeError: it was refused or failed; what was to be shown with it still waits.
        """
        begun = False
        stream = self._chat.stream(
            text, self._waiting, self._waiting_video, progress=self._progress, **self._options
        )
        try:
            with stream:
                for piece in stream:
                    self._progress.clear()
                    print(piece, end="", flush=True, file=self._live)
                    begun = True
        except KeyboardInterrupt:
            self._progress.clear()
            self._note("\n(stopped; neither message nor answer is kept)")
            return
        except BaseException:
            if begun:
                print(file=self._live, flush=True)
            raise
        self._progress.clear()
        print(file=self._live, flush=True)
        self._forget_waiting()
        self.turns.append(Turn(text, stream.answer))
        self._note(self._describe(stream.answer))

    def show(self, path: str) -> None:
        """Have a picture wait for the next message.

        Raises:
            ImageError: it is refused.
        """
        image = self._chat.prepare(path)
        bounded = self._options.get("max_image_tokens") is not None
        # Its grid depends on what else the message shows, so it is cut then.
        self._waiting.append(path if bounded else image)
        tokens = f"{'at most ' if bounded else ''}{image.layout.num_image_tokens} tokens"
        self._note(f"({path}: {tokens}, with the next message)")

    def show_video(self, path: str) -> None:
        """Have a video wait for the next message, in place of one that waits already.

        Raises:
            LlavaEdgeError: it is refused, or PyAV is not installed.
        """
        video = self._waiting_video = self._chat.prepare_video(path, **self._frames)
        frames = len(video.frame_pixels)
        self._note(f"({path}: {frames} frames, {video.num_tokens} tokens, with the next message)")

    def _forget_waiting(self) -> None:
        self._waiting.clear()
        self._waiting_video = None

    def _command(self, name: str, rest: str) -> None:
        rest = rest.strip()
        if name == "/image" and rest:
            self.show(rest)
        elif name == "/video" and rest:
            self.show_video(rest)
        elif name == "/undo" and not rest:
            self._chat.undo()
            self._note(f"({len(self._chat.messages) // 2} turns are left)")
        elif name == "/reset" and not rest:
            self._chat.reset()
            self._forget_waiting()
            self._note("(a new conversation)")
        elif name == "/help":
            self._note(HELP)
        else:
            raise RequestError(
                f"{f'{name} {rest}'.strip()!r:.40} is no command. Commands are:\n{HELP}"
            )

    def _note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def terminal_lines() -> Iterator[str]:
    """Lines of stdin, with a prompt and line editing where people type them."""
    asks = sys.stdin.isatty()
    if asks:
        print("Ask away; /help lists commands.", file=sys.stderr)
    if not (asks and sys.stdout.isatty()):
        # A prompt of input() would go among the answers.
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        # Being imported is all it takes for lines to be edited and recalled.
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        yield line
